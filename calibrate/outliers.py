"""Which picture sets a tensor's range, and which pictures do so for many tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trtune.calibrate.histogram import Histogram


@dataclass(frozen=True, slots=True)
class Outlier:
    """The picture that sets the maximum of a tensor, and how far above the others it is.

    `max` is the largest |x| of the tensor, in picture `item`; `runner_up` the largest without
    that picture; `median_max` the median over pictures of each one's largest |x|. `ratio` is
    `max / median_max`: at least 1, and infinity if most pictures leave the tensor at zero.
    """

    tensor: str
    item: str
    max: float
    median_max: float
    ratio: float
    runner_up: float


@dataclass(frozen=True, slots=True)
class DominantPicture:
    """A picture that sets the range of several tensors far above the median.

    `tensors` counts them; `worst_tensor` is the one with the largest ratio, `worst_ratio`.
    """

    item: str
    tensors: int
    worst_ratio: float
    worst_tensor: str


def outliers(histograms: Mapping[str, Histogram]) -> list[Outlier]:
    """One `Outlier` for each tensor that was ever anything but zero, worst ratio first.

    Ties go by the tensor's name.
    """
    found = [_outlier(tensor, histogram) for tensor, histogram in histograms.items()]
    return sorted((o for o in found if o.max > 0), key=lambda o: (-o.ratio, o.tensor))


def dominant(
    found: Iterable[Outlier], *, ratio: float = 10.0, tensors: int = 2
) -> list[DominantPicture]:
    """The pictures that set the maximum of at least `tensors` tensors `ratio` times the median.

    Most tensors first, then by the worst ratio and the picture's name. The worst tensor is the
    first by name of those with the same ratio.

    >>> rows = [Outlier(t, "cat.png", 50.0, 1.0, 50.0, 1.5) for t in ("conv1", "conv2")]
    >>> dominant(rows)
    [DominantPicture(item='cat.png', tensors=2, worst_ratio=50.0, worst_tensor='conv1')]
    """
    by_picture: dict[str, list[Outlier]] = {}
    for outlier in found:
        if outlier.ratio >= ratio:
            by_picture.setdefault(outlier.item, []).append(outlier)
    rows = []
    for item, set_by in by_picture.items():
        worst = min(set_by, key=lambda o: (-o.ratio, o.tensor))
        if len(set_by) >= tensors:
            rows.append(DominantPicture(item, len(set_by), worst.ratio, worst.tensor))
    return sorted(rows, key=lambda p: (-p.tensors, -p.worst_ratio, p.item))


def _outlier(tensor: str, histogram: Histogram) -> Outlier:
    pictures = histogram.pictures
    # The median is a bin's middle, which can lie just above the exact maximum.
    median = min(pictures.median, histogram.maximum)
    ratio = histogram.maximum / median if median else math.inf
    return Outlier(tensor, pictures.item, histogram.maximum, median, ratio, pictures.runner_up)
