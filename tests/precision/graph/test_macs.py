from __future__ import annotations

import numpy as np
import pytest
import tinymodels
from onnx import numpy_helper

from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.macs import macs as count_macs
from trtune.precision.graph.macs import parameters as count_parameters
from trtune.precision.graph.macs import widest_step
from trtune.precision.graph.view import GraphView


def view(name: str) -> GraphView:
    return GraphView.of(model_from_proto(tinymodels.MODELS[name]()))


@pytest.mark.parametrize(
    ("model", "node", "macs", "parameters"),
    [
        pytest.param("conv_relu", "n_conv1", 16 * 8 * 8 * 3 * 9, 16 * 27 + 16, id="Conv"),
        pytest.param("conv_relu", "n_conv2", 32 * 4 * 4 * 16 * 9, 32 * 144 + 32, id="strided"),
        pytest.param("depthwise", "n_dw", 32 * 64 * 9, 32 * 9 + 32, id="depthwise"),
        pytest.param("resize", "n_up", 16 * 64 * 8 * 4, 16 * 8 * 4, id="ConvTranspose"),
        pytest.param("mlp", "n_fc1", 16 * 32, 16 * 32 + 32, id="Gemm"),
        pytest.param("mlp", "n_fc2", 32 * 10, 320, id="MatMul with a weight"),
        pytest.param("mlp", "n_logits", 0, 10, id="Add of a bias: parameters, no MACs"),
        pytest.param("attention", "n_scores", 6 * 6 * 16, 0, id="MatMul of two activations"),
        pytest.param("attention", "n_ln", 0, 32, id="LayerNormalization"),
        pytest.param("int64_input", "n_embedded", 0, 320, id="Gather from an embedding"),
        pytest.param("depthwise", "n_clip1", 0, 0, id="the bounds of a Clip are no parameters"),
        pytest.param("dynamic_reshape", "n_flat", 0, 0, id="a shape is no parameter"),
        pytest.param("dynamic_reshape", "n_target", 0, 0, id="shape computation has none"),
        pytest.param("quantized", "n_conv", 16 * 64 * 27, 16 * 27, id="weights behind Q/DQ"),
        pytest.param("quantized", "n_w", 0, 0, id="scales are no parameters"),
        pytest.param("dynamic_weight", "n_output", 4 * 64 * 144, 0, id="a weight that is an input"),
        pytest.param("branches", "n_chosen", 0, 0, id="subgraphs are left alone"),
    ],
)
def test_macs_and_parameters(model: str, node: str, macs: int, parameters: int) -> None:
    graph = view(model)
    assert count_macs(graph, node) == macs
    assert count_parameters(graph, node) == parameters


@pytest.mark.parametrize("batch", [1, 4])
def test_macs_are_those_of_one_sample_whatever_the_fixed_batch(batch: int) -> None:
    proto = tinymodels.fixed_batch()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = batch
    fixed, free = GraphView.of(model_from_proto(proto)), view("conv_relu")
    assert {n.name: count_macs(fixed, n.name) for n in fixed.nodes} == {
        n.name: count_macs(free, n.name) for n in free.nodes
    }


def test_gemm_with_transposed_left_side() -> None:
    net = tinymodels.Net()
    x = net.input("input", (16, 5))
    net.const("w", numpy_helper.to_array(numpy_helper.from_array(np.ones((16, 3), np.float32))))
    net.op("Gemm", x, "w", out="output", transA=1)
    graph = GraphView.of(model_from_proto(net.model({"output": (5, 3)})))
    assert count_macs(graph, "n_output") == 5 * 16 * 3


@pytest.mark.parametrize(
    ("model", "values"),
    [
        pytest.param("conv_relu", 2 * 16 * 8 * 8, id="the first Relu reads and makes 16 channels"),
        pytest.param("residual", 3 * 16 * 8 * 8, id="an Add reads two"),
    ],
)
def test_the_widest_step_of_a_sample(model: str, values: int) -> None:
    assert widest_step(view(model)) == values


@pytest.mark.parametrize("batch", [1, 4])
def test_the_widest_step_is_that_of_one_sample_whatever_the_fixed_batch(batch: int) -> None:
    proto = tinymodels.conv_relu()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    del proto.graph.value_info[:]
    assert widest_step(GraphView.of(model_from_proto(proto))) == 2 * 16 * 8 * 8


def test_of_pictures_of_any_size_it_is_not_known() -> None:
    proto = tinymodels.conv_relu()
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert widest_step(GraphView.of(model_from_proto(proto))) is None
