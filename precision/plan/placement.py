"""Where quantization happens: which tensors, read by which nodes, with whose scale.

The rules are those of explicit quantization in TensorRT: pairs on the inputs of convolutions and
matrix products with constant weights (per output channel there) and on the skip input of an Add
behind a convolution; none on biases, on the outputs of weighted operators, or inside softmax and
normalisation. Operators that only move values (max pool, reshape, concat) commute with
quantization: they get no pairs of their own, and what they connect shares one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.operators import KEEPS, MOVES, SELECTS
from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.plan import RANGE, PrecisionPlan
from trtune.precision.plan.rules import weight_axis

Edge = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """What a plan quantizes: `activations` maps a tensor to the (node, input index) pairs that
    read it quantized; `weights` a (node, input index) pair to its initializer and channel axis.
    """

    activations: Mapping[str, tuple[Edge, ...]]
    weights: Mapping[Edge, tuple[str, int]]


def place(view: GraphView, plan: PrecisionPlan) -> Placement:
    """The tensors that `plan` quantizes, in graph order: by the rules, or, if the plan came with a
    model that was quantized already, where that model has its pairs."""
    if isinstance(plan, ImportedPlan):
        return _as_read(view, plan)
    edges: dict[str, list[Edge]] = {}
    weights: dict[Edge, tuple[str, int]] = {}
    for node in view.nodes:
        if not plan.is_quantized(node.name):
            continue
        edges.setdefault(node.input[0], []).append((node.name, 0))
        weights[(node.name, 1)] = (node.input[1], weight_axis(node))
        skip = skip_edge(view, plan, node)
        if skip is not None:
            edges.setdefault(view.by_name[skip[0]].input[skip[1]], []).append(skip)
    return Placement({t: tuple(e) for t, e in _in_graph_order(view, edges).items()}, weights)


def _as_read(view: GraphView, plan: ImportedPlan) -> Placement:
    edges: dict[str, list[Edge]] = {}
    for read in plan.active_reads:
        edges.setdefault(read.tensor, []).append((read.node, read.index))
    of_data = {*plan.products, *plan.elementwise}
    weighted = [name for name in plan.quantized_nodes if name not in of_data]
    nodes = [view.by_name[name] for name in weighted]
    weights = {
        (node.name, 1): (node.input[1], plan.axes.get(node.input[1], weight_axis(node)))
        for node in nodes
    }
    return Placement({t: tuple(e) for t, e in _in_graph_order(view, edges).items()}, weights)


def _in_graph_order(view: GraphView, edges: Mapping[str, list[Edge]]) -> dict[str, list[Edge]]:
    order = {name: i for i, name in enumerate(view.graph_inputs)}
    for node in view.nodes:
        for name in node.output:
            order[name] = len(order)
    return {tensor: edges[tensor] for tensor in sorted(edges, key=lambda t: order.get(t, -1))}


def skip_edge(view: GraphView, plan: PrecisionPlan, node: onnx.NodeProto) -> Edge | None:
    """The skip input of the residual Add that is fused behind a convolution, if there is one."""
    if node.op_type not in ("Conv", "ConvTranspose"):
        return None
    main = node.output[0]
    for member in plan.groups.get(node.name, ()):
        follower = view.by_name[member]
        if follower.op_type == "Add" and not any(view.is_constant(i) for i in follower.input):
            if follower.input[0] == follower.input[1]:
                return None
            index = 1 if follower.input[0] == main else 0
            same = view.shapes.get(follower.input[index]) == view.shapes.get(main)
            if isinstance(plan, ImportedPlan):
                same = plan.reads_quantized(member, index)
            return (member, index) if same and (member, index) not in plan.float_reads else None
        main = follower.output[0]
    return None


def edges_of(view: GraphView, plan: PrecisionPlan, node: onnx.NodeProto) -> tuple[Edge, ...]:
    """What a quantized node has read quantized: its data, and the skip input behind it.

    In an imported plan that may be the input of a moving operator before it.
    """
    if isinstance(plan, ImportedPlan):
        return tuple((r.node, r.index) for r in plan.active_reads if node.name in r.owners)
    skip = skip_edge(view, plan, node)
    return ((node.name, 0), *((skip,) if skip is not None else ()))


def served_by(plan: PrecisionPlan, edge: Edge) -> tuple[str, ...]:
    """The quantized nodes for whose sake the input `edge` is read quantized."""
    if isinstance(plan, ImportedPlan):
        owners = [r.owners for r in plan.active_reads if (r.node, r.index) == edge]
        return tuple(o for found in owners for o in found if plan.is_quantized(o))
    return (plan.leader(edge[0]),)


def codes_read(plan: PrecisionPlan, edge: Edge) -> str:
    """int8 or fp8: what the input `edge`, which is read quantized, is read in."""
    owners = [o for o in served_by(plan, edge) if plan.is_quantized(o)]
    kinds = [plan.precision(owner) for owner in owners]
    if isinstance(plan, ImportedPlan):
        in_file = next(r.codes for r in plan.reads if (r.node, r.index) == edge)
        return in_file if in_file in kinds or not kinds else kinds[0]
    return kinds[0] if kinds else "int8"


def shared_ranges(view: GraphView, tensors: Mapping[str, object] | set[str]) -> dict[str, str]:
    """Tensor -> the tensor whose range it takes: what moving operators make of it.

    Only among `tensors`; a tensor that stands alone maps to itself. As in TensorRT the range is
    that of the output: the last of the chain.
    """
    roots: dict[str, str] = {}
    for tensor in tensors:
        root, seen = tensor, {tensor}
        while (onward := _moved_to(view, root, tensors, seen)) is not None:
            root = onward
            seen.add(root)
        roots[tensor] = root
    return roots


def _moved_to(
    view: GraphView, tensor: str, tensors: Mapping[str, object] | set[str], seen: set[str]
) -> str | None:
    """The first of `tensors` that moving operators lead to from `tensor`."""
    frontier = [tensor]
    while frontier:
        current = frontier.pop(0)
        for name, index in view.consumers.get(current, ()):
            node = view.by_name[name]
            if not is_move(node, index):
                continue
            for output in node.output:
                if output in tensors and output not in seen:
                    return str(output)
                if output and output not in seen:
                    frontier.append(output)
    return None


def is_move(node: onnx.NodeProto, index: int) -> bool:
    """Whether `node` passes the values of its input `index` on unchanged."""
    if node.op_type in ("Resize", "Upsample"):
        mode = attribute(node, "mode", b"nearest")
        return index == 0 and mode == b"nearest"
    return node.op_type in MOVES and (index == 0 or node.op_type == "Concat")


def moves_codes(node: onnx.NodeProto, index: int) -> bool:
    """Whether `node` may stand between a quantized tensor's codes and their DequantizeLinear, and
    pass those of its input `index` on unchanged."""
    return is_move(node, index) or (node.op_type in SELECTS and index == 0)


def carries(node: onnx.NodeProto, index: int, view: GraphView | None = None) -> bool:
    """Whether what `node` makes of dequantized values at its input `index` is read as codes by
    what is behind it, as TensorRT dequantizes only there.

    That are moves and parts, signs and largest values, padding with what is there, and with 0 where
    convolutions alone read the result, which pad themselves then (`view` tells; without, no such
    Pad is known). A Resize to nearest values is not among them: TensorRT-RTX computes it, and what
    reads it, in float.
    """
    op = node.op_type
    if op in ("Resize", "Upsample"):
        return False
    if op == "Cast":
        return bool(attribute(node, "to", 0) == onnx.TensorProto.FLOAT)
    if op == "Pad":
        return index == 0 and _pads_with_codes(node, view)
    return moves_codes(node, index) or (op in KEEPS and index == 0)


def _pads_with_codes(node: onnx.NodeProto, view: GraphView | None) -> bool:
    if attribute(node, "mode", b"constant") != b"constant":
        return True
    if view is None or not pads_with_zeros(view, node):
        return False
    readers = view.consumers.get(node.output[0], ())
    absorbed = all(view.by_name[name].op_type == "Conv" and k == 0 for name, k in readers)
    return bool(readers) and absorbed and node.output[0] not in view.graph_outputs


def pads_with_zeros(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether `node` is a Pad that puts zeros around its input."""
    if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return False
    name = node.input[2] if len(node.input) > 2 else ""
    if not name:
        return bool(attribute(node, "value", 0.0) == 0)
    return view.is_constant(name) and not np.any(view.constant(name))


def with_shared_ranges(view: GraphView, table: CalibrationTable) -> CalibrationTable:
    """`table` with equal scales across moving operators: the output's for all."""
    roots = shared_ranges(view, set(table.scales))
    scales = {tensor: table.scales[roots[tensor]] for tensor in table.scales}
    methods = {t: table.methods.get(roots[t], "") for t in table.methods}
    factors = {t: table.factors[roots[t]] for t in table.methods if roots[t] in table.factors}
    float8 = {t: table.float8[roots[t]] for t in table.scales if roots[t] in table.float8}
    return CalibrationTable(scales, methods, table.provenance, factors=factors, float8=float8)


def without_zero_ranges(
    view: GraphView, plan: PrecisionPlan, table: CalibrationTable
) -> PrecisionPlan:
    """`plan` less the nodes that read a tensor which was never anything but zero: no scale is right
    for it.

    A skip input is read in float instead: the convolution that it is added to is alive.
    """
    reasons: dict[str, str] = {}
    skips: list[Edge] = []
    for tensor, edges in place(view, plan).activations.items():
        if table.scales.get(tensor) != 0:
            continue
        for edge in edges:
            if plan.leader(edge[0]) != edge[0]:
                skips.append(edge)
            else:
                reason = f"its input {tensor!r} was zero in every calibration picture"
                reasons.update(dict.fromkeys(served_by(plan, edge), reason))
    return plan.without_int8(reasons, origin=RANGE).reading_float(skips)
