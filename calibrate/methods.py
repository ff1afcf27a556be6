"""From a histogram of |x| to amax: the methods, by name.

All take a `Histogram` and give an amax in (0, histogram.maximum], or 0.0 for a tensor that was
never anything but zero. None depends on the order of the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.histogram import Histogram, bin_edges, quantile

LEVELS = 127
ENTROPY_BINS = 1024
LARGEST_RATIO = 64
"""Entropy looks no further than this many times the median of the per-picture maxima."""

MSE_CANDIDATES = 96


def amax_max(histogram: Histogram) -> float:
    """The largest magnitude seen, exactly."""
    return histogram.maximum


def amax_percentile(histogram: Histogram, *, percentile: float = 99.99) -> float:
    """The magnitude that `percentile` percent of all values, zeros included, do not exceed.

    Within a bin, 0.8 % at most. Raises ValueError for a percentile outside (0, 100].
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it must be above 0 and at most 100")
    if not histogram.total:
        return 0.0
    return min(quantile(histogram.counts, percentile / 100), histogram.maximum)


def amax_mse(histogram: Histogram) -> float:
    """The amax with the least mean squared error of x against its int8 value.

    Candidates lie from the maximum down to 1/64 of it, 6.6 % apart, then 0.4 % apart around the
    best. The expectation treats a bin as its middle while it is narrower than a quantization step,
    and its rounding error as uniform (step^2 / 12) otherwise.
    """
    if histogram.maximum == 0:
        return 0.0
    centers, counts = _centers(histogram)
    coarse = histogram.maximum * np.geomspace(1 / 64, 1, MSE_CANDIDATES)
    best = int(np.argmin(_mse(centers, counts, coarse)))
    fine = np.geomspace(coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)], 33)
    return float(fine[int(np.argmin(_mse(centers, counts, fine)))])


def _centers(histogram: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles and counts of the filled bins above zero."""
    filled = np.flatnonzero(histogram.counts[1:]) + 1
    edges = bin_edges()
    middles = (edges[filled] + np.minimum(edges[filled + 1], histogram.maximum)) / 2
    return middles, histogram.counts[filled].astype(np.float64)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mse(centers: Any, counts: Any, amaxes: Any) -> Any:
    """Sum over bins of count * E[(x - Q(x))^2] for each amax."""
    errors = np.zeros(amaxes.size)
    for k in range(amaxes.size):
        amax = amaxes[k]
        step = amax / 127.0
        uniform = step * step / 12.0
        total = 0.0
        for i in range(centers.size):
            x = centers[i]
            if x > amax:
                total += counts[i] * (x - amax) ** 2
            elif x > 64.0 * step:
                total += counts[i] * uniform
            else:
                total += counts[i] * (x - np.rint(x / step) * step) ** 2
        errors[k] = total
    return errors


def amax_entropy(histogram: Histogram) -> float:
    """NVIDIA's published entropy calibration, made independent of order and of single outliers.

    The published algorithm (MLPerf calibration document) takes 1024 equal bins over the range of
    the *first batch* and adds bins of that width when later data exceeds it. Here the width is
    the median of the per-picture maxima divided by 1024: the range that the first batch would
    have if it were typical. It depends neither on which pictures come first nor on how many go in
    a batch, and one outlier picture, which would stretch the bins of any method that starts from
    the maximum, only adds empty bins far above. The rest is as published: the first bin is
    discarded; for each bin B the reference is what lies up to B with everything above folded into
    B, the coarse distribution has 127 bins from 0 to the middle of B, and the threshold is the
    middle of the bin with the least KL(reference || coarse), empty reference bins left out.

    The counts of a bin by exponent and mantissa are spread evenly over the linear bins it covers.
    Thresholds are tried 64 bins apart, then each around the best few, up to 64 times the median
    maximum. Equality with TensorRT's closed implementation is not promised.
    """
    width = histogram.pictures.median / ENTROPY_BINS
    if width == 0:  # zero in most pictures: what the others hold is all there is to go by
        width = histogram.maximum / ENTROPY_BINS
    if width == 0:
        return 0.0
    bins = min(math.ceil(histogram.maximum / width), ENTROPY_BINS * LARGEST_RATIO)
    counts = linear_counts(histogram, width, max(bins, LEVELS + 1))
    counts[0] = 0
    best = _search_entropy(counts, first=LEVELS, empty_apart=False)
    return min((best + 0.5) * width, histogram.maximum)


def amax_entropy_s7310(histogram: Histogram) -> float:
    """The variant NVIDIA showed at GTC 2017 (session S7310): 2048 bins over [0, max].

    Thresholds from bin 128 to 2047, coarse distributions of 128 levels, empty reference bins stay
    empty. One outlier makes its bins too coarse for everything else; kept for comparison, and for
    networks whose activations have no tails.
    """
    if histogram.maximum == 0:
        return 0.0
    counts = linear_counts(histogram, histogram.maximum / 2048, 2048)
    best = _search_entropy(counts, first=128, empty_apart=True)
    return min((best + 0.5) * histogram.maximum / 2048, histogram.maximum)


def linear_counts(histogram: Histogram, width: float, bins: int) -> NDArray[np.float64]:
    """`bins` equal bins of `width` from 0, float64; what lies above is added to the last.

    A bin of the histogram is spread evenly over the linear bins that it covers.
    """
    edges = bin_edges()
    last = int(np.flatnonzero(histogram.counts)[-1]) + 1 if histogram.total else 1
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts[:last])]).astype(np.float64)
    upper = np.minimum(edges[: last + 1], np.nextafter(histogram.maximum, np.inf))
    upper[0] = 0.0
    at = np.interp(np.arange(bins + 1) * width, upper, cumulative)
    at[0], at[-1] = 0.0, cumulative[-1]
    counts: NDArray[np.float64] = np.diff(at)
    return counts


def _search_entropy(counts: NDArray[np.float64], *, first: int, empty_apart: bool) -> int:
    """The bin with the least divergence: every 64th, then closer around the best ones."""
    last = len(counts) - 1
    below = np.concatenate([[0.0], np.cumsum(counts)])
    tried: dict[int, float] = {}

    def divergence(bins: NDArray[np.int64]) -> None:
        fresh = np.array([b for b in bins if b not in tried], np.int64)
        tried.update(
            zip(fresh.tolist(), _kl(counts, below, fresh, empty_apart).tolist(), strict=True)
        )

    grid = first + np.unique(np.geomspace(1, max(last - first, 1) + 1, 96).astype(np.int64)) - 1
    divergence(np.unique(np.concatenate([grid, np.arange(first, min(last, 4096) + 1, 64), [last]])))
    for _ in range(3):
        for best in sorted(tried, key=lambda b: (tried[b], b))[:3]:
            position = sorted(tried)
            i = position.index(best)
            low, high = position[max(i - 1, 0)], position[min(i + 1, len(position) - 1)]
            divergence(np.unique(np.linspace(low, high, 9).astype(np.int64)))
    return min(tried, key=lambda b: (tried[b], b))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _kl(counts: Any, below: Any, thresholds: Any, empty_apart: Any) -> Any:
    """KL(reference || coarse) for thresholds at each of the given bins; inf for an empty one."""
    out = np.empty(thresholds.size)
    total = below[-1]
    levels = 128 if empty_apart else 127
    coarse = np.zeros(levels)
    filled = np.zeros(levels)
    for k in range(thresholds.size):
        last = thresholds[k]
        size = last + 1
        coarse[:] = 0.0
        filled[:] = 0.0
        span = size if empty_apart else last + 0.5
        for i in range(size):
            if counts[i] > 0:
                level = min(int((i + 0.5) * levels / span), levels - 1)
                coarse[level] += counts[i]
                filled[level] += 1.0
        if total == 0 or below[size] == 0:
            out[k] = np.inf
            continue
        tail = total - below[size]
        mass = below[size]
        divergence = 0.0
        for i in range(size):
            reference = counts[i] + (tail if i == last else 0.0)
            if reference > 0:
                level = min(int((i + 0.5) * levels / span), levels - 1)
                q = coarse[level] / filled[level] / mass if filled[level] > 0 else 0.0
                p = reference / total
                divergence += p * np.log(p / q) if q > 0 else p * 30.0
        out[k] = divergence
    return out


AMAX_METHODS: Mapping[str, Callable[[Histogram], float]] = {
    "entropy": amax_entropy,
    "entropy-s7310": amax_entropy_s7310,
    "percentile": amax_percentile,
    "mse": amax_mse,
    "max": amax_max,
}

CANDIDATES: Mapping[str, Callable[[Histogram], float]] = {
    "max": amax_max,
    "percentile-99.999": partial(amax_percentile, percentile=99.999),
    "percentile-99.99": partial(amax_percentile, percentile=99.99),
    "percentile-99.9": partial(amax_percentile, percentile=99.9),
    "entropy": amax_entropy,
    "mse": amax_mse,
}
"""What `auto` chooses from for each tensor."""


def choose(
    histograms: Mapping[str, Histogram], method: str, *, percentile: float = 99.99
) -> dict[str, float]:
    """Tensor -> amax by one of `AMAX_METHODS`, on all usable cores.

    `percentile` counts for that method only. Raises ValueError for an unknown method.
    """
    if method not in AMAX_METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(AMAX_METHODS)}")
    function = AMAX_METHODS[method]
    if method == "percentile":
        function = partial(amax_percentile, percentile=percentile)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(histograms, pool.map(function, histograms.values()), strict=True))
