"""The measures against hand-computed values and against plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from trtune.precision.runtime import errors as metrics
from trtune.precision.runtime.errors import ErrorSums, NotFiniteError

INF = math.inf
MEASURES: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    name: getattr(metrics, name)
    for name in ("sqnr_db", "cosine", "relative_l2", "mean_relative", "max_abs")
}
FINITE = st.floats(-1000, 1000, width=32, allow_subnormal=False)
PAIRS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[arrays(np.float32, n, elements=FINITE)] * 2)
)


def plain(reference: NDArray[Any], test: NDArray[Any]) -> dict[str, float]:
    """The same measures as formulas over whole float64 arrays."""
    r, t = reference.astype(np.float64), test.astype(np.float64)
    error = np.abs(r - t)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(r == 0, (t != 0).astype(float), error / np.abs(r))
        return {
            "sqnr_db": float(10 * np.log10(np.sum(r * r) / np.sum(error**2))),
            "cosine": float(np.sum(r * t) / np.sqrt(np.sum(r * r) * np.sum(t * t))),
            "relative_l2": float(np.sqrt(np.sum(error**2) / np.sum(r * r))),
            "mean_relative": float(np.mean(relative)),
            "max_abs": float(np.max(error)),
        }


@pytest.mark.parametrize(
    ("measure", "reference", "test", "expected"),
    [
        pytest.param("sqnr_db", [3, 4], [3, 4.5], 20.0, id="sqnr: 25 to 0.25 is 20 dB"),
        pytest.param("sqnr_db", [3, 4], [3, 4], INF, id="sqnr: equal arrays give inf"),
        pytest.param("sqnr_db", [0, 0], [0, 0], INF, id="sqnr: equal zeros give inf"),
        pytest.param("sqnr_db", [0, 0], [0, 1], -INF, id="sqnr: noise on silence gives -inf"),
        pytest.param("sqnr_db", [3, 4], [3, INF], -INF, id="sqnr: Inf in the test gives -inf"),
        pytest.param("sqnr_db", [3, 4], [math.nan, 4], -INF, id="sqnr: NaN in the test: -inf"),
        pytest.param("cosine", [1, 2], [2, 4], 1.0, id="cosine: blind to a factor"),
        pytest.param("cosine", [1, 0], [0, 5], 0.0, id="cosine: orthogonal gives 0"),
        pytest.param("cosine", [1, 2], [-1, -2], -1.0, id="cosine: opposite gives -1"),
        pytest.param("cosine", [0, 0], [0, 0], 1.0, id="cosine: equal zeros give 1"),
        pytest.param("cosine", [1, 2], [0, 0], 0.0, id="cosine: a test of zeros gives 0"),
        pytest.param("cosine", [0, 0], [1, 2], 0.0, id="cosine: a reference of zeros gives 0"),
        pytest.param("cosine", [1, 2], [1, math.nan], 0.0, id="cosine: NaN in the test gives 0"),
        pytest.param("relative_l2", [3, 4], [3, 4.5], 0.1, id="l2: 0.5 of 5"),
        pytest.param("relative_l2", [0, 0], [0, 0], 0.0, id="l2: equal zeros give 0"),
        pytest.param("relative_l2", [0, 0], [0, 2], INF, id="l2: noise on silence gives inf"),
        pytest.param("relative_l2", [1, 2], [1, -INF], INF, id="l2: Inf in the test gives inf"),
        pytest.param("mean_relative", [2, 4], [3, 3], 0.375, id="relative: mean of 1/2 and 1/4"),
        pytest.param("mean_relative", [-2, 4], [-3, 4], 0.25, id="relative: over |r|"),
        pytest.param("mean_relative", [0, 4], [9, 4], 0.5, id="relative: r = 0, t != 0 counts 1"),
        pytest.param("mean_relative", [0, 4], [0, 5], 0.125, id="relative: 0 against 0 counts 0"),
        pytest.param("mean_relative", [1, 4], [math.nan, 4], INF, id="relative: NaN gives inf"),
        pytest.param("max_abs", [1, 4], [2, 1], 3.0, id="max: largest difference"),
        pytest.param("max_abs", [1, 4], [1, math.nan], INF, id="max: NaN in the test gives inf"),
        pytest.param("sqnr_db", [], [], INF, id="sqnr: nothing differs in an empty tensor"),
        pytest.param("cosine", [], [], 1.0, id="cosine: nothing differs in an empty tensor"),
        pytest.param("mean_relative", [], [], 0.0, id="relative: nothing differs when empty"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_measure(
    measure: str, reference: list[float], test: list[float], expected: float, dtype: str
) -> None:
    got = MEASURES[measure](np.array(reference, dtype), np.array(test, dtype))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_that_would_broadcast_are_refused(measure: str) -> None:
    with pytest.raises(ValueError, match=r"reference \(2, 3\), test \(1, 3\)"):
        MEASURES[measure](np.ones((2, 3)), np.ones((1, 3)))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_reference_of_nan_is_an_error_with_its_place(measure: str) -> None:
    reference = np.array([[1, 2], [3, math.nan]], np.float32)
    with pytest.raises(NotFiniteError, match="flat index 3") as caught:
        MEASURES[measure](reference, np.zeros((2, 2), np.float32))
    assert caught.value.index == 3
    assert math.isnan(caught.value.value)


@pytest.mark.parametrize(
    ("reference", "test", "equal", "bad"),
    [
        pytest.param([3, -INF, 4], [3, -INF, 4.5], 1, 0, id="a mask is no difference"),
        pytest.param([3, -INF, 4], [3, INF, 4.5], 0, 1, id="of another sign"),
        pytest.param([3, -INF, 4], [3, 1e9, 4.5], 0, 1, id="a mask that became a number"),
        pytest.param([3, 0, 4], [3, INF, 4.5], 0, 1, id="a number that became infinite"),
        pytest.param([3, INF, 4], [3, math.nan, 4.5], 0, 1, id="NaN"),
    ],
)
def test_infinities(reference: list[float], test: list[float], equal: int, bad: int) -> None:
    sums = ErrorSums().add(np.float32(reference), np.float32(test))
    assert (sums.equal_infinities, sums.not_finite, sums.count) == (equal, bad, 3)
    assert sums.sqnr_db == (-INF if bad else pytest.approx(20.0))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_and_booleans_are_compared_as_numbers(dtype: str) -> None:
    sums = ErrorSums().add(np.array([1, 0, 1], dtype), np.array([1, 1, 1], dtype))
    assert (sums.signal, sums.noise, sums.dot, sums.energy) == (2.0, 1.0, 2.0, 3.0)


def test_large_integers_keep_their_last_digit() -> None:
    assert metrics.max_abs(np.array([2**40]), np.array([2**40 + 1])) == 1.0


def test_arrays_in_any_memory_order_are_compared_by_index_and_left_alone() -> None:
    reference = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    view = reference.transpose(2, 0, 1)
    copy = np.ascontiguousarray(view)
    assert metrics.sqnr_db(view, copy) == INF
    np.testing.assert_array_equal(reference.ravel(), np.arange(24))


def test_an_extreme_ratio_does_not_overflow() -> None:
    r, t = np.array([1e200, 1e-160]), np.array([1e200, 0.0])
    with np.errstate(over="raise"):
        assert metrics.sqnr_db(r[1:], t[1:]) == pytest.approx(0.0)
    sums = ErrorSums(signal=1e300, noise=1e-300)
    assert sums.sqnr_db == pytest.approx(6000.0)


def test_one_million_small_errors_are_summed_in_double_precision() -> None:
    r = np.full(1_000_000, 1.0, np.float32)
    t = np.full(1_000_000, 1.0 + 2.0**-12, np.float32)
    assert metrics.mean_relative(r, t) == pytest.approx(2.0**-12, rel=1e-12)


@given(PAIRS)
def test_the_kernel_agrees_with_plain_numpy(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    reference, test = pair
    expected = plain(reference, test)
    for name, measure in MEASURES.items():
        if math.isfinite(expected[name]):
            assert measure(reference, test) == pytest.approx(expected[name], rel=1e-9, abs=1e-12)


@given(PAIRS, st.integers(0, 40))
def test_adding_in_two_parts_is_adding_once(
    pair: tuple[NDArray[Any], NDArray[Any]], cut: int
) -> None:
    reference, test = pair
    whole = ErrorSums().add(reference, test)
    parts = ErrorSums().add(reference[:cut], test[:cut]).add(reference[cut:], test[cut:])
    merged = (
        ErrorSums()
        .merge(ErrorSums().add(reference[cut:], test[cut:]))
        .merge(ErrorSums().add(reference[:cut], test[:cut]))
    )
    for sums in (parts, merged):
        assert sums.count == whole.count
        assert sums.max_abs == whole.max_abs
        for name in ("signal", "noise", "dot", "energy", "relative"):
            assert getattr(sums, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-9)


@given(PAIRS)
def test_cosine_stays_in_its_range(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    assert -1.0 <= metrics.cosine(*pair) <= 1.0


def test_values_that_are_not_finite_stay_counted_as_more_is_added() -> None:
    ones = np.ones(3, np.float32)
    bad = np.array([1, math.nan, INF], np.float32)
    sums = ErrorSums().add(ones, bad).add(ones, ones)
    assert (sums.not_finite, sums.count) == (2, 6)
    assert (sums.sqnr_db, sums.max_abs, sums.relative_l2) == (-INF, INF, INF)
    assert sums.signal == 4.0


def test_sums_are_a_value_that_adding_leaves_alone() -> None:
    empty = ErrorSums()
    empty.add(np.ones(2), np.zeros(2))
    assert empty == ErrorSums()
