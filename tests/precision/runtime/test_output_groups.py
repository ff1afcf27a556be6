"""Outputs whose channels differ by orders of magnitude are judged in parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtune.precision.runtime.output_groups import (
    OutputGroup,
    channel_levels,
    output_groups,
    parts,
    split_points,
)


@pytest.mark.parametrize(
    ("levels", "points"),
    [
        pytest.param([2, 2, 2, 2], [], id="alike"),
        pytest.param([2.5, 2.6, 2.4, 2.5, -1.5, -1.3, -1.9, -1.2], [4], id="boxes, scores"),
        pytest.param([2.5, 2.6, 2.4, 2.5, -0.3], [4], id="boxes and one score"),
        pytest.param([0, 0, 0, 0, 0.9, 0.9], [], id="less than a decade"),
        pytest.param([2, 2, 2, 0, 0, 0, -2, -2, -2], [3, 6], id="three kinds"),
        pytest.param([0, 1.2, 0, 1.2, 0, 1.2, 0, 1.2], [], id="no two kinds, but a mixture"),
        pytest.param([*[-1.7, -1.2, -2.0] * 10, -3.5], [], id="one rare class at the end"),
        pytest.param([1.0], [], id="one channel"),
    ],
)
def test_where_magnitudes_change(levels: list[float], points: list[int]) -> None:
    assert split_points(np.array(levels, np.float64)) == points


def test_levels_are_logarithms_of_root_mean_squares() -> None:
    arrays = [np.float32([[10, 0, 0.1], [10, 0, np.inf]]), np.float32([[-10, 0, 0.1]])]
    assert channel_levels(arrays, 1) == pytest.approx([1, 1, -1])
    assert channel_levels([np.zeros((2, 3), np.float32)], 1).tolist() == [0, 0, 0]


def joined(shape: tuple[int, ...], axis: int, boxes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.random(shape)
    scale = np.full(shape[axis], 0.05)
    scale[:boxes] = 300
    return (values * scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("shape", "axis", "boxes"),
    [
        pytest.param((2, 20, 8, 8), 1, 4, id="a head's map"),
        pytest.param((2, 84, 2100), 1, 4, id="as YOLOv8 gives it"),
        pytest.param((2, 2100, 85), 2, 4, id="as YOLOX gives it"),
        pytest.param((2, 2100, 5), 2, 4, id="one class"),
        pytest.param((3, 16), 1, 10, id="a vector"),
    ],
)
def test_boxes_beside_scores(shape: tuple[int, ...], axis: int, boxes: int) -> None:
    found = output_groups({"out": [joined(shape, axis, boxes)]})
    assert found == (
        OutputGroup("out", axis, 0, boxes),
        OutputGroup("out", axis, boxes, shape[axis]),
    )


@settings(deadline=None)
@given(hnp.arrays(np.float32, (2, 6, 3), elements=st.floats(0.5, 1, width=32)), st.floats(-9, 9))
def test_one_magnitude_is_one_group_whatever_it_is(values: np.ndarray, power: float) -> None:
    scaled = values.astype(np.float64) * 10**power
    assert output_groups({"y": [scaled]}) == (OutputGroup("y"),)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(2, 40)), elements=st.floats(-1e9, 1e9))
)
def test_parts_cover_every_channel_once(values: np.ndarray) -> None:
    found = dict(parts(output_groups({"y": [values]}), {"y": values}))
    assert sum(part.shape[1] for part in found.values()) == values.shape[1]
    assert np.array_equal(np.concatenate(list(found.values()), axis=1), values)


def test_the_axis_of_the_samples_is_none_of_the_channels() -> None:
    rows = np.float32([[1000, 1000], [0.1, 0.1]])
    assert output_groups({"y": [rows]}) == (OutputGroup("y"),)
    assert len(output_groups({"y": [rows]}, batch_axes={"y": 1})) == 2


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param([np.int64([[1, 1000]])], id="integers"),
        pytest.param([np.float32([[1, 999]]), np.float32([[1, 9, 9]])], id="follows the data"),
        pytest.param([], id="never seen"),
        pytest.param([np.float32(3)], id="a number"),
    ],
)
def test_what_has_no_channels_is_one_group(arrays: list[np.ndarray]) -> None:
    assert output_groups({"y": arrays}) == (OutputGroup("y"),)
