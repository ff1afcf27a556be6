"""float8 E4M3: what it holds, rounds and saturates, against ml_dtypes and onnxruntime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trtune.calibrate.float8 import (
    float8_codes,
    float8_dtype,
    float8_weight_scales,
    through_float8,
)
from trtune.calibrate.table import FLOAT8_MAX
from trtune.precision.plan.float8 import OPSET
from trtune.precision.runtime.session import make_session

EVERY = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""All 254 numbers of the type, and NaN twice."""


def test_the_limits_are_those_of_the_type() -> None:
    info = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn)
    assert float8_dtype() == np.dtype(ml_dtypes.float8_e4m3fn)
    assert float(info.max) == FLOAT8_MAX


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (1.0625, 1.0),  # half way between 1 and 1.125: to the even one
        (1.1875, 1.25),  # half way between 1.125 and 1.25
        (1.07, 1.125),
        (-17.0, -16.0),
        (17.01, 18.0),
        (448.0, 448.0),
        (463.9, 448.0),
        (1e9, 448.0),
        (-np.inf, -448.0),
        (2.0**-9, 2.0**-9),  # the least that is not zero
        (2.0**-10, 0.0),  # half of it: to the even one
        (3 * 2.0**-10, 2.0**-8),
        (2.0**-6, 2.0**-6),
        (-0.0, -0.0),
    ],
)
def test_a_value_goes_to_the_nearest(value: float, expected: float) -> None:
    found = through_float8(np.float32([value]), 1.0)[0]
    assert found == expected
    assert np.signbit(found) == np.signbit(expected)
    assert float8_codes(np.float32([value])).astype(np.float32)[0] == expected


def test_every_number_of_the_type_stays_what_it_is() -> None:
    np.testing.assert_array_equal(through_float8(EVERY, 1.0), EVERY)
    np.testing.assert_array_equal(through_float8(EVERY * np.float32(0.25), 0.25), EVERY / 4)


FLOATS = arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=True))


@given(values=FLOATS)
def test_codes_and_values_agree_with_ml_dtypes(values: NDArray[np.float32]) -> None:
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(through_float8(values, 1.0), expected)
    np.testing.assert_array_equal(float8_codes(values).astype(np.float32), expected)


def through_onnxruntime(values: NDArray[np.float32], scale: float) -> Any:
    """`values` through its QuantizeLinear and DequantizeLinear."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return make_session(model).run(None, {"x": values})[0]


@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-5, 812.5])
def test_the_arithmetic_is_that_of_onnxruntime(scale: float) -> None:
    rng = np.random.default_rng(5)
    spread = np.exp(rng.uniform(-14, 8, 20_000)) * np.float32(scale)
    middles = (EVERY[:-1] + EVERY[1:]) / 2 * np.float32(scale)  # ties
    values = np.concatenate([rng.standard_normal(20_000) * spread, middles, EVERY, [np.inf]])
    held = values.astype(np.float32)
    np.testing.assert_array_equal(through_float8(held, scale), through_onnxruntime(held, scale))


def test_the_input_is_left_as_it_is() -> None:
    values = np.float32([[1.07, -3.3]])
    before = values.copy()
    assert through_float8(values, 1.0).shape == (1, 2)
    np.testing.assert_array_equal(values, before)


def test_weights_get_a_scale_a_channel() -> None:
    weights = np.zeros((2, 3, 3), np.float32)
    weights[:, 0, 0], weights[:, 2, 1] = (4.48, -8.96), (448.0, 0.1)
    expected = np.float32([8.96 / 448, 1.0, 448.0 / 448])
    np.testing.assert_array_equal(float8_weight_scales(weights, 1), expected)
