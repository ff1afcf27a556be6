"""What the error of an output is worth: each by its own energy, the worst decides.

Channels of one output that differ by orders of magnitude (boxes beside scores) are judged apart.

What un-quantizing one node gains is a difference between two networks whose roundings behind that
node are drawn anew, and a few pictures hold most of the noise. On ResNet-20 the gains of early
nodes have standard errors as large as themselves over 128 pictures, and say nothing of the next
128; those of late nodes are certain. So each gain is drawn towards what the node does alone, as far
as its own error and the spread of all gains say (the empirical Bayes estimate of Efron and Morris,
1975, with the between-node variance of DerSimonian and Laird, 1986).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.precision.compare.alone import Alone
from trtune.precision.graph.file import Model
from trtune.precision.runtime.output_groups import output_groups

Array = NDArray[Any]

FEWEST = 8
"""Of fewer pictures the standard error is not known well enough to doubt a gain by it."""


class Judge:
    """Errors of a model's outputs on a few batches whose exact outputs it is given.

    `references` are, for each batch, the outputs in the model's order, and `pictures` how many
    pictures each batch holds (None: as many as the longest output has rows). Only the outputs with
    the numbers `counted` count, if there are any; integer outputs only if there are no others.
    With `alike` all pictures have the same signal, the mean: then the mean of the errors is noise
    by signal energy as reports have it.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Array]],
        pictures: Sequence[int] | None = None,
        counted: Sequence[int] = (),
        *,
        alike: bool = False,
    ) -> None:
        self._references = references
        self._alike = alike
        self._pictures = pictures or [_longest(batch) for batch in references]
        numbers = list(counted) or list(range(len(references[0])))
        floats = [i for i in numbers if np.issubdtype(references[0][i].dtype, np.floating)]
        self._outputs = floats or numbers
        self._axes = {i: self._axis(i) for i in self._outputs}
        rows = {str(i): [self._rows(batch[i], i) for batch in references] for i in self._outputs}
        self.groups = output_groups(rows)
        self._energies = [
            sum(_energy(group.of(array)) for array in rows[group.output]) / sum(self._pictures)
            for group in self.groups
        ]

    def _axis(self, output: int) -> int | None:
        """The axis of an output along which the pictures lie in every batch, the first of several.

        >>> Judge([[np.zeros((7, 2, 5), np.float32)]], [2])._axes
        {0: 1}
        """
        arrays = [batch[output] for batch in self._references]
        for axis in range(min(array.ndim for array in arrays)):
            if all(a.shape[axis] == n for a, n in zip(arrays, self._pictures, strict=True)):
                return axis
        return None

    def _rows(self, values: Array, output: int) -> Array:
        """An output with its pictures first; one row for all where they cannot be told apart."""
        axis = self._axes[output]
        return values[np.newaxis] if axis is None else np.moveaxis(values, axis, 0)

    def errors(self, batch: int, outputs: Sequence[Array]) -> NDArray[np.float64]:
        """Noise by signal energy, shape (groups, pictures).

        The signal is the picture's own or the mean over all pictures, whichever is larger, so that
        a picture without objects does not decide alone; noise without any signal counts itself.
        Elements that are not finite in FP32 either are left out; one that was finite makes the
        error infinite. An output of another shape than in FP32 follows the data, and is left out.
        """
        exact, pictures = self._references[batch], self._pictures[batch]
        found = []
        for group, energy in zip(self.groups, self._energies, strict=True):
            number = int(group.output)
            if exact[number].shape != outputs[number].shape:
                found.append(np.zeros(pictures))
                continue
            expected, got = (
                group.of(self._rows(values[number], number)) for values in (exact, outputs)
            )
            rows = _relative_noise(expected, got, energy, alike=self._alike)
            found.append(np.broadcast_to(rows, (pictures,)))
        return np.stack(found) if found else np.zeros((1, pictures))


def judge_of(alone: Alone) -> Judge:
    """A judge on the pictures that `alone` holds."""
    batches = range(alone.batches)
    return Judge(
        [alone.reference(i) for i in batches],
        [alone.pictures(i) for i in batches],
        counted_outputs(alone.model),
    )


def counted_outputs(model: Model) -> list[int]:
    """The numbers of the outputs that are judged, or none if all are."""
    names = [spec.name for spec in model.outputs]
    return [names.index(name) for name in model.judged] if model.counted else []


def _longest(batch: Sequence[Array]) -> int:
    return max((len(array) for array in batch if array.ndim), default=1)


def worst(errors: Sequence[NDArray[np.float64]]) -> float:
    """The largest over the groups of the mean over pictures; `errors` as `Judge` gives them."""
    with np.errstate(invalid="ignore"):
        return float(np.concatenate(errors, axis=1).mean(axis=1).max())


def gain(
    before: Sequence[NDArray[np.float64]], after: Sequence[NDArray[np.float64]]
) -> tuple[float, float]:
    """How much smaller the worst group's error became, and the standard error of that.

    Both as parts of the error before, paired over the pictures; the group is the one that is worst
    before. Infinite errors count as a gain of 1, or of minus infinity.
    """
    old, new = np.concatenate(before, axis=1), np.concatenate(after, axis=1)
    group = int(np.argmax(old.mean(axis=1)))
    if not np.isfinite(old[group]).all() or not np.isfinite(new).all():
        return (1.0, 0.0) if np.isfinite(new).all() else (-np.inf, 0.0)
    size = old[group].mean()
    if size <= 0:
        return (-np.inf if new.mean() > 0 else 0.0), 0.0
    difference = (old[group] - new[group]) / size
    whole = 1 - float(new.mean(axis=1).max() / size)
    noise = float(difference.std(ddof=1) / np.sqrt(difference.size)) if difference.size > 1 else 0.0
    return whole, noise


def typical_gain(
    before: Sequence[NDArray[np.float64]], after: Sequence[NDArray[np.float64]]
) -> float:
    """The typical picture's gain of the group that is worst before, in its standard errors.

    Where a few pictures hold most of the error, the mean's own says little, and this much.
    """
    old, new = np.concatenate(before, axis=1), np.concatenate(after, axis=1)
    group = int(np.argmax(old.mean(axis=1)))
    one = improvement([old[group : group + 1]], [new[group : group + 1]])
    return one.typical / one.typical_noise if one.typical_noise > 0 else 0.0


LEAST_ERROR = 1e-12
"""A group whose error is less than this is as good as exact."""

BEYOND_CHANCE = 3.0
"""A gain of so many standard errors, of the mean and of the typical picture, does not happen by
chance, though a few candidates are compared a few times."""

WORTH = 0.15
"""Decibels that a certain gain has at least."""

HURT = 0.1
"""A group may lose this many decibels, or what its noise allows."""


def level(errors: Sequence[NDArray[np.float64]]) -> float:
    """10 log10 of the mean error of a group, averaged over the groups: smaller is better."""
    means = np.concatenate(errors, axis=1).mean(axis=1)
    with np.errstate(invalid="ignore"):
        return float(np.mean(10 * np.log10(np.maximum(means, LEAST_ERROR))))


@dataclass(frozen=True, slots=True)
class Improvement:
    """Decibels gained, averaged over the groups, with their standard error, paired over pictures.

    `typical` and `typical_noise` are the same of the typical picture: the mean of the logarithms
    instead of the logarithm of the mean; `likely_noise` is the standard error of `likely`. `groups`
    and `group_noises` are those of each group.
    """

    decibels: float
    noise: float
    typical: float
    typical_noise: float
    likely_noise: float
    groups: NDArray[np.float64]
    group_noises: NDArray[np.float64]

    @property
    def is_shown(self) -> bool:
        """Whether the gain is beyond its noise, of the mean or of the typical picture, and no group
        is hurt."""
        if not self.decibels > 0 or self.hurts:
            return False
        return self.decibels > self.noise or self.typical > self.typical_noise

    @property
    def hurts(self) -> bool:
        """Whether a group loses more than `HURT` beyond its noise."""
        return bool(np.any(self.groups < -np.maximum(HURT, self.group_noises)))

    @property
    def is_certain(self) -> bool:
        """Whether more pictures would say the same: both gains are many times their noise."""
        if not math.isfinite(self.decibels):
            return self.decibels > 0
        mean = self.decibels > max(BEYOND_CHANCE * self.noise, WORTH)
        return mean and self.typical > BEYOND_CHANCE * self.typical_noise and not self.hurts

    @property
    def likely(self) -> float:
        """Half of the mean's gain and half of the typical picture's: a few pictures decide the one,
        and pictures that matter little the other."""
        return (self.decibels + self.typical) / 2

    def towards(self, expected: float, spread: float) -> float:
        """The likely gain drawn towards what is `expected`, which holds up to a standard deviation
        of `spread` decibels.

        >>> flat = np.zeros(1)
        >>> Improvement(1.0, 0.5, 2.0, 0.5, 1.0, flat, flat).towards(0.5, 1.0)
        1.0
        """
        if self.likely_noise <= 0 or not np.isfinite(self.likely):
            return self.likely
        weight = 1 / (1 + (self.likely_noise / spread) ** 2)
        return expected + weight * (self.likely - expected)


def improvement(
    before: Sequence[NDArray[np.float64]], after: Sequence[NDArray[np.float64]]
) -> Improvement:
    """What `after` has gained over `before`; errors as `Judge` gives them, of the same pictures.

    Averaging over the groups keeps one noisy group from hiding what all the others say. Errors that
    are not finite count as a gain or loss without bounds.
    """
    old, new = (np.concatenate(errors, axis=1) for errors in (before, after))
    if not np.isfinite(old).all() or not np.isfinite(new).all():
        sign = np.isfinite(new).all() and not np.isfinite(old).all()
        way = np.full(len(old), np.inf if sign else -np.inf)
        return Improvement(float(way[0]), 0.0, float(way[0]), 0.0, 0.0, way, np.zeros(len(old)))
    old, new = np.maximum(old, LEAST_ERROR), np.maximum(new, LEAST_ERROR)
    parts = (old - new) / old.mean(axis=1, keepdims=True)
    ratios = np.log(old / new)
    groups = np.log(old.mean(axis=1) / new.mean(axis=1))
    to_db = 10 / math.log(10)
    return Improvement(
        decibels=to_db * float(groups.mean()),
        noise=to_db * _standard_error(parts.mean(axis=0)),
        typical=to_db * float(ratios.mean()),
        typical_noise=to_db * _standard_error(ratios.mean(axis=0)),
        likely_noise=to_db * _standard_error((parts + ratios).mean(axis=0) / 2),
        groups=to_db * groups,
        group_noises=to_db * np.array([_standard_error(row) for row in parts]),
    )


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0


def _finite(values: Array) -> Array:
    found: Array = np.where(np.isfinite(values), values, 0)
    return found


def _energy(values: Array) -> float:
    return float((_finite(values).astype(np.float64) ** 2).sum())


def _relative_noise(
    exact: Array, test: Array, energy: float, *, alike: bool = False
) -> NDArray[np.float64]:
    """Noise by signal energy of each row, the signal at least `energy`; just that if `alike`."""
    finite = np.isfinite(exact)
    r = _finite(exact).astype(np.float64).reshape(len(exact), -1)
    t = np.where(finite, test, 0).astype(np.float64).reshape(len(exact), -1)
    t[~np.isfinite(t)] = np.inf
    noise = ((r - t) ** 2).sum(axis=1)
    own = (r**2).sum(axis=1)
    signal = np.full(len(own), energy) if alike and energy > 0 else np.maximum(own, energy)
    found: NDArray[np.float64] = noise / np.where(signal > 0, signal, 1.0)
    return found


@dataclass(frozen=True, slots=True)
class Gain:
    """What a pin takes off, as a part of the noise, and the standard error over pictures."""

    part: float
    error: float = 0.0


def paired_gain(before: NDArray[np.float64], after: NDArray[np.float64]) -> Gain:
    """The gain between two rows of noise energies, a picture each; of a few without an error.

    >>> paired_gain(np.array([1.0, 3.0]), np.array([0.5, 2.5]))
    Gain(part=0.25, error=0.0)
    """
    size = float(before.mean()) if len(before) else 0.0
    if size <= 0 or not np.isfinite(before).all() or not np.isfinite(after).all():
        return Gain(0.0 if np.isfinite(after).all() else -np.inf)
    parts = (before - after) / size
    error = float(parts.std(ddof=1) / np.sqrt(len(parts))) if len(parts) >= FEWEST else 0.0
    return Gain(float(parts.mean()), error)


def towards(gain: Gain, expected: float, spread: float) -> float:
    """A gain drawn towards what is `expected`, which holds up to a standard deviation `spread`.

    >>> towards(Gain(0.4, 0.1), 0.0, 0.1), towards(Gain(0.4), 0.0, 0.1)
    (0.2, 0.4)
    """
    if gain.error <= 0 or not np.isfinite(gain.part):
        return gain.part
    weight = 1 / (1 + (gain.error / spread) ** 2) if spread > 1e-12 else 0.0
    return expected + weight * (gain.part - expected)


def expectations(
    gains: Mapping[str, Gain], alone: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """What each node is expected to gain before its own gain is looked at, and how far that holds.

    `alone` is the noise of nodes that are quantized alone, as a part of all noise; it is scaled so
    that it fits the gains best, by at most 1. Without it all are expected to gain the same. The
    standard deviation is that of true gains around it: what their own errors do not explain.

    >>> expectations({"a": Gain(0.25, 0.5), "b": Gain(0.25, 0.5)}, {})
    ({'a': 0.25, 'b': 0.25}, 0.0)
    """
    sure = {n: g for n, g in gains.items() if g.error > 0 and np.isfinite(g.part)}
    if len(sure) < 2:
        return {n: g.part for n, g in gains.items()}, 0.0
    parts = np.array([gain.part for gain in sure.values()])
    weights = np.array([max(gain.error, 1e-9) ** -2 for gain in sure.values()])
    hurts = np.array([alone.get(node, 0.0) for node in sure])
    energy = float(weights @ hurts**2)
    if energy > 0:
        scale = min(max(float(weights @ (hurts * parts)) / energy, 0.0), 1.0)
        expected = {node: scale * alone.get(node, 0.0) for node in gains}
    else:
        expected = dict.fromkeys(gains, float(weights @ parts / weights.sum()))
    apart = parts - np.array([expected[node] for node in sure])
    excess = float(weights @ apart**2) - (len(sure) - 1)
    total = float(weights.sum() - (weights**2).sum() / weights.sum())
    return expected, float(np.sqrt(max(excess / total, 0.0))) if total > 0 else 0.0
