"""Models whose rest is half: written in float32, typed again by the plan, the same to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinyqat
from onnx import TensorProto, helper, numpy_helper
from tinyqat import QatNet

from trtune.datasets.batches import Batch
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.casts import insert_casts
from trtune.precision.quantized.forms.float_types import in_full_precision
from trtune.precision.quantized.importing import (
    import_model,
    insert_quantization,
    quantization_errors,
)


def small(opset: int = 19) -> onnx.ModelProto:
    """Two quantized convs and a float product; all scales are numbers that halves have too."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    x = net.op("Relu", net.qconv(x, "one", 3, 16), out="r1")
    x = net.pair(x, 0.02, out="read2")
    x = net.op("Relu", net.qconv(x, "two", 16, 16), out="r2")
    proto = net.head(x, 16)
    bfloat16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("_scale"):
            value = numpy_helper.to_array(tensor).astype(bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return onnx.version_converter.convert_version(model_from_proto(proto).proto, opset)


def in_half(kind: str, *, cast_first: bool) -> onnx.ModelProto:
    """`small` as a quantizer writes it: all floats in `kind`, inputs and outputs float32."""
    model = model_from_proto(small(19 if kind == "fp16" else 22))
    types = {n.name: kind for n in model.proto.graph.node}
    proto = insert_casts(model.proto, types)
    if cast_first:
        quantize = next(n for n in proto.graph.node if n.input[0] == "input")
        word = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[kind]
        cast = helper.make_node("Cast", ["input"], ["input_half"], name="cast", to=word)
        quantize.input[0] = "input_half"
        half = onnx.helper.tensor_dtype_to_np_dtype(word)
        scale = next(t for t in proto.graph.initializer if t.name == quantize.input[1])
        value = numpy_helper.to_array(scale).astype(half)
        proto.graph.initializer.append(numpy_helper.from_array(value, "input_scale_half"))
        quantize.input[1] = "input_scale_half"
        at = list(proto.graph.node).index(quantize)
        proto.graph.node.insert(at, cast)
    return proto


def test_a_float32_model_is_left_alone() -> None:
    proto = model_from_proto(tinyqat.torch_residual()).proto
    wide, floats, found = in_full_precision(proto)
    assert wide is proto
    assert (floats.half, found) == ("", ())
    assert set(floats.nodes.values()) == {"fp32"}


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("cast_first", [False, True])
def test_a_model_with_a_half_rest_is_imported_bit_for_bit(kind: str, cast_first: bool) -> None:
    found = import_model(model_from_proto(in_half(kind, cast_first=cast_first), fold="none"))
    assert found.plan.fallback == found.floats.half == kind
    assert len(found.plan.int8_nodes) == 2
    assert not [row for row in found.findings if row.kind == "activation-alone"]
    assert not [row for row in found.findings if row.blocks]
    assert {t.data_type for t in found.model.proto.graph.initializer} <= {
        TensorProto.FLOAT,
        TensorProto.INT64,
    }
    shape = found.original.inputs[0].shape
    feeds = {
        "input": np.random.default_rng(0)
        .normal(0, 1, [d if isinstance(d, int) else 4 for d in shape])
        .astype(np.float32)
    }
    count = len(feeds["input"])
    sums = quantization_errors(found, [Batch(feeds, tuple("abcdefgh"[:count]))])
    assert [e.noise for e in sums.values()] == [0] * len(sums)


def test_what_the_file_has_in_float32_stays_so() -> None:
    model = model_from_proto(small())
    types = {n.name: "fp16" for n in model.proto.graph.node if n.name != "n_r2"}
    found = import_model(model_from_proto(insert_casts(model.proto, types), fold="none"))
    assert found.plan.fallback == "fp16"
    assert found.plan.precision("n_r1") == "fp16"
    assert found.plan.precision("n_r2") == "fp32"
    assert found.plan.nodes["n_r2"].origin == "file"


def test_a_fallback_that_is_asked_for_holds_for_all_of_it() -> None:
    model = model_from_proto(in_half("fp16", cast_first=False), fold="none")
    assert import_model(model, fallback="bf16").plan.halves == ("bf16",)


def test_casts_are_gone_and_the_output_keeps_its_name() -> None:
    proto = model_from_proto(in_half("fp16", cast_first=False), fold="none").proto
    assert any(node.op_type == "Cast" for node in proto.graph.node)
    wide, _, _ = in_full_precision(proto)
    assert not any(node.op_type == "Cast" for node in wide.graph.node)
    assert [o.name for o in wide.graph.output] == [o.name for o in proto.graph.output]
    onnx.checker.check_model(wide, full_check=True)


def test_half_inputs_become_float32() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 4]) for n in "xy"]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    wide, floats, found = in_full_precision(model_from_proto(proto, fold="none").proto)
    kinds = {i.type.tensor_type.elem_type for i in (*wide.graph.input, *wide.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    assert floats.nodes == {"relu": "fp16"}
    assert [row.kind for row in found] == ["half-rest"]


def test_two_outputs_cast_from_one_tensor() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16, name="down"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Cast", ["r"], ["a"], to=TensorProto.FLOAT, name="up1"),
        helper.make_node("Cast", ["r"], ["b"], to=TensorProto.FLOAT, name="up2"),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xab"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    wide, _, _ = in_full_precision(model_from_proto(proto, fold="none").proto)
    onnx.checker.check_model(wide, full_check=True)
    assert [(n.op_type, n.output[0]) for n in wide.graph.node] == [("Relu", "a"), ("Identity", "b")]


def test_half_scales_before_opset_19_are_named_and_repaired() -> None:
    path = Path("model.onnx")
    proto = in_half("fp16", cast_first=True)
    for entry in proto.opset_import:
        entry.version = 17
    model = dataclasses.replace(model_from_proto(small(17), path), proto=proto)
    _, _, found = in_full_precision(model.proto)
    kinds = {row.kind for row in found}
    assert "half-model" in kinds
    assert all(row.repair == "exact" for row in found if row.kind == "half-model")


def test_bodies_with_halves_stay() -> None:
    half = numpy_helper.from_array(np.ones(1, np.float16), "c")
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["o"])],
        "body",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT16, [1])],
        [half],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["h"], name="if", then_branch=body, else_branch=body),
        helper.make_node("Cast", ["h"], ["y"], name="up", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    normal = model_from_proto(proto, fold="none").proto
    wide, _, found = in_full_precision(normal)
    assert wide is normal
    assert [row.found for row in found if row.kind == "half-model"] == [
        "the body of if has half types"
    ]
    assert GraphView(wide).by_name["if"].op_type == "If"


def test_the_plan_of_the_file_is_written_in_its_own_types() -> None:
    proto = model_from_proto(in_half("fp16", cast_first=True), fold="none")
    found = import_model(proto)
    again = insert_quantization(found.model, found.table, found.in_file())
    kinds = {
        helper.get_attribute_value(entry)
        for node in again.graph.node
        if node.op_type == "Cast"
        for entry in node.attribute
    }
    assert TensorProto.FLOAT16 in kinds
    halves = [t for t in again.graph.initializer if t.data_type == TensorProto.FLOAT16]
    assert halves
