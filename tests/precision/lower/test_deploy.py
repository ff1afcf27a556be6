"""The `deploy` lowering: what onnxruntime's integer kernels take over, and what must stay float."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import numpy_helper
from tinymodels import Net
from tinyquant import (
    PLACED,
    Case,
    case,
    initializer,
    inner_values,
    maker,
    named,
    op_counts,
    outputs,
    read_edges,
    set_weight,
)

from trtune.calibrate.table import CalibrationTable, MissingScaleError
from trtune.precision.backends.ort.readback import read_precisions
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.deploy import (
    behind_activation,
    clip_bounds,
    deploy_tensors,
    lower_deploy,
)
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.runtime.session import optimized_graph


def deployed(prepared: Case) -> onnx.ModelProto:
    return lower_deploy(prepared.model, prepared.plan, prepared.table)


def optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxruntime makes of a lowered model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        return optimized_graph(path)


def runs_in(prepared: Case) -> dict[str, str]:
    """The precision of each compute node in the graph that onnxruntime runs."""
    proto = deployed(prepared)
    found = read_precisions(prepared.model.proto, proto, optimized(proto))
    return {name: found[name] for name in prepared.plan.compute_nodes}


def closeness(prepared: Case) -> float:
    """SQNR of `deploy`, on integer kernels, against `emulate`."""
    emulated = outputs(lower_emulate(prepared.model, prepared.plan, prepared.table), prepared.feeds)
    found = outputs(deployed(prepared), prepared.feeds, integer_kernels=True)
    assert list(found) == list(emulated)
    return min(sqnr_db(emulated[name], found[name]) for name in found)


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto))


# Integer kernels


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("conv_relu", {"QLinearConv": 2, "QGemm": 1}),
        ("depthwise", {"QLinearConv": 3, "QGemm": 1}),
        ("residual", {"QLinearConv": 3, "QGemm": 1}),
        ("concat", {"QLinearConv": 4, "QLinearConcat": 1, "QGemm": 1}),
        ("silu_se", {"QLinearConv": 4, "QGemm": 1}),
        ("mlp", {"QGemm": 2}),
        ("attention", {"MatMulIntegerToFloat": 4, "MatMul": 1, "FusedMatMul": 1}),
        ("dynamic_reshape", {"QLinearConv": 1, "QGemm": 1}),
        ("two_inputs", {"QLinearConv": 1, "QGemm": 2}),
        ("int64_input", {"MatMulIntegerToFloat": 1}),
        ("fixed_batch", {"QLinearConv": 2, "QGemm": 1}),
        ("opset11", {"QLinearConv": 1, "QGemm": 1}),
        ("shared_weight", {"QLinearConv": 3, "QGemm": 1}),
        ("two_outputs", {"FusedConv": 1, "QGemm": 1}),
        ("nothing_quantizable", {}),
    ],
)
def test_the_integer_kernels_of_onnxruntime_take_over(name: str, kernels: dict[str, int]) -> None:
    counts = op_counts(optimized(deployed(named(name))))
    weighted = {
        *("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearConcat", "QLinearAdd", "Gemm"),
        *("Conv", "FusedConv", "MatMul", "FusedMatMul", "ConvTranspose"),
    }
    assert {op: count for op, count in counts.items() if op in weighted} == kernels


def test_a_pre_activation_block_adds_in_integers() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="x")
    y = net.op("Relu", net.op("Add", net.conv(x, "c", 16, 16), x, out="sum"), out="y")
    prepared = case(net.head(net.conv(y, "d", 16, 16), 16))
    counts = op_counts(optimized(deployed(prepared)))
    assert counts["QLinearAdd"] == 1
    assert counts["Relu"] == counts["Add"] == 0
    assert closeness(prepared) > 30


@pytest.mark.parametrize("name", PLACED)
def test_deploy_is_close_to_emulate(name: str) -> None:
    prepared = named(name)
    assert closeness(prepared) > 30


@pytest.mark.parametrize("name", PLACED)
def test_the_kernels_compute_what_the_graph_says(name: str) -> None:
    prepared = named(name)
    proto = deployed(prepared)
    onnx.checker.check_model(proto, full_check=True)
    said = outputs(proto, prepared.feeds)
    done = outputs(proto, prepared.feeds, integer_kernels=True)
    for tensor, values in said.items():
        assert sqnr_db(values, done[tensor]) > 80


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_every_opset_from_13_on(opset: int) -> None:
    net = Net(opset=opset)
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="stem_relu")
    y = net.op("Add", net.conv(x, "conv", 16, 16), x, out="sum")
    prepared = case(net.head(net.op("Relu", y, out="sum_relu"), 16))
    found = deployed(prepared)
    assert found.opset_import[0].version == opset
    onnx.checker.check_model(found, full_check=True)
    assert runs_in(prepared) == dict.fromkeys(prepared.plan.compute_nodes, "int8")
    assert closeness(prepared) > 30


def test_the_model_is_not_modified_and_the_bytes_are_the_same_each_time() -> None:
    prepared = named("residual")
    before = prepared.model.proto.SerializeToString(deterministic=True)
    found = deployed(prepared).SerializeToString(deterministic=True)
    assert deployed(prepared).SerializeToString(deterministic=True) == found
    assert prepared.model.proto.SerializeToString(deterministic=True) == before


def test_a_tensor_without_a_scale_is_named() -> None:
    prepared = named("conv_relu")
    table = CalibrationTable({"input": 0.1, "relu1": 0.1, "flat": 0.1})
    with pytest.raises(MissingScaleError, match="'relu2' has no scale"):
        lower_deploy(prepared.model, prepared.plan, table)


# Which tensors need scales


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("conv_relu", ["input", "relu1", "relu2", "flat"], id="behind a Relu"),
        pytest.param("depthwise", ["input", "clip1", "clip2", "project", "flat"], id="a Clip"),
        pytest.param(
            "residual", ["input", "stem_relu", "relu1", "conv2", "flat"], id="an Add is no output"
        ),
        pytest.param(
            "concat",
            ["input", "squeeze_relu", "left_relu", "right_relu", "max", "mix", "flat"],
            id="a concat",
        ),
        pytest.param(
            "silu_se",
            [
                "input",
                "stem",
                "stem_silu",
                "dw",
                "dw_silu",
                "se_mean",
                "se_relu",
                "se_up",
                "se",
                "flat",
            ],
            id="SiLU and the gate of its channels",
        ),
        pytest.param("mlp", ["input", "relu1"], id="no outputs of matrix products"),
        pytest.param("two_outputs", ["input", "flat"], id="no outputs of the model"),
        pytest.param("nothing_quantizable", [], id="nothing"),
    ],
)
def test_deploy_tensors(name: str, expected: list[str]) -> None:
    view = view_of(tinymodels.MODELS[name]())
    assert list(deploy_tensors(view, make_plan(view))) == expected


def test_pins_never_need_further_scales() -> None:
    for name in PLACED:
        view = view_of(tinymodels.MODELS[name]())
        every = set(deploy_tensors(view, make_plan(view)))
        for node in make_plan(view).compute_nodes:
            assert set(deploy_tensors(view, make_plan(view, pins={node: "fp32"}))) <= every


# Codes


def parameters(proto: onnx.ModelProto, tensor: str) -> tuple[float, int]:
    """Scale and zero point of the pair behind `tensor`."""
    (node,) = (
        n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == tensor
    )
    scale, zero = (initializer(proto, name) for name in node.input[1:])
    assert list(scale.dims) == list(zero.dims) == []
    assert zero.data_type == onnx.TensorProto.UINT8
    return float(numpy_helper.to_array(scale)), int(numpy_helper.to_array(zero))


def test_signed_tensors_have_the_codes_of_emulate_unsigned_ones_half_the_step() -> None:
    prepared = named("residual")
    found = deployed(prepared)
    for tensor in ("input", "conv2"):
        assert parameters(found, tensor) == (prepared.table.scale(tensor), 128)
    for tensor in ("stem_relu", "relu1", "flat"):
        amax = np.float32(prepared.table.amax(tensor))
        assert parameters(found, tensor) == (float(amax / np.float32(255)), 0)


# Relu and Clip


def clipped(*bounds: float | str, others: str = "") -> onnx.ModelProto:
    """conv `c`, a Clip `a` with these bounds, conv; `others` adds a further reader of `c`."""
    net = Net()
    c = net.conv(net.input("input"), "c", 3, 16)
    names = []
    for i, bound in enumerate(bounds):
        if bound == "input":
            names.append(net.input("bound", ()))
        else:
            names.append("" if bound == "" else net.const(f"bound{i}", bound))
    x = net.op("Clip", c, *names, out="a")
    x = net.conv(x, "d", 16, 16)
    if others == "reader":
        x = net.op("Add", x, c, out="both")
    model = net.head(x, 16)
    if others == "output":
        info = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ("N", 16, 8, 8))
        model.graph.output.append(info)
    return model


@pytest.mark.parametrize(
    ("model", "amax", "absorbed"),
    [
        pytest.param(clipped(0.0, 1.0), 1.0, True, id="the range ends at the bound"),
        pytest.param(clipped(0.0, 1.0), 0.7, True, id="the range ends below the bound"),
        pytest.param(clipped(0.0, 1.0), 1.2, False, id="the range goes beyond the bound"),
        pytest.param(clipped(0.0), 3.0, True, id="no upper bound"),
        pytest.param(clipped(0.0, ""), 3.0, True, id="an upper bound left out"),
        pytest.param(clipped(-1.0, 1.0), 1.0, False, id="another lower bound"),
        pytest.param(clipped(0.25, 1.0), 1.0, False, id="a lower bound above zero"),
        pytest.param(clipped("", 1.0), 1.0, False, id="no lower bound"),
        pytest.param(clipped(0.0, "input"), 1.0, False, id="a bound that is computed"),
        pytest.param(clipped(0.0, 1.0, others="reader"), 1.0, False, id="another reader"),
        pytest.param(clipped(0.0, 1.0, others="output"), 1.0, False, id="an output of the model"),
    ],
)
def test_a_clip_is_absorbed_only_where_that_is_exact(
    model: onnx.ModelProto, amax: float, absorbed: bool
) -> None:
    prepared = case(model, amax={"a": amax})
    if "bound" in prepared.feeds:
        prepared.feeds["bound"][...] = 0.8  # type: ignore[index]
    found = deployed(prepared)
    assert op_counts(found)["Clip"] == (0 if absorbed else 1)
    onnx.checker.check_model(found, full_check=True)
    assert closeness(prepared) > 25


def test_a_bound_of_shape_1_is_a_bound() -> None:
    proto = clipped(0.0, 6.0)
    set_weight(proto, "bound1", [6.0])
    view = view_of(proto)
    assert clip_bounds(view, view.by_name["n_a"]) == (0.0, 6.0)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        pytest.param("conv_relu", "conv1", "relu1", id="a Relu"),
        pytest.param("depthwise", "expand", "clip1", id="a Clip from zero on"),
        pytest.param("two_outputs", "conv", "features", id="a Relu that makes an output"),
        pytest.param("silu_se", "stem", "stem", id="x * sigmoid(x): two readers"),
        pytest.param("residual", "conv2", "conv2", id="an Add"),
        pytest.param("two_outputs", "features", "features", id="an output of the model"),
        pytest.param("conv_relu", "logits", "logits", id="the end of the graph"),
    ],
)
def test_behind_activation(name: str, tensor: str, expected: str) -> None:
    assert behind_activation(view_of(tinymodels.MODELS[name]()), tensor) == expected


def test_a_relu_stays_where_a_pinned_node_reads_it_in_float() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="x")
    y = net.op("Relu", net.op("Add", net.conv(x, "c", 16, 16), x, out="sum"), out="y")
    both = net.op("Concat", net.conv(y, "a", 16, 16), net.conv(y, "b", 16, 16), out="ab", axis=1)
    proto = net.head(both, 32)
    assert op_counts(deployed(case(proto)))["Relu"] == 0
    prepared = case(proto, pins={"n_a": "fp32"})
    found = deployed(prepared)
    assert maker(found, "a").input[0] == "y"
    assert maker(found, "y").op_type == "Relu"
    assert closeness(prepared) > 30


# Pins


def pinned_net(between: str) -> onnx.ModelProto:
    """int8 conv, what stands `between`, conv `p` to be pinned, int8 conv."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "first", 3, 16), out="x")
    if between == "MaxPool":
        x = net.op("MaxPool", x, out="m", kernel_shape=[2, 2], strides=[2, 2])
    elif between == "Transpose":
        x = net.op("Transpose", x, out="m", perm=[0, 1, 3, 2])
    elif between == "Reshape":
        x = net.op("Reshape", x, net.const("s", [0, 16, 4, 16], np.int64), out="m")
    elif between == "Slice":
        low, high = net.const("low", [0, 0], np.int64), net.const("high", [8, 4], np.int64)
        x = net.op("Slice", x, low, high, net.const("axes", [1, 2], np.int64), out="m")
        x = net.op("Concat", x, x, out="mm", axis=1)
    elif between == "Concat":
        other = net.op("Relu", net.conv(x, "o", 16, 16), out="other")
        x = net.op("Concat", x, other, out="m", axis=1)
    channels = 32 if between == "Concat" else 16
    x = net.op("Relu", net.conv(x, "p", channels, 16), out="pr")
    return net.head(net.op("Relu", net.conv(x, "last", 16, 16), out="lr"), 16)


@pytest.mark.parametrize(
    "between", ["nothing", "MaxPool", "Transpose", "Reshape", "Slice", "Concat"]
)
def test_a_pinned_conv_reads_float_between_integer_ones(between: str) -> None:
    prepared = case(pinned_net(between), pins={"n_p": "fp32"})
    found = runs_in(prepared)
    floats = {"n_p", "n_first", "n_o"} if between == "Concat" else {"n_p", "n_first"}
    assert {name for name, runs in found.items() if runs == "fp32"} == floats & found.keys()
    assert closeness(prepared) > 30
    assert not any("dequantized" in t for t in maker(deployed(prepared), "x").output)
    assert maker(deployed(prepared), "pr").input[0] != "x/dequantized"


@pytest.mark.parametrize("name", PLACED)
def test_any_pinned_node_stays_float_in_onnxruntimes_own_graph(name: str) -> None:
    nodes = named(name).plan.int8_nodes
    for node in nodes:
        found = runs_in(named(name, pins={node: "fp32"}))
        assert found[node] == "fp32"


def test_pinning_everything_leaves_no_pair() -> None:
    prepared = named("residual", pins={"re:.*": "fp32"})
    assert deployed(prepared).graph == prepared.model.proto.graph


def test_a_pinned_concat_computes_in_float() -> None:
    def concats(pins: dict[str, str]) -> Counter[str]:
        counts = op_counts(optimized(deployed(named("concat", pins=pins))))
        return Counter({op: n for op, n in counts.items() if "Concat" in op})

    assert concats({}) == {"QLinearConcat": 1}
    assert concats({"n_cat": "fp32"}) == {"Concat": 1}
    assert closeness(named("concat", pins={"n_cat": "fp32"})) > 30


def test_products_that_cannot_be_quantized_stay_float() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "a", 3, 16), out="ar")
    y = net.op("Relu", net.conv(net.input("other"), "b", 3, 16), out="br")
    y = net.op("Transpose", y, out="bt", perm=[0, 1, 3, 2])
    net.op("MatMul", x, y, out="scores")
    prepared = case(net.model({"scores": ("N", 16, 8, 8)}))
    assert runs_in(prepared) == {"n_a": "int8", "n_b": "int8", "n_scores": "fp32"}


# Outputs of the model


def test_an_output_of_the_model_stays_float_and_its_reader_quantizes() -> None:
    net = Net()
    x = net.conv(net.input("input"), "features", 3, 16)
    model = net.head(net.conv(x, "c", 16, 16), 16)
    info = onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ("N", 16, 8, 8))
    model.graph.output.append(info)
    prepared = case(model)
    found = deployed(prepared)
    assert read_edges(found)["features"] == (("n_c", 0),)
    assert maker(found, "features").op_type == "Conv"
    assert runs_in(prepared)["n_c"] == "int8"
    assert closeness(prepared) > 30


def test_a_conv_that_makes_the_output_computes_from_int8_in_float() -> None:
    net = Net()
    net.conv(net.input("input"), "y", 3, 4)
    prepared = case(net.model({"y": ("N", 4, 8, 8)}))
    assert list(deploy_tensors(prepared.view, prepared.plan)) == ["input"]
    assert closeness(prepared) > 60


# Biases


@pytest.mark.parametrize(
    ("shape", "runs"),
    [
        pytest.param((8,), "int8", id="one value a channel"),
        pytest.param((1, 8), "int8", id="two dimensions"),
        pytest.param((1,), "int8", id="the same for all"),
        pytest.param((), "int8", id="a scalar"),
        pytest.param(None, "int8", id="none"),
        pytest.param((4, 8), "fp32", id="one value an element: no kernel takes it"),
    ],
)
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_the_bias_of_a_matrix_product(op: str, shape: tuple[int, ...] | None, runs: str) -> None:
    net = Net()
    x, w = net.input("x", ("N", 16)), net.weight("w", 16, 8)
    rng = np.random.default_rng(1)
    bias = [] if shape is None else [net.const("b", rng.standard_normal(shape))]
    if op == "Gemm":
        net.op("Gemm", x, w, *bias, out="y", name="n")
    elif bias:
        net.op("Add", *bias, net.op("MatMul", x, w, out="m", name="n"), out="y")
    else:
        net.op("MatMul", x, w, out="y", name="n")
    prepared = case(net.model({"y": ("N", 8)}))
    assert runs_in(prepared) == {"n": "int8" if op == "MatMul" else runs}
    assert closeness(prepared) > 60


def test_a_matmul_with_bias_and_activation_becomes_one_gemm() -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", ("N", 16)), net.weight("w", 16, 8), out="m")
    x = net.op("Relu", net.op("Add", x, net.weight("b", 8), out="s"), out="r")
    net.op("MatMul", x, net.weight("v", 8, 4), out="y")
    prepared = case(net.model({"y": ("N", 4)}))
    found = deployed(prepared)
    onnx.checker.check_model(found, full_check=True)
    assert op_counts(found)["Gemm"] == 1
    assert op_counts(found)["Add"] == 0
    assert runs_in(prepared) == {"n_m": "int8", "n_y": "int8"}
    assert closeness(prepared) > 30


@pytest.mark.parametrize("kind", ["an output", "two readers", "three dimensions", "no Add"])
def test_other_matmuls_stay_what_they_are(kind: str) -> None:
    net = Net()
    x = net.input("x", ("N", 3, 16) if kind == "three dimensions" else ("N", 16))
    m = net.op("MatMul", x, net.weight("w", 16, 8), out="m")
    y = net.op("Mul" if kind == "no Add" else "Add", m, net.weight("b", 8), out="y")
    if kind == "two readers":
        net.op("Add", y, m, out="z")
    shape = ("N", 3, 8) if kind == "three dimensions" else ("N", 8)
    made = {"z" if kind == "two readers" else "y": shape}
    prepared = case(net.model({**made, "m": shape} if kind == "an output" else made))
    assert op_counts(deployed(prepared))["MatMul"] == 1
    assert closeness(prepared) > 60


def dead_channels(weight: float, bias: float) -> Case:
    """A conv, the first half of whose channels have one tiny weight only, and a bias."""
    net = Net()
    x = net.conv(net.input("input"), "c", 3, 16)
    proto = net.head(net.conv(net.op("Relu", x, out="r"), "d", 16, 16), 16)
    values = numpy_helper.to_array(initializer(proto, "c_w")).copy()
    values[:8] = 0
    values[:8, 0, 0, 0] = weight
    set_weight(proto, "c_w", values)
    biases = np.where(np.arange(16) < 8, bias, 0.1)
    set_weight(proto, "c_b", biases)
    return case(proto)


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e-12, 1e-9, 1e-6])
@pytest.mark.parametrize("bias", [0.0, 0.3, -5.0])
def test_the_bias_of_a_channel_with_hardly_any_weight_is_kept(weight: float, bias: float) -> None:
    prepared = dead_channels(weight, bias)
    found = deployed(prepared)
    made = maker(found, maker(found, "r").input[2])  # the Relu is absorbed into the conv
    codes, scales = (numpy_helper.to_array(initializer(found, n)) for n in made.input[:2])
    assert codes.dtype == np.int32
    assert np.abs(codes.astype(np.int64)).max() <= 2**30
    np.testing.assert_allclose(codes * scales.astype(np.float64), [bias] * 8 + [0.1] * 8, rtol=1e-3)
    assert runs_in(prepared)["n_c"] == "int8"
    assert closeness(prepared) > 30


def test_a_computed_bias_stays_float() -> None:
    net = Net()
    net.op("Gemm", net.input("x", ("N", 16)), net.weight("w", 16, 8), net.input("b", (8,)), out="y")
    prepared = case(net.model({"y": ("N", 8)}))
    assert maker(deployed(prepared), "y").input[2] == "b"
    assert closeness(prepared) > 60


def test_a_grouped_transposed_conv() -> None:
    net = Net()
    x, w = net.input("x", ("N", 4, 5, 5)), net.weight("w", 4, 3, 2, 2)
    y = net.op("ConvTranspose", x, w, net.weight("b", 6), out="y", group=2, strides=[2, 2])
    net.op("Tanh", y, out="z")
    prepared = case(net.model({"z": ("N", 6, 10, 10)}))
    assert maker(deployed(prepared), "y").input[2] == "b"
    assert closeness(prepared) > 25


# Zero ranges


def test_a_conv_whose_output_was_always_zero_stays_float_behind() -> None:
    proto = tinymodels.conv_relu()
    set_weight(proto, "conv2_b", np.full(32, -1e3))  # the Relu never lets anything through
    model = model_from_proto(proto)
    view = GraphView.of(model)
    plan = make_plan(view, pins={"op:Gemm": "fp32"})
    feeds = tinymodels.feeds(proto)
    values = inner_values(model, ["input", "relu1", "relu2"], feeds)
    table = CalibrationTable.from_amax({t: float(np.abs(v).max()) for t, v in values.items()})
    assert table.scale("relu2") == 0
    found = lower_deploy(model, plan, table)
    assert read_edges(found).keys() == {"input", "relu1"}
    for integer in (False, True):
        logits = outputs(found, feeds, integer_kernels=integer)["logits"]
        np.testing.assert_array_equal(logits, outputs(proto, feeds)["logits"])


def branches() -> onnx.ModelProto:
    """A conv whose result two others read."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "first", 3, 16), out="x")
    left = net.conv(x, "left", 16, 16)
    right = net.conv(x, "right", 16, 16)
    return net.model({left: ("N", 16, 8, 8), right: ("N", 16, 8, 8)})


def test_a_pinned_reader_beside_an_integer_one_reads_float() -> None:
    prepared = case(branches(), pins={"n_right": "fp32"})
    found = deployed(prepared)
    by_name = {node.name: node for node in found.graph.node}
    assert by_name["n_right"].input[0] == "x"
    assert by_name["n_left"].input[0] != "x"
    clipped = replace(prepared.table, scales={**prepared.table.scales, "x": 1e-4})
    proto = lower_deploy(prepared.model, prepared.plan, clipped)
    exact, tested = outputs(prepared.model.proto, prepared.feeds), outputs(proto, prepared.feeds)
    left, right = prepared.view.graph_outputs
    assert sqnr_db(exact[right], tested[right]) > 30 > 10 > sqnr_db(exact[left], tested[left])
