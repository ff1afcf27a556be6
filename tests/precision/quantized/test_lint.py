"""Each thing that can be wrong with Q/DQ: what the linter says, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
import tinyqat
from onnx import helper
from tinyqat import QatNet, assert_same_bits, channel_scales, imported

from trtune.configs.errors import ModelError
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.quantized.find import codes_of, dequantized, find_quantization
from trtune.precision.quantized.findings import Finding, counts, summary
from trtune.precision.quantized.importing import import_model, insert_quantization
from trtune.precision.quantized.lint import lint
from trtune.precision.quantized.repair import Requantized, widest

NAN, TINY = float("nan"), 1e-40


def findings(proto: onnx.ModelProto) -> tuple[Finding, ...]:
    view = GraphView.of(model_from_proto(proto))
    return lint(view, find_quantization(view))


def activation(scale: Any = 0.03, zero: Any = 0, dtype: Any = np.int8, **attrs: Any) -> Any:
    """A conv whose data go through such a pair, its weights sound."""

    def make() -> onnx.ModelProto:
        net = QatNet()
        x = net.pair(net.input("input"), scale, zero, dtype, out="read", **attrs)
        return net.head(net.qconv(x, "conv", 3, 16), 16)

    return make


def weights(
    scale: Any, codes: Any = None, zero: Any = 0, dtype: Any = np.int8, axis: int = 0
) -> Any:
    """A conv with such stored weights, its data sound."""

    def make() -> onnx.ModelProto:
        net = QatNet()
        x = net.pair(net.input("input"), 0.03, out="read")
        held = np.random.default_rng(1).integers(-100, 100, (16, 3, 3, 3))
        held = held if codes is None else np.broadcast_to(codes, (16, 3, 3, 3))
        w = net.stored("w", held, scale, zero, dtype, axis=axis)
        return net.head(net.op("Conv", x, w, out="conv", kernel_shape=[3, 3], pads=[1] * 4), 16)

    return make


def float_weights(values: Any, scale: Any) -> Any:
    """A conv with float weights behind a pair with such a scale."""

    def make() -> onnx.ModelProto:
        net = QatNet()
        x = net.pair(net.input("input"), 0.03, out="read")
        w = net.const("w", np.broadcast_to(np.float32(values), (16, 3, 3, 3)))
        read = net.pair(w, scale, axis=0)
        return net.head(net.op("Conv", x, read, out="conv", kernel_shape=[3, 3], pads=[1] * 4), 16)

    return make


def disagreeing() -> onnx.ModelProto:
    model = activation()()
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    model.graph.initializer.append(helper.make_tensor("other", 1, [], [0.5]))
    node.input[1] = "other"
    return model


def with_bias() -> onnx.ModelProto:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    w = net.weight("w", 16, 3, 3, 3)
    read = net.pair(w, channel_scales(net.value(w), 0), axis=0)
    b = net.stored("b", np.arange(16), 0.001, 0, np.int32)
    return net.head(net.op("Conv", x, read, b, out="conv", kernel_shape=[3, 3], pads=[1] * 4), 16)


def only_quantize() -> onnx.ModelProto:
    net = QatNet()
    scale, zero = net.const("s", 0.1), net.const("z", 0, np.int8)
    net.op("QuantizeLinear", net.input("input"), scale, zero, out="output")
    return net.model({"output": (("N", 3, 8, 8), onnx.TensorProto.INT8)})


def only_dequantize() -> onnx.ModelProto:
    net = QatNet()
    x = net.input("input", ("N", 3, 8, 8), onnx.TensorProto.INT8)
    x = net.op("DequantizeLinear", x, net.const("s", 0.1), net.const("z", 0, np.int8), out="read")
    return net.head(net.qconv(x, "conv", 3, 16), 16)


def quantized_to_shape() -> onnx.ModelProto:
    """Codes that something other than a DequantizeLinear reads."""
    net = QatNet()
    scale, zero = net.const("s", 0.1), net.const("z", 0, np.int8)
    codes = net.op("QuantizeLinear", net.input("input"), scale, zero, out="codes")
    net.op("Cast", codes, out="output", to=onnx.TensorProto.FLOAT)
    return net.model({"output": ("N", 3, 8, 8)})


def shared() -> onnx.ModelProto:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    y = net.op("Softmax", x, out="soft", axis=1)
    model = net.head(net.qconv(x, "conv", 3, 16), 16)
    model.graph.output.append(helper.make_tensor_value_info(y, 1, ("N", 3, 8, 8)))
    return model


def inside_softmax() -> onnx.ModelProto:
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03, out="read"), "conv", 3, 16)
    x = net.op("Exp", x, out="exp")
    x = net.pair(x, 0.01, out="exp_read")
    total = net.op("ReduceSum", x, net.const("axes", [1], np.int64), out="total", keepdims=1)
    return net.head(net.op("Div", x, total, out="soft"), 16)


def free_skip() -> onnx.ModelProto:
    net = QatNet()
    x = net.op("Relu", net.qconv(net.pair(net.input("input"), 0.03), "stem", 3, 16), out="relu")
    y = net.qconv(net.pair(x, 0.02), "conv", 16, 16)
    return net.head(net.op("Add", y, x, out="sum"), 16)


def wrong_axis() -> onnx.ModelProto:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    w = net.weight("w", 16, 3, 3, 3)
    read = net.pair(w, channel_scales(net.value(w), 1), axis=1)
    return net.head(net.op("Conv", x, read, out="conv", kernel_shape=[3, 3], pads=[1] * 4), 16)


def constant_added() -> onnx.ModelProto:
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    added = net.stored("added", np.arange(16).reshape(1, 16, 1, 1), 0.01, 3, np.uint8)
    return net.head(net.op("Add", x, added, out="sum"), 16)


def scalar_added() -> onnx.ModelProto:
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    return net.head(net.op("Add", x, net.stored("added", 40, 0.01), out="sum"), 16)


def of_kind(make: Callable[[], onnx.ModelProto], kind: str) -> list[Finding]:
    return [row for row in findings(make()) if row.kind == kind]


CASES = [
    pytest.param(activation(0.03, 128, np.uint8), "uint8-zero-point-128", "error", "exact",
                 id="uint8 around 128 is int8 around 0"),
    pytest.param(activation(0.03, 0, np.uint8), "uint8", "error", "requantize",
                 id="uint8 from 0 needs a step twice as large"),
    pytest.param(activation(0.03, 131, np.uint8), "uint8", "error", "requantize",
                 id="uint8 around another zero point"),
    pytest.param(activation(0.03, 5), "int8-zero-point", "error", "requantize",
                 id="int8 around another zero point"),
    pytest.param(activation(0.03, None), "missing-zero-point", "error", "requantize",
                 id="no zero point means uint8 in ONNX and int8 in TensorRT"),
    pytest.param(activation([0.03]), "scale-shape", "error", "exact",
                 id="a scale of shape [1] makes TensorRT compute in float"),
    pytest.param(with_bias, "int32-bias", "error", "exact", id="an int32 bias becomes float"),
    pytest.param(activation([0.03, 0.02, 0.01], axis=1), "per-channel-activation", "error",
                 "requantize", id="several scales on an activation"),
    pytest.param(activation([0.03, 0.03, 0.03], axis=1), "per-channel-activation", "error",
                 "exact", id="several equal scales on an activation are one"),
    pytest.param(wrong_axis, "weight-axis", "error", "requantize", id="scales along the inputs"),
    pytest.param(activation(0.0), "bad-scale", "error", "", id="scale zero"),
    pytest.param(activation(-0.1), "bad-scale", "error", "", id="negative scale"),
    pytest.param(activation(NAN), "bad-scale", "error", "", id="scale NaN"),
    pytest.param(activation(TINY), "subnormal-scale", "error", "", id="subnormal scale"),
    pytest.param(weights([0.01] * 15 + [0.0]), "bad-scale", "error", "exact",
                 id="scale zero on stored weights, which it makes zero"),
    pytest.param(float_weights(0.5, [0.01] * 15 + [0.0]), "bad-scale", "error", "",
                 id="scale zero on float weights that are not zero"),
    pytest.param(float_weights(0.0, 0.0), "bad-scale", "error", "exact",
                 id="scale zero on float weights that are zero"),
    pytest.param(weights([0.01] * 15 + [TINY]), "subnormal-scale", "error", "requantize",
                 id="subnormal scale on weights"),
    pytest.param(weights(0.01, 3, 7, np.int8), "int8-zero-point", "error", "exact",
                 id="weights around a zero point whose codes fit all the same"),
    pytest.param(weights(0.01, 255, 7, np.uint8), "uint8", "error", "requantize",
                 id="uint8 weights whose codes do not fit"),
    pytest.param(activation(0.03, 0, np.int16), "code-type", "error", "", id="int16 codes"),
    pytest.param(disagreeing, "pair-disagrees", "error", "", id="Q and DQ with two scales"),
    pytest.param(only_quantize, "quantize-alone", "error", "", id="an int8 output"),
    pytest.param(quantized_to_shape, "quantize-alone", "error", "", id="codes that a Cast reads"),
    pytest.param(only_dequantize, "dequantize-alone", "error", "", id="an int8 input"),
    pytest.param(shared, "shared-dequantize", "info", "exact",
                 id="one pair for an int8 conv and a softmax"),
    pytest.param(inside_softmax, "inside-float", "warning", "", id="a pair behind exp"),
    pytest.param(free_skip, "residual", "warning", "", id="a skip input that is not quantized"),
    pytest.param(tinyqat.partly_quantized, "weights-alone", "warning", "exact",
                 id="weights quantized, data not"),
    pytest.param(tinyqat.partly_quantized, "activation-alone", "warning", "exact",
                 id="data quantized, weights not"),
    pytest.param(tinyqat.concatenated, "unequal-scales", "warning", "exact",
                 id="a conv behind a concat of two scales"),
    pytest.param(scalar_added, "scalar-constant", "error", "exact", id="a constant without axes"),
    pytest.param(constant_added, "constant-pair", "info", "exact", id="a constant, no weight"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "severity", "repair"), CASES)
def test_finding(
    make: Callable[[], onnx.ModelProto], kind: str, severity: str, repair: str
) -> None:
    found = of_kind(make, kind)
    assert len(found) == 1
    assert (found[0].severity, found[0].repair) == (severity, repair)
    assert found[0].found
    assert found[0].tensorrt
    assert found[0].remedy


EXACT = [case for case in CASES if case.values[3] == "exact"]


@pytest.mark.parametrize(("make", "kind", "severity", "repair"), EXACT)
def test_an_exact_repair_changes_no_bit(
    make: Callable[[], onnx.ModelProto], kind: str, severity: str, repair: str
) -> None:
    found = imported(make())
    rows = [row for row in found.findings if row.kind == kind]
    assert all(row.repaired for row in rows)
    feeds = tinymodels.feeds(found.original.proto, batch=3)
    assert_same_bits(found.original.proto, insert_quantization(found.model, found.table), feeds)


REFUSED = [case for case in CASES if case.values[2] == "error" and case.values[3] != "exact"]


@pytest.mark.parametrize(("make", "kind", "severity", "repair"), REFUSED)
def test_the_others_are_refused(
    make: Callable[[], onnx.ModelProto], kind: str, severity: str, repair: str
) -> None:
    with pytest.raises(ModelError, match=f"error: {kind}, 1 node"):
        imported(make())
    if repair == "requantize":
        found = imported(make(), allow_requantize=True)
        assert [row.repaired for row in found.findings if row.kind == kind] == [True]
        feeds = tinymodels.feeds(found.original.proto, batch=3)
        session = insert_quantization(found.model, found.table)
        value = tinymodels.run(session, feeds)["logits"]
        assert np.isfinite(value).all()
    else:
        with pytest.raises(ModelError, match="has to be changed where the model was exported"):
            imported(make(), allow_requantize=True)


def test_a_sound_model_has_no_errors() -> None:
    assert not [row for row in findings(tinyqat.torch_residual()) if row.severity == "error"]


def test_a_half_scale_is_taken_as_the_same_float() -> None:
    model = activation()()
    for tensor in model.graph.initializer:
        if tensor.name == "read_scale":
            held = np.float16(0.03)
            tensor.CopyFrom(onnx.numpy_helper.from_array(held, "read_scale"))
    rows = [r for r in imported(model).findings if r.kind == "scale-type"]
    assert [(r.repair, r.found) for r in rows] == [("exact", "data in float32, scale in float16")]
    assert imported(model).table.scale("input") == float(np.float16(0.03))


def test_a_softmax_input_behind_a_flatten_is_inside_float() -> None:
    rows = of_kind(tinyqat.tensorflow_block, "inside-float")
    assert [row.node for row in rows] == ["n_flat_dq_codes"]
    assert "a pair before Softmax (n_output)" in rows[0].found


def test_summary_counts_nodes_of_a_kind_and_names_one() -> None:
    rows = findings(tinyqat.tensorflow_block())
    lines = summary(rows)
    assert lines[0].startswith("error: int32-bias, 2 nodes (n_a_b: a bias in int32")
    assert counts(rows)["uint8"] == 6
    assert rows[0].to_dict()["kind"] == rows[0].kind


def test_codes_are_those_of_onnxruntime() -> None:
    proto = tinyqat.torch_residual()
    view = GraphView.of(model_from_proto(proto))
    pairs = [pair for pair in find_quantization(view).pairs if pair.constant]
    assert len(pairs) == 4
    for pair in pairs:
        np.testing.assert_array_equal(codes_of(view, pair), view.constant(f"{pair.result}_codes"))
        np.testing.assert_array_equal(dequantized(view, pair), view.constant(pair.result))


def test_codes_of_an_activation_are_a_callers_mistake() -> None:
    view = GraphView.of(model_from_proto(tinyqat.torch_residual()))
    pair = next(p for p in find_quantization(view).pairs if not p.constant)
    with pytest.raises(ValueError, match="has no constant codes"):
        codes_of(view, pair)


def test_widest_first() -> None:
    rows = [
        Requantized(name, "activation", 1.0, step, (0, 1), (-1, 1))
        for name, step in (("a", 1.5), ("b", 2.0), ("c", 2.0))
    ]
    assert [row.tensor for row in widest(rows)] == ["b", "c", "a"]


def test_the_axis_of_scales_may_count_from_the_end(tmp_path: Path) -> None:
    found = imported(weights(np.linspace(0.01, 0.02, 16).tolist(), axis=-4)())
    assert not found.changes
    feeds = tinymodels.feeds(found.original.proto, batch=2)
    assert_same_bits(found.original.proto, insert_quantization(found.model, found.table), feeds)


@pytest.mark.parametrize("op", ["Clip", "Transpose", "Reshape", "Identity", "Cast"])
def test_codes_that_are_computed_are_refused_and_stored(op: str) -> None:
    """Identity and Cast alone are what TensorRT-RTX was seen to take there."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    codes = np.random.default_rng(0).integers(-128, 128, (16, 3, 3, 3))
    if op == "Clip":
        held = net.const("c", codes, np.int8)
        limits = [net.const("low", -127, np.int8), net.const("high", 127, np.int8)]
        held = net.op("Clip", held, *limits, out="clipped")
    elif op == "Transpose":
        held = net.const("c", codes.transpose(1, 0, 2, 3), np.int8)
        held = net.op("Transpose", held, out="turned", perm=[1, 0, 2, 3])
    elif op == "Reshape":
        shape = net.const("shape", [16, 3, 3, 3], np.int64)
        held = net.op("Reshape", net.const("c", codes.reshape(16, 27), np.int8), shape, out="r")
    elif op == "Cast":
        held = net.op("Cast", net.const("c", codes, np.int32), out="cast", to=onnx.TensorProto.INT8)
    else:
        held = net.op("Identity", net.const("c", codes, np.int8), out="same")
    scale = net.const("s", np.full(16, 0.01))
    zero = net.const("z", np.zeros(16), np.int8)
    w = net.op("DequantizeLinear", held, scale, zero, out="w", axis=0)
    y = net.op("Conv", x, w, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    proto = net.head(y, 16)
    found = import_model(model_from_proto(proto, fold="none"))
    kinds = [(row.kind, row.repaired) for row in found.findings if row.kind == "computed-codes"]
    assert kinds == ([] if op in ("Identity", "Cast") else [("computed-codes", True)])
    assert found.plan.int8_nodes == ("n_conv",)
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(found.model.proto, batch=2))


def test_blocks_along_another_axis_than_the_one_named() -> None:
    """As Model-Optimizer 0.47 writes the weights of a transposed Gemm: TensorRT-RTX refuses it."""
    for shape, kinds in (((4, 1), {"block-axis", "blocked-scale"}), ((1, 32), {"blocked-scale"})):
        net = QatNet(opset=21)
        x = net.input("input", ("N", 32))
        codes = net.const("codes", np.ones((4, 32)), np.int8)
        scale = net.const("scale", np.full(shape, 0.1), np.float32)
        weight = net.op("DequantizeLinear", codes, scale, out="w", axis=0, block_size=32)
        proto = net.model({net.op("Gemm", x, weight, out="output", transB=1): ("N", 4)})
        found = {row.kind for row in findings(proto)}
        assert found & {"block-axis", "blocked-scale"} == kinds


def test_pairs_in_branches_are_said_and_stay() -> None:
    """Three deep: a branch of an If inside a branch of an If."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    scale, zero = net.const("s", 0.1, np.float32), net.const("z", 0, np.int8)

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [out])

    pair = (
        helper.make_node("QuantizeLinear", [x, scale, zero], ["q"], name="n_q"),
        helper.make_node("DequantizeLinear", ["q", scale, zero], ["d"], name="n_d"),
    )
    deep = helper.make_node(
        "If", ["no"], ["deep"], name="n_deep",
        then_branch=branch("a", *pair),
        else_branch=branch("b", helper.make_node("Relu", [x], ["b"], name="n_b")),
    )  # fmt: skip
    zero_float = net.const("f", 0.0, np.float32)
    net.op("Greater", net.op("ReduceMax", x, out="top", keepdims=0), zero_float, out="no")
    other = branch("c", helper.make_node("Neg", [x], ["c"], name="n_c"))
    y = net.op("If", "no", out="chosen", then_branch=branch("t", deep), else_branch=other)
    (row,) = of_kind(lambda: net.head(y, 16), "inside-subgraph")
    assert (row.node, row.blocks) == ("n_chosen", False)
    assert row.found == "2 quantizing nodes stand inside it: n_q, n_d"


def test_weights_cut_by_codes_that_hold_no_negative_values_come_back_cut() -> None:
    """A QuantizeLinear without a zero point means uint8 from 0 on: half of the weights are 0."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    weight = net.weight("w", 16, 3, 3, 3)
    scale = net.const("s", channel_scales(net.value(weight), 0))
    codes = net.op("QuantizeLinear", weight, scale, out="codes", axis=0)
    read = net.op("DequantizeLinear", codes, scale, out="read", axis=0)
    proto = net.head(net.op("Conv", x, read, out="conv", kernel_shape=[3, 3], pads=[1] * 4), 16)
    found = imported(proto)
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=2))


def test_a_bias_in_int8_is_no_int32_one() -> None:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    weight = net.weight("w", 16, 3, 3, 3)
    read = net.pair(weight, channel_scales(net.value(weight), 0), axis=0)
    bias = net.pair(net.weight("b", 16), 0.01)
    conv = net.op("Conv", x, read, bias, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    kinds = {row.kind for row in imported(net.head(conv, 16)).findings}
    assert kinds == {"constant-pair"}


@pytest.mark.parametrize("shape", [(10, 16), (2, 10, 16)])
def test_a_quantized_constant_on_the_left_is_multiplied_in_int8(shape: tuple[int, ...]) -> None:
    """TensorRT-RTX does so; the import keeps its values, in float."""
    net = QatNet()
    x = net.pair(net.input("input", (2, 16, 8)), 0.03)
    net.op("MatMul", net.pair(net.weight("w", *shape), 0.01), x, out="output")
    proto = net.model({"output": (2, 10, 8)})
    found = imported(proto)
    assert {row.kind for row in found.findings} == {"constant-pair"}
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=2))
