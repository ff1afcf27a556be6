"""What a graph proves of the least values of its tensors."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import tinymodels
from tinymodels import Net

from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.bounds import SILU_LOWEST, lowest, never_negative


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto))


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("conv_relu", "input", False),
        ("conv_relu", "conv1", False),
        ("conv_relu", "relu1", True),
        pytest.param("conv_relu", "flat", True, id="an average of a Relu, flattened"),
        ("depthwise", "clip1", True),
        ("depthwise", "project", False),
        pytest.param("residual", "sum", False, id="a sum with a conv"),
        pytest.param("concat", "max", True, id="a concat of Relus"),
        pytest.param("silu_se", "stem_silu", False, id="x * sigmoid(x)"),
        ("silu_se", "se_gate", True),
        ("attention", "probs", True),
        ("two_inputs", "joined", False),
        pytest.param("mlp", "fc2_b", False, id="a constant with both signs"),
        pytest.param("dynamic_reshape", "rest", False, id="a negative constant"),
        pytest.param("attention", "ln_scale", True, id="a constant of ones"),
    ],
)
def test_never_negative(name: str, tensor: str, expected: bool) -> None:
    assert never_negative(view_of(tinymodels.MODELS[name]()), tensor) is expected


def test_never_negative_on_a_graph_with_very_many_paths() -> None:
    net = Net()
    x = net.op("Relu", net.input("input"), out="x0")
    for i in range(1, 200):  # each doubles the number of paths
        x = net.op("Add", x, net.op("Identity", x, out=f"i{i}"), out=f"x{i}")
    view = view_of(net.model({x: ("N", 3, 8, 8)}))
    known: dict[str, float] = {}
    assert never_negative(view, "x199", known)
    assert known["i7"] == 0
    assert not never_negative(view, "input", known)


def test_the_least_value_of_silu() -> None:
    x = np.linspace(-3, 3, 60001)
    assert pytest.approx(float((x / (1 + np.exp(-x))).min()), abs=1e-7) == SILU_LOWEST


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("input", -math.inf),
        ("silu", SILU_LOWEST),
        ("silu_left", SILU_LOWEST),
        pytest.param("gated", -math.inf, id="x * sigmoid(y)"),
        ("pooled", SILU_LOWEST),
        ("sum", SILU_LOWEST),
        pytest.param("twice", 2 * SILU_LOWEST, id="a sum of two"),
        ("joined", SILU_LOWEST),
        pytest.param("mixed", -math.inf, id="a concat with the input"),
    ],
)
def test_lowest(tensor: str, expected: float) -> None:
    net = Net()
    x = net.input("input")
    gate = net.op("Sigmoid", x, out="gate")
    silu = net.op("Mul", x, gate, out="silu")
    left = net.op("Mul", gate, x, out="silu_left")
    net.op("Mul", net.op("Relu", x, out="relu"), gate, out="gated_relu")
    net.op("Mul", net.op("Neg", x, out="less"), gate, out="gated")
    net.op("MaxPool", silu, out="pooled", kernel_shape=[2, 2])
    net.op("Add", silu, "relu", out="sum")
    net.op("Add", silu, left, out="twice")
    net.op("Concat", silu, left, "relu", out="joined", axis=1)
    net.op("Concat", silu, x, out="mixed", axis=1)
    view = view_of(net.model({name: ("N", 3, 8, 8) for name in ("mixed", "twice", "sum")}))
    assert lowest(view, tensor) == pytest.approx(expected)
