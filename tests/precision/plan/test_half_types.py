"""The limits of half types, and which inputs and outputs of an operator take them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from trtune.precision.plan.half_types import HALVES, Slots, half_above, half_slots, to_half

FP16, BF16 = HALVES["fp16"], HALVES["bf16"]


@pytest.mark.parametrize("name", HALVES)
def test_the_limits_are_those_of_the_type(name: str) -> None:
    half, info = HALVES[name], ml_dtypes.finfo(HALVES[name].dtype)
    assert half.word == half.dtype.name
    assert (half.max, half.tiny) == (float(info.max), float(info.tiny))
    assert half.smallest == float(info.smallest_subnormal)
    assert half.bits == info.nmant + 1
    coarse = half.dtype.type(half.coarse)
    assert float(np.nextafter(coarse, half.dtype.type(np.inf))) == half.coarse + 0.5
    assert half.coarse - float(np.nextafter(coarse, half.dtype.type(0))) == 0.25


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """Tensors called f.. are float32, i.. int64, b.. bool, h.. float16, d.. float64."""
    return helper.make_node(
        op, [name.strip("_") for name in inputs.split()], outputs.split(), **attributes
    )


def dtypes_of(made: onnx.NodeProto) -> dict[str, str]:
    kinds = {"f": "float32", "i": "int64", "b": "bool", "h": "float16", "d": "float64"}
    names = (*made.input, *made.output)
    return {name: kinds[name[0]] for name in names if name and name[0] in kinds}


BODY = helper.make_graph([], "body", [], [])


@pytest.mark.parametrize(
    ("made", "opset", "half", "expected"),
    [
        pytest.param(node("Conv", "fx fw fb", "fy"), 17, FP16, Slots((0, 1, 2), (0,)), id="Conv"),
        pytest.param(
            node("Clip", "fx _ fmax", "fy"), 17, FP16, Slots((0, 2), (0,)),
            id="an input that is left out",
        ),
        pytest.param(
            node("Resize", "fx froi fscales", "fy"), 17, FP16, Slots((0,), (0,)),
            id="the region and the scales of a Resize stay",
        ),
        pytest.param(
            node("Where", "bc fx fz", "fy"), 17, FP16, Slots((1, 2), (0,)), id="not the condition"
        ),
        pytest.param(
            node("Gather", "ftable iat", "fy"), 17, FP16, Slots((0,), (0,)), id="not the indices"
        ),
        pytest.param(
            node("Concat", "fa fb fc", "fy", axis=0), 17, FP16, Slots((0, 1, 2), (0,)),
            id="any number of inputs",
        ),
        pytest.param(
            node("Split", "fx", "fa fb fc", axis=0), 17, FP16, Slots((0,), (0, 1, 2)),
            id="any number of outputs",
        ),
        pytest.param(
            node("TopK", "fx ik", "fy iwhere"), 17, FP16, Slots((0,), (0,)), id="not the places"
        ),
        pytest.param(
            node("LayerNormalization", "fx fs fb", "fy fmean"), 17, FP16, Slots((0, 1, 2), (0,)),
            id="the mean of a LayerNormalization is float32 by definition",
        ),
        pytest.param(
            node("BatchNormalization", "fx fs fb fm fv", "fy"), 17, FP16,
            Slots((0, 1, 2, 3, 4), (0,)), id="all three types of a BatchNormalization",
        ),
        pytest.param(
            node("Cast", "ix", "fy", to=TensorProto.FLOAT), 17, FP16, Slots((), (0,)),
            id="what a Cast gives",
        ),
        pytest.param(
            node("ConstantOfShape", "ishape", "fy"), 17, FP16, Slots((), (0,)),
            id="what ConstantOfShape gives",
        ),
        pytest.param(
            node("Relu", "hx", "hy"), 17, FP16, Slots(), id="half already: nothing to change"
        ),
        pytest.param(
            node("Conv", "fx fw", "fy"), 17, BF16, Slots((0, 1), (0,)),
            id="bfloat16 is looked up in opset 22",
        ),
        pytest.param(node("Dropout", "fx fratio", "fy bmask"), 17, FP16, Slots((0, 1), (0,)),
                     id="a Dropout draws nothing here"),
    ],
)  # fmt: skip
def test_what_changes_together(
    made: onnx.NodeProto, opset: int, half: Any, expected: Slots
) -> None:
    assert half_slots(made, dtypes_of(made), opset, half) == expected


@pytest.mark.parametrize(
    ("made", "half", "refusal"),
    [
        pytest.param(
            node("If", "bc", "fy", then_branch=BODY, else_branch=BODY), FP16,
            "its body stays float32", id="If",
        ),
        pytest.param(
            node("Fused", "fx", "fy", domain="my.ops"), FP16,
            "my.ops::Fused is no ONNX operator, so its types are not known", id="another domain",
        ),
        pytest.param(node("GridSample", "fx fg", "fy"), FP16, "it computes positions", id="grid"),
        pytest.param(
            node("RandomNormalLike", "fx", "fy"), FP16, "it draws random numbers", id="random"
        ),
        pytest.param(node("Relu", "unknown", "fy"), FP16,
                     "the type of 'unknown' is not known", id="a type that inference did not find"),
        pytest.param(node("Cast", "fx", "iy", to=TensorProto.INT64), FP16,
                     "it computes no float32", id="a Cast to integers"),
        pytest.param(node("Shape", "ix", "iy"), FP16, "it computes no float32", id="integers"),
        pytest.param(node("Relu", "dx", "dy"), FP16, "it computes no float32", id="float64"),
        pytest.param(node("DynamicQuantizeLinear", "fx", "u fs uz"), FP16,
                     "the type of 'u' is not known", id="no type for an output"),
        pytest.param(node("NonMaxSuppression", "fboxes fscores", "iy"), FP16,
                     "NonMaxSuppression takes no float16 in opset 17", id="float32 by definition"),
        pytest.param(node("TopK", "fx ik", "fy iw"), BF16,
                     "TopK takes no bfloat16 in opset 22", id="no bfloat16"),
        pytest.param(node("Newer", "fx", "fy"), FP16, "ONNX has no Newer in opset 17",
                     id="no such operator"),
        pytest.param(node("OneHot", "fat fdepth fvalues", "fy"), FP16, "", id="OneHot"),
    ],
)  # fmt: skip
def test_why_a_node_stays_float32(made: onnx.NodeProto, half: Any, refusal: str) -> None:
    found = half_slots(made, dtypes_of(made), 17, half)
    assert found.refusal == refusal
    assert not refusal or (found.inputs, found.outputs) == ((), ())


def test_a_half_beyond_the_range_is_infinite_without_a_warning() -> None:
    values = np.float32([65504, 65519, 65520, -1e6])
    assert to_half(values, FP16).tolist() == [65504, 65504, np.inf, -np.inf]


@given(st.floats(2.0**-30, 2.0**15, width=32).map(np.float32), st.sampled_from(sorted(HALVES)))
def test_half_above_is_the_least_half_that_is_not_below(value: np.float32, name: str) -> None:
    half = HALVES[name]
    found = half_above(np.array(value), half)
    assert found.shape == ()
    assert found >= value
    assert to_half(found, half) == found
    below = np.nextafter(half.dtype.type(found), half.dtype.type(0))
    assert np.float32(below) < value
