from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray

from trtune.calibrate import extents as module
from trtune.calibrate.extents import Extent, measure
from trtune.configs.errors import ModelError
from trtune.datasets.batches import Batch

MODELS = [
    *("conv_relu", "depthwise", "residual", "concat", "silu_se", "mlp", "attention"),
    *("two_inputs", "int64_input", "two_outputs", "branches", "resize", "fixed_batch"),
    *("dynamic_reshape", "constant_nodes", "initializer_inputs"),
]


def batch_of(model: onnx.ModelProto, count: int = 3) -> Batch:
    feeds: dict[str, NDArray[Any]] = tinymodels.feeds(model, batch=count, seed=3)
    return Batch(feeds, tuple(f"{i}" for i in range(count)))


def outputs_of(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output if name]


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was run for its shapes")

    monkeypatch.setattr(module, "open_session", run)


@pytest.mark.parametrize("name", MODELS)
def test_inferred_extents_are_those_that_the_runtime_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = getattr(tinymodels, name)()
    tensors, batch = outputs_of(model), batch_of(model)
    inferred = measure(model, tensors, batch)
    monkeypatch.setattr(module, "_inferred", lambda *arguments: [])
    assert measure(model, tensors, batch) == inferred


@pytest.mark.usefixtures("never_run")
def test_what_shape_inference_tells_is_not_run() -> None:
    model = tinymodels.conv_relu()
    found = measure(model, outputs_of(model), batch_of(model))
    assert {extent.axis for extent in found.values()} == {0}


@pytest.mark.usefixtures("never_run")
def test_inputs_are_known_without_anything() -> None:
    feeds = {"x": np.zeros((4, 3, 5), np.float32)}
    net = tinymodels.Net()
    net.op("Relu", net.input("x", ("n", 3, 5)), out="y")
    model = net.model({"y": ("n", 3, 5)})
    assert measure(model, ["x"], Batch(feeds, tuple("abcd"))) == {"x": Extent(60, 0)}


@pytest.mark.usefixtures("never_run")
def test_weights_are_not_needed() -> None:
    model = tinymodels.conv_relu()
    expected = measure(model, outputs_of(model), batch_of(model))
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) > module.MOST_OF_A_SHAPE:
            tensor.ClearField("raw_data")
    assert measure(model, outputs_of(model), batch_of(model)) == expected


def test_declared_shapes_that_do_not_hold_are_not_believed() -> None:
    model = tinymodels.conv_relu()
    (tensor, *_) = outputs_of(model)
    expected = measure(model, [tensor], batch_of(model))
    wrong = onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, [1, 1, 1, 1])
    model.graph.value_info.append(wrong)
    assert measure(model, [tensor], batch_of(model)) == expected


def test_a_shape_that_follows_the_data_is_looked_up() -> None:
    net = tinymodels.Net()
    net.op("NonZero", net.input("x", ("n", 4)), out="places")
    net.op("Cast", "places", out="found", to=onnx.TensorProto.FLOAT)
    model = net.model({"found": (2, "found")})
    feeds = {"x": np.float32([[1, 1, 0, 0], [1, 1, 0, 0]])}
    (extent,) = measure(model, ["found"], Batch(feeds, ("a", "b"))).values()
    assert (extent.bytes, extent.axis) == (16, 1)


def test_a_network_that_cannot_be_loaded_is_said_to_be(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], domain="nowhere")
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])
    graph = onnx.helper.make_graph([node], "g", [info], [onnx.ValueInfoProto(name="y")])
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("nowhere", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    with pytest.raises(ModelError, match="cannot load the model"):
        measure(model, ["y"], Batch({"x": np.zeros((2, 2), np.float32)}, ("a", "b")))
