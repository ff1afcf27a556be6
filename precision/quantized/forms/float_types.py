"""A model whose floats are halves, in float32: the same graph, and what each node computed in.

Quantizers write their models so by default: int8 where they quantize, float16 elsewhere. Everything
here works in float32; the types come back from the plan, when it is lowered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtune.precision.graph.proto import (
    all_tensors,
    captured,
    copy_model,
    copy_of,
    default_opset,
    is_external,
    replace_field,
    subgraphs,
)
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.casts import QDQ_HALF_OPSET
from trtune.precision.plan.half_types import HALF_WORDS, HALVES
from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE
from trtune.precision.quantized.findings import EXACT, NONE, Finding, finding

HALF_TYPES: Mapping[int, str] = MappingProxyType(
    {h.tensor_type: name for name, h in HALVES.items()}
)
WORDS: Mapping[str, str] = MappingProxyType(
    {"float32": "fp32", **{half.word: name for name, half in HALVES.items()}}
)
FLOATS = (TensorProto.FLOAT, *HALF_TYPES)
PASSING = (QUANTIZE, DEQUANTIZE, "Cast", "Constant")
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


@dataclass(frozen=True, slots=True)
class Floats:
    """What the float nodes of a file compute in: `half` is the half type that most of those with
    one have ("" if none has), `nodes` maps every node that makes floats to fp32, fp16 or bf16."""

    half: str = ""
    nodes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", MappingProxyType(dict(self.nodes)))


def in_full_precision(
    proto: onnx.ModelProto,
) -> tuple[onnx.ModelProto, Floats, tuple[Finding, ...]]:
    """A copy of a normalised model with float32 in the place of halves, what was what, and what
    TensorRT would do with the halves of the file.

    Casts between floats are gone; inputs and outputs that were halves are float32. Without halves,
    or where they cannot be changed (inside the body of an If or Loop, or in external files), the
    result is `proto` itself.
    """
    view = GraphView(proto)
    kinds = _node_types(view)
    halves = Counter(kind for kind in kinds.values() if kind in HALVES)
    constants = any(tensor.data_type in HALF_TYPES for tensor in proto.graph.initializer)
    if not halves and not constants:
        return proto, Floats(nodes=kinds), ()
    found = tuple(_findings(view))
    why = _immovable(proto)
    if why:
        first = proto.graph.node[0].name
        stays = finding(first, "half-model", why, "export in float32; the plan makes the halves")
        return proto, Floats(nodes=kinds), (*found, stays)
    half = halves.most_common(1)[0][0] if halves else ""
    model = _without_casts(_widened(proto), view)
    return model, Floats(half, kinds), (*found, *_rest(kinds, halves))


def _node_types(view: GraphView) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in view.nodes:
        if node.op_type in PASSING and not _rounds_for_codes(view, node):
            continue
        kinds = [WORDS[view.dtypes[t]] for t in node.output if view.dtypes.get(t) in WORDS]
        if kinds:
            found[node.name] = kinds[0]
    return found


def _rounds_for_codes(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether `node` rounds a float32 to a half that is quantized next: other codes come out of
    that now and then, so it stays, as an Identity in the half type."""
    if node.op_type != "Cast" or view.dtypes.get(node.input[0]) != "float32":
        return False
    readers = view.consumers.get(node.output[0], ())
    quantized = any(view.by_name[name].op_type == QUANTIZE for name, _ in readers)
    return quantized and view.dtypes.get(node.output[0]) in HALF_WORDS


def _rest(kinds: Mapping[str, str], halves: Mapping[str, int]) -> Iterator[Finding]:
    if halves:
        first = next(name for name, kind in kinds.items() if kind in HALVES)
        parts = [f"{count} nodes compute in {HALVES[kind].word}" for kind, count in halves.items()]
        remedy = "planned in the same type where they are not int8"
        yield finding(first, "half-rest", ", ".join(parts), remedy, NONE)


def _findings(view: GraphView) -> Iterator[Finding]:
    """Pairs whose types TensorRT does not take as they stand."""
    opset = default_opset(view.proto) or 0
    for node in view.nodes:
        if node.op_type not in (QUANTIZE, DEQUANTIZE) or len(node.input) < 2:
            continue
        held = view.dtypes.get(node.input[1], "")
        data = view.dtypes.get(node.input[0], held) if node.op_type == QUANTIZE else held
        if held != data and {held, data} <= set(WORDS):
            yield finding(
                node.name,
                "scale-type",
                f"data in {data}, scale in {held}",
                "the scale in the type of its data, which holds the same value",
                EXACT,
            )
        elif held in HALF_WORDS and opset < QDQ_HALF_OPSET:
            yield finding(
                node.name,
                "half-model",
                f"{data} data and {held} scales in opset {opset}",
                f"opset {QDQ_HALF_OPSET} or later, with the same values",
                EXACT,
            )


def _immovable(proto: onnx.ModelProto) -> str:
    """Why the halves of `proto` stay as they are; empty if they can be changed."""
    for node in proto.graph.node:
        if any(t.data_type in HALF_TYPES for body in subgraphs(node) for t in all_tensors(body)):
            return f"the body of {node.name} has half types"
    outside = [
        t.name for t in proto.graph.initializer if t.data_type in HALF_TYPES and is_external(t)
    ]
    return f"half weights in external files, such as {outside[0]!r}" if outside else ""


def _widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = copy_model(proto)
    graph = model.graph
    for tensor in all_tensors(graph):
        if tensor.data_type in HALF_TYPES:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in graph.node:
        for entry in node.attribute:
            if entry.name in TYPE_ATTRIBUTES and entry.i in HALF_TYPES:
                entry.i = TensorProto.FLOAT
    for info in (*graph.value_info, *graph.input, *graph.output):
        if info.type.tensor_type.elem_type in HALF_TYPES:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def _without_casts(model: onnx.ModelProto, before: GraphView) -> onnx.ModelProto:
    """`model` without the Casts that stood between float types, in place."""
    known = {helper.tensor_dtype_to_np_dtype(kind).name for kind in FLOATS}
    outputs, inner = set(before.graph_outputs), {t for n in before.nodes for t in captured(n)}
    same: dict[str, str] = {}
    named: dict[str, str] = {}
    changed = {node.name: node for node in model.graph.node}
    kept: list[onnx.NodeProto] = []
    rounding = {node.name for node in before.nodes if _rounds_for_codes(before, node)}
    for node in before.nodes:
        ends = [*node.input[:1], *node.output]
        if node.op_type != "Cast" or {before.dtypes.get(t) for t in ends} - known:
            kept.append(copy_of(changed[node.name]))
            continue
        source, result = same.get(node.input[0], node.input[0]), node.output[0]
        fixed = source in outputs | inner or source not in before.producer or source in named
        rounds = node.name in rounding
        if rounds or result in inner or (result in outputs and fixed):
            kept.append(helper.make_node("Identity", [source], [result], name=node.name))
            continue
        if result in outputs:
            named[source] = result
        same[result] = source
    for node in kept:
        for index, name in enumerate(node.input):
            name = same.get(name, name)
            node.input[index] = named.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = named.get(name, name)
    replace_field(model.graph.node, kept)
    gone = {*same, *named} - outputs
    replace_field(model.graph.value_info, [i for i in model.graph.value_info if i.name not in gone])
    return model
