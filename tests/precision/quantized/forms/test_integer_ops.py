"""Integer operators written as pairs around float ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tinymodels
from onnx import helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from ortquantized import Reader, quantized
from tinymodels import Net
from tinyqat import assert_same_bits, imported
from tinyquant import op_counts, outputs

from trtune.configs.errors import ModelError
from trtune.precision.graph.view import model_from_proto
from trtune.precision.quantized.forms.integer_ops import write_as_pairs
from trtune.precision.quantized.importing import import_quantized, insert_quantization

ORT = tuple(map(int, onnxruntime.__version__.split(".")[:2]))


def qlinear(
    op: str = "QLinearConv", *, per_channel: bool = True, bias: bool = True
) -> onnx.ModelProto:
    """One integer operator between a QuantizeLinear and a DequantizeLinear."""
    net = Net()
    rng = np.random.default_rng(3)
    conv = op == "QLinearConv"
    x = net.input("input", tinymodels.PICTURE if conv else ("N", 16))
    s, z = net.const("x_scale", 0.03), net.const("x_zero", 0, np.int8)
    x = net.op("QuantizeLinear", x, s, z, out="codes")
    shape = (8, 3, 3, 3) if conv else (16, 10)
    outputs = 8 if conv else 10
    w = net.const("w", rng.integers(-127, 128, shape), np.int8)
    steps = rng.uniform(0.001, 0.003, outputs) if per_channel else 0.002
    ws = net.const("w_scale", steps)
    wz = net.const("w_zero", np.zeros(outputs if per_channel else ()), np.int8)
    ys, yz = net.const("y_scale", 0.04), net.const("y_zero", 0, np.int8)
    extra = [net.const("b", rng.integers(-500, 500, 8), np.int32)] if bias and conv else []
    attrs = {"kernel_shape": [3, 3], "pads": [1] * 4} if conv else {}
    y = net.op(op, x, s, z, w, ws, wz, ys, yz, *extra, out="y_codes", name="product", **attrs)
    net.op("DequantizeLinear", y, ys, yz, out="output")
    return net.model({"output": ("N", 8, 8, 8) if conv else ("N", 10)})


@pytest.mark.parametrize(
    ("op", "options"),
    [
        pytest.param("QLinearConv", {}, id="conv, per channel, bias"),
        pytest.param("QLinearConv", {"per_channel": False, "bias": False}, id="conv, one scale"),
        pytest.param("QLinearMatMul", {}, id="matmul, per column"),
        pytest.param("QLinearMatMul", {"per_channel": False}, id="matmul, one scale"),
    ],
)
def test_operators_with_scales_become_pairs(op: str, options: dict[str, bool]) -> None:
    proto = qlinear(op, **options)
    found = imported(proto)
    rows = [row for row in found.findings if row.kind == "integer-operator"]
    assert [(row.node, row.repair, row.repaired) for row in rows] == [("product", "exact", True)]
    assert found.plan.int8_nodes == ("product",)
    feeds = tinymodels.feeds(proto, batch=4)
    before = tinymodels.run(proto, feeds)["output"]
    after = tinymodels.run(insert_quantization(found.model, found.table), feeds)["output"]
    # A float sum may round a tie to the other code.
    codes = np.rint(np.abs(before - after) / np.float32(0.04))
    assert codes.max() <= 1
    assert (codes == 0).mean() > 0.99


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(
            "ConvInteger",
            marks=pytest.mark.skipif(
                ORT < (1, 24), reason="this onnxruntime has no ConvInteger with int8 weights"
            ),
        ),
        "MatMulInteger",
    ],
)
def test_integer_products_with_a_constant_scale_become_pairs(op: str) -> None:
    net = Net()
    rng = np.random.default_rng(3)
    conv = op == "ConvInteger"
    x = net.input("input", tinymodels.PICTURE if conv else ("N", 16))
    s, z = net.const("x_scale", 0.03), net.const("x_zero", 128, np.uint8)
    x = net.op("QuantizeLinear", x, s, z, out="codes")
    shape = (8, 3, 3, 3) if conv else (16, 10)
    w, wz = net.const("w", rng.integers(-127, 128, shape), np.int8), net.const("wz", 0, np.int8)
    attrs = {"kernel_shape": [3, 3], "pads": [1] * 4} if conv else {}
    y = net.op(op, x, w, z, wz, out="sums", name="product", **attrs)
    y = net.op("Cast", y, out="floats", to=onnx.TensorProto.FLOAT)
    net.op("Mul", y, net.const("total", 0.03 * 0.002), out="output")
    proto = net.model({"output": ("N", 8, 8, 8) if conv else ("N", 10)})
    found = imported(proto)
    assert found.plan.int8_nodes == ("product",)
    assert op_counts(found.model.proto) == {op.removesuffix("Integer"): 1}
    feeds = tinymodels.feeds(proto, batch=4)
    before = tinymodels.run(proto, feeds)["output"]
    after = tinymodels.run(insert_quantization(found.model, found.table), feeds)["output"]
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)


def test_a_model_of_onnxruntimes_quantizer_in_operator_form(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    model = tinymodels.conv_relu()
    onnx.save(model, source)
    quantize_static(
        source,
        target,
        Reader(model),
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=["Conv"],
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )
    operators = onnx.load(target)
    assert op_counts(operators)["QLinearConv"] == 2
    found = imported(operators)
    assert found.plan.counts()["int8"] == 2
    feeds = tinymodels.feeds(model, batch=4)
    before = tinymodels.run(operators, feeds)["logits"]
    after = tinymodels.run(insert_quantization(found.model, found.table), feeds)["logits"]
    np.testing.assert_allclose(before, after, atol=0.02)


def test_dynamic_quantization_is_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(tinymodels.mlp(), source)
    quantize_dynamic(source, target)
    with pytest.raises(ModelError) as caught:
        imported(onnx.load(target), allow_requantize=True)
    text = str(caught.value)
    assert "dynamic-quantization" in text
    assert "quantize the FP32 model with calibration instead" in text


def test_operators_of_onnxruntime_alone_are_refused() -> None:
    net = Net()
    s, z = net.const("s", 0.03), net.const("z", 0, np.int8)
    x = net.op("QuantizeLinear", net.input("input"), s, z, out="codes")
    y = net.op("QAttention", x, x, s, s, out="y", domain="com.microsoft", num_heads=1)
    net.op("DequantizeLinear", y, s, z, out="output")
    model = net.model({"output": tinymodels.PICTURE})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ModelError, match=r"QuantFormat\.QDQ"):
        imported(model)


def test_other_models_pass_untouched() -> None:
    model = model_from_proto(tinymodels.conv_relu())
    proto, rows = write_as_pairs(model.proto)
    assert proto is model.proto
    assert rows == ()


@pytest.mark.parametrize("name", ["conv_relu", "residual", "concat", "depthwise", "mlp"])
def test_a_symmetric_model_of_onnxruntimes_quantizer_comes_back_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    model = tinymodels.MODELS[name]()
    onnx.save(model, source)
    quantize_static(
        source,
        target,
        Reader(model),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    found = import_quantized(target)
    assert not found.changes
    assert len(found.plan.int8_nodes) >= 2
    feeds = tinymodels.feeds(model, batch=4)
    assert_same_bits(found.original.proto, insert_quantization(found.model, found.table), feeds)


@pytest.mark.parametrize("name", ["conv_relu", "residual", "depthwise"])
def test_an_asymmetric_model_of_onnxruntimes_quantizer_stays_close(name: str) -> None:
    model = tinymodels.MODELS[name]()
    proto = quantized(model)
    with pytest.raises(ModelError, match=r"precision\.allow_requantize"):
        imported(proto)
    found = imported(proto, allow_requantize=True)
    feeds = tinymodels.feeds(model, batch=4)
    before = outputs(proto, feeds)["logits"]
    after = outputs(insert_quantization(found.model, found.table), feeds)["logits"]
    assert 10 * np.log10((before**2).sum() / ((before - after) ** 2).sum()) > 20


def _codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8)


MICROSOFT_OPS = {
    "QLinearAdd": (2, {}),
    "QLinearMul": (2, {}),
    "QLinearSigmoid": (1, {}),
    "QLinearLeakyRelu": (1, {"alpha": 0.1}),
    "QLinearSoftmax": (1, {"axis": -1, "opset": 17}),
    "QLinearGlobalAveragePool": (1, {"channels_last": 0}),
    "QLinearAveragePool": (1, {"kernel_shape": [2, 2], "strides": [2, 2], "channels_last": 0}),
    "QLinearConcat": (2, {"axis": 1}),
}


def microsoft(op: str) -> onnx.ModelProto:
    """One of onnxruntime's own integer operators between pairs, with asymmetric uint8 scales."""
    count, attributes = MICROSOFT_OPS[op]
    net = Net(opset=17)
    x = net.input("input", ("N", 4, 6, 6))
    s, z = net.const("x_scale", 0.03), net.const("x_zero", 120, np.uint8)
    codes = net.op("QuantizeLinear", x, s, z, out="codes")
    inputs = [codes, s, z]
    if count == 2:
        other = net.const("other", _codes(np.random.default_rng(5), 1, 4, 6, 6), np.uint8)
        if op == "QLinearConcat":
            other = codes
        t = net.const("o_scale", 0.02) if op != "QLinearConcat" else s
        inputs += [other, t, net.const("o_zero", 131, np.uint8) if op != "QLinearConcat" else z]
    small = op in ("QLinearSigmoid", "QLinearSoftmax")
    ys = net.const("y_scale", 1 / 256 if small else 0.05)
    yz = net.const("y_zero", 0 if small else 118, np.uint8)
    ordered = [ys, yz, *inputs] if op == "QLinearConcat" else [*inputs, ys, yz]
    y = net.op(op, *ordered, out="y", name="product", domain="com.microsoft", **attributes)
    net.op("DequantizeLinear", y, ys, yz, out="output")
    sizes = {
        "QLinearGlobalAveragePool": (4, 1, 1),
        "QLinearAveragePool": (4, 3, 3),
        "QLinearConcat": (8, 6, 6),
    }
    proto = net.model({"output": ("N", *sizes.get(op, (4, 6, 6)))})
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


@pytest.mark.parametrize("op", MICROSOFT_OPS)
def test_operators_of_onnxruntime_become_pairs(op: str) -> None:
    """The same values, but for a code where onnxruntime rounds a fixed-point sum otherwise."""
    proto = model_from_proto(microsoft(op), fold="none").proto
    made, found = write_as_pairs(proto)
    assert [(row.kind, row.repair) for row in found] == [("integer-operator", "exact")]
    assert not any(node.domain for node in made.graph.node)
    onnx.checker.check_model(made)
    feeds = {"input": np.random.default_rng(1).normal(0, 2, (3, 4, 6, 6)).astype(np.float32)}
    before, after = (outputs(model, feeds)["output"] for model in (proto, made))
    step = 1 / 256 if op in ("QLinearSigmoid", "QLinearSoftmax") else 0.05
    assert np.abs(before - after).max() <= step * 1.01
    assert np.mean(before != after) < 0.1  # the mean of four codes is often half-way


@pytest.mark.parametrize("quantized_result", [True, False])
def test_a_gemm_of_onnxruntime_becomes_pairs(quantized_result: bool) -> None:
    net, rng = Net(opset=17), np.random.default_rng(2)
    s, z = net.const("x_scale", 0.03), net.const("x_zero", 120, np.uint8)
    codes = net.op("QuantizeLinear", net.input("input", ("N", 16)), s, z, out="codes")
    w = net.const("w", rng.integers(-127, 128, (10, 16)), np.int8)
    ws, wz = net.const("ws", rng.uniform(0.001, 0.003, 10)), net.const("wz", [0] * 10, np.int8)
    b = net.const("b", rng.integers(-900, 900, 10), np.int32)
    ys, yz = net.const("ys", 0.02), net.const("yz", 128, np.uint8)
    out = "y" if quantized_result else "output"
    more = [ys, yz] if quantized_result else []
    attrs = {"alpha": 1.0, "transB": 1}
    y = net.op(
        "QGemm", codes, s, z, w, ws, wz, b, *more,
        out=out, name="product", domain="com.microsoft", **attrs,
    )  # fmt: skip
    if quantized_result:
        net.op("DequantizeLinear", y, ys, yz, out="output")
    proto = net.model({"output": ("N", 10)})
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto = model_from_proto(proto, fold="none").proto
    made, _ = write_as_pairs(proto)
    feeds = {"input": rng.normal(0, 1, (5, 16)).astype(np.float32)}
    before, after = (outputs(model, feeds)["output"] for model in (proto, made))
    tolerance = 0.0201 if quantized_result else 1e-5
    np.testing.assert_allclose(after, before, rtol=0, atol=tolerance)


def test_an_operator_with_its_channels_last_is_refused() -> None:
    proto = microsoft("QLinearGlobalAveragePool")
    for node in proto.graph.node:
        for entry in node.attribute:
            if entry.name == "channels_last":
                entry.i = 1
    made, found = write_as_pairs(model_from_proto(proto, fold="none").proto)
    assert [(row.kind, row.repair) for row in found] == [("integer-operator", "")]
    assert any(node.op_type == "QLinearGlobalAveragePool" for node in made.graph.node)
