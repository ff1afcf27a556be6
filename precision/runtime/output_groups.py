"""Which parts of a model's outputs are judged apart, because their magnitudes differ.

A detector often gives boxes in pixels beside scores from 0 to 1 in one tensor. One sum over both
says only what became of the boxes: every score can be lost at an SQNR that looks good. So the
channels of an output are split where their magnitude changes by an order, and each part is
measured by its own energy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.precision.runtime.errors import ErrorSums

LARGEST_AXIS = 1024
"""Longer axes are positions (anchors, pixels, a vocabulary), not kinds of values."""

DECADE = 1.0
"""Neighbouring parts differ by at least a factor of ten in root mean square (20 dB)."""

SPREADS = 3.5
"""... and by this many standard deviations of the channels within them."""

FEW = 16
"""With more channels than this a part has at least two: one rare class is no kind of its own."""


@dataclass(frozen=True, slots=True)
class OutputGroup:
    """Channels `start` to `stop` of `output` along `axis`; all of it if `axis` is None.

    >>> OutputGroup("out", 1, 0, 4).label, OutputGroup("out", 2, 4, 85).label
    ('out[:, 0:4]', 'out[:, :, 4:85]')
    """

    output: str
    axis: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def label(self) -> str:
        """The output's name, and as NumPy writes it which part."""
        if self.axis is None:
            return self.output
        return f"{self.output}[{':, ' * self.axis}{self.start}:{self.stop}]"

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """The part of the output's `array`, a view."""
        if self.axis is None:
            return array
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


def output_groups(
    outputs: Mapping[str, Sequence[NDArray[Any]]], *, batch_axes: Mapping[str, int] | None = None
) -> tuple[OutputGroup, ...]:
    """The groups of a model's outputs, given FP32 answers to some batches, in order.

    `outputs` has for each output its arrays, batch by batch. `batch_axes` says which axis holds
    the samples (0 where it does not). Outputs that are no floats, or whose number of channels
    follows the data, are one group each.

    >>> out = np.float32([[300, 400, 0.1, 0.2], [500, 300, 0.3, 0.1]])
    >>> [g.label for g in output_groups({"boxes": [out * 9], "joined": [out]})]
    ['boxes[:, 0:2]', 'boxes[:, 2:4]', 'joined[:, 0:2]', 'joined[:, 2:4]']
    """
    return tuple(
        group
        for name, arrays in outputs.items()
        for group in _groups_of(name, arrays, (batch_axes or {}).get(name, 0))
    )


def parts(
    groups: Iterable[OutputGroup], outputs: Mapping[str, Any]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Label and values of each group that `outputs` holds."""
    for group in groups:
        if group.output in outputs:
            yield group.label, group.of(outputs[group.output])


def add_parts(
    sums: Mapping[str, ErrorSums],
    groups: Iterable[OutputGroup],
    reference: Mapping[str, Any],
    test: Mapping[str, Any],
) -> dict[str, ErrorSums]:
    """`sums` by label with the outputs of another batch added.

    Only outputs of floats are compared, and only where both have one shape: what follows the data
    (a number of detections) has no counterpart where it differs.
    """
    found = dict(sums)
    for (label, expected), (_, got) in zip(
        parts(groups, reference), parts(groups, test), strict=True
    ):
        floats = np.issubdtype(expected.dtype, np.floating)
        if floats and expected.shape == got.shape:
            found[label] = found.get(label, ErrorSums()).add(expected, got)
    return found


def worst_output(sums: Mapping[str, ErrorSums]) -> ErrorSums:
    """The sums with the lowest SQNR, of equals the first; those of nothing if there are none."""
    return min(sums.values(), key=lambda each: each.sqnr_db, default=ErrorSums())


def _groups_of(
    name: str, arrays: Sequence[NDArray[Any]], batch_axis: int
) -> tuple[OutputGroup, ...]:
    whole = (OutputGroup(name),)
    if not arrays or not all(np.issubdtype(a.dtype, np.floating) for a in arrays):
        return whole
    best: tuple[float, tuple[OutputGroup, ...]] = (0.0, whole)
    for axis in range(arrays[0].ndim):
        sizes = {a.shape[axis] if a.ndim == arrays[0].ndim else -1 for a in arrays}
        size = next(iter(sizes))
        if axis == batch_axis or len(sizes) > 1 or not 2 <= size <= LARGEST_AXIS:
            continue
        levels = channel_levels(arrays, axis)
        cuts = [0, *split_points(levels), size]
        if len(cuts) > 2:
            explained = _explained(levels, cuts)
            ranges = pairwise(cuts)
            groups = tuple(OutputGroup(name, axis, start, stop) for start, stop in ranges)
            best = max(best, (explained, groups), key=lambda found: found[0])
    return best[1]


def channel_levels(arrays: Sequence[NDArray[Any]], axis: int) -> NDArray[np.float64]:
    """log10 of the root mean square of each channel along `axis`, over all finite values.

    A channel that was always zero has the level of its neighbour before it (the first: behind it).
    """
    energy, count = 0.0, 0.0
    for array in arrays:
        others = tuple(i for i in range(array.ndim) if i != axis)
        values = array.astype(np.float64)
        finite = np.isfinite(values)
        energy = energy + np.square(np.where(finite, values, 0.0)).sum(axis=others)
        count = count + finite.sum(axis=others)
    mean = np.asarray(energy) / np.maximum(count, 1)
    known = np.flatnonzero(mean > 0)
    if not known.size:
        return np.zeros(mean.shape)
    nearest = np.maximum(np.searchsorted(known, np.arange(mean.size), side="right") - 1, 0)
    levels: NDArray[np.float64] = np.log10(mean[known[nearest]]) / 2
    return levels


def split_points(levels: NDArray[np.float64]) -> list[int]:
    """Where contiguous channels of one magnitude end and those of another begin, ascending.

    Halved at the place that leaves the least squared deviation, again and again, as long as both
    sides differ by `DECADE` and by `SPREADS` standard deviations of what is within them.
    """
    return _split(levels, 1 if len(levels) <= FEW else 2)


def _split(levels: NDArray[np.float64], least: int) -> list[int]:
    size = len(levels)
    if size < 2 * least:
        return []
    sums, squares = np.cumsum(levels), np.cumsum(levels**2)
    at = np.arange(least, size - least + 1)
    left, right = sums[at - 1] / at, (sums[-1] - sums[at - 1]) / (size - at)
    within = squares[-1] - at * left**2 - (size - at) * right**2
    best = int(np.argmin(within))
    spread = math.sqrt(max(float(within[best]), 0.0) / size)
    step = abs(float(left[best] - right[best]))
    if step < max(DECADE, SPREADS * spread):
        return []
    cut = int(at[best])
    return [
        *_split(levels[:cut], least),
        cut,
        *(cut + point for point in _split(levels[cut:], least)),
    ]


def _explained(levels: NDArray[np.float64], cuts: Sequence[int]) -> float:
    """The share of the levels' variance that lies between the parts."""
    total = float(((levels - levels.mean()) ** 2).sum())
    within = sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(levels, cuts[1:-1]))
    return 1.0 - within / total if total else 0.0
