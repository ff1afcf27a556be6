from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from trtune.calibrate.histogram import (
    BINS,
    FIRST_NON_FINITE,
    Histogram,
    bin_edges,
    quantile,
)

NORMAL = float(np.finfo(np.float32).tiny)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
pictures_of = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.integers(1, 9)), elements=finite
)


@pytest.mark.parametrize(
    ("value", "lower", "upper"),
    [
        pytest.param(1.0, 1.0, 1 + 1 / 128, id="one opens its bin"),
        pytest.param(-1.0, 1.0, 1 + 1 / 128, id="the sign does not count"),
        pytest.param(1.9999, 2 - 1 / 128, 2.0, id="the last bin below two"),
        pytest.param(2.0, 2.0, 2 + 1 / 64, id="bins double with the exponent"),
        pytest.param(0.375, 0.375, 0.375 + 1 / 512, id="a fraction"),
        pytest.param(0.0, 0.0, 2.0**-133, id="zero"),
        pytest.param(-0.0, 0.0, 2.0**-133, id="negative zero"),
        pytest.param(1e-41, 0.0, 2.0**-133, id="the smallest subnormals count as zero"),
        pytest.param(3.4e38, 255 * 2.0**120, math.inf, id="the largest floats"),
    ],
)
def test_a_value_lies_between_the_edges_of_its_bin(
    value: float, lower: float, upper: float
) -> None:
    (index,) = np.flatnonzero(Histogram.of(np.float32([value])).counts)
    assert bin_edges()[index : index + 2].tolist() == [lower, upper]


def test_edges_rise_and_bins_are_less_than_one_128th_of_their_value_wide() -> None:
    edges = bin_edges()
    assert edges.shape == (BINS + 1,)
    lower, upper = edges[: FIRST_NON_FINITE - 1], edges[1:FIRST_NON_FINITE]
    assert (upper > lower).all()
    normal = lower >= NORMAL
    relative = (upper[normal] - lower[normal]) / lower[normal]
    assert relative.max() == 1 / 128
    assert relative.min() > 1 / 256
    assert np.isinf(edges[FIRST_NON_FINITE:]).all()


def test_edges_are_shared_and_cannot_be_written() -> None:
    assert bin_edges() is bin_edges()
    with pytest.raises(ValueError, match="read-only"):
        bin_edges()[0] = 1


@pytest.mark.parametrize(
    ("maxima", "median"),
    [
        pytest.param([1, 2, 100], 2 + 1 / 128, id="odd: the middle of the middle one's bin"),
        pytest.param([1, 2, 3, 100], 2 + 1 / 128, id="even: the lower of the two"),
        pytest.param([0, 0, 7], 0, id="zero in most pictures"),
        pytest.param([], 0, id="no picture"),
    ],
)
def test_the_median_of_the_pictures_maxima(maxima: list[float], median: float) -> None:
    found = Histogram.of(*(np.float32([m, 0]) for m in maxima))
    assert found.pictures.median == median


def test_arrays_of_any_shape_and_type_are_one_picture_each() -> None:
    found = Histogram.of(np.arange(8).reshape(2, 2, 2), np.float16([-9]))
    assert (found.total, found.maximum) == (9, 9.0)
    assert (found.pictures.pictures, found.pictures.item) == (2, "1")


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(NORMAL, 2.0**120, width=32), min_size=1, max_size=40),
    q=st.floats(0, 1),
)
def test_a_quantile_lies_in_the_bin_of_the_exact_one(values: list[float], q: float) -> None:
    exact = sorted(values)[max(math.ceil(q * len(values)), 1) - 1]
    found = quantile(Histogram.of(np.float32(values)).counts, q)
    assert abs(found - exact) <= exact / 256


@given(rows=pictures_of, qs=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_quantiles_rise(rows: NDArray[np.float32], qs: list[float]) -> None:
    counts = Histogram.of(*rows).counts
    found = [quantile(counts, q) for q in sorted(qs)]
    assert all(low <= high for low, high in pairwise(found))


def test_an_empty_histogram_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="quantile of an empty histogram"):
        quantile(np.zeros(BINS, np.int64), 0.5)


def test_infinities_are_not_counted() -> None:
    found = Histogram.of(np.float32([-np.inf, 2, 3, np.inf]), np.float32([np.inf, 1, 1, 0]))
    expected = Histogram.of(np.float32([2, 3]), np.float32([1, 1, 0]))
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert (found.total, found.maximum, found.pictures.runner_up) == (5, 3.0, 1.0)
