"""What has to be measured to know how large every tensor gets, and what follows from it."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import tinymodels
from tinymodels import Net
from tinyquant import case, inner_values

from trtune.calibrate.histogram import Histogram
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.half_ranges import bounds, tensors_for_ranges


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto, fold="none"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_relu", ["input", "conv1", "conv2", "pooled", "logits"]),
        pytest.param(
            "depthwise", ["input", "expand", "dw", "project", "pooled", "logits"],
            id="what a Clip lets through is known",
        ),
        pytest.param(
            "silu_se",
            ["input", "stem", "dw", "se_mean", "se_down", "se_up", "pooled", "logits"],
            id="a product with a sigmoid is no larger",
        ),
        pytest.param(
            "concat", ["input", "squeeze", "left", "right", "mix", "pooled", "logits"],
            id="a Concat is as large as its largest part",
        ),
        pytest.param(
            "attention",
            ["input", "ln", "q", "k", "v", "scores", "scaled", "mixed", "proj", "output"],
            id="a softmax ends at 1",
        ),
        pytest.param("int64_input", ["fc", "logits"], id="an embedding is as large as its table"),
        pytest.param("dynamic_reshape", ["input", "conv", "logits"], id="no shapes"),
        pytest.param(
            "resize", ["input", "conv", "up", "output"], id="not the scales of a Resize"
        ),
        pytest.param(
            "quantized", ["input", "x_dq", "conv", "pooled", "logits"], id="no integers"
        ),
    ],
)  # fmt: skip
def test_what_is_measured(name: str, expected: list[str]) -> None:
    assert list(tensors_for_ranges(view_of(tinymodels.MODELS[name]()))) == expected


def chain() -> Net:
    net = Net()
    net.input("x", ("N", 4))
    return net


def one(op: str, *constants: tuple[str, object], **attributes: object) -> onnx.ModelProto:
    """y = op(x, constants...), where `x` is measured."""
    net = chain()
    names = [net.const(name, value) if name else "" for name, value in constants]
    net.op(op, "x", *names, out="y", **attributes)
    return net.model({"y": (None, None)})


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        pytest.param(one("Relu"), 8.0, id="Relu"),
        pytest.param(one("Tanh"), 1.0, id="Tanh"),
        pytest.param(one("LeakyRelu", alpha=0.5), 8.0, id="LeakyRelu"),
        pytest.param(one("LeakyRelu", alpha=3.0), None, id="a steep LeakyRelu"),
        pytest.param(one("Clip", ("a", -2.0), ("b", 6.0)), 6.0, id="Clip"),
        pytest.param(one("Clip", ("a", -2.0), ("b", 60.0)), 8.0, id="a wide Clip"),
        pytest.param(one("Clip", ("a", 0.0)), 8.0, id="Clip from below"),
        pytest.param(one("Clip", ("a", 20.0)), None, id="Clip from below at more than the data"),
        pytest.param(one("Clip", ("a", 20.0), ("b", 30.0)), 30.0, id="Clip above the data"),
        pytest.param(one("Mul", ("a", 0.125)), 1.0, id="scaled"),
        pytest.param(one("Mul", ("a", 4.0)), 32.0, id="scaled up"),
        pytest.param(one("Mul", ("a", 0.0)), 0.0, id="times zero"),
        pytest.param(one("Mul", ("a", [1.0, 2.0, 3.0, 4.0])), None, id="a factor a channel"),
        pytest.param(one("Max", ("a", [10.0])), 10.0, id="Max"),
        pytest.param(one("Max", ("a", [-np.inf, 2.0, 3.0, 4.0])), 8.0, id="an infinite mask"),
        pytest.param(one("Exp"), None, id="Exp"),
        pytest.param(one("Cast", to=onnx.TensorProto.FLOAT), 8.0, id="Cast"),
    ],
)
def test_what_follows(proto: onnx.ModelProto, expected: float | None) -> None:
    view = view_of(proto)
    assert bounds(view, {"x": 8.0}).get("y") == expected
    assert tensors_for_ranges(view) == (("x", "y") if expected is None else ("x",))


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        pytest.param(one("Tanh"), 1.0, id="Tanh"),
        pytest.param(one("Clip", ("a", -2.0), ("b", 6.0)), 6.0, id="Clip"),
        pytest.param(one("Relu"), None, id="Relu"),
        pytest.param(one("Mul", ("a", 4.0)), None, id="scaled"),
    ],
)
def test_what_is_known_of_unmeasured_data(proto: onnx.ModelProto, expected: float | None) -> None:
    assert bounds(view_of(proto), {}).get("y") == expected


def test_a_measured_tensor_needs_no_derivation() -> None:
    assert bounds(view_of(one("Relu")), {"x": 8.0, "y": 3.0})["y"] == 3.0


def test_a_histogram_stands_for_its_maximum() -> None:
    histogram = Histogram.of(np.float32([1, -7, 2]))
    assert bounds(view_of(one("Relu")), {"x": histogram})["y"] == 7.0


def test_a_computed_constant_is_known() -> None:
    net = chain()
    root = net.op("Sqrt", net.const("c", [16.0]), out="root")
    net.op("Add", "x", root, out="y")
    assert bounds(view_of(net.model({"y": ("N", 4)})), {"x": 8.0, "y": 9.0})["root"] == 4.0


@pytest.mark.parametrize("name", [n for n in tinymodels.MODELS if n != "half_weights"])
def test_no_value_exceeds_its_bound(name: str) -> None:
    prepared = case(tinymodels.MODELS[name](), seed=3)
    view = prepared.view
    measured = inner_values(prepared.model, tensors_for_ranges(view), prepared.feeds)
    found = bounds(view, {t: float(np.abs(v).max()) for t, v in measured.items()})
    floats = [
        tensor
        for node in view.nodes
        if node.name not in view.shape_nodes
        for tensor in node.output
        if view.dtypes.get(tensor) == "float32"
    ]
    assert set(floats) <= set(found)
    values = inner_values(prepared.model, floats, prepared.feeds)
    for tensor in floats:
        assert np.abs(values[tensor]).max() <= found[tensor] * (1 + 1e-6) < math.inf
