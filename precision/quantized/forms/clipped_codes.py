"""Codes that are cut to fewer than their type holds, written as a cut of the float values.

torch's x86 settings use 7 of 8 bits, and Brevitas writes every narrower type so: QuantizeLinear,
Clip, DequantizeLinear. Rounding to a grid and cutting at points of that grid commute, so a Clip in
front, at the values of those codes, gives the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.precision.graph.proto import FreshNames, copy_model, copy_of, names_in, replace_field
from trtune.precision.graph.view import GraphView
from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE
from trtune.precision.quantized.findings import EXACT, Finding, finding


@dataclass(frozen=True, slots=True)
class _Cut:
    """A Clip of codes: the QuantizeLinear in front of it, and the floats that its bounds stand for
    (None where the type ends there anyway)."""

    clip: onnx.NodeProto
    quantize: onnx.NodeProto
    low: np.float32 | None
    high: np.float32 | None


def with_clips_in_front(
    proto: onnx.ModelProto, view: GraphView
) -> tuple[onnx.ModelProto, tuple[Finding, ...]]:
    """A copy of `proto` in which floats are cut in the place of their codes, and what was found of
    it; `proto` itself if there is nothing to do."""
    cuts = {cut.clip.name: cut for cut in _cuts(view)}
    if not cuts:
        return proto, ()
    rows = tuple(
        finding(
            name,
            "clipped-codes",
            f"a Clip of codes between {cut.quantize.name} and its DequantizeLinear",
            "a Clip of the floats in front, which gives the same codes",
            EXACT,
        )
        for name, cut in cuts.items()
    )
    model = copy_model(proto)
    fresh = FreshNames(names_in(model.graph)).new
    before = {cut.quantize.name: cut for cut in cuts.values()}
    renamed = {cut.clip.output[0]: cut.clip.input[0] for cut in cuts.values()}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name in cuts:
            continue
        made = copy_of(node)
        for index, name in enumerate(made.input):
            made.input[index] = renamed.get(name, name)
        cut = before.get(node.name)
        cut = None if cut is None or cut.low is cut.high is None else cut
        if cut is not None and view.is_constant(made.input[0]):
            value = np.clip(view.constant(made.input[0]), cut.low, cut.high)
            made.input[0] = fresh(f"{made.input[0]}/clipped")
            model.graph.initializer.append(numpy_helper.from_array(value, made.input[0]))
        elif cut is not None:
            result = fresh(f"{made.input[0]}/clipped")
            bounds = []
            for word, value in (("low", cut.low), ("high", cut.high)):
                bounds.append("" if value is None else fresh(f"{result}/{word}"))
                if value is not None:
                    held = numpy_helper.from_array(np.array(value), bounds[-1])
                    model.graph.initializer.append(held)
            inputs = [made.input[0], *bounds]
            while not inputs[-1]:
                del inputs[-1]
            nodes.append(helper.make_node("Clip", inputs, [result], name=fresh(f"{result}/Clip")))
            made.input[0] = result
        nodes.append(made)
    replace_field(model.graph.node, nodes)
    return model, rows


def _cuts(view: GraphView) -> Iterator[_Cut]:
    for node in view.nodes:
        quantize = view.by_name.get(view.producer.get(node.input[0] if node.input else "", ""))
        if node.op_type != "Clip" or quantize is None or quantize.op_type != QUANTIZE:
            continue
        readers = view.consumers.get(node.output[0], ())
        alone = view.consumers.get(node.input[0], ()) == ((node.name, 0),)
        ends = {node.input[0], node.output[0]} & set(view.graph_outputs)
        dequantized = all(view.by_name[n].op_type == DEQUANTIZE and k == 0 for n, k in readers)
        if not alone or ends or not readers or not dequantized:
            continue
        bounds = _bounds(view, node, quantize)
        if bounds is not None:
            yield _Cut(node, quantize, *bounds)


def _bounds(
    view: GraphView, clip: onnx.NodeProto, quantize: onnx.NodeProto
) -> tuple[np.float32 | None, np.float32 | None] | None:
    """The floats that the bounds of `clip` stand for; None if they, or the scale, are not known."""
    names = [*quantize.input[1:3], *clip.input[1:3]]
    if not all(view.is_constant(name) for name in names if name):
        return None
    scale = view.constant(quantize.input[1])
    zero = _one(view, quantize.input[2]) if len(quantize.input) > 2 else np.zeros((), np.uint8)
    if scale.size != 1 or zero is None or zero.dtype.name not in ("int8", "uint8"):
        return None
    info = np.iinfo(zero.dtype)
    found: list[np.float32 | None] = []
    for index, end in ((1, info.min), (2, info.max)):
        name = clip.input[index] if len(clip.input) > index else ""
        code = int(view.constant(name).reshape(-1)[0]) if name else end
        step = np.float32(scale.reshape(-1)[0])
        found.append(None if code == end else np.float32(code - int(zero)) * step)
    return found[0], found[1]


def _one(view: GraphView, name: str) -> NDArray[Any] | None:
    value = view.constant(name)
    return value.reshape(()) if value.size == 1 else None
