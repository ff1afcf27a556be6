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
    y = net.op("QLinearSigmoid", x, s, z, s, z, out="y", domain="com.microsoft")
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
