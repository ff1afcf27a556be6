"""What an error at the outputs counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from trtune.precision.tune.judge import Judge, gain, improvement, level, worst


def errors(reference: list[object], test: list[object]) -> NDArray[np.float64]:
    exact = [np.asarray(r, np.float32) for r in reference]
    return Judge([exact]).errors(0, [np.asarray(t, np.float32) for t in test])


@pytest.mark.parametrize(
    ("reference", "test", "expected"),
    [
        pytest.param(
            [[[3.0, 4.0], [0.0, 5.0]]],
            [[[3.0, 5.0], [0.0, 7.0]]],
            [[1 / 25, 4 / 25]],
            id="noise by signal energy, each picture by itself",
        ),
        pytest.param(
            [[[3.0, 4.0], [0.0, 1.0]]],
            [[[3.0, 4.0], [0.0, 2.0]]],
            [[0.0, 1 / 13]],
            id="a picture with little signal counts by the mean",
        ),
        pytest.param(
            [[[3.0, 4.0], [5.0, 0.0]], [[1.0], [1.0]]],
            [[[3.0, 5.0], [5.0, 0.0]], [[1.5], [1.0]]],
            [[1 / 25, 0.0], [0.25, 0.0]],
            id="each output by its own energy",
        ),
        pytest.param([[[0.0, 0.0]]], [[[0.5, 0.5]]], [[0.5]], id="no signal: the noise itself"),
        pytest.param([[[0.0]]], [[[0.0]]], [[0.0]], id="nothing at all"),
        pytest.param([2.0], [1.0], [[0.25]], id="a scalar output"),
        pytest.param(
            [[[-np.inf, 2.0]]], [[[5.0, 1.0]]], [[0.25]], id="what is infinite anyway is left out"
        ),
        pytest.param([[[1.0, 2.0]]], [[[1.0, np.nan]]], [[np.inf]], id="what becomes NaN"),
        pytest.param([[[1.0, 2.0]]], [[[1.0, -np.inf]]], [[np.inf]], id="what becomes infinite"),
        pytest.param([[[1.0]], [[2.0]]], [[[3.0]], [[2.0], [2.0]]], [[4.0], [0.0]], id="shapes"),
    ],
)
def test_errors(reference: list[object], test: list[object], expected: list[list[float]]) -> None:
    found = errors(reference, test)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_sums_are_in_float64() -> None:
    reference = np.full((1, 1 << 20), 1e-3, np.float32)
    np.testing.assert_allclose(
        errors([reference], [reference * np.float32(1.5)]), [[0.25]], rtol=1e-6
    )


def test_boxes_are_judged_apart_from_scores() -> None:
    rng = np.random.default_rng(0)
    boxes = 100 * rng.standard_normal((2, 50, 4))
    scores = 0.1 * rng.standard_normal((2, 50, 6))
    exact = np.concatenate([boxes, scores], axis=2).astype(np.float32)
    judge = Judge([[exact]])
    assert [(group.start, group.stop) for group in judge.groups] == [(0, 4), (4, 10)]
    noisy = exact.copy()
    noisy[..., 4:] *= np.float32(1.5)
    found = judge.errors(0, [noisy])
    np.testing.assert_allclose(found[0], 0, atol=1e-12)
    assert worst([found]) == pytest.approx(0.25, rel=0.2)
    alike = Judge([[exact[..., 4:]]])
    assert [group.axis for group in alike.groups] == [None]


def test_class_numbers_count_only_where_nothing_else_does() -> None:
    logits, label = np.ones((2, 3), np.float32), np.int64([[1], [2]])
    assert [g.output for g in Judge([[label, logits]]).groups] == ["1"]
    assert [g.output for g in Judge([[label]]).groups] == ["0"]


def test_a_gain_of_nearly_all_pictures_counts_beside_one_far_worse() -> None:
    rng = np.random.default_rng(0)
    before = np.exp(rng.normal(0, 0.3, (1, 24)))
    before[0, 3] = 40.0
    after = before * np.exp(rng.normal(-0.2, 0.2, (1, 24)))
    after[0, 3] = 38.0
    assert improvement([before], [after]).is_shown
    assert not improvement([after], [before]).is_shown
    assert not improvement([before], [before]).is_shown
    assert not improvement([before], [before * np.exp(rng.normal(0, 0.5, (1, 24)))]).is_shown


def test_gain_is_paired_and_says_how_sure_it_is() -> None:
    before = [np.array([[0.2, 0.4], [0.01, 0.01]])]
    after = [np.array([[0.1, 0.2], [0.01, 0.02]])]
    part, noise = gain(before, after)
    assert part == pytest.approx(0.5)
    assert noise == pytest.approx(np.std([0.1 / 0.3, 0.2 / 0.3], ddof=1) / math.sqrt(2))
    assert gain(before, [np.array([[0.0, 0.0], [0.6, 0.6]])])[0] == pytest.approx(-1)
    assert gain(before, [np.array([[np.inf, 0.0], [0.0, 0.0]])])[0] == -math.inf
    assert gain(before, before)[0] == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pictures_are_told_apart_along_any_axis(axis: int) -> None:
    exact = np.moveaxis(np.ones((3, 5, 4), np.float32), 0, axis)
    factors = np.float32([1.1, 1.2, 1.5]).reshape([-1 if i == axis else 1 for i in range(3)])
    found = Judge([[exact]], [3]).errors(0, [exact * factors])
    np.testing.assert_allclose(found, [[0.01, 0.04, 0.25]], rtol=1e-5)


def test_rows_that_are_no_pictures_count_for_all_of_them() -> None:
    picked = np.ones((240, 3), np.float32)
    judge = Judge([[picked, np.ones((2, 4), np.float32)]], [2])
    found = judge.errors(0, [picked * np.float32(1.5), np.ones((2, 4), np.float32)])
    np.testing.assert_allclose(found, [[0.25, 0.25], [0, 0]], rtol=1e-5)
    other = judge.errors(0, [picked[:7], np.ones((2, 4), np.float32)])
    np.testing.assert_allclose(other, np.zeros((2, 2)))


def test_improvement_is_averaged_over_the_groups_and_hurts_none() -> None:
    before = np.array([[0.2, 0.4, 0.3], [0.01, 0.01, 0.01]])
    found = improvement([before], [before / np.array([[2.0], [8.0]])])
    assert found.decibels == pytest.approx(5 * math.log10(16))
    assert found.typical == pytest.approx(found.decibels)
    np.testing.assert_allclose(found.groups, 10 * np.log10([2, 8]))
    assert found.is_shown
    worse = improvement([before], [before * np.array([[1.1], [0.1]])])
    assert worse.decibels > 4
    assert not worse.is_shown  # the first group loses 0.4 dB in every picture
    assert not improvement([before], [before]).is_shown
    assert level([before]) == pytest.approx(5 * math.log10(0.3 * 0.01))


def test_improvement_of_errors_that_are_not_finite() -> None:
    fine, broken = np.array([[0.1, 0.2]]), np.array([[0.1, np.inf]])
    assert improvement([broken], [fine]).is_shown
    assert improvement([fine], [broken]).decibels == -math.inf
    assert not improvement([broken], [broken]).is_shown


def test_one_noisy_group_does_not_hide_what_the_others_gain() -> None:
    rng = np.random.default_rng(3)
    before = np.exp(rng.normal(-3, 0.2, (5, 16)))
    after = before * np.exp(rng.normal(-0.3, 0.1, (5, 16)))
    before[0] *= np.exp(rng.normal(0, 2, 16))
    after[0] = before[0] * np.exp(rng.normal(-0.2, 0.8, 16))
    found = improvement([before], [after])
    assert found.groups[0] < 2 * found.group_noises[0]
    assert found.is_shown


def test_a_likely_gain_is_half_the_mean_s_and_half_the_typical_picture_s() -> None:
    before = np.array([[1.0, 1.0, 1.0, 97.0]])
    found = improvement([before], [np.array([[0.1, 0.1, 0.1, 97.0]])])
    assert found.decibels == pytest.approx(10 * math.log10(100 / 97.3))
    assert found.typical == pytest.approx(7.5)
    assert found.likely == pytest.approx((found.decibels + 7.5) / 2)
    assert found.likely_noise == pytest.approx(
        found.typical_noise / 2, rel=0.1
    )  # the typical picture's is most of it


@pytest.mark.parametrize(
    ("after", "expected", "spread", "wanted"),
    [
        pytest.param([0.5, 0.5, 0.5, 0.5], -4.0, 1.0, 3.0103, id="a certain gain stands"),
        pytest.param([0.1, 10.0, 0.1, 10.0], 2.0, 1e-6, 2.0, id="a sure expectation stands"),
        pytest.param([0.1, 10.0, 0.1, 10.0], 2.0, 1e6, -3.5166, id="nothing expected"),
    ],
)
def test_a_gain_is_drawn_towards_what_is_expected(
    after: list[float], expected: float, spread: float, wanted: float
) -> None:
    found = improvement([np.ones((1, 4))], [np.array([after])])
    assert found.towards(expected, spread) == pytest.approx(wanted, abs=1e-3)
