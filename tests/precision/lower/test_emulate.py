"""The `emulate` lowering: Q/DQ exactly as TensorRT reads them, and the numbers they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, numpy_helper
from tinymodels import Net
from tinyquant import (
    PLACED,
    Case,
    case,
    fake,
    initializer,
    maker,
    named,
    numpy_outputs,
    op_counts,
    outputs,
    read_edges,
    set_weight,
)

from trtune.calibrate.table import CalibrationTable, MissingScaleError
from trtune.configs.errors import ModelError
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.file import tensor_spec
from trtune.precision.graph.view import GraphView, load_model, save_model
from trtune.precision.lower.emulate import LOWERINGS, lower_deploy, lower_emulate
from trtune.precision.lower.half_on_cpu import has_halves, in_float32
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import Candidate


def emulated(prepared: Case) -> onnx.ModelProto:
    return lower_emulate(prepared.model, prepared.plan, prepared.table)


def pairs_of(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The QuantizeLinear nodes."""
    return [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]


def specs(infos: Any) -> list[Any]:
    return [tensor_spec(info) for info in infos]


# The form


@pytest.mark.parametrize("name", [name for name in PLACED if name != "quantized"])
def test_exactly_the_planned_edges_read_a_pair(name: str) -> None:
    found = emulated(named(name))
    assert read_edges(found) == PLACED[name]
    assert len(pairs_of(found)) == len(PLACED[name])  # one pair however many readers


@pytest.mark.parametrize("name", PLACED)
def test_the_model_is_valid_and_its_outside_unchanged(name: str) -> None:
    prepared = named(name)
    before = prepared.model.proto.SerializeToString(deterministic=True)
    found = emulated(prepared)
    onnx.checker.check_model(found, full_check=True)
    source = prepared.model.proto
    assert specs(found.graph.input) == specs(source.graph.input)
    assert specs(found.graph.output) == specs(source.graph.output)
    assert found.opset_import == source.opset_import
    assert source.SerializeToString(deterministic=True) == before
    again = emulated(prepared)
    assert again.SerializeToString(deterministic=True) == found.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("name", [name for name in PLACED if name != "quantized"])
def test_activation_scales_are_zero_dimensional_with_int8_zero_point_0(name: str) -> None:
    prepared = named(name)
    found = emulated(prepared)
    for node in pairs_of(found):
        scale, zero = (initializer(found, entry) for entry in node.input[1:3])
        assert list(scale.dims) == []  # [1] makes TensorRT compute everything in float
        assert scale.data_type == TensorProto.FLOAT
        assert float(numpy_helper.to_array(scale)) == prepared.table.scale(node.input[0])
        assert list(zero.dims) == []
        assert zero.data_type == TensorProto.INT8
        assert int(numpy_helper.to_array(zero)) == 0
        (back,) = (n for n in found.graph.node if n.input[0] == node.output[0])
        assert back.op_type == "DequantizeLinear"
        assert list(back.input[1:]) == list(node.input[1:])


def weight_node(kind: str) -> tuple[onnx.ModelProto, int]:
    """A model with one product `y` of weight `w`, and its channel axis."""
    net = Net()
    if kind in ("Conv", "Conv, depthwise"):
        group = 4 if "depthwise" in kind else 1
        x = net.input("x", ("N", 4, 5, 5))
        w = net.weight("w", 8, 4 // group, 3, 3)
        net.op("Conv", x, w, net.weight("b", 8), out="y", kernel_shape=[3, 3], group=group)
        return net.model({"y": ("N", 8, 3, 3)}), 0
    if kind == "ConvTranspose":
        x, w = net.input("x", ("N", 4, 3, 3)), net.weight("w", 4, 6, 2, 2)
        net.op("ConvTranspose", x, w, net.weight("b", 6), out="y", strides=[2, 2])
        return net.model({"y": ("N", 6, 6, 6)}), 1
    x = net.input("x", ("N", 5) if "batched" not in kind else ("N", 7, 5))
    if kind == "Gemm, transB":
        net.op("Gemm", x, net.weight("w", 8, 5), net.weight("b", 8), out="y", transB=1)
        return net.model({"y": ("N", 8)}), 0
    w = net.weight("w", 5, 8)
    if kind == "Gemm, alpha and beta":
        net.op("Gemm", x, w, net.weight("b", 8), out="y", alpha=0.5, beta=2.0)
    elif kind == "Gemm":
        net.op("Gemm", x, w, net.weight("b", 8), out="y")
    else:
        net.op("MatMul", x, w, out="y")
    return net.model({"y": ("N", 7, 8) if "batched" in kind else ("N", 8)}), 1


@pytest.mark.parametrize(
    "kind",
    [
        *("Conv", "Conv, depthwise", "ConvTranspose", "Gemm", "Gemm, transB"),
        *("Gemm, alpha and beta", "MatMul", "MatMul, batched"),
    ],
)
def test_weights_are_int8_with_a_scale_for_each_output_channel(kind: str) -> None:
    proto, axis = weight_node(kind)
    spread = numpy_helper.to_array(initializer(proto, "w")).copy()
    np.moveaxis(spread, axis, 0)[0] *= 100  # one scale for all would lose the other channels
    set_weight(proto, "w", spread)
    prepared = case(proto)
    found = emulated(prepared)
    node = maker(found, maker(found, "y").input[1])
    assert node.op_type == "DequantizeLinear"
    assert node.attribute[0].i == axis
    codes, scales, zeros = (initializer(found, name) for name in node.input)
    assert codes.data_type == zeros.data_type == TensorProto.INT8
    assert list(scales.dims) == list(zeros.dims) == [spread.shape[axis]]
    expected = np.abs(np.moveaxis(spread, axis, 0)).reshape(spread.shape[axis], -1).max(axis=1)
    np.testing.assert_array_equal(
        numpy_helper.to_array(scales), expected.astype(np.float32) / np.float32(127)
    )
    assert "w" not in {tensor.name for tensor in found.graph.initializer}
    plain = numpy_outputs(
        prepared.model.proto,
        prepared.feeds,
        edges={"x": (("n_y", 0),)},
        scales=prepared.table.scales,
        weights={"n_y": axis},
    )
    np.testing.assert_allclose(
        outputs(found, prepared.feeds)["y"], plain["y"], rtol=1e-5, atol=1e-4
    )


def test_biases_stay_float() -> None:
    found = emulated(named("conv_relu"))
    for tensor in ("conv1", "conv2", "logits"):
        bias = initializer(found, maker(found, tensor).input[2])
        assert bias.name == f"{tensor}_b"
        assert bias.data_type == TensorProto.FLOAT


# The numbers

AXES: dict[str, dict[str, int]] = {
    "conv_relu": {"n_conv1": 0, "n_conv2": 0, "n_logits": 0},
    "depthwise": {"n_expand": 0, "n_dw": 0, "n_project": 0, "n_logits": 0},
    "residual": {"n_stem": 0, "n_conv1": 0, "n_conv2": 0, "n_logits": 0},
    "concat": {"n_squeeze": 0, "n_left": 0, "n_right": 0, "n_mix": 0, "n_logits": 0},
    "silu_se": {"n_stem": 0, "n_dw": 0, "n_se_down": 0, "n_se_up": 0, "n_logits": 0},
    "mlp": {"n_fc1": 0, "n_fc2": 1},
    "attention": {"n_q": 1, "n_k": 1, "n_v": 1, "n_proj": 1},
    "shared_weight": {"n_stem": 0, "n_conv1": 0, "n_conv2": 0, "n_logits": 0},
    "two_inputs": {"n_conv": 0, "n_meta_fc": 0, "n_logits": 0},
}


@pytest.mark.parametrize("name", AXES)
def test_the_outputs_are_those_of_a_plain_numpy_computation(name: str) -> None:
    prepared = named(name)
    (found,) = outputs(emulated(prepared), prepared.feeds).values()
    (expected,) = numpy_outputs(
        prepared.model.proto,
        prepared.feeds,
        edges=PLACED[name],
        scales=prepared.table.scales,
        weights=AXES[name],
    ).values()
    # A value right between two codes may round either way after another order of additions.
    np.testing.assert_allclose(found, expected, atol=2e-3)
    (exact,) = outputs(prepared.model.proto, prepared.feeds).values()
    assert np.abs(found - expected).mean() < 0.05 * np.abs(found - exact).mean()


def test_values_beyond_amax_saturate() -> None:
    proto, _ = weight_node("Gemm")
    prepared = case(proto, amax={"x": 0.5})
    values = np.float32([[3.0, -3.0, 0.5, -0.5, 0.25]])
    table = CalibrationTable({"x": prepared.table.scale("x")})
    found = lower_emulate(prepared.model, prepared.plan, table)
    (pair,) = pairs_of(found)
    quantized = maker(found, maker(found, "y").input[0]).output[0]
    inner = outputs(found, {"x": values}, outputs=[quantized])[quantized]
    np.testing.assert_array_equal(inner, fake(values, table.scale("x")))
    assert inner.max() == np.float32(127) * np.float32(table.scale("x"))
    assert inner.min() == np.float32(-128) * np.float32(table.scale("x"))
    assert pair.input[0] == "x"


def test_a_channel_of_zeros_stays_zero() -> None:
    proto, _ = weight_node("Conv")
    weight = numpy_helper.to_array(initializer(proto, "w")).copy()
    weight[3] = 0
    set_weight(proto, "w", weight)
    prepared = case(proto)
    found = outputs(emulated(prepared), prepared.feeds)["y"]
    bias = numpy_helper.to_array(initializer(proto, "b"))
    np.testing.assert_array_equal(found[:, 3], np.full_like(found[:, 3], bias[3]))
    assert np.isfinite(found).all()


def test_only_one_batch_of_a_fixed_size_goes_in() -> None:
    prepared = named("fixed_batch")
    found = emulated(prepared)
    assert tensor_spec(found.graph.input[0]) == prepared.model.inputs[0]
    assert outputs(found, prepared.feeds)["logits"].shape == (1, 10)


# Pins and shared weights


def test_a_pinned_node_reads_what_the_float_model_has() -> None:
    prepared = named("residual", pins={"n_conv2": "fp32"})
    found = emulated(prepared)
    assert list(maker(found, "conv2").input) == ["relu1", "conv2_w", "conv2_b"]
    assert list(maker(found, "sum").input) == ["conv2", "stem_relu"]
    assert op_counts(found)["QuantizeLinear"] == 3


def test_a_weight_that_two_nodes_share_is_stored_once() -> None:
    found = emulated(named("shared_weight"))
    first, second = maker(found, "conv1").input[1], maker(found, "conv2").input[1]
    assert first == second
    assert "conv1_w" not in {tensor.name for tensor in found.graph.initializer}


def test_a_weight_that_a_float_node_shares_stays_for_it() -> None:
    prepared = named("shared_weight", pins={"n_conv2": "fp32"})
    found = emulated(prepared)
    assert maker(found, "conv2").input[1] == "conv1_w"
    assert maker(found, maker(found, "conv1").input[1]).op_type == "DequantizeLinear"
    expected = numpy_outputs(
        prepared.model.proto,
        prepared.feeds,
        edges={t: e for t, e in PLACED["shared_weight"].items() if t != "relu1"},
        scales=prepared.table.scales,
        weights={"n_stem": 0, "n_conv1": 0, "n_logits": 0},
    )
    np.testing.assert_allclose(
        outputs(found, prepared.feeds)["logits"], expected["logits"], atol=1e-4
    )


def test_a_weight_shared_along_different_axes_is_stored_for_each() -> None:
    net = Net()
    w = net.weight("w", 16, 16)
    x = net.op("Relu", net.op("Gemm", net.input("x", ("N", 16)), w, out="a", transB=1), out="r")
    net.op("MatMul", x, w, out="y")
    prepared = case(net.model({"y": ("N", 16)}))
    found = emulated(prepared)
    rows, columns = (maker(found, maker(found, t).input[1]) for t in ("a", "y"))
    assert (rows.attribute[0].i, columns.attribute[0].i) == (0, 1)
    expected = numpy_outputs(
        prepared.model.proto,
        prepared.feeds,
        edges={"x": (("n_a", 0),), "r": (("n_y", 0),)},
        scales=prepared.table.scales,
        weights={"n_a": 0, "n_y": 1},
    )
    np.testing.assert_allclose(outputs(found, prepared.feeds)["y"], expected["y"], atol=1e-4)


def test_a_tensor_without_a_scale_is_named() -> None:
    prepared = named("conv_relu")
    table = CalibrationTable({"input": 0.1, "relu2": 0.1, "flat": 0.1})
    with pytest.raises(MissingScaleError, match=r"'relu1' has no scale.*did you mean 'relu2'"):
        lower_emulate(prepared.model, prepared.plan, table)


def test_a_table_may_hold_more_than_is_needed() -> None:
    prepared = named("conv_relu")
    table = CalibrationTable({**prepared.table.scales, "nobody": 1.0})
    assert lower_emulate(prepared.model, prepared.plan, table) == emulated(prepared)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_nothing_quantizable_gives_the_same_graph(lowering: str) -> None:
    prepared = named("nothing_quantizable")
    found = LOWERINGS[lowering](prepared.model, prepared.plan, CalibrationTable({}))
    assert found.graph == prepared.model.proto.graph


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_lowered_model_can_be_lowered_again_without_a_name_twice(lowering: str) -> None:
    first = named("residual", pins={"n_conv2": "fp32"})
    once = LOWERINGS[lowering](first.model, first.plan, first.table)
    again = case(once)
    twice = LOWERINGS[lowering](again.model, again.plan, again.table)
    onnx.checker.check_model(twice, full_check=True)
    assert "n_conv2" in again.plan.int8_nodes
    made = [name for node in twice.graph.node for name in node.output]
    assert len(made) == len(set(made))
    assert np.isfinite(outputs(twice, again.feeds)["logits"]).all()


# Half types

HALF_PLANS: dict[str, dict[str, Any]] = {
    "fp16": {"default": "fp16"},
    "bf16": {"default": "bf16"},
    "int8 and fp16": {"fallback": "fp16"},
    "int8 and bf16": {"fallback": "bf16"},
}


def halved(prepared: Case, **options: Any) -> onnx.ModelProto:
    """The `emulate` lowering of a plan with half types, valid and of consistent types."""
    plan = make_plan(prepared.view, **options)
    found = lower_emulate(prepared.model, plan, prepared.table)
    onnx.checker.check_model(found, full_check=True)
    onnx.shape_inference.infer_shapes(found, check_type=True, strict_mode=True)
    return found


def value(proto: onnx.ModelProto, name: str) -> Any:
    return numpy_helper.to_array(initializer(proto, name))


@pytest.mark.parametrize("kind", HALF_PLANS)
@pytest.mark.parametrize("name", [name for name in PLACED if name != "half_weights"])
def test_half_types_give_about_the_same_numbers(name: str, kind: str) -> None:
    prepared = named(name)
    found = halved(prepared, **HALF_PLANS[kind])
    source = prepared.model.proto
    assert specs(found.graph.input) == specs(source.graph.input)
    assert specs(found.graph.output) == specs(source.graph.output)
    quantized = "int8" in kind
    reference = emulated(prepared) if quantized else source
    exact = outputs(reference, prepared.feeds)
    bits = 8 if "bf16" in kind else 11
    for tensor, values in outputs(in_float32(found), prepared.feeds).items():
        error = np.abs(values - exact[tensor]).max() / np.abs(exact[tensor]).max()
        # Values between two int8 codes may fall to the other side: that is a whole step.
        assert error < (0.1 if quantized else 24 * 2.0**-bits)


def test_an_int8_conv_has_half_inputs_a_half_bias_and_a_half_result() -> None:
    found = halved(named("conv_relu"), fallback="fp16")
    (opset,) = found.opset_import
    assert opset.version == 19
    conv = maker(found, "conv2")
    data, weight = (maker(found, name) for name in conv.input[:2])
    assert data.op_type == weight.op_type == "DequantizeLinear"
    scales = [value(found, n.input[1]) for n in (data, weight)]
    assert [s.dtype for s in scales] == [np.float16] * 2
    assert [s.ndim for s in scales] == [0, 1]
    assert value(found, conv.input[2]).dtype == np.float16
    assert maker(found, data.input[0]).input[1] == data.input[1]
    assert op_counts(found)["Cast"] == 1  # logits; the input goes into its pair in float32


def test_scales_read_in_half_are_rounded_up_before_the_codes_are_made() -> None:
    prepared = named("conv_relu")
    found = halved(prepared, fallback="fp16")
    dequantize = maker(found, maker(found, "conv2").input[1])
    weight = value(prepared.model.proto, "conv2_w")
    scales = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    stored = value(found, dequantize.input[1]).astype(np.float32)
    assert (stored >= scales).all()
    assert (stored <= scales * 1.001).all()
    codes = np.rint(weight / stored[:, None, None, None])
    np.testing.assert_array_equal(value(found, dequantize.input[0]), codes)
    pair = next(n for n in found.graph.node if n.op_type == "QuantizeLinear")
    assert pair.input[0] == "input"
    scale = value(found, pair.input[1])
    assert scale.dtype == np.float32  # the input is float32, and so is its pair's first half
    assert scale == np.float32(np.float16(scale)) >= prepared.table.scale("input")


def test_a_pinned_node_in_between_has_casts_and_no_pairs() -> None:
    found = halved(named("residual"), fallback="fp16", pins={"n_conv2": "fp32"})
    assert list(maker(found, "conv2").input) == ["relu1/float32", "conv2_w", "conv2_b"]
    assert maker(found, "relu1/float32").op_type == "Cast"
    assert list(maker(found, "sum").input) == ["conv2", "stem_relu/float32"]
    assert maker(found, maker(found, "pooled").input[0]).op_type == "Cast"


def test_one_tensor_dequantized_for_two_types() -> None:
    prepared = named("concat")
    plan = make_plan(prepared.view, fallback="fp16")
    wide = dataclasses.replace(plan.nodes["n_left"], around="fp32")
    plan = dataclasses.replace(plan, nodes={**plan.nodes, "n_left": wide})
    found = lower_emulate(prepared.model, plan, prepared.table)
    onnx.checker.check_model(found, full_check=True)
    left, right = (maker(found, maker(found, t).input[0]) for t in ("left", "right"))
    assert left.input[0] == right.input[0]  # one QuantizeLinear
    assert value(found, left.input[1]) == value(found, right.input[1])
    assert [value(found, n.input[1]).dtype.name for n in (left, right)] == ["float32", "float16"]


def test_a_range_beyond_the_type_is_refused() -> None:
    prepared = case(tinymodels.conv_relu(), amax={"relu1": 7e4})
    with pytest.raises(ModelError, match="tensor 'relu1' reaches 70000, and float16 ends at 65504"):
        halved(prepared, fallback="fp16")
    assert halved(prepared, fallback="bf16") is not None


def test_a_half_model_is_refused() -> None:
    with pytest.raises(ModelError, match="the model is float16 already"):
        halved(named("half_weights"), fallback="fp16")


@pytest.mark.parametrize("kind", HALF_PLANS)
def test_deploy_computes_in_float32_what_is_not_int8(kind: str) -> None:
    prepared = named("conv_relu")
    plan = make_plan(prepared.view, **HALF_PLANS[kind])
    found = lower_deploy(prepared.model, plan, prepared.table)
    assert not has_halves(found)
    assert np.isfinite(outputs(found, prepared.feeds)["logits"]).all()


# External weights


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_weights_in_another_file_are_read_from_there(lowering: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in" / "m.onnx", tmp_path / "out" / "m.onnx"
    source.parent.mkdir()
    onnx.save(
        tinymodels.conv_relu(), source, save_as_external_data=True, location="w.bin",
        size_threshold=16,
    )  # fmt: skip
    model = load_model(source, load_limit=0)
    assert model.external_dir is not None
    assert initializer(model.proto, "conv2_w").data_location == TensorProto.EXTERNAL
    inside = named("conv_relu", pins={"n_conv1": "fp32"})
    plan = make_plan(GraphView.of(model), pins={"n_conv1": "fp32"})
    found = LOWERINGS[lowering](model, plan, inside.table)
    save_model(found, target, model.external_dir)
    expected = LOWERINGS[lowering](inside.model, inside.plan, inside.table)
    np.testing.assert_allclose(
        outputs(onnx.load(target), inside.feeds)["logits"],
        outputs(expected, inside.feeds)["logits"],
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("precision", "weight", "place"),
    [
        pytest.param("fp32", "conv2_w", TensorProto.EXTERNAL, id="float32 ones stay there"),
        pytest.param("fp16", "conv2_w/float16", TensorProto.DEFAULT, id="half ones do not"),
    ],
)
def test_half_weights_are_made_of_those_in_another_file(
    precision: str, weight: str, place: int, tmp_path: Path
) -> None:
    onnx.save(
        tinymodels.conv_relu(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin",
        size_threshold=16,
    )  # fmt: skip
    model = load_model(tmp_path / "m.onnx", load_limit=0)
    plan = make_plan(GraphView.of(model), fallback="fp16", pins={"n_conv2": precision})
    inside = named("conv_relu")
    found = lower_emulate(model, plan, inside.table)
    assert initializer(found, weight).data_location == place
    save_model(found, tmp_path / "out.onnx", model.external_dir)
    expected = lower_emulate(inside.model, plan, inside.table)
    np.testing.assert_array_equal(
        outputs(in_float32(onnx.load(tmp_path / "out.onnx")), inside.feeds)["logits"],
        outputs(in_float32(expected), inside.feeds)["logits"],
    )


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["residual", "branches", "two_outputs", "fixed_batch"])
def test_the_backend_builds_and_runs_what_is_lowered(
    name: str, lowering: Any, tmp_path: Path
) -> None:
    prepared = named(name)
    backend = OnnxruntimeBackend(lowering)
    info = backend.build(Candidate(prepared.model, prepared.plan, prepared.table), tmp_path)
    assert info.path == tmp_path / "model.onnx"
    with backend.load(tmp_path) as engine:
        found = engine.infer(prepared.feeds)
    exact = outputs(prepared.model.proto, prepared.feeds)
    assert list(found) == list(exact)
    for tensor, values in exact.items():
        assert np.abs(found[tensor] - values).max() < 0.1 * np.abs(values).max()


def test_the_lowerings_by_name() -> None:
    assert dict(LOWERINGS) == {"emulate": lower_emulate, "deploy": lower_deploy}
