"""What a convolution or product multiplies its weights with, gathered and summed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtune.precision.prepare.columns import (
    NARROW,
    moments,
    positions,
    weighted_columns,
)


def windows(
    x: np.ndarray, kernel: int, stride: int, dilation: int, pad: tuple[int, int]
) -> np.ndarray:
    """All windows of `x` (pictures, channels, height, width), shape (pictures, places, channels,
    kernel, kernel)."""
    padded = np.pad(x, [(0, 0), (0, 0), pad, pad])
    extent = dilation * (kernel - 1) + 1
    high, wide = (1 + (size - extent) // stride for size in padded.shape[2:])
    found = [
        padded[
            :,
            :,
            stride * i : stride * i + extent : dilation,
            stride * j : stride * j + extent : dilation,
        ]
        for i in range(high)
        for j in range(wide)
    ]
    return np.stack(found, axis=1)


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pad=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    depthwise=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_columns_of_a_convolution_are_its_windows(
    kernel: int, stride: int, dilation: int, pad: tuple[int, int], depthwise: bool
) -> None:
    rng = np.random.default_rng(kernel + 3 * stride)
    group, channels = (4, 4) if depthwise else (1, 4)
    x = rng.standard_normal((3, channels, 8, 7)).astype(np.float32)
    node = onnx.helper.make_node(
        "Conv", ["x", "w"], ["y"], name="n", group=group, strides=[stride, stride],
        dilations=[dilation, dilation], pads=[pad[0], pad[0], pad[1], pad[1]],
    )  # fmt: skip
    shape = (8, channels // group, kernel, kernel)
    places = positions(node, x.shape, shape, rng)
    found, _, _ = weighted_columns(node, x, shape, places, np.ones(len(x)))
    every = windows(x, kernel, stride, dilation, pad)
    taken = np.concatenate([every[k][at] for k, at in enumerate(places)])
    expected = taken.reshape(len(taken), group, -1).transpose(1, 0, 2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("operator", ["Conv", "MatMul"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_a_row_that_counts_twice_is_as_good_as_two(operator: str, depthwise: bool) -> None:
    rng = np.random.default_rng(0)
    shape, dims = ((2, 6, 5, 5), (6, 1, 3, 3)) if operator == "Conv" else ((2, 9, 6), (6, 4))
    if operator == "Conv" and not depthwise:
        dims = (4, 6, 3, 3)
    x = rng.standard_normal(shape).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    if operator == "Conv":
        node = onnx.helper.make_node(
            "Conv", ["x", "w"], ["y"], name="n", group=6 if depthwise else 1, pads=[1] * 4
        )

    def summed(data: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        places = positions(node, data.shape, dims, rng)
        sampled, sums, count = weighted_columns(node, data, dims, places, counts)
        return moments(sampled), sums, count

    found = summed(x, np.array([2.0, 0.5]))
    twice = np.concatenate([x[:1], x[:1], x[1:]])
    whole, half = summed(twice, np.ones(3)), summed(x[1:], np.ones(1))
    for one, more, part in zip(found, whole, half, strict=True):
        np.testing.assert_allclose(one, more - 0.5 * part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [3, NARROW, NARROW + 1])
@pytest.mark.parametrize("groups", [1, 5])
def test_moments_are_products_of_columns_also_beyond_float32(columns: int, groups: int) -> None:
    x = np.random.default_rng(0).standard_normal((groups, 50, columns)).astype(np.float32)
    exact = x.astype(np.float64).transpose(0, 2, 1) @ x.astype(np.float64)
    np.testing.assert_allclose(moments(x), exact, rtol=1e-4, atol=1e-3)
    x[0, 0, 0] = 1e30
    assert np.isfinite(moments(x)).all()
