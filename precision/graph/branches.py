"""Ifs whose branch is known: inputs that the user gives one value, and the branches taken inlined.

A model that asks its sampling rate, or whether a dimension is 1, holds its layers inside of an If,
where no plan reaches them. As soon as the condition is a constant, the nodes of the branch that
is taken stand in the If's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtune.configs.errors import ModelError, did_you_mean
from trtune.precision.graph.fold import fold, fold_constants
from trtune.precision.graph.normalise import name_nodes, sort_nodes
from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    copy_of,
    infer_shapes,
    inputs_of,
    names_in,
    rename_tensors,
    replace_field,
    subgraphs,
)

InputValue = bool | int | float | Sequence["InputValue"]

OF_SHAPES = frozenset({"Shape", "Size"})
"""What these give follows from the shape of what they read, not from its values."""


@dataclass(frozen=True, slots=True)
class Switch:
    """An input that decides which branch Ifs take: their names, the values it is compared with."""

    input: str
    branches: tuple[str, ...]
    values: tuple[bool | int | float, ...]


def fix_inputs(
    model: onnx.ModelProto, constants: Mapping[str, InputValue]
) -> tuple[onnx.TensorProto, ...]:
    """Make the inputs named in `constants` constants of these values, in place; what they became.

    A single value fills an input of any fixed shape. Raises ModelError for a name that is no
    input, and for a value that has not its type or shape.
    """
    graph = model.graph
    infos = {info.name: info for info in graph.input}
    made = []
    for name, value in constants.items():
        if name not in infos:
            raise ModelError(
                f"model.constants: the model has no input {name!r}{did_you_mean(name, infos)} "
                f"(inputs: {', '.join(map(repr, infos))})"
            )
        made.append(numpy_helper.from_array(_array(infos[name], value), name))
    if len(made) == len(infos) and made:
        raise ModelError("model.constants names every input of the model: none is left to feed")
    replace_field(graph.input, [info for info in graph.input if info.name not in constants])
    graph.initializer.extend(made)
    return tuple(made)


def _array(info: onnx.ValueInfoProto, value: InputValue) -> NDArray[np.generic]:
    """`value` in the type and shape of the input `info`."""
    kind = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
    try:
        given = np.asarray(value)
        array = given.astype(dtype)
        whole = np.issubdtype(dtype, np.floating) or bool((array == given).all())
    except (ValueError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise ModelError(f"model.constants.{info.name}: {value!r} is no value of type {dtype.name}")
    if array.ndim == 0 and None not in dims:
        return np.full([dim or 1 for dim in dims], array, dtype)
    fits = array.ndim == len(dims) and all(
        want in (None, have) for want, have in zip(dims, array.shape, strict=True)
    )
    if not fits:
        wanted = ["?" if dim is None else dim for dim in dims]
        raise ModelError(
            f"model.constants.{info.name}: the input has the shape {wanted}, the value "
            f"{list(array.shape)}"
        )
    return array


def settle_branches(model: onnx.ModelProto, external_dir: Path | None = None) -> tuple[str, ...]:
    """Inline, in the normalised `model`, the branch of every If that constants and fixed
    dimensions decide; sentences for the report.

    What a branch holds may decide the next If, so this goes on until none is left.
    """
    taken: list[str] = []
    notes: list[str] = []
    while any(node.op_type == "If" for node in model.graph.node):
        _fix_dimensions(model.graph)
        notes += fold(model, external_dir, batch_norm=False).notes
        names = take_branches(model)
        if not names:
            break
        taken += names
        sort_nodes(model)
        name_nodes(model)
        fold_constants(model)
        infer_shapes(model)
    if taken:
        _scalar_bounds(model.graph)
        notes.append(f"{len(taken)} Ifs whose branch is known are replaced by what they hold")
    return tuple(notes)


def _scalar_bounds(graph: onnx.GraphProto) -> None:
    """Make scalars of what Range reads where it is one element of shape [1].

    onnxruntime takes that from an If, whose shapes it does not know, and refuses it elsewhere.
    """
    single = {tensor.name for tensor in graph.initializer if list(tensor.dims) == [1]}
    single |= {
        info.name
        for info in graph.value_info
        if [dim.dim_value for dim in info.type.tensor_type.shape.dim] == [1]
    }
    names = FreshNames(_names(graph, graph.node))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for index, name in enumerate(node.input) if node.op_type == "Range" else ():
            if name in single:
                node.input[index] = names.new(f"{name}_scalar")
                made = node.input[index]
                nodes.append(helper.make_node("Squeeze", [name], [made], name=made))
        nodes.append(node)
    replace_field(graph.node, nodes)


def _fix_dimensions(graph: onnx.GraphProto) -> None:
    """Make constants of the fixed dimensions and ranks that conditions of Ifs ask for."""
    producer = {name: node for node in graph.node for name in node.output if name}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        info.name: [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
        for info in (*graph.input, *graph.value_info, *graph.output)
        if (kind := info.type.tensor_type).HasField("shape")
    }
    shapes.update((tensor.name, list(tensor.dims)) for tensor in graph.initializer)
    outputs = {info.name for info in graph.output}
    known: dict[str, NDArray[np.int64]] = {}
    for branch in (node for node in graph.node if node.op_type == "If"):
        for node in _behind(branch.input[0], producer):
            value = _dimension(node, producer, stored, shapes)
            if value is not None and outputs.isdisjoint(node.output):
                known[node.output[0]] = value
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in known.items())
    kept = [node for node in graph.node if known.keys().isdisjoint(node.output)]
    used = {name for node in kept for name in inputs_of(node)} | outputs
    kept = [n for n in kept if n.op_type not in OF_SHAPES or not used.isdisjoint(n.output)]
    replace_field(graph.node, kept)


def _dimension(
    node: onnx.NodeProto,
    producer: Mapping[str, onnx.NodeProto],
    stored: Mapping[str, TensorProto],
    shapes: Mapping[str, Sequence[int | None]],
) -> NDArray[np.int64] | None:
    """What `node` gives, if it picks fixed dimensions of a tensor's shape, or asks for its rank."""
    shape = producer.get(node.input[0]) if node.input else None
    if shape is None or shape.op_type != "Shape" or shape.attribute or node.domain:
        return None
    dims = shapes.get(shape.input[0])
    if dims is None:
        return None
    if node.op_type in OF_SHAPES:
        return np.asarray(len(dims) if node.op_type == "Size" else [len(dims)], np.int64)
    if node.op_type != "Gather" or node.input[1] not in stored or attribute(node, "axis", 0):
        return None
    places = numpy_helper.to_array(stored[node.input[1]])
    if places.size == 0 or places.min() < -len(dims) or places.max() >= len(dims):
        return None
    picked = [dims[int(place)] for place in places.reshape(-1)]
    found = [dim for dim in picked if dim is not None]
    return np.asarray(found, np.int64).reshape(places.shape) if len(found) == len(picked) else None


def take_branches(model: onnx.ModelProto) -> tuple[str, ...]:
    """Put the nodes of the branch taken in the place of each If with a constant condition.

    In place, in the normalised `model`; the names of the Ifs that are gone. The nodes have their
    own names, so some may now be there twice, and Constant nodes among them are left as they are.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found: list[str] = []
    for node in list(graph.node):
        if node.op_type != "If" or node.domain or node.input[0] not in stored:
            continue
        condition = numpy_helper.to_array(stored[node.input[0]])
        body = attribute(node, "then_branch" if condition.all() else "else_branch")
        if condition.size == 1 and body is not None and not body.sparse_initializer:
            _inline(graph, node, body)
            found.append(node.name)
    return tuple(found)


def _inline(graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto) -> None:
    """Put the nodes of `body` where the If `node` stands."""
    place = next(k for k, other in enumerate(graph.node) if other.name == node.name)
    others = [other for k, other in enumerate(graph.node) if k != place]
    names = FreshNames(_names(graph, others))
    made = [name for child in body.node for name in child.output if name]
    renamed = {
        inner.name: outer
        for inner, outer in zip(reversed(body.output), reversed(node.output), strict=True)
        if outer and inner.name in made
    }
    for name in (*(tensor.name for tensor in body.initializer), *made):
        if name not in renamed:
            renamed[name] = names.new(name)
    nodes = [rename_tensors(copy_of(child), renamed) for child in body.node]
    for inner, outer in zip(body.output, node.output, strict=True):
        source = renamed.get(inner.name, inner.name)
        if outer and source != outer:
            name = f"{node.name}_{outer}"
            nodes.append(helper.make_node("Identity", [source], [outer], name=name))
    for tensor in body.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = renamed[tensor.name]
    replace_field(graph.node, [*others[:place], *nodes, *others[place:]])


def _names(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of tensors in `graph`, of its nodes those of `nodes` alone."""
    found = {info.name for info in (*graph.input, *graph.output, *graph.initializer)}
    for node in nodes:
        found.update(node.output)
        for body in subgraphs(node):
            found |= names_in(body)
    return found


def switches(graph: onnx.GraphProto) -> tuple[Switch, ...]:
    """The inputs of one number each that alone decide, with constants, what Ifs of `graph` do."""
    sizes = {info.name: _size(info) for info in graph.input}
    producer = {name: node for node in graph.node for name in node.output if name}
    branches: dict[str, list[str]] = {}
    values: dict[str, dict[bool | int | float, None]] = {}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "If" or node.domain:
            continue
        behind = list(_behind(node.input[0], producer))
        read = {name for other in behind for name in inputs_of(other)} | {node.input[0]}
        inputs = [name for name in sizes if name in read]
        if any(other.op_type in OF_SHAPES or any(subgraphs(other)) for other in behind):
            continue
        if not inputs or any(sizes[name] != 1 for name in inputs):
            continue
        compared = _compared(behind, stored)
        for name in inputs:
            branches.setdefault(name, []).append(node.name)
            values.setdefault(name, {}).update(dict.fromkeys(compared))
    return tuple(
        Switch(name, tuple(found), tuple(values[name])) for name, found in branches.items()
    )


def _size(info: onnx.ValueInfoProto) -> int | None:
    """The number of elements of a tensor, where its shape is fixed."""
    kind = info.type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    return int(np.prod(dims)) if kind.HasField("shape") and 0 not in dims else None


def _behind(tensor: str, producer: Mapping[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes that `tensor` is computed by."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        node = producer.get(waiting.pop())
        if node is not None and node.name not in seen:
            seen.add(node.name)
            waiting.extend(inputs_of(node))
            yield node


def _compared(
    nodes: Iterable[onnx.NodeProto], stored: Mapping[str, TensorProto]
) -> list[bool | int | float]:
    """The single numbers that Equal nodes among `nodes` compare with."""
    constants = [
        numpy_helper.to_array(stored[name])
        for node in nodes
        if node.op_type == "Equal"
        for name in node.input
        if name in stored
    ]
    return [array.reshape(-1)[0].item() for array in constants if array.size == 1]
