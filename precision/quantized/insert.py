"""A table that came with a model put to use: the plan that it stands for, and the pairs again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, did_you_mean
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.imported import FLOAT_IN_FILE, IN_FILE, QAT, ImportedPlan, Read
from trtune.precision.plan.pins import with_pins
from trtune.precision.plan.placement import Edge, is_move, place
from trtune.precision.plan.plan import (
    COMPUTE,
    COMPUTE_OPS,
    FILE,
    QUANTIZED,
    SHAPE,
    Assignment,
    PrecisionPlan,
)
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.strip import as_int8

log = logging.getLogger(__name__)


def plan_from_table(
    view: GraphView,
    table: CalibrationTable,
    *,
    fallback: str = "fp32",
    pins: Mapping[str, str] | None = None,
    types: Mapping[str, str] = MappingProxyType({}),
) -> ImportedPlan:
    """The plan that a table of an imported model stands for, less the user's pins.

    `types` maps nodes to the float type that the file has them in, where that is not `fallback`.

    int8 are the nodes whose weights have scales in the table and whose data are read quantized, and
    the matrix products both of whose inputs are; every other node stays `fallback`, "float in the
    QAT model", whatever is pinned to int8. A pin holds for the whole group of the node. Raises
    ConfigError for a pin that matches nothing.
    """
    base = make_plan(view, default="int8", fallback=fallback)
    quantized = {(name, index) for edges in table.reads.values() for name, index in edges}
    carried = _carried(view, quantized)
    products = tuple(n.name for n in view.nodes if _of_data(view, n, carried))
    nodes: dict[str, Assignment] = {}
    for name, assigned in base.nodes.items():
        if assigned.role == COMPUTE:
            node = view.by_name[name]
            codes = _codes_in_file(table, node, carried, product=name in products)
            if codes:
                assigned = replace(assigned, precision=codes, reason=IN_FILE, origin=FILE)
            elif assigned.precision == "int8":
                floats = assigned.around or fallback
                assigned = Assignment(floats, FLOAT_IN_FILE, origin=FILE)
        nodes[name] = _as_in_file(base, name, assigned, types.get(name, ""))
    unscaled = {
        name: "the QAT model has no scales for it"
        for name, assigned in nodes.items()
        if assigned.role == COMPUTE and assigned.precision not in QUANTIZED
    }
    plan = ImportedPlan(
        QAT,
        fallback,
        nodes,
        base.groups,
        {**base.refusals, **dict.fromkeys(QUANTIZED, unscaled)},
        reads=_reads(view, table, nodes, base),
        axes=table.axes,
        products=products,
    )
    return with_pins(view, plan, pins or {})


def _codes_in_file(
    table: CalibrationTable, node: onnx.NodeProto, carried: set[Edge], *, product: bool
) -> str:
    """int8 or fp8, what a node multiplies in the file; empty for float."""
    if product:
        return "fp8" if _is_float8(table, node.input[0]) else "int8"
    if (node.name, 0) not in carried:
        return ""
    if node.input[1] in table.float8_weights:
        return "fp8"
    return "int8" if node.input[1] in table.weights else ""


def _is_float8(table: CalibrationTable, tensor: str) -> bool:
    """Whether an imported table has `tensor` in float8."""
    return tensor in table.float8


def _of_data(view: GraphView, node: onnx.NodeProto, carried: set[Edge]) -> bool:
    """Whether a MatMul multiplies two tensors of data, both read quantized."""
    both = (node.name, 0) in carried and (node.name, 1) in carried
    return node.op_type == "MatMul" and both and not any(view.is_constant(t) for t in node.input)


def _as_in_file(base: PrecisionPlan, name: str, assigned: Assignment, kind: str) -> Assignment:
    """`assigned` with the float type that the file gives the node, where it may run in that."""
    if kind in ("", base.fallback) or assigned.role == SHAPE or base.may(name, kind):
        return assigned
    if assigned.precision in QUANTIZED:
        return replace(assigned, around=kind)
    return replace(assigned, precision=kind, reason=f"{kind} in the QAT model", origin=FILE)


def _carried(view: GraphView, quantized: set[Edge]) -> set[Edge]:
    """`quantized`, and the inputs behind operators that move what those read."""
    found = set(quantized)
    for node in view.nodes:
        moving = [k for k in range(len(node.input)) if is_move(node, k)]
        if moving and all((node.name, k) in found for k in moving):
            for output in node.output:
                found.update(view.consumers.get(output, ()))
    return found


def _reads(
    view: GraphView,
    table: CalibrationTable,
    nodes: Mapping[str, Assignment],
    base: PrecisionPlan,
) -> tuple[Read, ...]:
    quantized = {n: a.precision for n, a in nodes.items() if a.role == COMPUTE}
    quantized = {n: precision for n, precision in quantized.items() if precision in QUANTIZED}
    found = []
    for tensor, edges in table.reads.items():
        for name, index in edges:
            if name not in nodes:
                continue
            owners = tuple(o for o in _owners(view, name, index, base) if o in quantized)
            codes = "fp8" if _is_float8(table, tensor) else "int8"
            if owners and _in_both(table, tensor):
                codes = quantized[owners[0]]
            found.append(Read(tensor, name, index, owners, codes))
    return tuple(found)


def _in_both(table: CalibrationTable, tensor: str) -> bool:
    """Whether an imported table has `tensor` in int8 and in float8, with a scale for each."""
    return _is_float8(table, tensor) and table.scales[tensor] != as_int8(table.float8[tensor])


def _owners(view: GraphView, name: str, index: int, plan: PrecisionPlan) -> list[str]:
    """The products that an input works for: its own node's, or those behind moving operators."""
    found: dict[str, None] = {}
    waiting, seen = [(name, index)], {(name, index)}
    while waiting:
        name, index = waiting.pop(0)
        node = view.by_name[name]
        if plan.leader(name) != name or not is_move(node, index):
            found[plan.leader(name)] = None
            continue
        for output in node.output:
            onward = [edge for edge in view.consumers.get(output, ()) if edge not in seen]
            waiting += onward
            seen.update(onward)
    return list(found)


def without_spare_reads(
    view: GraphView, table: CalibrationTable, plan: ImportedPlan
) -> tuple[CalibrationTable, tuple[Edge, ...]]:
    """`table` less the pairs that make nothing run in int8, and where those stood.

    What stays is what the rules of `place` would quantize for the int8 nodes of `plan`, and what
    moving operators pass on to them; pairs on the outputs of convolutions, on the main input of a
    residual Add, before an average pool or a softmax go.
    """
    ruled = place(view, plan.by_rules())
    wanted = {edge for edges in ruled.activations.values() for edge in edges}
    every = {edge for edges in table.reads.values() for edge in edges}
    for read in plan.reads:
        node = view.by_name[read.node]
        only_skip = node.op_type == "Add" and (read.node, 1 - read.index) not in every
        serves = bool(read.owners) and (only_skip or is_move(node, read.index))
        if serves or node.op_type in COMPUTE_OPS:
            wanted.add((read.node, read.index))
    reads = {t: tuple(e for e in edges if e in wanted) for t, edges in table.reads.items()}
    spare = tuple(e for edges in table.reads.values() for e in edges if e not in wanted)
    kept = {tensor: edges for tensor, edges in reads.items() if edges}
    return replace(table, reads=kept), spare


def with_reasons(plan: ImportedPlan, reasons: Mapping[str, str]) -> ImportedPlan:
    """`plan` with what else there is to say about nodes that are float in the model."""
    nodes = dict(plan.nodes)
    for name, reason in reasons.items():
        found = nodes.get(name)
        if found is not None and found.origin == FILE and found.precision not in QUANTIZED:
            nodes[name] = replace(nodes[name], reason=f"{FLOAT_IN_FILE}: {reason}")
    return replace(plan, nodes=nodes)


def insert_quantization(
    model: Model, table: CalibrationTable, plan: PrecisionPlan | None = None
) -> onnx.ModelProto:
    """A copy of `model` with the pairs that `table` stands for: where `plan` has them, else where
    the model that the table was read from had them.

    What `lower_emulate` writes for that plan. Raises CacheError if the table names tensors or nodes
    that the model has not, MissingScaleError for a tensor without a scale.
    """
    view = GraphView.of(model)
    if plan is None:
        check_reads(view, table)
        plan = plan_from_table(view, table) if table.reads else make_plan(view)
    return lower_emulate(model, plan, table)


def completed(table: CalibrationTable, calibrated: CalibrationTable) -> CalibrationTable:
    """`table` with the scales of `calibrated` for the tensors that it has none for."""
    missing = [tensor for tensor in calibrated.scales if tensor not in table.scales]
    scales = {tensor: calibrated.scales[tensor] for tensor in missing}
    methods = {t: calibrated.methods[t] for t in missing if t in calibrated.methods}
    factors = {t: calibrated.factors[t] for t in missing if t in calibrated.factors}
    return replace(
        table,
        scales={**table.scales, **scales},
        methods={**table.methods, **methods},
        factors={**table.factors, **factors},
    )


def check_reads(view: GraphView, table: CalibrationTable) -> None:
    """Raise CacheError, with the nearest name, if `table` was read from another model."""
    edges = [(t, n, k) for t, readers in table.reads.items() for n, k in readers]
    wrong = [
        (tensor, name)
        for tensor, name, index in edges
        if name not in view.by_name or list(view.by_name[name].input)[index : index + 1] != [tensor]
    ]
    every = (*table.weights, *table.float8_weights)
    weights = [name for name in every if name not in view.initializers]
    if wrong:
        tensor, name = wrong[0]
        raise CacheError(
            f"the table belongs to another model: {len(wrong)} of the {len(edges)} inputs that it "
            f"has quantized are not there, such as {tensor!r} read by {name!r}"
            f"{did_you_mean(name, view.by_name)}"
        )
    if weights:
        raise CacheError(
            f"the table belongs to another model: {len(weights)} of its {len(every)} "
            f"weights are not there, such as {weights[0]!r}"
            f"{did_you_mean(weights[0], view.initializers)}"
        )
