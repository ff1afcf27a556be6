"""Pairs in front of an activation function or a Resize, put behind where the same bits come out.

torch's eager mode quantizes the output of a convolution and computes the ReLU on what comes back,
so that the next convolution reads floats. Rounding to a grid around 0 and cutting at a point of
that grid commute: the same pair behind the ReLU gives the same values, and what reads it is int8.
So do rounding and a Resize to nearest values or a Pad with zeros, which TensorRT-RTX computes in
float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from trtune.precision.graph.proto import FreshNames, copy_model, copy_of, names_in, replace_field
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import carries, is_move, pads_with_zeros
from trtune.precision.quantized.find import (
    ACTIVATION,
    DEQUANTIZE,
    QUANTIZE,
    Found,
    Pair,
    carried_by,
    has_one_scale,
)
from trtune.precision.quantized.findings import EXACT, Finding, finding
from trtune.precision.quantized.forms.resized_codes import RESIZES

CUTS = ("Relu", "Clip", "Pad", *RESIZES)
_KINDS = {**dict.fromkeys(RESIZES, "pair-before-resize"), "Pad": "pair-before-pad"}


@dataclass(frozen=True, slots=True)
class _Move:
    """A node whose input is quantized by `pair`; `alone` if nothing else reads that pair."""

    node: onnx.NodeProto
    pair: Pair
    direct: bool
    alone: bool


def with_pairs_behind(
    proto: onnx.ModelProto, view: GraphView, found: Found
) -> tuple[onnx.ModelProto, tuple[Finding, ...]]:
    """A copy of `proto` with pairs behind the ReLUs and Resizes that need one, and what was found.

    Those are the ones that read quantized values, and lead to a product whose weights are quantized
    and whose data are not. `proto` itself if there are none.
    """
    moves = {move.node.name: move for move in _moves(view, found)}
    if not moves:
        return proto, ()
    rows = tuple(
        finding(
            move.node.name,
            _KINDS.get(move.node.op_type, "pair-before-activation"),
            f"{move.node.op_type} reads {move.pair.node}, and what is behind it reads float",
            f"the same pair behind the {move.node.op_type}, which gives the same values",
            EXACT,
        )
        for move in moves.values()
    )
    return _rewritten(proto, view, moves), rows


def _moves(view: GraphView, found: Found) -> Iterator[_Move]:
    carried = {pair.result: pair for pair in found.of_role(ACTIVATION)}
    passed = set(found.passed)
    for node in view.nodes:
        if node.op_type not in CUTS or carries(node, 0, view):
            continue
        pairs = carried_by(view, node.input[0], carried, passed)
        if not has_one_scale(pairs) or not commutes(view, node, pairs[0]):
            continue
        if _serves(view, found, node):
            direct = node.input[0] == pairs[0].result
            alone = direct and len(pairs[0].readers) == 1 and not pairs[0].is_output
            yield _Move(node, pairs[0], direct, alone)


def commutes(view: GraphView, node: onnx.NodeProto, pair: Pair) -> bool:
    """Whether `pair` behind the Relu, Clip, Resize or Pad `node` gives what it gives in front: one
    scale, and both bounds points of its grid, or beyond its range; nearest values; zeros."""
    if pair.scale is None or pair.scale.size != 1 or pair.blocked or not pair.agrees:
        return False
    if pair.dtype not in ("int8", "uint8") or not float(pair.scale.reshape(-1)[0]) > 0:
        return False
    if node.op_type != "Clip":
        return node.op_type == "Relu" or is_move(node, 0) or pads_with_zeros(view, node)
    names = [name for name in node.input[1:] if name]
    if not all(view.is_constant(name) for name in names):
        return False
    limits = [*node.input[1:3], "", ""][:2]
    scale, zero = np.float32(pair.scale.reshape(-1)[0]), int(pair.zero_points.reshape(-1)[0])
    info = np.iinfo(pair.dtype)
    ends = (np.float32(info.min - zero) * scale, np.float32(info.max - zero) * scale)
    for name, outside in zip(limits, (np.less_equal, np.greater_equal), strict=True):
        if name:
            bound = np.float32(view.constant(name).reshape(-1)[0])
            end = ends[0] if outside is np.less_equal else ends[1]
            on_grid = np.rint(bound / scale).astype(np.float32) * scale == bound
            if not (on_grid or outside(bound, end)):
                return False
    return True


def _serves(view: GraphView, found: Found, node: onnx.NodeProto) -> bool:
    """Whether a product with quantized weights reads the floats of `node`, also moved about."""
    waiting, seen = list(view.consumers.get(node.output[0], ())), set()
    while waiting:
        edge = waiting.pop()
        if edge in seen:
            continue
        seen.add(edge)
        reader = view.by_name[edge[0]]
        if edge[1] == 0 and (reader.name, 1) in found.weights and reader.name not in found.int8:
            return True
        if carries(reader, edge[1], view):
            for output in reader.output:
                waiting += view.consumers.get(output, ())
    return False


def _rewritten(
    proto: onnx.ModelProto, view: GraphView, moves: Mapping[str, _Move]
) -> onnx.ModelProto:
    model = copy_model(proto)
    fresh = FreshNames(names_in(model.graph)).new
    gone = {n for move in moves.values() if move.alone for n in _gone(view, move.pair)}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name in gone:
            continue
        made = copy_of(node)
        nodes.append(made)
        move = moves.get(node.name)
        if move is None:
            continue
        output = node.output[0]
        if move.direct:
            made.input[0] = move.pair.source
        made.output[0] = fresh(f"{output}/float")
        parameters = list(view.by_name[move.pair.name].input[1:])
        codes = fresh(f"{output}/codes")
        names = [fresh(f"{node.name}/{op}") for op in (QUANTIZE, DEQUANTIZE)]
        nodes += [
            helper.make_node(QUANTIZE, [made.output[0], *parameters], [codes], name=names[0]),
            helper.make_node(DEQUANTIZE, [codes, *parameters], [output], name=names[1]),
        ]
    replace_field(model.graph.node, nodes)
    return model


def _gone(view: GraphView, pair: Pair) -> list[str]:
    """The nodes of a pair that nothing reads any more."""
    codes = view.by_name[pair.name].input[0]
    only = len(view.consumers.get(codes, ())) == 1 and codes not in view.graph_outputs
    return [pair.name, *([pair.quantize] if only else [])]
