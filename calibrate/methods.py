"""From a histogram of |x| to amax: the methods, by name.

All take a `Histogram` and give an amax in (0, histogram.maximum], or 0.0 for a tensor that was
never anything but zero. None depends on the order of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.histogram import Histogram, bin_edges, filled_bins, quantile
from trtune.configs.system.compiled import compiled
from trtune.configs.system.machine import usable_cores
from trtune.configs.values import PERCENTILE

LEVELS = 127
ENTROPY_BINS = 1024
LARGEST_RATIO = 64
"""Entropy looks no further than this many times the median of the per-picture maxima."""

ENOUGH_PICTURES = 8
"""From here on entropy leaves out what only one picture reaches."""

FINE_BINS = 2 * ENTROPY_BINS
TIE = 0.01
"""Divergences that differ by less than this part count as equal."""

COARSE = np.geomspace(1 / 64, 1, 96)
"""What parts of the maximum `amax_mse` tries first."""


def amax_max(histogram: Histogram) -> float:
    """The largest magnitude seen, exactly."""
    return histogram.maximum


def amax_percentile(histogram: Histogram, *, percentile: float = PERCENTILE) -> float:
    """The magnitude that `percentile` percent of all values, zeros included, do not exceed.

    Within a bin, 0.8 % at most; the maximum if so many values are zero that it would be zero.
    Raises ValueError for a percentile outside (0, 100].
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it must be above 0 and at most 100")
    if not histogram.total:
        return 0.0
    amax = quantile(histogram.counts, percentile / 100)
    return min(amax, histogram.maximum) if amax else histogram.maximum


def amax_mse(histogram: Histogram) -> float:
    """The amax with the least mean squared error of x against its int8 value.

    Candidates lie from the maximum down to 1/64 of it, 6.6 % apart, then 0.4 % apart around the
    best. The expectation treats a bin as its middle while it is narrower than a quantization step,
    and its rounding error as uniform (step^2 / 12) otherwise.
    """
    return _least_mse(histogram.maximum, *_centers(histogram)) if histogram.maximum else 0.0


def _least_mse(maximum: float, centers: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    coarse = maximum * COARSE
    errors = np.empty(coarse.size)
    _mse(centers, counts, coarse, errors)
    best = int(np.argmin(errors))
    fine = np.geomspace(coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)], 33)
    errors = np.empty(fine.size)
    _mse(centers, counts, fine, errors)
    return float(fine[np.argmin(errors)])


def _centers(histogram: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles and counts of the filled bins above zero."""
    filled = filled_bins(histogram.counts[1:]) + 1
    edges = bin_edges()
    middles = (edges[filled] + np.minimum(edges[filled + 1], histogram.maximum)) / 2
    return middles, histogram.counts[filled].astype(np.float64)


@compiled(error_model="numpy")
def _mse(centers: Any, counts: Any, amaxes: Any, errors: Any) -> None:
    """Fill `errors` with the sum over bins of count * E[(x - Q(x))^2] for each amax.

    The amaxes stand in the inner loop, where compilers make vectors of them; the sum of each is
    in the order of the bins.
    """
    steps = amaxes / 127.0
    uniform = steps * steps / 12.0
    sums = np.zeros(amaxes.size)
    for i in range(centers.size):
        x, count = centers[i], counts[i]
        for k in range(amaxes.size):
            rounded = x - np.rint(x / steps[k]) * steps[k]
            rounded = rounded * rounded
            within = uniform[k] if x > 64.0 * steps[k] else rounded
            clipped = x - amaxes[k]
            clipped = clipped * clipped
            sums[k] += count * (clipped if x > amaxes[k] else within)
    errors[:] = sums


def quantization_snr_db(histogram: Histogram, amax: float) -> float:
    """Signal-to-noise ratio of a tensor through int8 with this amax, in dB, by its histogram.

    10 log10(sum(x^2) / sum((x - Q(x))^2)), the expectation as in `amax_mse`. Plus infinity for a
    tensor of zeros. Raises ValueError unless amax is above zero.

    >>> round(quantization_snr_db(Histogram.of(np.float32([-127, 64, 3])), 60.0), 1)
    6.5
    """
    if not amax > 0:
        raise ValueError(f"amax is {amax}; it must be above zero")
    if histogram.maximum == 0:
        return math.inf
    return _snrs_db(*_centers(histogram), [amax])[0]


def _snrs_db(
    centers: NDArray[np.float64], counts: NDArray[np.float64], amaxes: Sequence[float]
) -> list[float]:
    """`quantization_snr_db` of each of `amaxes`, of bins that hold something."""
    errors = np.empty(len(amaxes))
    _mse(centers, counts, np.array(amaxes, np.float64), errors)
    signal = float((counts * centers**2).sum())
    return [math.inf if e == 0 else 10 * math.log10(signal / e) for e in errors.tolist()]


@dataclass(frozen=True, slots=True)
class Better:
    """A tensor for which `method` leaves `gain_db` more than the amax that was chosen."""

    tensor: str
    method: str
    gain_db: float


def better_methods(
    histograms: Mapping[str, Histogram], amaxes: Mapping[str, float], *, least_db: float = 3.0
) -> list[Better]:
    """The tensors that max or mse would have quantized at least `least_db` better.

    By the signal-to-noise ratio of the tensor itself, not of the network's output. Largest gain
    first, then by name; tensors whose amax is zero are left out.
    """
    asked = {t: a for t, a in amaxes.items() if a > 0 and histograms[t].maximum > 0}
    with ThreadPoolExecutor(usable_cores()) as pool:
        gains = list(pool.map(lambda t: _most_gained(histograms[t], asked[t]), asked))
    found = [
        Better(tensor, method, gain)
        for tensor, (method, gain) in zip(asked, gains, strict=True)
        if gain >= least_db
    ]
    return sorted(found, key=lambda b: (-b.gain_db, b.tensor))


def _most_gained(histogram: Histogram, amax: float) -> tuple[str, float]:
    """Which of max and mse quantizes a tensor better, and by how many dB than `amax` does."""
    centers, counts = _centers(histogram)
    methods = {"max": histogram.maximum, "mse": _least_mse(histogram.maximum, centers, counts)}
    now, *others = _snrs_db(centers, counts, [amax, *methods.values()])
    best = max(range(len(others)), key=lambda number: others[number])
    return list(methods)[best], 0.0 if others[best] == now else others[best] - now


def amax_entropy(histogram: Histogram) -> float:
    """NVIDIA's published entropy calibration, made independent of order and of single outliers.

    The published algorithm (MLPerf calibration document) takes 1024 equal bins over the range of
    the *first batch* and adds bins of that width when later data exceeds it. Here the width is
    the median of the per-picture maxima divided by 1024: the range that the first batch would
    have if it were typical. It depends neither on which pictures come first nor on how many go in
    a batch. Values above the second largest of the per-picture maxima come from one picture alone
    and are left out, so that no single outlier can stretch the range, however large it is (with
    fewer than `ENOUGH_PICTURES` nobody can say what is an outlier, and all count). The rest is as
    published: the first bin is discarded; for each bin B the reference is what lies up to B with
    everything above folded into B, the coarse distribution has 127 bins from 0 to the middle of
    B, and the threshold is the middle of the bin with the least KL(reference || coarse), empty
    reference bins left out.

    The counts of a bin by exponent and mantissa are spread evenly over the linear bins it covers.
    Thresholds are tried 4 bins apart, above twice the median maximum (and up to 64 times) 1/256 of
    their value. Of those whose divergence is within 1 % of the least, which is less than the sample
    can tell apart, the largest is taken because it clips least: the lone minimum costs a vision
    transformer 3 dB. Equality with TensorRT's closed implementation is not promised.
    """
    histogram = _without_lone_values(histogram)
    width = histogram.pictures.median / ENTROPY_BINS
    if width == 0:  # zero in most pictures: what the others hold is all there is to go by
        width = histogram.maximum / ENTROPY_BINS
    if width == 0:
        return 0.0
    bins = min(math.ceil(histogram.maximum / width), ENTROPY_BINS * LARGEST_RATIO)
    counts = linear_counts(histogram, width, max(bins, LEVELS + 1))
    counts[0] = 0
    bins_tried = _thresholds(LEVELS, len(counts) - 1)
    found = _divergences_at(counts, bins_tried, levels=LEVELS, margin=0.5)
    best = bins_tried[_clipping_least(found)]
    return float(min((best + 0.5) * width, histogram.maximum))


def _without_lone_values(histogram: Histogram) -> Histogram:
    """`histogram` up to the largest |x| that two pictures reach, if there are enough of them."""
    limit = histogram.pictures.runner_up
    if histogram.pictures.pictures < ENOUGH_PICTURES or limit == 0:
        return histogram
    counts = histogram.counts.copy()
    counts[int(np.searchsorted(bin_edges(), limit, side="right")) :] = 0
    return replace(histogram, counts=counts, maximum=limit)


def amax_entropy_s7310(histogram: Histogram) -> float:
    """The variant NVIDIA showed at GTC 2017 (session S7310): 2048 bins over [0, max].

    Thresholds from bin 128 to 2047, coarse distributions of 128 levels, empty reference bins stay
    empty. One outlier makes its bins too coarse for everything else; kept for comparison, and for
    networks whose activations have no tails.
    """
    if histogram.maximum == 0:
        return 0.0
    counts = linear_counts(histogram, histogram.maximum / 2048, 2048)
    bins_tried = np.arange(LEVELS + 1, 2048)
    found = _divergences_at(counts, bins_tried, levels=LEVELS + 1, margin=1.0)
    best = bins_tried[np.argmin(found)]
    return float(min((best + 0.5) * histogram.maximum / 2048, histogram.maximum))


def linear_counts(histogram: Histogram, width: float, bins: int) -> NDArray[np.float64]:
    """`bins` equal bins of `width` from 0, float64; what lies above is added to the last.

    A bin of the histogram is spread evenly over the linear bins that it covers.
    """
    out = np.zeros(bins)
    if histogram.maximum == 0:
        out[0] = histogram.total
        return out
    last = int(filled_bins(histogram.counts)[-1]) + 1
    upper = np.minimum(bin_edges()[1 : last + 1], np.nextafter(histogram.maximum, np.inf))
    _spread(histogram.counts[:last], upper, width, out)
    return out


@compiled()
def _spread(counts: Any, upper: Any, width: Any, out: Any) -> None:
    """Add the counts of adjacent bins with these upper edges, the first from 0, to equal ones."""
    lower = 0.0
    end = out.size - 1
    for i in range(counts.size):
        if counts[i]:
            first = min(int(lower / width), end)
            last = min(int(upper[i] / width), end)
            density = counts[i] / (upper[i] - lower)
            at = lower
            for k in range(first, last):
                out[k] += density * ((k + 1) * width - at)
                at = (k + 1) * width
            out[last] += density * max(upper[i] - at, 0.0)
        lower = upper[i]


def _divergences_at(
    counts: NDArray[np.float64], thresholds: NDArray[np.int64], *, levels: int, margin: float
) -> NDArray[np.float64]:
    """KL(reference || coarse) for a threshold in each of the bins `thresholds`.

    `levels` and `margin`: see `_divergences`.
    """
    filled = counts > 0
    logs = counts * np.log(counts, out=np.zeros_like(counts), where=filled)
    mass, full, terms = (np.append(0.0, np.cumsum(each)) for each in (counts, filled, logs))
    found = np.empty(thresholds.size)
    _divergences(mass, full, terms, thresholds, levels, margin, found)
    return found


def _thresholds(first: int, last: int) -> NDArray[np.int64]:
    """The bins to try: 4 apart up to `FINE_BINS`, from there 1/256 of their value, and the last."""
    steps = math.ceil(256 * math.log(last / FINE_BINS)) if last > FINE_BINS else 0
    sparse = np.geomspace(FINE_BINS, last, steps + 1) if steps else [last]
    fine = np.arange(first, min(last, FINE_BINS), 4)
    rising = np.rint(np.concatenate([fine, sparse])).astype(np.int64)
    kept: NDArray[np.int64] = rising[np.diff(rising, prepend=-1) > 0]
    return kept


def _clipping_least(divergences: NDArray[np.float64]) -> int:
    """The last place whose divergence is within `TIE` of the least."""
    least = divergences.min()
    return int(np.flatnonzero(divergences <= least + TIE * abs(least))[-1])


@compiled(error_model="numpy")
def _divergences(
    mass: Any, filled: Any, logs: Any, thresholds: Any, levels: Any, margin: Any, out: Any
) -> None:
    """Fill `out` with KL(reference || coarse) for a threshold in each bin; inf if all below is 0.

    The reference is the counts up to the threshold's bin with everything above added to that bin;
    the coarse distribution averages the counts themselves over the filled bins of each of `levels`
    equal levels from 0 to `margin` of the threshold's bin. `mass`, `filled` and `logs` are sums
    over all bins below of the count, of 1 if it is not zero, and of count * ln(count): with them a
    threshold costs one step a level instead of one a bin. Where the threshold's level is empty
    but for what was added, ln(reference / coarse) counts as 30.
    """
    total = mass[-1]
    sizes = thresholds + 1
    spans = thresholds + margin
    edges, before, seen = np.zeros((3, thresholds.size))
    held, number, average, logarithm, cross = np.zeros((5, thresholds.size))
    for level in range(levels):
        last = level == levels - 1
        for k in range(thresholds.size):
            edge = np.ceil((level + 1) * spans[k] / levels - 0.5)
            edges[k] = sizes[k] if last or edge > sizes[k] else edge
        for k in range(thresholds.size):
            end = int(edges[k])
            held[k], number[k] = mass[end] - before[k], filled[end] - seen[k]
            before[k], seen[k] = mass[end], filled[end]
        for k in range(thresholds.size):
            average[k] = held[k] / number[k] if number[k] > 0.0 else 1.0
        _logarithms(average, logarithm)
        for k in range(thresholds.size):
            cross[k] += held[k] * logarithm[k]
    for k in range(thresholds.size):
        size = sizes[k]
        inside = mass[size]
        if inside <= 0.0:
            out[k] = np.inf
            continue
        divergence = (logs[size] - cross[k] - inside * np.log(total / inside)) / total
        tail = total - inside
        if tail > 0.0:
            own = inside - mass[thresholds[k]]
            folded = (own + tail) / total
            if held[k] > 0.0:
                coarse = average[k] / inside
                divergence += folded * np.log(folded / coarse)
                if own > 0.0:
                    divergence -= own / total * np.log(own / total / coarse)
            else:
                divergence += folded * 30.0
        out[k] = divergence


@compiled(error_model="numpy")
def _logarithms(values: Any, out: Any) -> None:
    """Fill `out` with the natural logarithms of `values` (float64, normal and above zero).

    Within 3e-16 of the value and of 1; a loop that compilers can make vectors of, as they cannot of
    calls to a library. With m in [0.71, 1.42) and s = (m - 1) / (m + 1):
    ln(2^e m) = e ln(2) + 2 (s + s^3 / 3 + s^5 / 5 + ...).
    """
    least, ones = 0x3FE6A09E667F3BCD, 0x3FF0000000000000  # the bits of the doubles 0.7071 and 1
    bits = values.view(np.int64)
    mantissas = np.empty(values.size)
    parts = mantissas.view(np.int64)
    for k in range(values.size):
        parts[k] = ((bits[k] + (ones - least)) & 0x000FFFFFFFFFFFFF) + least
    for k in range(values.size):
        exponent = ((bits[k] + (ones - least)) >> 52) - 1023
        s = (mantissas[k] - 1.0) / (mantissas[k] + 1.0)
        t = s * s
        series = 1 / 19
        series = series * t + 1 / 17
        series = series * t + 1 / 15
        series = series * t + 1 / 13
        series = series * t + 1 / 11
        series = series * t + 1 / 9
        series = series * t + 1 / 7
        series = series * t + 1 / 5
        series = series * t + 1 / 3
        out[k] = exponent * 0.6931471805599453 + 2.0 * (s + s * t * series)


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
    histograms: Mapping[str, Histogram], method: str, *, percentile: float = PERCENTILE
) -> dict[str, float]:
    """Tensor -> amax by one of `AMAX_METHODS`, on all usable cores.

    `percentile` counts for that method only. Raises ValueError for an unknown method.
    """
    if method not in AMAX_METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(AMAX_METHODS)}")
    function = AMAX_METHODS[method]
    if method == "percentile":
        function = partial(amax_percentile, percentile=percentile)
    with ThreadPoolExecutor(usable_cores()) as pool:
        return dict(zip(histograms, pool.map(function, histograms.values()), strict=True))
