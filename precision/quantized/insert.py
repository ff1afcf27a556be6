"""A table that came with a model put to use: the plan that it stands for, and the pairs again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, did_you_mean
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.imported import FLOAT_IN_FILE, IN_FILE, QAT, ImportedPlan, Read
from trtune.precision.plan.pins import with_pins
from trtune.precision.plan.placement import Edge, carries, place
from trtune.precision.plan.plan import (
    COMPUTE,
    COMPUTE_OPS,
    ELEMENTWISE_OPS,
    FILE,
    QUANTIZED,
    SHAPE,
    Assignment,
    PrecisionPlan,
)
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.strip import EXACT_METHOD, as_int8

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

    int8 are the nodes whose weights have scales in the table and whose data are read quantized, the
    matrix products both of whose inputs are, and sums and products of elements if all their inputs
    are data that is; every other node stays `fallback`, "float in the QAT model", whatever is
    pinned to int8. A pin holds for the whole group of the node. Raises ConfigError for a pin that
    matches nothing.
    """
    base = make_plan(view, default="int8", fallback=fallback)
    read = _read_through(view, table)
    of_data = {n.name: codes for n in view.nodes if (codes := _of_data(view, table, n, read))}
    elementwise = tuple(
        name
        for name in of_data
        if view.by_name[name].op_type in ELEMENTWISE_OPS and base.nodes[name].role != SHAPE
    )
    products = tuple(name for name in of_data if view.by_name[name].op_type == "MatMul")
    nodes: dict[str, Assignment] = {}
    for name, assigned in base.nodes.items():
        if name in elementwise:
            assigned = _elementwise(assigned, of_data[name], fallback)
        elif assigned.role == COMPUTE:
            node = view.by_name[name]
            codes = of_data[name] if name in products else _weighted(table, node, read)
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
    groups = led_by(base.groups, elementwise)
    led = replace(base, groups=groups)
    plan = ImportedPlan(
        QAT,
        fallback,
        nodes,
        groups,
        {**base.refusals, **dict.fromkeys(QUANTIZED, unscaled)},
        reads=_reads(view, table, nodes, led),
        axes=table.axes,
        products=products,
        elementwise=elementwise,
        ruled_groups=base.groups if groups != base.groups else {},
    )
    return with_pins(view, plan, pins or {})


def _elementwise(assigned: Assignment, codes: str, fallback: str) -> Assignment:
    """`assigned`, of a node that follows its neighbours, as one that the file quantizes."""
    around = assigned.precision if assigned.precision != fallback else ""
    return Assignment(codes, IN_FILE, COMPUTE, around, FILE)


def led_by(
    groups: Mapping[str, tuple[str, ...]], leaders: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """`groups` cut in front of each of `leaders`, which leads what stood behind it there.

    >>> led_by({"conv": ("add", "relu")}, ["add"])
    {'add': ('relu',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, members in groups.items():
        leader = name
        for member in members:
            if member in leaders:
                leader = member
            else:
                found[leader] = (*found.get(leader, ()), member)
    return found


def _weighted(
    table: CalibrationTable, node: onnx.NodeProto, read: Mapping[Edge, tuple[str, ...]]
) -> str:
    """int8 or fp8, what a node with weights multiplies in the file; empty for float."""
    if (node.name, 0) not in read:
        return ""
    if node.input[1] in table.float8_weights:
        return "fp8"
    return "int8" if node.input[1] in table.weights else ""


def _is_float8(table: CalibrationTable, tensor: str) -> bool:
    """Whether an imported table has `tensor` in float8."""
    return tensor in table.float8


def _of_data(
    view: GraphView,
    table: CalibrationTable,
    node: onnx.NodeProto,
    read: Mapping[Edge, tuple[str, ...]],
) -> str:
    """int8 or fp8, if that is what a MatMul or an operator on elements reads of all its inputs,
    which are several tensors of data with one scale each; else empty."""
    if node.op_type not in ("MatMul", *ELEMENTWISE_OPS) or len(node.input) < 2:
        return ""
    sides = [read.get((node.name, index), ()) for index in range(len(node.input))]
    single = all(len({table.scales.get(t) for t in side}) == 1 for side in sides)
    kinds = {_is_float8(table, t) for side in sides for t in side}
    if not single or len(kinds) != 1 or any(view.is_constant(t) for t in node.input):
        return ""
    return "fp8" if kinds.pop() else "int8"


def _as_in_file(base: PrecisionPlan, name: str, assigned: Assignment, kind: str) -> Assignment:
    """`assigned` with the float type that the file gives the node, where it may run in that."""
    if kind in ("", base.fallback) or assigned.role == SHAPE or base.may(name, kind):
        return assigned
    if assigned.precision in QUANTIZED:
        return replace(assigned, around=kind)
    return replace(assigned, precision=kind, reason=f"{kind} in the QAT model", origin=FILE)


def _read_through(view: GraphView, table: CalibrationTable) -> dict[Edge, tuple[str, ...]]:
    """The inputs that are read quantized, also behind operators that move what others read: the
    tensors of `table` whose values they hold."""
    found: dict[Edge, tuple[str, ...]] = {
        (name, index): (t,) for t, edges in table.reads.items() for name, index in edges
    }
    for node in view.nodes:
        moving = [k for k in range(len(node.input)) if carries(node, k, view)]
        if moving and all((node.name, k) in found for k in moving):
            held = tuple(dict.fromkeys(t for k in moving for t in found[node.name, k]))
            for output in node.output:
                for edge in view.consumers.get(output, ()):
                    found.setdefault(edge, held)
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
        if plan.leader(name) != name or not carries(node, index, view):
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

    What stays is what the rules of `place` would quantize for the int8 nodes of `plan`, what
    moving operators pass on to them, and what sums and products of elements read exactly as the
    file says; pairs on the outputs of convolutions, on the main input of a residual Add, before an
    average pool or a softmax go.
    """
    by_rules = plan.by_rules()
    ruled = place(view, by_rules)
    wanted = {edge for edges in ruled.activations.values() for edge in edges}
    every = {edge for edges in table.reads.values() for edge in edges}
    changed = {t for t, method in table.methods.items() if method != EXACT_METHOD}
    lost = {o for read in plan.reads if read.tensor in changed for o in read.owners}
    lost &= {*plan.elementwise}
    for read in plan.reads:
        node = view.by_name[read.node]
        owners = {by_rules.leader(o) if o in lost else o for o in read.owners}
        serves = any(plan.is_quantized(owner) and owner not in lost for owner in owners)
        only_skip = node.op_type == "Add" and (read.node, 1 - read.index) not in every
        own = node.op_type in COMPUTE_OPS or read.node in {*plan.elementwise} - lost
        if own or (serves and (only_skip or carries(node, read.index, view))):
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
