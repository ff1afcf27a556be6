"""What the error of an output is worth: each by its own energy, the worst decides.

In one output whose columns differ by orders of magnitude (boxes beside scores) the columns of one
magnitude are judged apart from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

APART = 100.0
"""Columns whose mean energies differ by this factor, with none between them, are judged apart."""

COLUMNS = 4096
"""No more columns than this can be groups; a longer last axis is a space, not a list of columns."""

TIES = 1e-12


@dataclass(frozen=True, slots=True)
class Group:
    """Columns of the last axis of an output that are judged together; all of it if None."""

    output: int
    columns: tuple[int, ...] | None
    energy: float


class Judge:
    """Errors of a model's outputs on a few batches whose exact outputs it is given.

    `references` are, for each batch, the outputs in the model's order. Integer outputs count only
    if there are no others; an output that is not finite anywhere counts nowhere.
    """

    def __init__(self, references: Sequence[Sequence[Array]]) -> None:
        self._references = references
        self.groups = _groups(references)

    def errors(self, batch: int, outputs: Sequence[Array]) -> NDArray[np.float64]:
        """Noise by signal energy, shape (groups, pictures).

        The signal is the picture's own or the mean over all pictures, whichever is larger, so that
        a picture without objects does not decide alone; noise without any signal counts itself.
        Elements that are not finite in FP32 either are left out; one that was finite makes the
        error infinite. An output of another shape than in FP32 follows the data, and is left out.
        """
        exact = self._references[batch]
        pictures = max((len(e) for e in exact if e.ndim), default=1)
        rows = [_errors(exact[g.output], outputs[g.output], g, pictures) for g in self.groups]
        return np.stack(rows) if rows else np.zeros((1, pictures))


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


def _groups(references: Sequence[Sequence[Array]]) -> tuple[Group, ...]:
    numbers = range(len(references[0]))
    floats = [i for i in numbers if np.issubdtype(references[0][i].dtype, np.floating)]
    found: list[Group] = []
    for i in floats or numbers:
        arrays = [_finite(batch[i]) for batch in references]
        columns = _column_groups(arrays)
        for part in columns:
            energy = _energy(arrays, part)
            found.append(Group(i, part, energy))
    return tuple(found)


def _column_groups(arrays: Sequence[Array]) -> list[tuple[int, ...] | None]:
    """The columns of the last axis by magnitude, if one axis at least lies before it."""
    first = arrays[0]
    wide = first.ndim >= 3 and 2 <= first.shape[-1] <= COLUMNS
    if (
        not wide
        or first.shape[-2] < first.shape[-1]
        or any(a.shape[1:] != first.shape[1:] for a in arrays)
    ):
        return [None]
    energy = sum(
        (a.astype(np.float64) ** 2).reshape(-1, first.shape[-1]).mean(axis=0) for a in arrays
    )
    order = np.argsort(-np.asarray(energy), kind="stable")
    ranked = np.asarray(energy)[order]
    if ranked[0] <= 0 or ranked[0] < APART * max(ranked[-1], TIES * ranked[0]):
        return [None]
    ratios = ranked[:-1] / np.maximum(ranked[1:], TIES * ranked[0])
    cut = int(np.argmax(ratios)) + 1
    if ratios[cut - 1] < APART:
        return [None]
    return [tuple(sorted(order[:cut].tolist())), tuple(sorted(order[cut:].tolist()))]


def _finite(values: Array) -> Array:
    found: Array = np.where(np.isfinite(values), values, 0)
    return found


def _energy(arrays: Sequence[Array], columns: tuple[int, ...] | None) -> float:
    """The sum of squares of a picture, on average."""
    total, pictures = 0.0, 0
    for values in arrays:
        part = values if columns is None else values[..., columns]
        total += float((part.astype(np.float64) ** 2).sum())
        pictures += len(part) if part.ndim else 1
    return total / max(pictures, 1)


def _errors(exact: Array, test: Array, group: Group, pictures: int) -> NDArray[np.float64]:
    if exact.shape != test.shape:
        return np.zeros(pictures)
    if group.columns is not None:
        exact, test = exact[..., group.columns], test[..., group.columns]
    rows = pictures if exact.ndim and len(exact) == pictures else 1
    finite = np.isfinite(exact)
    r = np.where(finite, exact, 0).astype(np.float64).reshape(rows, -1)
    t = np.where(finite, test, 0).astype(np.float64).reshape(rows, -1)
    t[~np.isfinite(t)] = np.inf
    noise = ((r - t) ** 2).sum(axis=1)
    signal = np.maximum((r**2).sum(axis=1), group.energy)
    return np.broadcast_to(noise / np.where(signal > 0, signal, 1.0), (pictures,))
