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

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtune.precision.lower.convolutions import (
    Constants,
    IntegerConvolution,
    integer_convolutions,
)

TOGETHER = 4
"""Channels, of input and of output, that the kernel takes at a time."""
LEAST_OUTPUTS = 16
"""Output channels below which the kernel is not used."""
LARGEST_WINDOW = 256
"""Products of one output value above which the other kernel was measured to be as fast."""


def fill_channels(model: onnx.ModelProto) -> None:
    """Add channels of zeros to the inputs of `model` that integer convolutions read, where that is
    faster.

    `model` is a lowered one, and is changed in place: a Pad of codes stands between a
    QuantizeLinear and the DequantizeLinear that a convolution reads, and the weights have as many
    channels. Results are the same bits.
    """
    found = _to_fill(model.graph)
    if not found:
        return
    made = Constants(model.graph)
    padded: dict[str, str] = {}
    for one in found:
        source = one.data.output[0]
        if source not in padded:
            padded[source] = _padding(made, one)
        one.node.input[0] = padded[source]
        codes = numpy_helper.to_array(one.codes)
        widths = [(0, 0), (0, _extra(one)), *[(0, 0)] * (codes.ndim - 2)]
        made.reweight(one, "filled", np.pad(codes, widths))
    made.finish()


def _to_fill(graph: onnx.GraphProto) -> list[IntegerConvolution]:
    makers = {tensor: node for node in graph.node for tensor in node.output}
    inside = _behind_codes(graph)
    found = []
    for one in integer_convolutions(graph):
        first = makers.get(one.data.input[0])
        begins = first is not None and first.op_type == "QuantizeLinear"
        if first is not None and begins and first.input[0] not in inside and _pays(one.codes.dims):
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


def _pays(shape: list[int] | tuple[int, ...]) -> bool:
    """Whether weights of this shape (output channels, input channels, window) are better filled."""
    made, read, *window = shape
    wide = read + -read % TOGETHER
    fits = made >= LEAST_OUTPUTS and made % TOGETHER == 0 and bool(window)
    return fits and wide != read and wide * math.prod(window) <= LARGEST_WINDOW


def _extra(one: IntegerConvolution) -> int:
    """The channels that are added."""
    return int(-one.codes.dims[1] % TOGETHER)


def _padding(made: Constants, one: IntegerConvolution) -> str:
    """A Pad of the codes that `one.data` dequantizes, and a DequantizeLinear of its own."""
    codes, scale, zero_point = one.data.input[:3]
    rank = len(one.codes.dims)
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + 1] = _extra(one)
    amounts = made.constant(f"{one.data.output[0]}/pads", pads)
    filled = made.name(f"{one.data.output[0]}/filled")
    result = made.name(f"{filled}/dequantized")
    pair = (
        ("Pad", [codes, amounts, zero_point], filled),
        (
            "DequantizeLinear",
            [filled, scale, zero_point],
            result,
        ),
    )
    for op, inputs, output in pair:
        name = made.name(f"{filled}/{op}")
        made.before(one.node.name, helper.make_node(op, inputs, [output], name=name))
    return result
