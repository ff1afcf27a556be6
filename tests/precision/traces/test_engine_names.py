from __future__ import annotations

import pytest
import tinymodels

from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.traces.engine_names import between, nodes_of_layer, parts_of


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("conv1", ["conv1"]),
        ("/a/Conv + /a/Relu", ["/a/Conv", "/a/Relu"]),
        ("q || k || v", ["q", "k", "v"]),
        ("a + PWN(PWN(PWN(s), PWN(m)), d)", ["a", "s", "m", "d"]),
        ("PWN(a + b, c)", ["a", "b", "c"]),
        ("w + (Unnamed Layer* 3) [Shuffle] + Mul", ["w", "(Unnamed Layer* 3) [Shuffle]", "Mul"]),
        ("{ForeignNode[a.b.../c/Add]}", ["a.b", "/c/Add"]),
        ("odd(name + b", ["odd(name", "b"]),
    ],
)
def test_parts(layer: str, expected: list[str]) -> None:
    assert list(parts_of(layer)) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("n_conv1", ["n_conv1"]),
        ("w1 + n_conv1 + n_relu1", ["n_conv1", "n_relu1"]),
        ("{ForeignNode[n_relu1...n_relu2]}", ["n_relu1", "n_conv2", "n_relu2"]),
        ("{ForeignNode[conv2...n_pooled]}", ["n_conv2", "n_relu2", "n_pooled"]),
        ("Reformatting CopyNode for Input Tensor 0 to n_conv1", []),
        ("{ForeignNode[x...n_relu2]}", []),
        ("nothing", []),
    ],
)
def test_nodes_of_a_layer(layer: str, expected: list[str]) -> None:
    view = GraphView.of(model_from_proto(tinymodels.conv_relu()))
    assert list(nodes_of_layer(layer, view)) == expected


def test_what_is_on_no_way_between_is_left_out() -> None:
    view = GraphView.of(model_from_proto(tinymodels.residual()))
    first, last = view.nodes[0].name, view.nodes[-1].name
    assert between(view, first, last) == {node.name for node in view.nodes}
