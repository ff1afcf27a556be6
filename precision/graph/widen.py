"""A model that computes in half precision, in float32: what precisions are planned and measured in.

Exporters write whole models in float16. Their weights are held exactly by float32, and nothing that
is computed from them overflows there, so such a file is one more way of storing a float32 model:
which node then runs in int8 and which in half, the plan says. Inputs and outputs of the model keep
their types, with a Cast behind or before them, and so does what stands behind a cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper

from trtune.precision.graph.fold import TOTAL, room
from trtune.precision.graph.proto import (
    FreshNames,
    all_nodes,
    all_tensors,
    captured,
    infer_shapes,
    is_external,
    names_in,
    rename_tensors,
    replace_field,
    subgraphs,
    tensor_bytes,
)

HALF_KINDS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
KIND_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"}
)
"""Attributes that hold the type of what an operator gives, or computes in."""
BORDERS = frozenset({"Cast", "Constant", "QuantizeLinear", "DequantizeLinear"})
"""Operators that compute nothing in the type of their floats."""


def computing_in_half(graph: onnx.GraphProto) -> list[str]:
    """The nodes of the normalised `graph` that compute in float16 or bfloat16.

    One whose body has anything in such a type counts. Stored halves with a Cast behind do not.
    """
    halves = set(_half_tensors(graph))
    return [
        node.name
        for node in graph.node
        if (node.op_type not in BORDERS and not halves.isdisjoint((*node.input, *node.output)))
        or any(map(_holds_halves, subgraphs(node)))
    ]


def widen_halves(model: onnx.ModelProto, external_dir: Path | None = None) -> tuple[str, str]:
    """Let the normalised `model` compute in float32 where it computes in a half type, in place.

    The type that most of it computed in, by ONNX's name in lower case ("" if it is left as it is),
    and a sentence for the report ("" for a model without such nodes). Inputs and outputs keep
    their names and types, nodes and other tensors their names; Casts between floats are gone.
    `external_dir` is where external weights lie.
    """
    graph = model.graph
    found = computing_in_half(graph)
    if not found:
        return "", ""
    word = _word(graph)
    why = _immovable(graph)
    if why:
        return "", f"{len(found)} nodes compute in {word} and are left so: {why}"
    weights = sum(tensor.data_type in HALF_KINDS for tensor in graph.initializer)
    ends = [i.name for i in (*graph.input, *graph.output) if _kind(i) in HALF_KINDS]
    _retype(graph, external_dir)
    _cast_ends(graph)
    _drop_casts(graph)
    infer_shapes(model)
    kept = f"; {', '.join(dict.fromkeys(ends))} kept as {word}, by Casts" if ends else ""
    return word, (
        f"{len(found)} nodes that the file computes in {word} are planned and measured in float32, "
        f"with {weights} constants raised to it{kept}"
    )


def _kind(info: onnx.ValueInfoProto) -> int:
    return int(info.type.tensor_type.elem_type)


def _half_tensors(graph: onnx.GraphProto) -> Iterator[str]:
    for info in (*graph.input, *graph.value_info, *graph.output):
        if any(kind.elem_type in HALF_KINDS for kind in _tensor_types(info.type)):
            yield info.name
    yield from (tensor.name for tensor in graph.initializer if tensor.data_type in HALF_KINDS)


def _holds_halves(body: onnx.GraphProto) -> bool:
    """Whether anything in the graph of an If, Loop or Scan says that it is of a half type."""
    if any(_half_tensors(body)) or any(t.data_type in HALF_KINDS for t in all_tensors(body)):
        return True
    named = (entry for node in all_nodes(body.node) for entry in node.attribute)
    return any(entry.name in KIND_ATTRIBUTES and entry.i in HALF_KINDS for entry in named)


def _tensor_types(kind: TypeProto) -> Iterator[TypeProto.Tensor]:
    """The types of the tensors in `kind`: itself, or the elements of sequences and optionals."""
    which = kind.WhichOneof("value")
    if which == "tensor_type":
        yield kind.tensor_type
    elif which in ("sequence_type", "optional_type"):
        yield from _tensor_types(getattr(kind, which).elem_type)


def _word(graph: onnx.GraphProto) -> str:
    """The half type that most tensors of `graph` have."""
    infos = (*graph.input, *graph.value_info, *graph.output)
    kinds = Counter(kind for kind in map(_kind, infos) if kind in HALF_KINDS)
    kinds.update(t.data_type for t in graph.initializer if t.data_type in HALF_KINDS)
    most = max(kinds, key=lambda kind: (kinds[kind], kind), default=TensorProto.FLOAT16)
    return str(TensorProto.DataType.Name(most)).lower()


def _immovable(graph: onnx.GraphProto) -> str:
    """Why the halves of `graph` stay as they are; empty if they can be changed."""
    for info in (*graph.input, *graph.output):
        if _kind(info) == TensorProto.BFLOAT16:
            return f"{info.name!r} is bfloat16, which NumPy does not have"
        if not info.type.HasField("tensor_type") and any(
            kind.elem_type in HALF_KINDS for kind in _tensor_types(info.type)
        ):
            return f"{info.name!r} is a sequence of them, which no Cast takes"
    if any(t.values.data_type in HALF_KINDS for t in graph.sparse_initializer):
        return "some are sparse"
    left = room(graph)
    raised = sum(
        tensor_bytes(t) * (2 if is_external(t) else 1)
        for t in graph.initializer
        if t.data_type in HALF_KINDS
    )
    if raised > left:
        return (
            f"in float32 its weights would have {(TOTAL - left + raised) / 2**30:.1f} GiB, and "
            f"{TOTAL / 2**30:.1f} fit a model in memory"
        )
    return ""


def _retype(graph: onnx.GraphProto, external_dir: Path | None) -> None:
    """Say float32 wherever `graph` says half, but for its inputs and outputs."""
    for tensor in all_tensors(graph):
        if tensor.data_type in HALF_KINDS:
            tensor.CopyFrom(widened(tensor, external_dir))
    _retype_infos(graph.value_info)
    _retype_nodes(graph.node)


def widened(tensor: onnx.TensorProto, external_dir: Path | None = None) -> onnx.TensorProto:
    """`tensor`, in memory and as float32 if it is half."""
    if tensor.data_type not in HALF_KINDS:
        return tensor
    value = numpy_helper.to_array(tensor, str(external_dir or ""))
    return numpy_helper.from_array(value.astype(np.float32), tensor.name)


def _retype_infos(infos: Iterable[onnx.ValueInfoProto]) -> None:
    for info in infos:
        _retype_type(info.type)


def _retype_type(kind: TypeProto) -> None:
    for tensor in _tensor_types(kind):
        if tensor.elem_type in HALF_KINDS:
            tensor.elem_type = TensorProto.FLOAT


def _retype_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in all_nodes(nodes):
        for entry in node.attribute:
            if entry.name in KIND_ATTRIBUTES and entry.i in HALF_KINDS:
                entry.i = TensorProto.FLOAT
            if entry.HasField("tp"):
                _retype_type(entry.tp)
        for body in subgraphs(node):
            for infos in (body.input, body.output, body.value_info):
                _retype_infos(infos)


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Put Casts between the half inputs and outputs of `graph` and what now is float32."""
    fresh = FreshNames(names_in(graph)).new
    inputs = {info.name for info in graph.input}
    read = {name for node in graph.node for name in (*node.input, *captured(node))}
    renamed: dict[str, str] = {}
    before: list[onnx.NodeProto] = []
    behind: list[onnx.NodeProto] = []
    infos: list[onnx.ValueInfoProto] = []
    for info in (*graph.input, *graph.output):
        name, kind = info.name, _kind(info)
        unread = name in inputs and name not in read
        if kind not in HALF_KINDS or name in renamed or unread:
            continue
        renamed[name] = fresh(f"{name}/float32")
        ends = (name, renamed[name], TensorProto.FLOAT) if name in inputs else (
            renamed[name], name, kind)  # fmt: skip
        cast = helper.make_node(
            "Cast", [ends[0]], [ends[1]], name=fresh(f"{name}/Cast"), to=ends[2]
        )
        (before if name in inputs else behind).append(cast)
        inner = onnx.ValueInfoProto()
        inner.CopyFrom(info)
        inner.name = renamed[name]
        inner.type.tensor_type.elem_type = TensorProto.FLOAT
        infos.append(inner)
    nodes = [rename_tensors(node, renamed) for node in graph.node]
    replace_field(graph.node, [*before, *nodes, *behind])
    graph.value_info.extend(infos)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)


def _drop_casts(graph: onnx.GraphProto) -> None:
    """Take out the Casts of `graph` that give float32 for float32; one that names an output of the
    model gives that name to what it reads, or stays as an Identity where that has one already."""
    infos = (*graph.input, *graph.value_info, *graph.output)
    kinds = {info.name: _kind(info) for info in infos}
    kinds.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    outputs = {info.name for info in graph.output}
    made = {name for node in graph.node for name in node.output if name}
    named: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        ends = (node.input[0], node.output[0]) if node.op_type == "Cast" else ("", "")
        if [kinds.get(name) for name in ends] != [TensorProto.FLOAT] * 2:
            kept.append(node)
            continue
        source, result = named.get(ends[0], ends[0]), ends[1]
        if result not in outputs:
            named[result] = source
        elif source in made and source not in outputs:
            named = {name: result if old == source else old for name, old in named.items()}
            named[source] = result
        else:
            name = node.name
            node.Clear()
            node.CopyFrom(helper.make_node("Identity", [source], [result], name=name))
            kept.append(node)
    replace_field(graph.node, [rename_tensors(node, named) for node in kept])
    gone = named.keys() - outputs
    replace_field(graph.value_info, [i for i in graph.value_info if i.name not in gone])
