"""How work grows with the size of a network: by counted calls, not by the clock."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

import onnx
import pytest
from tinymodels import Net

from trtune.calibrate.table import CalibrationTable
from trtune.precision.compare.alone import held_tensors
from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.implicit import implicit_tensors
from trtune.precision.plan.placement import place, shared_ranges
from trtune.precision.plan.rules import make_plan


def blocks(count: int) -> onnx.ModelProto:
    """`count` residual blocks of two convs."""
    net = Net()
    x = net.conv(net.input("input"), "stem", 3, 4)
    for n in range(count):
        y = net.op("Relu", net.conv(x, f"a{n}", 4, 4, 1), out=f"r{n}")
        x = net.op("Add", net.conv(y, f"b{n}", 4, 4, 1), x, out=f"s{n}")
    return net.head(x, 4)


def repeated_names(count: int) -> onnx.ModelProto:
    """The same, and every node has one name."""
    model = blocks(count)
    for node in model.graph.node:
        node.name = "node"
    return model


def concats(count: int) -> onnx.ModelProto:
    """A chain of `count` concats, each of all before it and a conv, before a last conv."""
    net = Net()
    x = net.conv(net.input("input"), "stem", 3, 4)
    for n in range(count):
        x = net.op("Concat", x, net.conv("input", f"k{n}", 3, 4, 1), out=f"c{n}", axis=1)
    return net.head(net.conv(x, "mix", 4 + 4 * count, 8, 1), 8)


def calls_of(make: Callable[[int], onnx.ModelProto], count: int) -> int:
    """Calls, of Python and of C, from the file's proto to what is calibrated and lowered."""
    proto = make(count)
    profile = cProfile.Profile()
    profile.enable()
    model = model_from_proto(proto)
    view = GraphView.of(model)
    plan = make_plan(view, default="int8")
    placement = place(view, plan)
    shared_ranges(view, placement.activations)
    implicit_tensors(view, plan)
    held_tensors(view, placement)
    lower_emulate(model, plan, CalibrationTable(dict.fromkeys(placement.activations, 1.0)))
    profile.disable()
    found: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("make", [blocks, repeated_names, concats])
def test_work_is_linear_in_the_nodes(make: Callable[[int], onnx.ModelProto]) -> None:
    calls_of(make, 2)  # what is done once
    small, large = calls_of(make, 40), calls_of(make, 160)
    assert large < 4.4 * small
