"""FP8 in the `emulate` lowering: pairs, weights, opsets, and FP8 beside INT8 and halves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, numpy_helper
from tinyquant import Case, case, fake, fake_weight, initializer, maker, named, outputs, read_edges

from trtune.calibrate.float8 import through_float8
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ModelError
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_deploy, lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import Candidate

FLOAT8 = TensorProto.FLOAT8E4M3FN


def in_fp8(name: str, **options: object) -> Case:
    """A model of `tinymodels` with a plan of FP8."""
    found = named(name)
    return replace(found, plan=make_plan(found.view, default="fp8", **options))  # type: ignore[arg-type]


def emulated(prepared: Case) -> onnx.ModelProto:
    return lower_emulate(prepared.model, prepared.plan, prepared.table)


def kinds_of_pairs(proto: onnx.ModelProto) -> Counter[int]:
    """How many QuantizeLinear there are of each type."""
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    return Counter(types[n.input[2]] for n in proto.graph.node if n.op_type == "QuantizeLinear")


@pytest.mark.parametrize("name", ["conv_relu", "depthwise", "residual", "silu_se", "mlp"])
def test_pairs_stand_where_those_of_int8_do(name: str) -> None:
    fp8, int8 = emulated(in_fp8(name)), emulated(named(name))
    assert read_edges(fp8) == read_edges(int8)
    assert set(kinds_of_pairs(fp8)) == {FLOAT8}
    onnx.checker.check_model(fp8, full_check=True)
    assert fp8.ir_version >= 9
    assert next(o.version for o in fp8.opset_import if not o.domain) == 19


def test_scales_are_amax_by_448_and_scalar() -> None:
    found = in_fp8("conv_relu")
    proto = emulated(found)
    pair = maker(proto, next(n.input[0] for n in proto.graph.node if n.name == "n_conv1"))
    scale = initializer(proto, pair.input[1])
    assert list(scale.dims) == []
    expected = np.float32(found.table.amax("input")) / np.float32(448)
    assert numpy_helper.to_array(scale) == expected


def test_a_table_may_have_another_range_for_fp8() -> None:
    found = in_fp8("conv_relu")
    found = replace(found, table=replace(found.table, float8={"input": 0.5}))
    proto = emulated(found)
    pair = maker(proto, next(n.input[0] for n in proto.graph.node if n.name == "n_conv1"))
    assert numpy_helper.to_array(initializer(proto, pair.input[1])) == 0.5


def test_weights_are_fp8_codes_a_channel() -> None:
    found = in_fp8("conv_relu")
    proto = emulated(found)
    pair = maker(proto, next(n.input[1] for n in proto.graph.node if n.name == "n_conv2"))
    codes, scales, zero = (initializer(proto, name) for name in pair.input)
    assert (codes.data_type, zero.data_type, list(scales.dims)) == (FLOAT8, FLOAT8, [32])
    weights = found.view.constant("conv2_w")
    steps = np.abs(weights).max(axis=(1, 2, 3)) / np.float32(448)
    expected = (weights / steps.reshape(-1, 1, 1, 1)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(
        numpy_helper.to_array(codes).astype(np.float32), expected.astype(np.float32)
    )
    assert np.abs(expected.astype(np.float32)).max() == 448


def test_onnxruntime_computes_what_numpy_says() -> None:
    found = case(tinymodels.mlp())
    found = replace(found, plan=make_plan(found.view, default="fp8"))
    node = next(n for n in found.view.nodes if n.op_type == "Gemm")
    weights = found.view.constant(node.input[1])
    steps = np.abs(weights).max(axis=1, keepdims=True).astype(np.float32) / np.float32(448)
    codes = (weights / steps).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * steps
    data = found.feeds[node.input[0]]
    read = through_float8(data, found.table.float8_scale(node.input[0]))
    expected = read @ codes.T + found.view.constant(node.input[2])
    given = outputs(emulated(found), found.feeds, outputs=[node.output[0]])[node.output[0]]
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_readers_of_both_kinds_get_a_pair_each() -> None:
    found = named("concat", pins={"n_left": "fp8"})
    proto = emulated(found)
    left, right = (
        next(n for n in proto.graph.node if n.name == f"n_{s}") for s in ("left", "right")
    )
    amax = np.float32(found.table.amax("squeeze_relu"))
    for node, kind, most in ((left, FLOAT8, 448), (right, TensorProto.INT8, 127)):
        for tensor in node.input[:2]:
            assert initializer(proto, maker(proto, tensor).input[2]).data_type == kind
        scale = initializer(proto, maker(proto, node.input[0]).input[1])
        assert numpy_helper.to_array(scale) == amax / np.float32(most)
    values = outputs(proto, found.feeds, outputs=["squeeze_relu", "left", "right"])
    squeezed = values["squeeze_relu"]
    exact = outputs(found.model.proto, found.feeds, outputs=["squeeze_relu"])
    read = fake(squeezed, found.table.scale("squeeze_relu"))
    weights = fake_weight(found.view.constant("right_w"), 0)
    assert exact["squeeze_relu"].shape == read.shape
    assert weights.shape == found.view.constant("right_w").shape
    assert kinds_of_pairs(proto)[FLOAT8] == 1
    onnx.checker.check_model(proto, full_check=True)


def test_a_weight_of_two_precisions_is_stored_in_both() -> None:
    found = named("shared_weight", pins={"n_conv1": "fp8"})
    proto = emulated(found)
    types = Counter(t.data_type for t in proto.graph.initializer if t.dims and len(t.dims) == 4)
    assert types[FLOAT8] == 1
    assert types[TensorProto.INT8] == 2
    assert outputs(proto, found.feeds)["logits"].shape == (4, 10)


def test_the_skip_input_of_an_fp8_convolution_is_fp8() -> None:
    proto = emulated(in_fp8("residual"))
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    assert any(initializer(proto, maker(proto, t).input[2]).data_type == FLOAT8
               for t in add.input if maker(proto, t).op_type == "DequantizeLinear")  # fmt: skip


def test_int8_alone_stays_in_its_opset() -> None:
    proto = emulated(named("conv_relu"))
    assert next(o.version for o in proto.opset_import if not o.domain) == 17


@pytest.mark.parametrize("fallback", ["fp16", "bf16"])
def test_halves_around_fp8(fallback: str) -> None:
    found = in_fp8("depthwise", fallback=fallback)
    proto = emulated(found)
    onnx.checker.check_model(proto)
    given = outputs(in_float32(proto), found.feeds)["logits"]
    exact = outputs(found.model.proto, found.feeds)["logits"]
    noise = float(((given - exact) ** 2).sum() / (exact**2).sum())
    assert noise < 0.01


def test_a_range_beyond_fp16_is_refused_by_name() -> None:
    found = in_fp8("conv_relu", fallback="fp16")
    table = CalibrationTable({**found.table.scales, "relu1": 1000.0})
    with pytest.raises(ModelError, match="'relu1' reaches 127000"):
        lower_emulate(found.model, found.plan, table)


@pytest.mark.parametrize("name", ["depthwise", "conv_relu"])
def test_clips_and_relus_before_fp8_are_computed(name: str) -> None:
    """onnxruntime's fusion of a Clip or Relu with the Q behind it fails on float8."""
    found = in_fp8(name)
    exact = outputs(found.model.proto, found.feeds)["logits"]
    given = outputs(emulated(found), found.feeds)["logits"]
    assert not np.array_equal(given, exact)
    assert float(((given - exact) ** 2).sum() / (exact**2).sum()) < 0.01


def test_deploy_leaves_fp8_in_float_and_says_so(tmp_path: object) -> None:
    found = named("conv_relu", pins={"n_conv2": "fp8"})
    floats = named("conv_relu", pins={"n_conv2": "fp32"})
    proto = lower_deploy(found.model, found.plan, found.table)
    assert proto == lower_deploy(floats.model, floats.plan, floats.table)
    info = OnnxruntimeBackend("deploy").build(
        Candidate(found.model, found.plan, found.table), tmp_path  # type: ignore[arg-type]
    )  # fmt: skip
    assert info.precisions["n_conv2"] == "fp32"
    assert info.precisions["n_logits"] == "int8"
    said = [line for line in info.not_honoured if line.startswith("n_conv2: planned fp8")]
    assert len(said) == 1
    assert "no float8 kernels" in said[0]


def test_emulate_is_a_backend_for_fp8(tmp_path: object) -> None:
    found = in_fp8("silu_se")
    candidate = Candidate(found.model, found.plan, found.table)
    backend = OnnxruntimeBackend("emulate")
    info = backend.build(candidate, tmp_path)  # type: ignore[arg-type]
    assert set(info.precisions.values()) == {"fp8"}
    assert not info.not_honoured
    with backend.load(tmp_path) as engine:  # type: ignore[arg-type]
        assert engine.infer(found.feeds)["logits"].shape == (4, 10)


def test_the_plan_counts_and_reads_back() -> None:
    view: GraphView = named("silu_se").view
    plan = make_plan(view, default="fp8", pins={"op:Gemm": "int8"})
    assert plan.counts()["fp8"] == len(plan.fp8_nodes) > 0
    assert plan.int8_nodes == ("n_logits",)
    assert set(plan.quantized_nodes) == {*plan.fp8_nodes, *plan.int8_nodes}
    assert type(plan).from_json(plan.to_json()) == plan
    assert plan.may("n_se_mean", "fp8") == "it has no float8 kernel"
