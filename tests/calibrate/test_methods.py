from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from trtune.calibrate.cpu.counter import Counter
from trtune.calibrate.histogram import Histogram, bin_edges
from trtune.calibrate.methods import (
    AMAX_METHODS,
    CANDIDATES,
    amax_entropy,
    amax_entropy_s7310,
    amax_max,
    amax_mse,
    amax_percentile,
    choose,
    linear_counts,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
DRAWS: dict[str, Draw] = {
    "normal": lambda r, s: r.normal(size=s),
    "laplace": lambda r, s: r.laplace(size=s),
    "relu": lambda r, s: np.maximum(r.normal(size=s), 0),
    "uniform": lambda r, s: r.uniform(size=s),
    "exponential": lambda r, s: r.exponential(size=s),
    "student": lambda r, s: r.standard_t(4, size=s),
    "lognormal": lambda r, s: r.lognormal(size=s),
}
METHODS = [pytest.param(name, id=name) for name in AMAX_METHODS]

pictures_of = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 12)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@cache
def drawn(name: str, pictures: int = 16, values: int = 40_000) -> NDArray[np.float32]:
    return DRAWS[name](np.random.default_rng(0), (pictures, values)).astype(np.float32)


def published(
    counts: NDArray[np.float64], *, first: int, levels: int, half: float
) -> NDArray[np.float64]:
    """KL(reference || coarse) for a threshold in every bin from `first`.

    The coarse distribution of bin B has `levels` bins from 0 to `B + half` widths.
    """
    divergences = []
    for b in range(first, len(counts)):
        head = counts[: b + 1]
        reference = head.copy()
        reference[b] += counts[b + 1 :].sum()
        edges = np.linspace(0, b + half, levels + 1)
        level = np.searchsorted(edges, np.arange(b + 1) + 0.5, side="right") - 1
        level = level.clip(0, levels - 1)
        mass = np.bincount(level, head, levels)
        filled = np.bincount(level, head > 0, levels)
        coarse = np.where(head > 0, mass[level] / np.maximum(filled[level], 1), 0)
        p, q = reference / reference.sum(), coarse / head.sum()
        inside = (p > 0) & (q > 0)
        lost = p[(p > 0) & (q == 0)].sum() * 30
        divergences.append(np.sum(p[inside] * np.log(p[inside] / q[inside])) + lost)
    return np.array(divergences)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "histogram",
    [
        pytest.param(Histogram.of(np.zeros(9, np.float32)), id="all zero"),
        pytest.param(Counter().histogram(), id="nothing counted"),
    ],
)
def test_amax_of_a_tensor_that_is_never_anything_but_zero_is_zero(
    method: str, histogram: Histogram
) -> None:
    assert AMAX_METHODS[method](histogram) == 0.0


@settings(max_examples=40, deadline=None)
@given(rows=pictures_of)
def test_amax_is_above_zero_and_at_most_the_maximum(rows: NDArray[np.float32]) -> None:
    assume(rows.any())
    histogram = Histogram.of(*rows)
    for method, amax in (AMAX_METHODS | CANDIDATES).items():
        assert 0 < amax(histogram) <= histogram.maximum, method


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(DRAWS)), power=st.integers(-60, 60)
)
def test_data_scaled_by_a_power_of_two_scales_amax_by_it(seed: int, name: str, power: int) -> None:
    rows = DRAWS[name](np.random.default_rng(seed), (3, 200)).astype(np.float32)
    rows[np.abs(rows) < 2.0**-40] = 0  # what would become subnormal
    one, other = Histogram.of(*rows), Histogram.of(*np.ldexp(rows, power))
    for method, amax in AMAX_METHODS.items():
        assert amax(other) == pytest.approx(amax(one) * 2.0**power, rel=1e-9), method


def test_max_is_exact() -> None:
    assert amax_max(Histogram.of(np.float32([0.1, -0.3]))) == float(np.float32(0.3))


@pytest.mark.parametrize(
    ("percentile", "exact"),
    [
        pytest.param(100, 1000, id="all"),
        pytest.param(99.9, 999, id="all but one"),
        pytest.param(50, 500, id="the median"),
        pytest.param(0.1, 1, id="one"),
        pytest.param(1e-9, 1, id="never fewer than one"),
    ],
)
def test_percentile_is_within_a_bin(percentile: float, exact: float) -> None:
    histogram = Histogram.of(np.arange(1, 1001, dtype=np.float32))
    assert amax_percentile(histogram, percentile=percentile) == pytest.approx(exact, rel=1 / 256)


def test_percentile_counts_zeros() -> None:
    histogram = Histogram.of(np.float32([0, 0, 0, 8, 900]))
    assert amax_percentile(histogram, percentile=80) == pytest.approx(8, rel=1 / 128)


def test_percentile_of_a_tensor_that_is_nearly_always_zero_is_its_maximum() -> None:
    values = np.zeros(100_000, np.float32)
    values[7] = 3
    assert amax_percentile(Histogram.of(values), percentile=99.99) == 3.0


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_a_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match=f"percentile is {percentile}; it must be above 0"):
        amax_percentile(Histogram.of(np.ones(3, np.float32)), percentile=percentile)


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_mse_is_that_of_trying_every_amax_on_the_data(name: str) -> None:
    rows = drawn(name)[:, :2000]
    x = np.abs(rows).astype(np.float64).ravel()

    def error(amax: float) -> float:
        step = amax / 127
        return float(np.mean((x - np.minimum(np.rint(x / step), 127) * step) ** 2))

    found = amax_mse(Histogram.of(*rows))
    least = min(map(error, x.max() * np.geomspace(1 / 64, 1, 800)))
    assert error(found) <= 1.01 * least


def test_mse_gives_up_a_lone_outlier_for_the_resolution_of_the_rest() -> None:
    rows = drawn("normal").copy()
    rows[0, 0] = 20
    assert 3 < amax_mse(Histogram.of(*rows)) < 10


@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "uniform", "exponential", "student"])
def test_entropy_is_the_published_algorithm_with_ties_for_the_larger_threshold(name: str) -> None:
    rows = drawn(name).copy()
    rows[:2, 0] = np.abs(rows).max()  # two pictures reach the maximum: nothing is left out
    histogram = Histogram.of(*rows)
    width = histogram.pictures.median / 1024
    counts = linear_counts(histogram, width, math.ceil(histogram.maximum / width))
    counts[0] = 0
    tried = np.append(np.arange(127, len(counts) - 1, 4), len(counts) - 1)  # below bin 2048
    divergences = published(counts, first=127, levels=127, half=0.5)[tried - 127]
    expected = tried[divergences <= 1.01 * divergences.min()][-1]
    assert amax_entropy(histogram) == pytest.approx((expected + 0.5) * width, rel=5e-3)


@pytest.mark.parametrize("name", ["relu", "uniform", "exponential", "lognormal"])
def test_entropy_is_the_published_algorithm_on_the_data_itself(name: str) -> None:
    # Not where tails are so sparse that spreading a bin's counts changes the distribution.
    rows = drawn(name)
    histogram = Histogram.of(*rows)
    width = histogram.pictures.median / 1024
    bins = math.ceil(histogram.maximum / width)
    counts = np.histogram(np.abs(rows), bins, (0, bins * width))[0].astype(np.float64)
    counts[0] = 0
    tried = np.append(np.arange(127, len(counts) - 1, 4), len(counts) - 1)  # below bin 2048
    divergences = published(counts, first=127, levels=127, half=0.5)[tried - 127]
    expected = tried[divergences <= 1.01 * divergences.min()][-1]
    assert amax_entropy(histogram) == pytest.approx((expected + 0.5) * width, rel=0.05)


@pytest.mark.parametrize("name", ["normal", "relu", "uniform", "student", "lognormal"])
def test_s7310_is_the_published_algorithm_on_the_data_itself(name: str) -> None:
    rows = drawn(name)
    histogram = Histogram.of(*rows)
    width = histogram.maximum / 2048
    counts = np.histogram(np.abs(rows), 2048, (0, histogram.maximum))[0].astype(np.float64)
    expected = 128 + int(published(counts, first=128, levels=128, half=1.0).argmin())
    assert amax_entropy_s7310(histogram) == pytest.approx((expected + 0.5) * width, abs=4 * width)


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        *((name, 0.05) for name in sorted(DRAWS) if name != "uniform"),
        # Without a tail the bins up to the outlier are empty, and nearly as good as the edge.
        ("uniform", 0.15),
    ],
)
def test_one_value_1000_times_too_large_sets_max_but_hardly_moves_entropy(
    name: str, moves: float
) -> None:
    rows = drawn(name)[:, :8192]
    loud = rows.copy()
    loud[np.unravel_index(np.abs(rows).argmax(), rows.shape)] *= np.float32(1000)
    calm, disturbed = Histogram.of(*rows), Histogram.of(*loud)
    assert amax_max(disturbed) == pytest.approx(1000 * amax_max(calm), rel=1e-6)
    assert amax_entropy(disturbed) == pytest.approx(amax_entropy(calm), rel=moves)


@pytest.mark.parametrize("times", [2, 10, 100, 1000, 1e6])
@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_whole_picture_too_large_does_not_stretch_the_range_of_entropy(
    name: str, times: float
) -> None:
    rows = drawn(name)[:, :8192]
    loud = np.concatenate([rows, rows[:1] * np.float32(times)])
    calm, disturbed = Histogram.of(*rows), Histogram.of(*loud)
    assert amax_max(disturbed) > 0.5 * times * amax_max(Histogram.of(rows[0]))
    assert 0.6 * amax_entropy(calm) < amax_entropy(disturbed) <= amax_max(calm)


def test_few_pictures_all_count_for_entropy() -> None:
    rows = drawn("uniform")[:7, :8192] * np.float32([[1], [1], [1], [1], [1], [1], [4]])
    assert amax_entropy(Histogram.of(*rows)) > 3.9


def test_entropy_falls_back_on_the_maximum_where_most_pictures_are_zero() -> None:
    zero = np.zeros(4096, np.float32)
    found = amax_entropy(Histogram.of(zero, zero, drawn("uniform")[0, :4096]))
    assert 0.9 < found <= 1.0


@settings(max_examples=40, deadline=None)
@given(rows=pictures_of, bins=st.integers(1, 300), reach=st.floats(0.01, 2, allow_subnormal=False))
def test_linear_bins_keep_every_count(rows: NDArray[np.float32], bins: int, reach: float) -> None:
    histogram = Histogram.of(*rows)
    counts = linear_counts(histogram, (histogram.maximum or 1.0) * reach / bins, bins)
    assert counts.shape == (bins,)
    assert counts.min() >= 0
    assert counts.sum() == pytest.approx(rows.size)


def test_linear_bins_that_match_the_histograms_bins_are_exact() -> None:
    values = np.repeat(np.float32(np.arange(128, 256)), np.arange(1, 129))
    counts = linear_counts(Histogram.of(values), 1.0, 256)
    np.testing.assert_allclose(counts[128:], np.arange(1, 129))
    assert counts[:128].sum() == pytest.approx(0)
    assert bin_edges()[np.searchsorted(bin_edges(), 200.0)] == 200.0


def test_what_lies_above_the_linear_bins_is_added_to_the_last() -> None:
    counts = linear_counts(Histogram.of(np.float32([1, 130, 140, 250])), 8.0, 4)
    np.testing.assert_allclose(counts, [1, 0, 0, 3])


@pytest.mark.parametrize("method", METHODS)
def test_choose_gives_each_tensor_its_amax_in_the_order_asked(method: str) -> None:
    histograms = {
        name: Histogram.of(*drawn(name)[:2, :500]) for name in ("relu", "uniform", "laplace")
    }
    found = choose(histograms, method)
    assert list(found) == list(histograms)
    assert found == {name: AMAX_METHODS[method](h) for name, h in histograms.items()}


def test_choose_hands_the_percentile_on_to_that_method_alone() -> None:
    histograms = {"x": Histogram.of(np.arange(1, 101, dtype=np.float32))}
    assert choose(histograms, "percentile", percentile=50)["x"] == pytest.approx(50, rel=1 / 128)
    assert choose(histograms, "max", percentile=50) == {"x": 100.0}


def test_choose_of_no_tensor_is_empty() -> None:
    assert choose({}, "entropy") == {}


def test_an_unknown_method_is_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'entopy'; known: entropy, .*, max"):
        choose({}, "entopy")
