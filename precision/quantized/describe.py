"""What a model is, before anything is done to it: sizes, costs, and what may stand in the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from trtune.configs.errors import ModelError
from trtune.datasets.batches import InputSpec
from trtune.precision.graph.branches import switches
from trtune.precision.graph.macs import MACS, macs, parameter_tensors, parameters
from trtune.precision.graph.proto import subgraphs
from trtune.precision.graph.view import GraphView, Model, Shape, elements
from trtune.precision.plan.imported import QAT
from trtune.precision.plan.plan import QUANTIZED, PrecisionPlan

QUANTIZED_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
DYNAMIC_OPS = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"})
KNOWN_DOMAINS = frozenset({"", "com.microsoft"})
LISTED = 3


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node: the shape of its first output (None if its rank is unknown), and its costs.

    `macs` is for one sample. `precision` and `reason` come from a plan; None and "" without one.
    """

    name: str
    op: str
    shape: Shape | None
    macs: int
    parameters: int
    precision: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's inputs, costs, existing quantization and problems.

    `macs` is for one sample, `parameters` counts each weight once, `weight_bytes` is what they
    take in the file. `quantize_nodes` counts the Q/DQ nodes that are there already.
    """

    path: str
    sha256: str
    opset: int
    producer: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    ops: Mapping[str, int]
    macs: int
    parameters: int
    weight_bytes: int
    quantize_nodes: int
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    nodes: tuple[NodeRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as values that `json.dumps` accepts."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        for name in ("inputs", "outputs", "nodes"):
            fields[name] = [asdict(value) for value in fields[name]]
        return {**fields, "ops": dict(self.ops)}


def inspect_model(
    model: Model,
    assigned: Mapping[str, tuple[str, str]] | None = None,
    *,
    raised: bool = False,
) -> Inspection:
    """Describe `model`; `assigned` maps nodes to (precision, reason), as a plan has them.

    Nodes that `assigned` leaves out have no precision. With `raised` the plan is that of the model
    in float32, so that halves are no problem. Weights are read, to find values that are
    not finite, unless they were too large to be loaded.
    """
    graph = GraphView.of(model)
    plan = assigned or {}
    rows = []
    for node in graph.nodes:
        precision, reason = plan.get(node.name, (None, ""))
        shape = graph.shapes.get(node.output[0])
        work, held = macs(graph, node.name), parameters(graph, node.name)
        rows.append(NodeRow(node.name, node.op_type, shape, work, held, precision, reason))
    weights = {tensor for row in rows for tensor in parameter_tensors(graph, row.name)}
    ops = Counter(row.op for row in rows)
    producer = f"{model.proto.producer_name} {model.proto.producer_version}".strip()
    return Inspection(
        path=str(model.path),
        sha256=model.sha256,
        opset=model.opset,
        producer=producer,
        inputs=model.inputs,
        outputs=model.outputs,
        ops=MappingProxyType(dict(sorted(ops.items(), key=lambda item: (-item[1], item[0])))),
        macs=sum(row.macs for row in rows),
        parameters=sum(elements(graph.shapes.get(tensor, ())) for tensor in weights),
        weight_bytes=sum(_bytes(graph, tensor) for tensor in weights),
        quantize_nodes=sum(ops[op] for op in QUANTIZED_OPS),
        notes=model.notes,
        problems=tuple(_problems(model, graph, rows, assigned, raised=raised)),
        nodes=tuple(rows),
    )


def _bytes(graph: GraphView, tensor: str) -> int:
    """Bytes of a weight in the file, where it may be stored as int8 in front of Q/DQ."""
    found = [tensor] if tensor in graph.initializers else _largest_source(graph, tensor)
    return sum(
        elements(graph.shapes.get(name, ())) * np.dtype(graph.dtypes[name]).itemsize
        for name in found
    )


def _largest_source(graph: GraphView, tensor: str) -> list[str]:
    names = graph.ancestors([tensor])
    read = [t for name in sorted(names) for t in graph.by_name[name].input]
    stored = [t for t in dict.fromkeys(read) if t in graph.initializers]
    return sorted(stored, key=lambda t: -elements(graph.shapes.get(t, ())))[:1]


def _problems(
    model: Model,
    graph: GraphView,
    rows: list[NodeRow],
    assigned: Mapping[str, tuple[str, str]] | None,
    *,
    raised: bool,
) -> Iterator[str]:
    yield from _deciding(model)
    for find in (
        _nothing_to_quantize,
        _already_quantized,
        _not_float32,
        _not_finite,
        _weights_at_run_time,
        _foreign_operators,
        _with_subgraphs,
        _unknown_shapes,
    ):
        problem = None if raised and find is _not_float32 else find(graph)
        if problem:
            yield problem
    if model.tail is not None:
        yield (
            f"operators that onnxruntime does not have: {_listed(model.tail.operators)}; the "
            f"{len(model.tail.nodes)} nodes from there on are neither quantized nor compared"
        )
    floats = quantized_how(graph) != "static"  # such a model has a plan of its own
    if floats and assigned is not None and not any(row.precision in QUANTIZED for row in rows):
        reasons = Counter(row.reason for row in rows if row.op in MACS and row.reason)
        usual = reasons.most_common(LISTED)
        why = "; ".join(f"{reason} ({count} nodes)" for reason, count in usual)
        yield "the plan runs no node in INT8" + (f": {why}" if why else "")
    for spec in model.inputs:
        if spec.fixed_batch is not None:
            yield (
                f"input {spec.name!r} fixes the batch at {spec.fixed_batch}: samples go in "
                f"{spec.fixed_batch} at a time, whatever the batch of the config"
            )


def _deciding(model: Model) -> Iterator[str]:
    """What inputs decide on the branches of Ifs."""
    for switch in switches(model.proto.graph):
        value = switch.values[0] if switch.values else "VALUE"
        yield (
            f"input {switch.input!r} decides which branch {_listed(switch.branches)} takes, and "
            f"nothing inside is quantized: `model.constants: {{{switch.input}: {value}}}` builds "
            "the branch of one value, without that input"
        )


def _nothing_to_quantize(graph: GraphView) -> str | None:
    if any(node.op_type in MACS for node in graph.nodes):
        return None
    return f"nothing to quantize: there is no {', '.join(MACS)} node"


def refuse_quantized(view: GraphView, default: str) -> None:
    """Raise ModelError, naming what to do, if a plan of `default` is not for a model such as this.

    One that holds Q/DQ or integer operators is not calibrated, nor run in half precision: only its
    own scales say what its integers mean. "fp32" takes every model as it is.
    """
    problem = _already_quantized(view)
    if default == "fp32" or problem is None:
        return
    raise ModelError(f"precision.default: {default}: the model is {problem}")


def nothing_in_int8(view: GraphView, plan: PrecisionPlan) -> str:
    """Why a run whose default is int8, fp8 or qat has not met its target: no node is quantized.

    Empty if one is, or another default was asked for. Such a run gives back the model that went
    in, and a target of accuracy says nothing.
    """
    if plan.default not in (*QUANTIZED, QAT) or plan.quantized_nodes:
        return ""
    reasons = Counter(plan.nodes[name].reason for name in plan.compute_nodes)
    listed = "; ".join(f"{why} ({count} nodes)" for why, count in reasons.most_common(3))
    kind = "FP8" if plan.default == "fp8" else "INT8"
    return (
        f"no node runs in {kind}: {listed or _nothing_to_quantize(view) or 'nothing to quantize'}"
    )


def quantized_how(view: GraphView) -> str:
    """ "static" for a model with Q/DQ or integer operators, "dynamic" if ranges are found at run
    time, "" if it is not quantized."""
    ops = {node.op_type for node in view.nodes}
    if not ops.isdisjoint(DYNAMIC_OPS):
        return "dynamic"
    return "static" if ops.intersection(QUANTIZED_OPS) or any(map(_is_integer, ops)) else ""


def _is_integer(op: str) -> bool:
    return op.startswith("QLinear") or op in ("QGemm", "QAttention", "ConvInteger")


def _already_quantized(graph: GraphView) -> str | None:
    how = quantized_how(graph)
    if how == "dynamic":
        found = [node.name for node in graph.nodes if node.op_type in DYNAMIC_OPS]
        return (
            f"already quantized, with ranges found at run time: {_listed(found)}. TensorRT has no "
            "such operators: give the FP32 model"
        )
    if not how:
        return None
    ops = QUANTIZED_OPS.union(node.op_type for node in graph.nodes if _is_integer(node.op_type))
    found = [node.name for node in graph.nodes if node.op_type in ops]
    return (
        f"already quantized: {_listed(found)} are Q/DQ nodes; calibrating would quantize twice. "
        "Give the FP32 model, or take the model's own scales with `precision.default: qat`"
    )


def _not_float32(graph: GraphView) -> str | None:
    kinds: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes:
        kind = graph.dtypes.get(node.output[0])
        if node.op_type in MACS and kind not in (None, "float32"):
            kinds[str(kind)].append(node.name)
    if not kinds or quantized_how(graph) == "static":  # the linter says what becomes of the rest
        return None
    parts = [f"{kind}: {_listed(names)}" for kind, names in sorted(kinds.items())]
    return f"not every weighted node computes in float32 ({'; '.join(parts)}); export in float32"


def _not_finite(graph: GraphView) -> str | None:
    names = dict.fromkeys(t for node in graph.nodes for t in parameter_tensors(graph, node.name))
    stored = [t for t in names if t in graph.initializers and graph.dtypes[t].startswith("float")]
    # weights too large to be loaded stay on the disk: reading gigabytes is no inspection
    bad = [
        t
        for t in stored
        if not graph.initializers[t].external_data and not np.isfinite(graph.constant(t)).all()
    ]
    return f"weights with NaN or infinite values: {_listed(bad)}" if bad else None


def _weights_at_run_time(graph: GraphView) -> str | None:
    found = [
        node.name
        for node in graph.nodes
        if node.op_type in ("Conv", "ConvTranspose", "Gemm")
        and not graph.is_constant(node.input[1])
    ]
    return (
        f"weights that are computed at run time, not constant: {_listed(found)}" if found else None
    )


def _foreign_operators(graph: GraphView) -> str | None:
    found = {f"{n.domain}.{n.op_type}" for n in graph.nodes if n.domain not in KNOWN_DOMAINS}
    if not found:
        return None
    return f"operators that no runtime here knows without a plugin: {_listed(sorted(found))}"


def _with_subgraphs(graph: GraphView) -> str | None:
    found = [node.name for node in graph.nodes if any(True for _ in subgraphs(node))]
    return f"nodes inside {_listed(found)} are left as they are" if found else None


def _unknown_shapes(graph: GraphView) -> str | None:
    found = [t for t in graph.producer if t not in graph.shapes]
    return f"tensors of unknown rank: {_listed(found)}" if found else None


def _listed(names: Iterable[str]) -> str:
    """'3 (a, b, c)', of which at most `LISTED` are named.

    >>> _listed(["a", "b", "c", "d"])
    '4 (a, b, c, ...)'
    """
    every = list(names)
    dots = ", ..." if len(every) > LISTED else ""
    return f"{len(every)} ({', '.join(every[:LISTED])}{dots})"
