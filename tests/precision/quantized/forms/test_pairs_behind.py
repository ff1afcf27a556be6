"""A pair in front of a ReLU and the same behind it: equal to the bit, and the product is int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from tinyqat import QatNet, assert_same_bits, imported

from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.quantized.find import find_quantization
from trtune.precision.quantized.forms.pairs_behind import commutes, with_pairs_behind
from trtune.precision.quantized.importing import Imported, insert_quantization


def network(
    behind: Callable[[QatNet, str], str],
    *,
    zero: int = 0,
    dtype: Any = np.int8,
    scale: float = 0.03,
) -> onnx.ModelProto:
    """Conv, pair, `behind`, Conv, as torch's eager mode has it."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    x = net.pair(net.qconv(x, "one", 3, 16), scale, out="back")
    return net.head(net.qconv(behind(net, x), "two", 16, 16), 16)


def check(proto: onnx.ModelProto, found: Imported) -> None:
    """Fail unless the import gives the bits of the file."""
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(found.model.proto, batch=4))


def relu(net: QatNet, x: str) -> str:
    return net.op("Relu", x, out="r")


def relu_and_pool(net: QatNet, x: str) -> str:
    return net.op("MaxPool", relu(net, x), out="p", kernel_shape=[2, 2], strides=[2, 2])


def pool_and_relu(net: QatNet, x: str) -> str:
    return relu(net, net.op("MaxPool", x, out="p", kernel_shape=[2, 2], strides=[2, 2]))


def transposed(net: QatNet, x: str) -> str:
    return net.op("Transpose", relu(net, x), out="t", perm=[0, 1, 3, 2])


def read_twice(net: QatNet, x: str) -> str:
    return net.op("Add", relu(net, x), x, out="both")


def clip(low: float, high: float) -> Callable[[QatNet, str], str]:
    def behind(net: QatNet, x: str) -> str:
        return net.op("Clip", x, net.const("low", low), net.const("high", high), out="r")

    return behind


@pytest.mark.parametrize(
    "behind",
    [relu, relu_and_pool, pool_and_relu, transposed, clip(0, 6), clip(-0.5, 0.75)],
    ids=["relu", "relu, pool", "pool, relu", "relu, transpose", "beyond the range", "on the grid"],
)
def test_the_product_behind_becomes_int8(behind: Callable[[QatNet, str], str]) -> None:
    proto = network(behind, scale=0.03125)
    found = imported(proto)
    assert [row.kind for row in found.findings if row.repaired] == ["pair-before-activation"]
    assert found.plan.int8_nodes == ("n_one", "n_two")
    check(proto, found)


def test_a_bound_beside_the_grid_stays_as_it_is() -> None:
    proto = network(clip(0, 1.01), scale=0.03125)
    found = imported(proto)
    assert found.plan.int8_nodes == ("n_one",)
    check(proto, found)


def test_who_else_reads_the_pair_goes_on_doing_so() -> None:
    proto = network(read_twice)
    check(proto, imported(proto))


def test_no_pair_is_added_where_no_product_needs_one() -> None:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, out="read")
    x = net.pair(net.qconv(x, "one", 3, 16), 0.03, out="back")
    proto = model_from_proto(net.head(relu(net, x), 16)).proto
    view = GraphView(proto)
    made, rows = with_pairs_behind(proto, view, find_quantization(view))
    assert made is proto
    assert rows == ()


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2.0**-20, 2.0**13, width=32),
    zero=st.integers(-128, 127),
    signed=st.booleans(),
    values=st.lists(st.floats(-(2.0**17), 2.0**17, width=32), min_size=1, max_size=40),
    steps=st.tuples(st.integers(-200, 0), st.integers(0, 300)),
    op=st.sampled_from(["Relu", "Clip"]),
)
def test_rounding_and_cutting_commute(
    scale: float, zero: int, signed: bool, values: list[float], steps: tuple[int, int], op: str
) -> None:
    """The claim that the rewrite stands on, in NumPy as onnxruntime computes it."""
    s = np.float32(scale)
    low, high = (-128, 127) if signed else (0, 255)
    z = zero if signed else zero + 128
    bounds = (np.float32(0), np.float32(np.inf))
    if op == "Clip":
        bounds = (np.float32(steps[0]) * s, np.float32(steps[1]) * s)
    x = np.asarray(values, np.float32)

    def pair(v: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(v / s).astype(np.float64) + z, low, high)
        return (codes - z).astype(np.float32) * s

    before = np.clip(pair(x), *bounds)
    behind = pair(np.clip(x, *bounds))
    accepted = _accepts(op, bounds, s, z, signed=signed)
    if op == "Relu":
        assert accepted
    if accepted:
        np.testing.assert_array_equal(before, behind)
        np.testing.assert_array_equal(before, pair(before))


def _accepts(op: str, bounds: tuple[Any, Any], scale: Any, zero: int, *, signed: bool) -> bool:
    net = QatNet()
    dtype = np.int8 if signed else np.uint8
    read = net.pair(net.input("input"), np.float32(scale), zero, dtype, out="read")
    more = [] if op == "Relu" else [net.const(n, b) for n, b in zip("lh", bounds, strict=True)]
    net.op(op, read, *more, out="output")
    proto = net.model({"output": ("N", 3, 8, 8)})
    view = GraphView(model_from_proto(proto, fold="none").proto)
    (pair,) = find_quantization(view).pairs
    node = view.by_name[view.producer["output"]]
    assert helper.printable_node(node)
    return commutes(view, node, pair)
