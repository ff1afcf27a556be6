from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.calibrate.histogram import Histogram
from trtune.calibrate.outliers import DominantPicture, Outlier, dominant, outliers


def of_maxima(*maxima: float) -> Histogram:
    return Histogram.of(*(np.float32([0, m]) for m in maxima))


def row(tensor: str, item: str, ratio: float) -> Outlier:
    return Outlier(tensor, item, ratio, 1.0, ratio, 1.0)


@pytest.mark.parametrize(
    ("maxima", "item", "ratio", "runner_up"),
    [
        pytest.param([1, 1, 1000], "2", 1000 / (1 + 1 / 256), 1, id="one picture far above"),
        pytest.param([2, 8, 4], "1", 8 / (4 + 1 / 64), 4, id="spread"),
        pytest.param([0, 0, 5], "2", math.inf, 0, id="zero in most pictures: infinite"),
        pytest.param([3], "0", 1, 0, id="one picture is its own median"),
        pytest.param([3, 3, 3], "0", 1, 3, id="all alike: exactly one, never below"),
    ],
)
def test_ratio_of_the_maximum_to_the_median_picture(
    maxima: list[float], item: str, ratio: float, runner_up: float
) -> None:
    (found,) = outliers({"x": of_maxima(*maxima)})
    assert (found.tensor, found.item, found.max) == ("x", item, max(maxima))
    assert found.ratio == pytest.approx(ratio, rel=1e-12)
    assert found.runner_up == runner_up


def test_worst_first_then_by_name_without_tensors_that_are_always_zero() -> None:
    found = outliers(
        {
            "b": of_maxima(1, 1, 20),
            "dead": of_maxima(0, 0, 0),
            "calm": of_maxima(1, 1, 1),
            "a": of_maxima(1, 1, 20),
            "rare": of_maxima(0, 0, 2),
        }
    )
    assert [o.tensor for o in found] == ["rare", "a", "b", "calm"]


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=9))
def test_a_ratio_is_never_below_one(maxima: list[float]) -> None:
    found = outliers({"x": of_maxima(*maxima)})
    assert len(found) == (max(maxima) > 0)
    for outlier in found:
        assert outlier.ratio >= 1
        assert 0 <= outlier.runner_up <= outlier.max
        assert outlier.median_max <= outlier.max


def test_no_tensor_no_outlier() -> None:
    assert outliers({}) == []
    assert dominant([]) == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([row("a", "1", 50)], [], id="one tensor is not enough"),
        pytest.param(
            [row("a", "1", 50), row("b", "1", 9.99)], [], id="a tensor below the ratio is not one"
        ),
        pytest.param(
            [row("a", "1", 10), row("b", "1", 10)],
            [DominantPicture("1", 2, 10, "a")],
            id="at the ratio; the worst tensor of equals is the first by name",
        ),
        pytest.param(
            [row("b", "1", 11), row("a", "1", 90), row("c", "2", 99), row("d", "3", 12)],
            [DominantPicture("1", 2, 90, "a")],
            id="each picture counts for itself",
        ),
        pytest.param(
            [row(t, "few", 500) for t in "ab"] + [row(t, "many", 20) for t in "cde"],
            [DominantPicture("many", 3, 20, "c"), DominantPicture("few", 2, 500, "a")],
            id="most tensors first",
        ),
        pytest.param(
            [row(t, i, r) for i, r in (("y", 20), ("z", 30), ("x", 20)) for t in "ab"],
            [DominantPicture(i, 2, r, "a") for i, r in (("z", 30), ("x", 20), ("y", 20))],
            id="then the worst ratio, then the name",
        ),
    ],
)
def test_pictures_that_set_the_range_of_several_tensors(
    rows: list[Outlier], expected: list[DominantPicture]
) -> None:
    assert dominant(rows) == expected
    assert dominant(reversed(rows)) == expected


def test_the_limits_of_a_dominant_picture_can_be_chosen() -> None:
    rows = [row("a", "1", 3)]
    assert dominant(rows, ratio=3, tensors=1) == [DominantPicture("1", 1, 3, "a")]
    assert dominant(rows, ratio=3.1, tensors=1) == []


def test_one_loud_picture_dominates_the_tensors_it_drives() -> None:
    quiet = [np.float32([1, -2])] * 8
    loud = Histogram.of(*quiet, np.float32([0, 4000]))
    found = outliers({"fc1": loud, "fc2": loud, "input": Histogram.of(*quiet, quiet[0])})
    (picture,) = dominant(found)
    assert (picture.item, picture.tensors, picture.worst_tensor) == ("8", 2, "fc1")
    assert picture.worst_ratio == pytest.approx(2000, rel=0.005)
