"""Half precision on a CPU: what is rounded where, and that overflow is seen."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tinymodels
from onnx import TensorProto, helper, numpy_helper
from tinymodels import Net
from tinyquant import op_counts, outputs

from trtune.configs.errors import ModelError
from trtune.precision.graph.view import model_from_proto
from trtune.precision.lower.casts import insert_casts
from trtune.precision.lower.half_on_cpu import has_halves, in_float32

KINDS = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}

ORT = tuple(map(int, onnxruntime.__version__.split(".")[:2]))


def product(kind: str, *, scale: float = 1.0) -> onnx.ModelProto:
    """y = relu(x w) + b in `kind`, opset 22."""
    net = Net(opset=22)
    w = net.const("w", np.array([[1.0, 0.1], [0.3, -0.7]]) * scale)
    x = net.op("MatMul", net.input("x", ("N", 2)), w, out="m")
    net.op("Add", net.op("Relu", x, out="r"), net.const("b", [0.2, 0.001]), out="y")
    proto = model_from_proto(net.model({"y": ("N", 2)})).proto
    return insert_casts(proto, dict.fromkeys(("n_m", "n_r", "n_y"), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_is_rounded_and_sums_are_not(kind: str) -> None:
    proto, half = product(kind), KINDS[kind]

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(half).astype(np.float32)

    x = np.float32([[1.2345678, 2.3456789], [-3.3333, 0.77777]])
    w, b = rounded(np.float32([[1.0, 0.1], [0.3, -0.7]])), rounded(np.float32([0.2, 0.001]))
    expected = rounded(np.maximum(rounded(rounded(x) @ w), 0) + b)
    found = in_float32(proto)
    onnx.checker.check_model(found, full_check=True)
    assert found.graph.input == proto.graph.input
    assert found.graph.output == proto.graph.output
    np.testing.assert_array_equal(outputs(found, {"x": x})["y"], expected)
    assert op_counts(found)["Cast"] == 2 + 1 + 2 + 2  # x and back, y, and behind MatMul and Add


def test_inner_tensors_keep_their_names_and_hold_rounded_values() -> None:
    found = in_float32(product("fp16"))
    x = np.float32([[1.2345678, 2.3456789]])
    inner = outputs(found, {"x": x}, outputs=["m", "r"])
    for name in ("m", "r"):
        assert inner[name].dtype == np.float32
        np.testing.assert_array_equal(inner[name], inner[name].astype(np.float16))


def test_what_passes_65504_is_infinite() -> None:
    x = np.float32([[7.0, 7.0]])
    proto = product("fp16", scale=1e4)
    small = float(np.float16(0.001))
    assert outputs(in_float32(proto), {"x": x})["y"].tolist() == [[np.inf, small]]
    assert np.isfinite(outputs(in_float32(product("bf16", scale=1e4)), {"x": x})["y"]).all()


def test_a_float32_model_is_left_alone() -> None:
    proto = tinymodels.conv_relu()
    assert not has_halves(proto)
    assert in_float32(proto) is proto


def test_dequantized_values_are_not_rounded() -> None:
    net = Net(opset=19)
    scale, zero = net.const("s", np.float16(0.1), np.float16), net.const("z", 0, np.int8)
    x = net.op("Cast", net.input("x", ("N", 2)), out="h", to=TensorProto.FLOAT16)
    q = net.op("QuantizeLinear", x, scale, zero, out="q")
    d = net.op("DequantizeLinear", q, scale, zero, out="d")
    net.op("Cast", d, out="y", to=TensorProto.FLOAT)
    found = in_float32(net.model({"y": ("N", 2)}))
    (y,) = outputs(found, {"x": np.float32([[10.3, -2.0]])}).values()
    step = np.float32(np.float16(0.1))
    np.testing.assert_array_equal(y, np.float32([[103, -20]]) * step)


@pytest.mark.skipif(ORT < (1, 24), reason="this onnxruntime has no QuantizeLinear of opset 23")
def test_a_constant_of_a_computed_shape_and_the_type_of_a_dequantization() -> None:
    net = Net(opset=23)
    x = net.input("x", (2,))
    filler = numpy_helper.from_array(np.float16([2.5]))
    c = net.op("ConstantOfShape", net.op("Shape", x, out="shape"), out="c", value=filler)
    scale, zero = net.const("s", np.float16(0.5), np.float16), net.const("z", 0, np.int8)
    q = net.op("QuantizeLinear", c, scale, zero, out="q")
    d = net.op("DequantizeLinear", q, scale, zero, out="d", output_dtype=TensorProto.FLOAT16)
    net.op("Add", x, net.op("Cast", d, out="full", to=TensorProto.FLOAT), out="y")
    proto = net.model({"y": (2,)})
    proto.ir_version = 11
    found = in_float32(proto)
    onnx.checker.check_model(found, full_check=True)
    assert outputs(found, {"x": np.float32([1, 2])})["y"].tolist() == [3.5, 4.5]


def test_names_that_are_taken() -> None:
    net = Net()
    x = net.op("Cast", net.input("x", ("N", 2)), out="h", to=TensorProto.FLOAT16)
    t = net.op("Tanh", x, out="t")
    e = net.op("Exp", t, out="t/exact", name="t/Round")
    net.op("Cast", e, out="y", to=TensorProto.FLOAT)
    found = in_float32(net.model({"y": ("N", 2)}))
    onnx.checker.check_model(found, full_check=True)
    made = [name for node in found.graph.node for name in node.output]
    assert len(made) == len(set(made))
    assert {"t/exact", "t/exact_2"} <= set(made)


def test_half_inputs_and_outputs_stay_half() -> None:
    net = Net()
    x = net.input("x", ("N", 2), TensorProto.FLOAT16)
    t = net.op("Tanh", x, out="t")
    e = net.op("Exp", t, out="e")
    net.op("Mul", e, x, out="y")
    half = TensorProto.FLOAT16
    proto = net.model({"e": (("N", 2), half), "y": (("N", 2), half), "t": (("N", 2), half)})
    found = in_float32(proto)
    onnx.checker.check_model(found, full_check=True)
    values = np.float16([[0.3, -2.7], [0.1, 5.0]])
    e_of = np.exp(np.tanh(values.astype(np.float32)).astype(np.float16).astype(np.float32))
    got = outputs(found, {"x": values})
    assert [array.dtype for array in got.values()] == [np.float16] * 3
    np.testing.assert_array_equal(got["e"], e_of.astype(np.float16))
    product = got["e"].astype(np.float32) * values.astype(np.float32)
    np.testing.assert_array_equal(got["y"], product.astype(np.float16))
    kinds = {node.name: node.op_type for node in found.graph.node if "Cast" not in node.op_type}
    assert kinds == {"n_t": "Tanh", "n_e": "Exp", "n_y": "Mul"}


def test_bfloat16_inputs_are_refused() -> None:
    net = Net(opset=22)
    net.op("Cast", net.input("x", ("N", 2), TensorProto.BFLOAT16), out="y", to=TensorProto.FLOAT)
    with pytest.raises(ModelError, match="'x' is bfloat16; inputs and outputs have to be float32"):
        in_float32(net.model({"y": ("N", 2)}))


def test_half_types_in_a_body_are_refused() -> None:
    proto = tinymodels.branches()
    (chosen,) = (node for node in proto.graph.node if node.op_type == "If")
    for attribute in chosen.attribute:
        body, end = attribute.g, attribute.g.output[0].name
        half = helper.make_node("Cast", [end], ["half"], to=TensorProto.FLOAT16)
        body.node.extend([half, helper.make_node("Cast", ["half"], ["full"], to=TensorProto.FLOAT)])
        body.output[0].name = "full"
    half = helper.make_node("Cast", ["logits"], ["h"], name="h", to=TensorProto.FLOAT16)
    proto.graph.node.append(half)
    with pytest.raises(ModelError, match="the body of 'n_chosen' has half types"):
        in_float32(proto)
