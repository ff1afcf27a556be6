"""The `emulate` lowering: Q/DQ exactly as TensorRT reads them, and the numbers they stand for."""

from __future__ import annotations

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
from trtune.precision.backends.base import Candidate
from trtune.precision.backends.onnxruntime import OnnxruntimeBackend
from trtune.precision.graph import GraphView, load_model, save_model
from trtune.precision.lowering import LOWERINGS, lower_deploy, lower_emulate
from trtune.precision.model import tensor_spec
from trtune.precision.plan import make_plan


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
        atol=1e-6,
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
