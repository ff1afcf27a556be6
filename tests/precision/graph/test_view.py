from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import helper

from trtune.precision.graph.view import GraphView, elements, model_from_proto


def view(name: str) -> GraphView:
    return GraphView.of(model_from_proto(tinymodels.MODELS[name]()))


def test_producer_and_consumers_index_every_tensor() -> None:
    graph = view("residual")
    assert graph.producer["sum"] == "n_sum"
    assert graph.consumers["stem_relu"] == (("n_conv1", 0), ("n_sum", 1))
    assert graph.consumers["conv1_w"] == (("n_conv1", 1),)
    assert "logits" not in graph.consumers
    assert graph.graph_inputs == ("input",)
    assert graph.graph_outputs == ("logits",)
    assert graph.by_name["n_stem"].op_type == "Conv"


def test_empty_optional_inputs_are_no_tensor() -> None:
    graph = view("resize")
    assert "" not in graph.consumers
    assert graph.consumers["scales"] == (("n_big", 2),)


def test_a_tensor_read_in_a_subgraph_counts_as_read_by_its_node() -> None:
    graph = view("branches")
    chosen = graph.by_name["n_chosen"]
    assert graph.consumers["relu"] == (("n_chosen", 1),)
    assert graph.consumers["conv"] == (("n_relu", 0), ("n_total", 0), ("n_chosen", 2))
    assert len(chosen.input) == 1
    assert "n_relu" in graph.ancestors(["chosen"])
    assert "n_chosen" in graph.descendants(["relu"])


def test_shapes_and_dtypes_of_inputs_weights_and_inner_tensors() -> None:
    graph = view("conv_relu")
    assert graph.shapes["input"] == ("N", 3, 8, 8)
    assert graph.shapes["conv2"] == ("N", 32, 4, 4)
    assert graph.shapes["conv1_w"] == (16, 3, 3, 3)
    assert graph.dtypes["relu1"] == "float32"
    assert view("int64_input").dtypes["ids"] == "int64"
    assert view("quantized").dtypes["x_q"] == "int8"
    assert view("half_weights").dtypes["conv"] == "float16"


def test_a_tensor_of_unknown_rank_has_no_shape() -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], name="m", domain="com.example")
    tail = helper.make_node("Relu", ["y"], ["z"], name="r")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    z = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    proto = helper.make_model(helper.make_graph([node, tail], "g", [x], [z]), opset_imports=opsets)
    proto.ir_version = 8
    graph = GraphView.of(model_from_proto(proto, fold="none"))
    assert "y" not in graph.shapes
    assert "y" not in graph.dtypes
    assert graph.shape_nodes == frozenset()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(
            "dynamic_reshape",
            {"n_shape", "n_size", "n_size1", "n_target"},
            id="integers computed from a shape for a Reshape",
        ),
        pytest.param(
            "resize",
            {"n_shape", "n_rank", "n_one", "n_one_f", "n_edge", "n_scales"},
            id="floats computed from a shape for the scales of a Resize",
        ),
        pytest.param("branches", {"n_positive"}, id="the condition of an If"),
        pytest.param("int64_input", set(), id="an embedding reads indices but makes data"),
        pytest.param("quantized", set(), id="int8 data is no shape"),
    ],
)
def test_shape_nodes(model: str, expected: set[str]) -> None:
    assert view(model).shape_nodes == expected


def test_a_conv_whose_classes_are_the_output_is_no_shape_node() -> None:
    net = tinymodels.Net()
    x = net.conv(net.input("input"), "conv", 3, 16)
    net.op("ArgMax", x, out="best", axis=1)
    proto = net.model({"best": (("N", 1, 8, 8), tinymodels.INT64)})
    assert GraphView.of(model_from_proto(proto)).shape_nodes == {"n_best"}


def test_ancestors_and_descendants() -> None:
    graph = view("concat")
    assert graph.ancestors(["left_relu"]) == {
        "n_squeeze", "n_squeeze_relu", "n_left", "n_left_relu",
    }  # fmt: skip
    assert graph.ancestors(["input"]) == frozenset()
    assert graph.descendants(["mix"]) == {"n_pooled", "n_flat", "n_logits"}
    assert graph.descendants(["left_w"]) >= {"n_left", "n_cat", "n_logits"}
    assert "n_right" not in graph.descendants(["left_w"])


def test_constants_are_initializers_and_what_is_computed_from_them() -> None:
    graph = view("quantized")
    assert graph.is_constant("w_q")
    assert graph.is_constant("w")
    assert not graph.is_constant("x_dq")
    assert not graph.is_constant("input")
    assert not graph.is_constant("no such tensor")
    stored, scale = graph.constant("w_q"), graph.constant("w_scale")
    np.testing.assert_array_equal(graph.constant("w"), stored * scale[:, None, None, None])
    assert graph.constant("w") is graph.constant("w")


def test_a_constant_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        view("conv_relu").constant("conv1_b")[0] = 1.0


def test_a_value_that_depends_on_an_input_is_not_constant() -> None:
    with pytest.raises(ValueError, match="'relu1' is not constant"):
        view("conv_relu").constant("relu1")


def test_random_numbers_are_not_constant() -> None:
    net = tinymodels.Net()
    noise = net.op("RandomNormal", out="noise", shape=[1, 3, 8, 8], seed=1.0)
    net.op("Add", net.input("input"), noise, out="output")
    graph = GraphView.of(model_from_proto(net.model({"output": tinymodels.PICTURE})))
    assert not graph.is_constant("noise")


def test_a_constant_of_unknown_type_is_computed_too() -> None:
    net = tinymodels.Net()
    doubled = net.op("Add", net.const("a", [1.0, 2.0]), "a", out="doubled")
    net.op("Add", net.input("input", ("N", 2)), doubled, out="output")
    proto = net.model({"output": ("N", 2)})
    np.testing.assert_array_equal(GraphView(proto).constant("doubled"), [2.0, 4.0])


def test_external_constants_are_read_from_their_folder(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(values.tobytes())
    net = tinymodels.Net()
    net.op("Add", net.input("input", ("N", 6)), "w", out="output")
    proto = net.model({"output": ("N", 6)})
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[6])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    np.testing.assert_array_equal(GraphView(proto, tmp_path).constant("w"), values)


def test_names_must_be_unique() -> None:
    with pytest.raises(ValueError, match="not unique"):
        GraphView(tinymodels.duplicate_names())
    with pytest.raises(ValueError, match="not unique"):
        GraphView(tinymodels.unnamed_nodes())


def test_elements_counts_free_dimensions_as_one() -> None:
    assert elements(()) == 1
    assert elements(("N", None, 3, 4)) == 12
