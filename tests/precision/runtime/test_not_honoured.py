"""Which precision each node really runs in, read from graphs that onnxruntime wrote."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tinymodels
from ortquantized import quantized

from trtune.precision.backends.ort.readback import read_precisions
from trtune.precision.graph.view import model_from_proto
from trtune.precision.runtime.not_honoured import not_honoured
from trtune.precision.runtime.session import optimized_graph


def read_back(model: onnx.ModelProto, lowered: onnx.ModelProto, folder: Path) -> dict[str, str]:
    onnx.save(lowered, folder / "lowered.onnx")
    return read_precisions(model, lowered, optimized_graph(folder / "lowered.onnx"))


@pytest.mark.parametrize(
    ("name", "int8"),
    [
        ("conv_relu", {"n_conv1", "n_relu1", "n_conv2", "n_relu2", "n_logits"}),
        ("residual", {"n_stem", "n_conv1", "n_relu1", "n_conv2", "n_sum", "n_sum_relu"}),
        ("concat", {"n_squeeze", "n_left", "n_right", "n_mix", "n_max"}),
        ("mlp", {"n_fc1", "n_relu1", "n_fc2"}),
    ],
)
def test_fused_integer_kernels_are_found_by_name_tensor_or_absorption(
    name: str, int8: set[str], tmp_path: Path
) -> None:
    model = tinymodels.MODELS[name]()
    found = read_back(model, quantized(model), tmp_path)
    assert list(found) == [node.name for node in model.graph.node]
    assert {node for node, precision in found.items() if precision == "int8"} >= int8


def test_a_float_node_that_onnxruntime_quantizes_by_itself_is_found_out(tmp_path: Path) -> None:
    model = tinymodels.conv_relu()
    pinned = ("n_conv2", "n_relu2")
    lowered = quantized(model, pinned)
    (conv,) = (node for node in lowered.graph.node if node.name == "n_conv2")
    assert conv.input[1] == "conv2_w"
    found = read_back(model, lowered, tmp_path)
    assert [found[node] for node in pinned] == ["int8", "int8"]


def test_a_node_without_pairs_around_it_is_read_as_fp32(tmp_path: Path) -> None:
    model = tinymodels.conv_relu()
    found = read_back(model, quantized(model, ("n_conv1", "n_relu1")), tmp_path)
    assert (found["n_conv1"], found["n_conv2"]) == ("fp32", "int8")


@pytest.mark.parametrize("name", ["residual", "mlp", "silu_se", "two_inputs"])
def test_without_quantization_every_fused_node_is_fp32(name: str, tmp_path: Path) -> None:
    model = tinymodels.MODELS[name]()
    assert set(read_back(model, model, tmp_path).values()) == {"fp32"}


def test_nodes_that_onnxruntime_computed_beforehand_are_unknown(tmp_path: Path) -> None:
    model = tinymodels.dynamic_reshape()
    found = read_back(model, model, tmp_path)
    assert (found["n_conv"], found["n_relu"], found["n_logits"]) == ("fp32", "fp32", "fp32")
    assert found["n_size"] == "unknown"


def test_a_node_on_integers_is_read_as_what_it_reads(tmp_path: Path) -> None:
    net = tinymodels.Net()
    shape = net.op("Shape", net.input("input"), out="shape")
    net.op("Cast", shape, out="output", to=onnx.TensorProto.FLOAT)
    model = model_from_proto(net.model({"output": (4,)})).proto
    assert read_back(model, model, tmp_path)["n_output"] == "int64"


@pytest.mark.parametrize(
    ("planned", "real", "expected"),
    [
        ("int8", "fp32", ("n: planned int8, runs in fp32",)),
        ("fp32", "int8", ("n: planned fp32, runs in int8",)),
        ("fp16", "fp32", ("n: planned fp16, runs in fp32",)),
        ("int8", "int8", ()),
        ("int8", "unknown", ()),
        ("fp32", "int64", ()),
    ],
)
def test_not_honoured(planned: str, real: str, expected: tuple[str, ...]) -> None:
    assert not_honoured({"n": planned}, {"n": real}) == expected
