"""Small things that every module does with ONNX's protobufs: names, copies, subgraphs, types.

Nothing here knows more than the format; what a graph means stands in `view` and `normalise`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

HEAVY_BYTES = 4096
"""Initializers above this take no part in shape inference or opset conversion."""

PACKED = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}
"""Types of which a byte holds two."""
DEFAULT_DOMAINS = ("", "ai.onnx")
RANDOM_OPS = frozenset(
    {
        *("Bernoulli", "Dropout", "Multinomial"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    }
)
"""Operators that give something else each time."""


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute as Python has it (int, float, bytes, list, TensorProto)."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan, not those nested deeper."""
    for entry in node.attribute:
        if entry.type == onnx.AttributeProto.GRAPH:
            yield entry.g
        elif entry.type == onnx.AttributeProto.GRAPHS:
            yield from entry.graphs


def captured(node: onnx.NodeProto) -> tuple[str, ...]:
    """Tensors of the outer graph that the node's subgraphs read, each once, in order of use."""
    used: dict[str, None] = {}
    for body in subgraphs(node):
        inner = {i.name for i in body.input} | {i.name for i in body.initializer}
        for child in body.node:
            for name in (*child.input, *captured(child)):
                if name and name not in inner:
                    used[name] = None
            inner.update(child.output)
        for output in body.output:
            if output.name and output.name not in inner:
                used[output.name] = None
    return tuple(used)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """`nodes`, each followed by those of the graphs inside it."""
    for node in nodes:
        yield node
        for body in subgraphs(node):
            yield from all_nodes(body.node)


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node, or None if it is sparse or has none."""
    if not node.attribute:
        return None
    entry = node.attribute[0]
    if entry.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(entry.t)
        return tensor
    value = onnx.helper.get_attribute_value(entry)
    if entry.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.asarray(value, np.float32))
    if entry.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.asarray(value, np.int64))
    if entry.name in ("value_string", "value_strings"):
        return numpy_helper.from_array(np.asarray(value, object))
    return None


def rename_tensors(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    """`node`, and what graphs inside it read from outside, by the new names; in place."""
    for field in (node.input, node.output):
        replace_field(field, [renamed.get(name, name) for name in field])
    for body in subgraphs(node):
        own = {info.name for info in (*body.input, *body.initializer)}
        own.update(name for child in body.node for name in child.output)
        outer = {name: new for name, new in renamed.items() if name not in own}
        for child in body.node:
            rename_tensors(child, outer)
        for output in body.output:
            output.name = outer.get(output.name, output.name)
    return node


def inputs_of(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node and the graphs inside it read, without inputs left out."""
    return [name for name in (*node.input, *captured(node)) if name]


def used_tensors(graph: onnx.GraphProto) -> set[str]:
    """What is read in `graph`, by a node, by a graph inside one, or as an output."""
    used = {name for node in graph.node for name in inputs_of(node)}
    return used.union(output.name for output in graph.output)


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Names of all tensors and nodes of `graph` and of the graphs inside it."""
    found = {entry.name for entry in (*graph.input, *graph.initializer)}
    for node in graph.node:
        found.update((node.name, *node.output))
        for body in subgraphs(node):
            found |= names_in(body)
    return found


class FreshNames:
    """Names that are not `taken` yet, which each new one then is.

    >>> names = FreshNames({"x"})
    >>> names.new("x"), names.new("x"), names.new("y")
    ('x_2', 'x_3', 'y')
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._last: dict[str, int] = {}

    def new(self, name: str) -> str:
        """`name`, with a number from 2 up behind it if that is taken."""
        number, found = self._last.get(name, 1), name
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._last[name] = number  # no name is ever given back, so none below comes free
        self._taken.add(found)
        return found

    def take(self, name: str) -> None:
        """Let `name` be taken."""
        self._taken.add(name)


def copy_of(node: onnx.NodeProto) -> onnx.NodeProto:
    """`node` again, to be changed."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def copy_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` again, weights included, to be changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def is_repeated(field: Any) -> bool:
    """Whether a field (a protobuf's FieldDescriptor) is a list.

    protobuf has this as an attribute from 6.31 on, and warns of the number that older ones have.
    """
    known = getattr(field, "is_repeated", None)
    return bool(field.label == field.LABEL_REPEATED if known is None else known)


def copy_fields(source: Any, target: Any, *, leave_out: Collection[str]) -> None:
    """Copy the fields that `source` has to `target`, a message of the same type.

    Strings, numbers and lists alone: fields that are messages have to be left out.
    """
    for field, value in source.ListFields():
        if field.name in leave_out:
            continue
        if is_repeated(field):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)


def replace_field(field: Any, values: Iterable[Any]) -> None:
    """Set a repeated field of a protobuf; `values` may come from the field itself."""
    kept = list(values)
    del field[:]
    field.extend(kept)


def without_graph(source: onnx.ModelProto) -> onnx.ModelProto:
    """A model like `source` without nodes, constants and types of inner tensors."""
    model = onnx.ModelProto()
    inner = {"graph", "node", "initializer", "value_info"}
    copy_fields(source, model, leave_out=inner)
    copy_fields(source.graph, model.graph, leave_out=inner)
    return model


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A light copy of `model` in which heavy or external initializers are graph inputs.

    What is left has the same nodes, types and shapes and always fits a protobuf (2 GiB).
    """
    light = onnx.ModelProto()
    copy_fields(model, light, leave_out={"graph", "functions", "training_info"})
    graph, source = light.graph, model.graph
    graph.name = source.name
    for part in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(graph, part).extend(getattr(source, part))
    for tensor in source.initializer:
        if is_heavy(tensor):
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        else:
            graph.initializer.append(tensor)
    light.ir_version = max(light.ir_version, 4)
    return light


def default_opset(model: onnx.ModelProto) -> int | None:
    """The version of the default operator set that `model` imports."""
    return next((o.version for o in model.opset_import if o.domain in DEFAULT_DOMAINS), None)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of the values of `tensor`, inside the protobuf or outside it."""
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    if tensor.data_type in PACKED:
        return (count + 1) // 2
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values of `tensor` lie in a file of their own."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def is_heavy(tensor: onnx.TensorProto) -> bool:
    """Whether `tensor` is external, or so large that it is left out of copies of the graph."""
    return is_external(tensor) or tensor_bytes(tensor) > HEAVY_BYTES


def all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant of `graph` and of the graphs inside it: initializers and attributes."""
    yield from graph.initializer
    for node in graph.node:
        for entry in node.attribute:
            if entry.HasField("t"):
                yield entry.t
            yield from entry.tensors
        for body in subgraphs(node):
            yield from all_tensors(body)


def external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Those of `all_tensors` whose values lie in files of their own."""
    return (tensor for tensor in all_tensors(graph) if is_external(tensor))


def infer_shapes(model: onnx.ModelProto) -> str | None:
    """Fill `value_info` with every type and shape that can be known without running the model."""
    graph = model.graph
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"shape inference failed, so some shapes are unknown: {reason[:200]}"
    known = {info.name: info for info in inferred.value_info}
    outputs = {output.name for output in graph.output}
    inner = [name for node in graph.node for name in node.output if name not in outputs]
    replace_field(graph.value_info, [known[name] for name in inner if name in known])
    for output, found in zip(graph.output, inferred.output, strict=True):
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(found)
    return None
