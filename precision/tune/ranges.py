"""Method `auto`: for each tensor the amax whose quantization hurts the output least.

The output is that of the whole network, on pictures that the histograms have not seen, with
nothing else quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import CANDIDATES
from trtune.configs.progress import Progress, silent
from trtune.precision.compare.alone import Alone, Change, fake_quantize, in_parallel
from trtune.precision.plan.placement import Edge

log = logging.getLogger(__name__)

APART = 0.9
"""Candidates closer than this to a larger one are not tried."""

STRIDE = 1.2
"""From the best candidate, steps by this factor up or down as long as they help."""

HOPELESS = 1.5
"""What is this many times worse than the best on the first batch is given up."""

WITHIN = 1.1
"""What is this many times worse than the best on the first half is not tried on the others."""

FINALISTS = 2

NEGLIGIBLE = 0.2
"""The part of all the error that is not worth a search. Searching all of it takes MobileNetV2 three
times as long and gives no more decibels on other pictures than those searched on."""

SURPRISE = 1.25
"""If all pictures show this many times the error of the first half, all of them lead the search."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The amax chosen for a range, which method it is (or near to), and its output error.

    `factor` is the amax by that of the method, 1 where they are the same. `error` is the mean over
    the held-out pictures of noise energy by signal energy of the output.
    """

    amax: float
    method: str
    error: float
    factor: float = 1.0


Named = tuple[str, float]
"""A method, and the factor from its amax to another."""


def choose_by_output(
    alone: Alone,
    histograms: Mapping[str, Histogram],
    readers: Mapping[str, Mapping[str, tuple[Edge, ...]]],
    *,
    negligible: float = NEGLIGIBLE,
    progress: Progress = silent,
) -> dict[str, Choice]:
    """For each range the best amax, measured at the output on the pictures that `alone` holds.

    `readers` maps a range (a key of `histograms`) to its tensors and the edges that read each of
    them quantized; all tensors of a range are quantized together with one amax. Tried are the
    methods of `CANDIDATES`, those that differ by 10 % at least, then steps of 20 % from the best
    one as long as they help. The first batch sorts out the hopeless, the first half leads the
    steps, all decide; where all pictures show a clearly larger error than the first half did, all
    of them lead. The least ranges, whose errors together are at most the part `negligible` of all,
    keep the candidate that is best on the first batch: there is nothing to win there.
    """
    with_scale = [n for n in readers if np.float32(histograms[n].maximum) / np.float32(127) > 0]
    choices = {name: Choice(0.0, "max", 0.0) for name in readers}
    trials = {name: _Trials(alone, readers[name]) for name in with_scale}
    candidates = {name: distinct_candidates(histograms[name]) for name in with_scale}

    def first(name: str) -> Choice:
        with trials[name]:
            (amax,) = trials[name].best(candidates[name], 1, count=1, within=1.0)
            return Choice(amax, candidates[name][amax], trials[name].error(amax, 1))

    def second(name: str) -> Choice:
        with trials[name]:
            return _choose(trials[name], candidates[name], histograms[name].maximum)

    def settle(task: Callable[[str], Choice], names: Sequence[str], what: str) -> None:
        found = in_parallel(task, names, what=what, progress=progress)
        choices.update(zip(names, found, strict=True))

    settle(first, with_scale, "try ranges")
    settle(second, _those_that_matter(choices, negligible), "choose ranges")
    return choices


def _those_that_matter(choices: Mapping[str, Choice], negligible: float) -> list[str]:
    """Ranges without the least ones that together make at most `negligible` of all the error."""
    ranked = sorted(choices, key=lambda name: (choices[name].error, name))
    errors = np.array([choices[name].error for name in ranked])
    finite = errors[np.isfinite(errors)]
    matter = ~np.isfinite(errors)
    matter[: finite.size] = np.cumsum(finite) > negligible * finite.sum()
    kept = {name for name, keep in zip(ranked, matter, strict=True) if keep}
    return [name for name in choices if name in kept and choices[name].amax > 0]


def _choose(trials: _Trials, candidates: Mapping[float, str], limit: float) -> Choice:
    half, whole = -(-trials.batches // 2), trials.batches
    names: dict[float, Named] = {amax: (name, 1.0) for amax, name in candidates.items()}
    chosen = _search(trials, names, limit, leading=half)
    if trials.error(chosen, whole) > SURPRISE * trials.error(chosen, half):
        # Some picture of the second half is unlike those of the first: let all lead.
        chosen = _search(trials, names, limit, leading=whole)
    method, factor = names[chosen]
    return Choice(chosen, method, trials.error(chosen, whole), factor)


def _search(trials: _Trials, names: dict[float, Named], limit: float, *, leading: int) -> float:
    """The best of `names` and of what steps from it reach, led by the first `leading` batches.

    Adds the amaxes that it tries to `names`.
    """
    promising = list(names)
    if leading < trials.batches:
        promising = trials.best(promising, 1, count=len(names), within=HOPELESS)
    best = trials.best(promising, leading, count=1, within=1.0)[0]

    def better(amax: float, than: float) -> bool:
        names.setdefault(amax, _near(amax, names))
        return trials.error(amax, leading) < trials.error(than, leading)

    best = _climb(best, STRIDE, limit, better)
    tried = [amax for amax in names if trials.seen(amax) >= leading]
    finalists = trials.best(tried, leading, count=FINALISTS, within=WITHIN)
    return trials.best(finalists, trials.batches, count=1, within=1.0)[0]


class _Trials:
    """The output error of each amax tried, on as many batches as were asked for so far.

    More can be asked for inside `with`.
    """

    def __init__(self, alone: Alone, tensors: Mapping[str, tuple[Edge, ...]]) -> None:
        edges = tuple(edge for readers in tensors.values() for edge in readers)
        self._alone, self._tensors = alone, tuple(tensors)
        self._change = Change(edges)
        self._found: dict[float, list[NDArray[np.float64]]] = {}
        self.batches = alone.batches

    def __enter__(self) -> None:
        self._run = self._alone.session(self._change)

    def __exit__(self, *reason: object) -> None:
        del self._run  # a session holds the weights of what comes after the tensors

    def seen(self, amax: float) -> int:
        """Batches that `amax` was tried on."""
        return len(self._found.get(amax, ()))

    def error(self, amax: float, batches: int) -> float:
        """Mean over the pictures of the first `batches` of the relative noise energy."""
        found = self._found.setdefault(amax, [])
        scale = float(np.float32(amax) / np.float32(127))
        for batch in range(len(found), batches):
            changed = {t: fake_quantize(self._alone.stored(batch, t), scale) for t in self._tensors}
            found.append(relative_noise(self._alone.reference(batch), self._run(batch, changed)))
        return float(np.concatenate(found[:batches]).mean())

    def best(
        self, amaxes: Iterable[float], batches: int, *, count: int, within: float
    ) -> list[float]:
        """The best `count` of `amaxes` on some batches, none `within` times worse than the best."""
        ranked = sorted(amaxes, key=lambda amax: (self.error(amax, batches), amax))
        limit = within * self.error(ranked[0], batches)
        return [amax for amax in ranked[:count] if self.error(amax, batches) <= limit]


def _climb(
    start: float, stride: float, limit: float, better: Callable[[float, float], bool]
) -> float:
    """Walk up, or else down, by a factor as long as it gets better; at most up to `limit`."""
    for factor in (stride, 1 / stride):
        best = start
        while (onward := min(best * factor, limit)) != best and better(onward, best):
            best = onward
        if best != start:
            return best
    return start


def _near(amax: float, names: Mapping[float, Named]) -> Named:
    """How to call an amax that no method gave: the nearest method and the factor."""
    named = {known: name for known, (name, factor) in names.items() if factor == 1}
    known = min(named, key=lambda other: abs(np.log(amax / other)))
    return named[known], amax / known


def distinct_candidates(histogram: Histogram) -> dict[float, str]:
    """amax -> method for the candidates that differ, largest first."""
    found: dict[float, str] = {}
    candidates = {name: method(histogram) for name, method in CANDIDATES.items()}
    for name, amax in sorted(candidates.items(), key=lambda entry: (-entry[1], entry[0])):
        if amax > 0 and all(amax < APART * other for other in found):
            found[amax] = name
    return found


def relative_noise(
    reference: Sequence[NDArray[np.floating]], outputs: Sequence[NDArray[np.floating]]
) -> NDArray[np.float64]:
    """Noise by signal energy of each picture, over all outputs; shape (pictures,).

    A picture whose outputs are all zero counts with its noise energy itself. Outputs that are not
    finite in FP32 either (a mask of -inf) are left out; one that was finite makes it infinite.
    """
    noise: NDArray[np.float64] = np.zeros(1)
    signal: NDArray[np.float64] = np.zeros(1)
    pictures = len(reference[0]) if reference[0].ndim else 1
    for exact, test in zip(reference, outputs, strict=True):
        rows = pictures if exact.ndim and len(exact) == pictures else 1
        finite = np.isfinite(exact)
        r = np.where(finite, exact, 0).astype(np.float64).reshape(rows, -1)
        t = np.where(finite, test, 0).astype(np.float64).reshape(rows, -1)
        t[~np.isfinite(t)] = np.inf
        noise = noise + ((r - t) ** 2).sum(axis=1)
        signal = signal + (r**2).sum(axis=1)
    return noise / np.where(signal == 0, 1.0, signal)
