"""Which nodes are better left in float, by hand-computed times: a unit is a microsecond."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper

from trtune.precision.backends.ort.paying import slower_in_integers
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView

US = 1e-6


def chain(tmp_path: Path, *ops: str) -> GraphView:
    """Operators one behind the other on a thousand values: Conv, Relu, Silu."""
    nodes, weights, last = [], [], "input"
    for index, op in enumerate(ops):
        if op == "Silu":
            nodes.append(helper.make_node("Sigmoid", [last], [f"g{index}"], name=f"gate{index}"))
            nodes.append(
                helper.make_node("Mul", [last, f"g{index}"], [f"t{index}"], name=f"silu{index}")
            )
        elif op == "Conv":
            weights.append(
                helper.make_tensor(f"w{index}", TensorProto.FLOAT, (10, 10, 1, 1), [0.1] * 100)
            )
            nodes.append(
                helper.make_node("Conv", [last, f"w{index}"], [f"t{index}"], name=f"conv{index}")
            )
        else:
            nodes.append(helper.make_node(op, [last], [f"t{index}"], name=f"{op}{index}"))
        last = f"t{index}"
    shape = [1, 10, 10, 10]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        weights,
    )
    path = tmp_path / "chain.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return GraphView.of(load_model(path))


NET = ("Conv", "Silu", "Conv", "Silu", "Conv")


@pytest.mark.parametrize(
    ("integer", "exact", "conversion", "floats"),
    [
        pytest.param((5, 5, 5), (9, 9, 9), 1, [], id="all gain"),
        pytest.param((9, 9, 9), (5, 5, 5), 1, [0, 2, 4], id="all lose"),
        pytest.param((5, 9, 5), (9, 6, 9), 1, [2], id="the middle loses 3, its borders 2"),
        pytest.param((5, 9, 5), (9, 6, 9), 2, [], id="which cost 4: it stays"),
        pytest.param((9, 9, 4), (6, 6, 9), 2, [0, 2], id="the first two share one border"),
        pytest.param((4, 9, 9), (9, 6, 6), 2, [2, 4], id="and so do the last two"),
        pytest.param((7, 7, 7), (9, 9, 9), 4, [0, 2, 4], id="gains of 6, borders of 8"),
    ],
)
def test_a_layer_is_left_in_float_if_it_gains_less_than_its_borders_cost(
    tmp_path: Path,
    integer: tuple[int, ...],
    exact: tuple[int, ...],
    conversion: int,
    floats: list[int],
) -> None:
    view = chain(tmp_path, *NET)
    convs = [f"conv{index}" for index in (0, 2, 4)]
    found = slower_in_integers(
        view,
        {node.name for node in view.nodes},
        {name: us * US for name, us in zip(convs, integer, strict=True)},
        {name: us * US for name, us in zip(convs, exact, strict=True)},
        (conversion * US / 1000, conversion * US / 1000),
    )
    assert [name for name in found if name in convs] == [f"conv{index}" for index in floats]


def test_a_gate_goes_with_the_layer_before_it(tmp_path: Path) -> None:
    view = chain(tmp_path, *NET)
    free = {node.name for node in view.nodes}
    integer = {"conv0": US, "gate1": 4 * US, "silu1": 4 * US, "conv2": US, "conv4": US}
    exact = {"conv0": 4 * US, "silu1": US, "conv2": 9 * US, "conv4": 9 * US}
    assert slower_in_integers(view, free, integer, exact, (0.0, 0.0)) == (
        *("conv0", "gate1", "silu1"),
    )


def test_a_free_dimension_counts_as_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(tinymodels.conv_relu(), path)
    view = GraphView.of(load_model(path))
    free = {node.name for node in view.nodes}
    integer = dict.fromkeys(free, US)
    exact = dict.fromkeys(free, 2 * US)
    few, many = (
        slower_in_integers(view, free, integer, exact, (1e-10, 1e-10), batch=batch)
        for batch in (1, 10**6)
    )
    assert few == ()
    assert set(many) == free
