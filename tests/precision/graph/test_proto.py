from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper, numpy_helper

from trtune.precision.graph.proto import (
    FreshNames,
    all_tensors,
    attribute,
    captured,
    copy_fields,
    copy_model,
    external_tensors,
    is_repeated,
    names_in,
    replace_field,
    tensor_bytes,
    used_tensors,
    without_graph,
    without_weights,
)

FIELDS = {field.name: field for field in onnx.GraphProto.DESCRIPTOR.fields}


def test_attribute() -> None:
    node = helper.make_node("Gemm", ["a", "b"], ["c"], transB=1, alpha=0.5)
    assert attribute(node, "transB") == 1
    assert attribute(node, "alpha") == 0.5
    assert attribute(node, "beta", 1.0) == 1.0
    assert attribute(node, "beta") is None


def test_tensor_bytes() -> None:
    assert tensor_bytes(numpy_helper.from_array(np.zeros((2, 3), np.float16))) == 12
    assert tensor_bytes(numpy_helper.from_array(np.float32(1.0).reshape(()))) == 4
    assert tensor_bytes(numpy_helper.from_array(np.array(["ab", "c"], object))) == 3
    packed = helper.make_tensor("w", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
    assert tensor_bytes(packed) == len(packed.raw_data or packed.int32_data) == 3


@pytest.mark.parametrize(("name", "expected"), [("node", True), ("name", False), ("input", True)])
def test_lists_are_known_to_every_protobuf(name: str, expected: bool) -> None:
    assert is_repeated(FIELDS[name]) is expected
    label = 3 if expected else 1
    assert is_repeated(SimpleNamespace(label=label, LABEL_REPEATED=3)) is expected  # before 6.31


def test_fresh_names_are_numbered_from_two() -> None:
    names = FreshNames({"w", "w_2"})
    assert [names.new("w"), names.new("w"), names.new("x"), names.new("x")] == [
        "w_3", "w_4", "x", "x_2",
    ]  # fmt: skip
    names.take("y")
    assert names.new("y") == "y_2"


@pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
def test_a_copy_of_all_fields_is_the_same_model(name: str) -> None:
    source = tinymodels.MODELS[name]()
    made = onnx.ModelProto()
    copy_fields(source, made, leave_out={"graph"})
    copy_fields(source.graph, made.graph, leave_out=())
    assert made == source
    assert copy_model(source) == source


def test_a_field_may_be_replaced_by_a_part_of_itself() -> None:
    model = copy_model(tinymodels.conv_relu())
    before = [node.name for node in model.graph.node]
    replace_field(model.graph.node, reversed(model.graph.node))
    assert [node.name for node in model.graph.node] == before[::-1]


def test_what_a_branch_reads_is_captured_and_used() -> None:
    model = tinymodels.MODELS["branches"]()
    (branching,) = [node for node in model.graph.node if node.op_type == "If"]
    found = captured(branching)
    assert found
    assert used_tensors(model.graph) >= {*found, *branching.input, model.graph.output[0].name}
    inside = {o for a in branching.attribute for node in a.g.node for o in node.output}
    assert names_in(model.graph) >= inside
    assert not set(found) & inside


def test_a_light_copy_has_no_weights_and_a_frame_no_nodes() -> None:
    model = tinymodels.conv_relu()
    heavy = {t.name for t in model.graph.initializer if tensor_bytes(t) > 4096}
    light = without_weights(model)
    assert heavy
    assert heavy <= {info.name for info in light.graph.input}
    assert not heavy & {t.name for t in light.graph.initializer}
    frame = without_graph(model)
    assert list(frame.graph.input) == list(model.graph.input)
    assert not frame.graph.node
    assert not frame.graph.initializer


def test_constants_of_attributes_are_found_too() -> None:
    value = numpy_helper.from_array(np.zeros(3, np.float32), "value")
    value.data_location = TensorProto.EXTERNAL
    node = helper.make_node("Constant", [], ["c"], value=value)
    body = helper.make_graph([node], "body", [], [])
    outer = helper.make_node("If", ["flag"], ["out"], then_branch=body, else_branch=body)
    weight = numpy_helper.from_array(np.zeros(2, np.float32), "w")
    graph = helper.make_graph([outer], "outer", [], [], [weight])
    assert [tensor.name for tensor in all_tensors(graph)] == ["w", "value", "value"]
    assert [tensor.name for tensor in external_tensors(graph)] == ["value", "value"]
