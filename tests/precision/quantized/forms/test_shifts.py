"""Asymmetric activations by a shift: the levels of the file, the same FP32, int8 everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyqat import QatNet, channel_scales, imported
from tinyquant import outputs

from trtune.datasets.batches import Batch
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.quantized.forms.shifts import SHIFTED_METHOD, offset_of
from trtune.precision.quantized.importing import Imported, quantization_errors
from trtune.precision.quantized.repair import Requantized
from trtune.precision.runtime.api import Candidate

SAME_DB = 50.0
"""Codes are those of the file; floats are added in another order, so a tie breaks otherwise now and
then. A symmetric range gives less than 45."""


def sqnr(found: Imported, *, seed: int = 0) -> float:
    feeds = tinymodels.feeds(found.model.proto, batch=4, seed=seed)
    return min(
        e.sqnr_db for e in quantization_errors(found, [Batch(feeds, tuple("abcd"))]).values()
    )


def conv(
    net: QatNet, x: str, out: str, cin: int, cout: int, *, group: int = 1, **attrs: Any
) -> str:
    weight = net.weight(f"{out}_w", cout, cin // group, 3, 3)
    read = net.pair(weight, channel_scales(net.value(weight), 0), axis=0)
    bias = net.weight(f"{out}_b", cout)
    return net.op("Conv", x, read, bias, out=out, kernel_shape=[3, 3], group=group, **attrs)


def two_convs(
    scale: float,
    zero: int,
    dtype: Any = np.uint8,
    *,
    pads: int = 1,
    group: int = 1,
    data: bool = True,
) -> onnx.ModelProto:
    """Two convolutions on quantized data, or, without `data`, on floats."""
    net = QatNet()
    x = net.input("input")
    x = conv(net, net.pair(x, 0.03) if data else x, "a", 3, 16, pads=[1] * 4)
    x = net.pair(x, scale, zero, dtype) if data else x
    x = conv(net, x, "b", 16, 16, pads=[pads] * 4, group=group)
    return net.model({net.op("Relu", x, out="output"): ("N", 16, None, None)})


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        (Requantized("x", "activation", 0.5, 1.0, (0.0, 127.5), (-128.0, 127.0)), 64.0),
        (Requantized("x", "activation", 1.0, 1.1, (-28.0, 227.0), (-230.0, 227.0)), 100.0),
        (Requantized("x", "activation", 1.0, 1.1, (-138.0, 117.0), (-138.0, 137.0)), -10.0),
        (Requantized("x", "weight", 0.5, 1.0, (0.0, 127.5), (-128.0, 127.0)), None),
        (Requantized("x", "activation", 0.5, 1.0, (0.0, 63.5), (-64.0, 63.5)), None),
    ],
    ids=["uint8 from 0", "uint8 zero point 28", "int8 zero point 10", "weights", "128 levels"],
)
def test_the_shift(change: Requantized, offset: float | None) -> None:
    assert offset_of(change) == offset


@pytest.mark.parametrize(("pads", "group"), [(0, 1), (1, 1), (1, 16)])
@pytest.mark.parametrize("zero", [0, 100, 255])
def test_a_convolution_computes_what_the_file_does(pads: int, group: int, zero: int) -> None:
    found = imported(two_convs(0.04, zero, pads=pads, group=group), allow_requantize=True)
    assert sqnr(found) > SAME_DB
    assert found.plan.int8_nodes == ("n_a", "n_b")
    (change,) = found.changes
    assert change.shift == pytest.approx((128 - zero) * 0.04)
    assert change.step_after == change.step_before
    (read,) = [t for t in found.table.scales if t != "input"]
    assert found.table.methods[read] == SHIFTED_METHOD
    assert found.table.scale(read) == np.float32(0.04)
    assert sum(node.op_type == "Pad" for node in found.model.proto.graph.node) == pads


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(0.005, 0.1),
    zero=st.integers(0, 255),
    pads=st.integers(0, 2),
    group=st.sampled_from([1, 4, 16]),
)
def test_whatever_the_range(scale: float, zero: int, pads: int, group: int) -> None:
    found = imported(two_convs(scale, zero, pads=pads, group=group), allow_requantize=True)
    assert sqnr(found) > SAME_DB


@pytest.mark.parametrize("zero", [-128, -60, 31])
def test_int8_with_a_zero_point(zero: int) -> None:
    found = imported(two_convs(0.04, zero, np.int8), allow_requantize=True)
    assert sqnr(found) > SAME_DB
    assert [change.shift for change in found.changes] == pytest.approx([-zero * 0.04])


@pytest.mark.parametrize("pads", [0, 1])
def test_in_fp32_nothing_is_another_number(pads: int) -> None:
    """Weights are those that the codes stand for, and the bias gives back what was taken off."""
    found = imported(two_convs(0.04, 60, pads=pads), allow_requantize=True)
    assert found.changes[0].shift
    floats = two_convs(0.04, 60, pads=pads, data=False)
    feeds = tinymodels.feeds(floats, batch=4)
    (wanted,), (made,) = (outputs(m, feeds).values() for m in (floats, found.model.proto))
    first = float(np.mean((wanted - made) ** 2) / np.mean(wanted**2))
    assert first < 1e-3  # the first convolution keeps its float weights


def residual(zero: int = 0) -> onnx.ModelProto:
    """A block whose input, from 0 on, is read by a convolution and by its skip connection."""
    net = QatNet()
    x = net.op("Relu", conv(net, net.pair(net.input("input"), 0.03), "a", 3, 16), out="a_relu")
    x = net.pair(x, 0.03, zero, np.uint8)
    y = conv(net, x, "b", 16, 16, pads=[1] * 4)
    x = net.op("Relu", net.op("Add", y, x, out="sum"), out="sum_relu")
    x = net.pair(x, 0.05, zero, np.uint8)
    return net.model({conv(net, x, "output", 16, 4): ("N", 4, None, None)})


@pytest.mark.parametrize("zero", [0, 40])
def test_a_skip_connection_gets_its_shift_back(zero: int) -> None:
    found = imported(residual(zero), allow_requantize=True)
    assert sqnr(found) > SAME_DB
    assert found.plan.int8_nodes == ("n_a", "n_b", "n_output")
    assert all(change.shift for change in found.changes)
    edges = {edge for edges in found.table.reads.values() for edge in edges}
    assert edges == {("n_a", 0), ("n_b", 0), ("n_sum", 1), ("n_output", 0)}


def products(*, bias: bool) -> onnx.ModelProto:
    net = QatNet()
    x = net.input("input", ("N", 6, 16))
    for name in ("a", "b"):
        weight = net.weight(f"{name}_w", 16, 16)
        read = net.pair(weight, channel_scales(net.value(weight), 1), axis=1)
        x = net.op("MatMul", net.pair(x, 0.03, 90, np.uint8), read, out=name)
        if bias:
            x = net.op("Add", x, net.weight(f"{name}_b", 16), out=f"{name}_sum")
    return net.model({net.op("Identity", x, out="output"): ("N", 6, 16)})


def test_products_with_a_bias() -> None:
    found = imported(products(bias=True), allow_requantize=True)
    assert sqnr(found) > SAME_DB
    assert all(change.shift for change in found.changes)


def test_products_without_a_bias_keep_a_symmetric_range() -> None:
    found = imported(products(bias=False), allow_requantize=True)
    assert not any(change.shift for change in found.changes)
    assert {method for method in found.table.methods.values()} == {"qat, made symmetric"}


def test_a_pair_before_and_behind_a_pool_is_one() -> None:
    net = QatNet()
    x = net.op("Relu", conv(net, net.pair(net.input("input"), 0.03), "a", 3, 16), out="a_relu")
    x = net.pair(x, 0.03, 0, np.uint8)
    x = net.op("MaxPool", x, out="pool", kernel_shape=[2, 2], strides=[2, 2])
    x = conv(net, net.pair(x, 0.03, 0, np.uint8), "output", 16, 16, pads=[1] * 4)
    found = imported(net.model({x: ("N", 16, None, None)}), allow_requantize=True)
    assert sqnr(found) > SAME_DB
    assert ("n_pool", 0) not in {e for edges in found.table.reads.values() for e in edges}


def test_what_is_averaged_is_not_shifted() -> None:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03, 60, np.uint8)
    x = net.op("Sigmoid", x, out="s")
    x = conv(net, net.pair(x, 1 / 255, 0, np.uint8), "output", 3, 16)
    found = imported(net.model({x: ("N", 16, None, None)}), allow_requantize=True)
    shifted = {change.tensor for change in found.changes if change.shift}
    assert shifted == {"s/shifted"} or shifted == {"s"}


def test_a_pin_leaves_no_shift_behind() -> None:
    """A node in FP32 reads the shifted floats and gives what it gave."""
    found = imported(residual(30), allow_requantize=True)
    pinned = imported(residual(30), allow_requantize=True, pins={"n_b": "fp32", "n_output": "fp32"})
    assert found.table == pinned.table
    assert pinned.plan.int8_nodes == ("n_a",)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
@pytest.mark.parametrize("proto", [two_convs(0.04, 0), residual(40)], ids=["padded", "skip"])
def test_the_compiler_runs_all_of_it_in_int8(proto: onnx.ModelProto, tmp_path: Path) -> None:
    found = imported(proto, allow_requantize=True)
    backend = RtxBackend(compute_capabilities=["8.9"])
    info = backend.build(Candidate(found.model, found.plan, found.table), tmp_path)
    assert info.not_honoured == ()
    assert {info.precisions[name] for name in found.plan.compute_nodes} == {"int8"}
