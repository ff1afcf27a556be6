"""Input channels in fours, as onnxruntime's CPU kernels for integer convolutions want them.

The kernel that gathers nothing beforehand, multiplies and requantizes in one go takes four input
channels at a time. Any other number of them (the three of a picture, above all) goes through a copy
of every window, a matrix product and a pass over its int32 sums, which takes about twice as long.
Channels added to the codes, with weights of 0, change no sum. Where a window is large that matrix
product is the better kernel, most of all with AMX, and nothing is added. Nor is anything inside the
network: values lie channel by channel there, and to add some costs 26 ns a place, more than is won.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    is_external,
    names_in,
    replace_field,
    used_tensors,
)

TOGETHER = 4
"""Channels, of input and of output, that the kernel takes at a time."""
LEAST_OUTPUTS = 16
"""Output channels below which the kernel is not used."""
LARGEST_WINDOW = 256
"""Products of one output value above which the other kernel was measured to be as fast."""


@dataclass(frozen=True, slots=True)
class _Filled:
    """A convolution whose input gets channels: the nodes that dequantize its data and weights."""

    node: onnx.NodeProto
    data: onnx.NodeProto
    weight: onnx.NodeProto
    codes: onnx.TensorProto

    @property
    def extra(self) -> int:
        """The channels that are added."""
        return int(-self.codes.dims[1] % TOGETHER)


def fill_channels(model: onnx.ModelProto) -> None:
    """Add channels of zeros to the inputs of `model` that integer convolutions read, where that is
    faster.

    `model` is a lowered one, and is changed in place: a Pad of codes stands between a
    QuantizeLinear and the DequantizeLinear that a convolution reads, and the weights have as many
    channels. Results are the same bits.
    """
    graph = model.graph
    found = _to_fill(graph)
    if not found:
        return
    fresh = FreshNames(names_in(graph))
    before: dict[str, list[onnx.NodeProto]] = {}
    padded: dict[str, str] = {}
    weights: dict[str, str] = {}
    for one in found:
        source = one.data.output[0]
        if source not in padded:
            nodes = _padding(graph, one, fresh)
            before[one.node.name] = nodes
            padded[source] = nodes[-1].output[0]
        if one.weight.output[0] not in weights:
            wider = _wider_weight(graph, one, fresh)
            before.setdefault(one.node.name, []).append(wider)
            weights[one.weight.output[0]] = wider.output[0]
        one.node.input[0], one.node.input[1] = padded[source], weights[one.weight.output[0]]
    _put_before(graph, before)


def _to_fill(graph: onnx.GraphProto) -> list[_Filled]:
    makers = {tensor: node for node in graph.node for tensor in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    outputs, inside = {info.name for info in graph.output}, _behind_codes(graph)
    found = []
    for node in graph.node:
        one = _convolution(node, makers, constants)
        if one is None or node.output[0] in outputs or not _pays(one.codes.dims):
            continue
        behind = [reader.op_type for reader in readers.get(node.output[0], ())]
        first = makers.get(one.data.input[0])
        if first is None or first.op_type != "QuantizeLinear" or first.input[0] in inside:
            continue
        if behind == ["QuantizeLinear"]:
            found.append(one)
    return found


def _behind_codes(graph: onnx.GraphProto) -> set[str]:
    """The tensors that are computed from what was dequantized, constants aside."""
    constants = {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        dequantizes = node.op_type == "DequantizeLinear" and node.input[0] not in constants
        if dequantizes or not found.isdisjoint(node.input):
            found.update(node.output)
    return found


def _convolution(
    node: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> _Filled | None:
    """`node` as one that could be filled: a dense convolution of codes with constant int8 ones."""
    if node.op_type != "Conv" or attribute(node, "group", 1) != 1:
        return None
    data, weight = (makers.get(name) for name in node.input[:2])
    for pair in (data, weight):
        if pair is None or pair.op_type != "DequantizeLinear" or len(pair.input) < 3:
            return None
    assert data is not None
    assert weight is not None
    codes = constants.get(weight.input[0])
    if codes is None or codes.data_type != onnx.TensorProto.INT8 or is_external(codes):
        return None
    return _Filled(node, data, weight, codes)


def _pays(shape: list[int] | tuple[int, ...]) -> bool:
    """Whether weights of this shape (output channels, input channels, window) are better filled."""
    made, read, *window = shape
    wide = read + -read % TOGETHER
    fits = made >= LEAST_OUTPUTS and made % TOGETHER == 0 and bool(window)
    return fits and wide != read and wide * math.prod(window) <= LARGEST_WINDOW


def _padding(graph: onnx.GraphProto, one: _Filled, fresh: FreshNames) -> list[onnx.NodeProto]:
    """A Pad of the codes that `one.data` dequantizes, and a DequantizeLinear of its own."""
    codes, scale, zero_point = one.data.input[:3]
    rank = len(one.codes.dims)
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + 1] = one.extra
    amounts = fresh.new(f"{one.data.output[0]}/pads")
    graph.initializer.append(numpy_helper.from_array(pads, amounts))
    filled = fresh.new(f"{one.data.output[0]}/filled")
    result = fresh.new(f"{filled}/dequantized")
    return [
        helper.make_node(
            "Pad", [codes, amounts, zero_point], [filled], name=fresh.new(f"{filled}/Pad")
        ),
        helper.make_node(
            "DequantizeLinear",
            [filled, scale, zero_point],
            [result],
            name=fresh.new(f"{filled}/DequantizeLinear"),
        ),
    ]


def _wider_weight(graph: onnx.GraphProto, one: _Filled, fresh: FreshNames) -> onnx.NodeProto:
    """What dequantizes the weights of `one` with as many channels as its data."""
    codes = numpy_helper.to_array(one.codes)
    widths = [(0, 0), (0, one.extra), *[(0, 0)] * (codes.ndim - 2)]
    name = fresh.new(f"{one.codes.name}/filled")
    graph.initializer.append(numpy_helper.from_array(np.pad(codes, widths), name))
    wider = onnx.NodeProto()
    wider.CopyFrom(one.weight)
    wider.name = fresh.new(f"{one.weight.name}/filled")
    wider.input[0] = name
    wider.output[0] = fresh.new(f"{one.weight.output[0]}/filled")
    return wider


def _put_before(graph: onnx.GraphProto, before: Mapping[str, list[onnx.NodeProto]]) -> None:
    """`graph` with these nodes before those of the names, and without what nothing reads now."""
    nodes = [new for node in graph.node for new in (*before.get(node.name, ()), node)]
    wanted = used_tensors(graph) | {name for node in nodes for name in node.input}
    replace_field(
        graph.node,
        [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in wanted],
    )
    wanted = used_tensors(graph)
    replace_field(graph.initializer, [t for t in graph.initializer if t.name in wanted])
