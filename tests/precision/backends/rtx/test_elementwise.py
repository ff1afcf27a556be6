"""Which sums and products of elements read nothing but codes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tinyqat import QatNet

from trtune.precision.backends.rtx.elementwise import ReadCodes, read_as_codes


def net_of(second: str) -> onnx.ModelProto:
    net = QatNet()
    x = net.input("input")
    left = net.pair(x, 0.03, out="left")
    if second == "pair":
        right = net.pair(net.op("Relu", x, out="relu"), 0.02, out="right")
    elif second == "moved":
        right = net.op("Transpose", net.pair(x, 0.02, out="right"), out="turned", perm=[0, 1, 3, 2])
    elif second == "float":
        right = net.op("Relu", x, out="right")
    else:
        right = net.stored("right", np.ones((1, 3, 1, 1)), 0.02)
    net.op("Add", left, right, out="output")
    return net.model({"output": ("N", 3, 8, 8)})


@pytest.mark.parametrize(
    ("second", "read"), [("pair", True), ("moved", True), ("float", False), ("constant", False)]
)
def test_every_side_is_dequantized_data(second: str, read: bool) -> None:
    found = read_as_codes(net_of(second).graph)
    expected = {"n_output": ReadCodes("int8", frozenset({"n_left", "n_right"}))}
    assert found == (expected if read else {})


def test_only_the_nodes_asked_for() -> None:
    graph = net_of("pair").graph
    assert read_as_codes(graph, ["n_left"]) == {}
    assert list(read_as_codes(graph, ["n_output"])) == ["n_output"]
