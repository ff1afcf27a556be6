"""Folding: what a graph computes from constants alone becomes a constant; so does batch norm.

TensorRT and every integer kernel want weights that are stored, not computed: behind a Transpose,
a Cast from float16 or a multiplication they stay in float. onnx-graphsurgeon computes them, with
onnxruntime; which nodes it may take, and how large a result may be, is decided here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.logger.logger import G_LOGGER

from trtune.precision.graph.batch_norm import fold_batch_norms
from trtune.precision.graph.proto import (
    RANDOM_OPS,
    constant_value,
    infer_shapes,
    inputs_of,
    is_external,
    replace_field,
    subgraphs,
    tensor_bytes,
)

log = logging.getLogger(__name__)

LARGE = 64 << 20
"""Up to this many bytes a folded result may have, however small what it is computed from."""
GROWTH = 4
"""A larger one may have so many times the bytes of what it is computed from."""
TOTAL = 3 << 29
"""All constants of a model that are in memory stay below this: a protobuf ends at 2 GiB."""
PART = 1 << 29
"""So many bytes are computed at a time."""

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
FOLDED_DOMAINS = frozenset({"", "com.microsoft"})
PLAIN = frozenset(
    {
        *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL),
        *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
        *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    }
)
"""Types that NumPy has, and with it onnx-graphsurgeon and onnxruntime's Python."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A node that is no longer there: its operator, and the node that does its work ("": none)."""

    op: str
    into: str = ""


@dataclass(frozen=True, slots=True)
class Folding:
    """What folding did: sentences for the report, and the nodes that are gone."""

    notes: tuple[str, ...] = ()
    gone: Mapping[str, Folded] = field(default_factory=lambda: MappingProxyType({}))


def fold(
    model: onnx.ModelProto, external_dir: Path | None = None, *, batch_norm: bool = True
) -> Folding:
    """Fold constants, and with `batch_norm` those too, in the normalised `model`, in place.

    The nodes of subgraphs, random ones and Q/DQ stay, and so does a result that is an output of
    the graph, or larger than `LARGE` and than `GROWTH` times its inputs, unless it is the weight of
    a weighted node. `external_dir` is where external weights lie; what is folded of them is in
    memory afterwards.
    """
    notes: list[str] = []
    gone: dict[str, Folded] = {}
    count = _fold_computed(model, external_dir, gone)
    if count:
        notes.append(f"{count} nodes that compute with constants alone became constants")
    flat = flatten_weights(model.graph)
    if flat:
        notes.append(f"{flat} weights of MatMul lose their leading dimensions of 1")
    if batch_norm:
        merged = fold_batch_norms(model, external_dir, room=room(model.graph))
        gone.update({name: Folded("BatchNormalization", conv) for name, conv in merged.items()})
        if merged:
            notes.append(f"{len(merged)} batch normalizations folded into the convolution before")
    return Folding(tuple(notes), MappingProxyType(gone))


def flatten_weights(graph: onnx.GraphProto) -> int:
    """Give stored right sides of MatMul two dimensions where all others are 1, in place; how many.

    So that they are weights to whoever quantizes. The result is the same if the data has as many
    dimensions, since these broadcast; elsewhere, and if anything else reads them, they stay.
    """
    ranks = {
        info.name: len(info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.value_info, *graph.output)
        if info.type.tensor_type.HasField("shape")
    }
    other = {output.name for output in graph.output}
    data_ranks: dict[str, list[int]] = {}
    for node in graph.node:
        weight = node.input[1] if node.op_type == "MatMul" and not node.domain else ""
        other.update(name for name in inputs_of(node) if name != weight)
        if weight:
            data_ranks.setdefault(weight, []).append(ranks.get(node.input[0], 0))
    found = [
        tensor
        for tensor in graph.initializer
        if len(tensor.dims) > 2
        and set(tensor.dims[:-2]) == {1}
        and min(data_ranks.get(tensor.name, [0])) >= len(tensor.dims)
        and tensor.name not in other
    ]
    for tensor in found:
        replace_field(tensor.dims, list(tensor.dims)[-2:])
    return len(found)


def fold_constants(model: onnx.ModelProto) -> str | None:
    """Turn Constant nodes, and Identity nodes of constants, into initializers.

    Those whose value is an output of the graph stay, and so do those inside subgraphs.
    """
    graph = model.graph
    outputs = {output.name for output in graph.output}.union(_body_outputs(graph))
    constants = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    counts: Counter[str] = Counter()
    kept = []
    for node in graph.node:
        tensor = None
        if node.domain == "" and node.output and node.output[0] not in outputs:
            if node.op_type == "Constant":
                tensor = constant_value(node)
            elif node.op_type == "Identity":
                source = renamed.get(node.input[0], node.input[0])
                if source in constants:
                    renamed[node.output[0]] = source
                    counts["Identity"] += 1
                    continue
        if tensor is None:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        constants.add(tensor.name)
        graph.initializer.append(tensor)
        counts["Constant"] += 1
    if not counts:
        return None
    for node in kept:
        _rename_inputs(node, renamed)
    replace_field(graph.node, kept)
    parts = [f"{count} {op}" for op, count in sorted(counts.items())]
    return f"{' and '.join(parts)} nodes became initializers"


def _body_outputs(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the outputs of all graphs inside `graph`: one may be a tensor from outside."""
    for node in graph.node:
        for body in subgraphs(node):
            yield from (output.name for output in body.output)
            yield from _body_outputs(body)


def _rename_inputs(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for k, name in enumerate(node.input):
        if name in renamed:
            node.input[k] = renamed[name]
    for body in subgraphs(node):
        for child in body.node:
            _rename_inputs(child, renamed)


def _fold_computed(
    model: onnx.ModelProto, external_dir: Path | None, gone: dict[str, Folded]
) -> int:
    """Fold nodes that read constants alone; how many. `gone` gets their names."""
    count, before = 0, -1
    while count > before:  # again, with the shapes that are known by then
        before = count
        count += _fold_round(model, external_dir, gone)
        if count > before and any(_candidates(model.graph)):
            infer_shapes(model)
        else:
            break
    return count


def _fold_round(model: onnx.ModelProto, external_dir: Path | None, gone: dict[str, Folded]) -> int:
    graph = model.graph
    taken = _foldable(graph)
    names = {name for node in taken for name in node.output if name}
    wanted = _read_elsewhere(graph, {node.name for node in taken}, names)
    values: dict[str, TensorProto] = {}
    for part in _parts(graph, taken, wanted):
        values.update(_computed(model, part, external_dir))
    if not values:
        return 0
    return _put(graph, taken, values, gone)


def _candidates(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes that read constants alone and may be computed, in order."""
    constant = {tensor.name for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    for node in graph.node:
        if (
            node.domain in FOLDED_DOMAINS
            and node.op_type not in RANDOM_OPS | QUANTIZERS
            and any(node.input)
            and constant.issuperset(name for name in node.input if name)
            and not any(True for _ in subgraphs(node))
            and outputs.isdisjoint(node.output)
        ):
            yield node
            constant.update(name for name in node.output if name)


def _foldable(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The candidates whose results have a known size that is not out of proportion."""
    found = list(_candidates(graph))
    sizes = _sizes(graph)
    weights = _weights(graph, found)
    stored = {tensor.name: tensor_bytes(tensor) for tensor in graph.initializer}
    left = room(graph)
    roots: dict[str, int] = dict(stored)
    kept = []
    for node in found:
        read = [name for name in dict.fromkeys(node.input) if name]
        if not all(name in roots for name in read):
            continue  # what it reads is not folded
        made = [name for name in node.output if name]
        total = sum(roots[name] for name in read)
        size = sum(sizes.get(name, -TOTAL) for name in made)
        allowed = left if not weights.isdisjoint(made) else max(GROWTH * total, LARGE)
        if 0 <= size <= min(allowed, left):
            kept.append(node)
            roots.update(dict.fromkeys(made, total))
            left -= size
    return kept


def room(graph: onnx.GraphProto) -> int:
    """Bytes of constants that can be added to what is in memory already."""
    return TOTAL - sum(tensor_bytes(t) for t in graph.initializer if not is_external(t))


def _sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Bytes of every tensor of a plain type whose shape is known."""
    found = {}
    for info in graph.value_info:
        kind = info.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        if kind.HasField("shape") and kind.elem_type in PLAIN and min(dims, default=1) >= 0:
            width = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            found[info.name] = int(np.prod(dims, dtype=object)) * width
    return found


def _weights(graph: onnx.GraphProto, found: Sequence[onnx.NodeProto]) -> set[str]:
    """Tensors that are, or become, the weight of a weighted node."""
    weights = {n.input[1] for n in graph.node if n.op_type in WEIGHTED and len(n.input) > 1}
    for node in reversed(found):
        if not weights.isdisjoint(node.output):
            weights.update(name for name in node.input if name)
    return weights


def _read_elsewhere(graph: onnx.GraphProto, taken: set[str], names: set[str]) -> list[str]:
    """Of the tensors `names`, those that nodes other than the `taken` ones read, in order."""
    used: dict[str, None] = {}
    for node in graph.node:
        if node.name not in taken:
            used.update(dict.fromkeys(name for name in inputs_of(node) if name in names))
    return list(used)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of the tensors to be computed, and the nodes that compute them."""

    tensors: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]


def _parts(
    graph: onnx.GraphProto, taken: Sequence[onnx.NodeProto], wanted: Sequence[str]
) -> Iterator[_Part]:
    """`wanted` in parts whose results together take `PART` bytes, or one that is larger."""
    producer = {name: node for node in taken for name in node.output if name}
    order = {node.name: k for k, node in enumerate(taken)}
    sizes = _sizes(graph)
    tensors: list[str] = []
    size = 0
    for name in wanted:
        if tensors and size + sizes[name] > PART:
            yield _part(tensors, producer, order)
            tensors, size = [], 0
        tensors.append(name)
        size += sizes[name]
    if tensors:
        yield _part(tensors, producer, order)


def _part(
    tensors: Sequence[str], producer: Mapping[str, onnx.NodeProto], order: Mapping[str, int]
) -> _Part:
    nodes: dict[str, onnx.NodeProto] = {}
    waiting = list(tensors)
    while waiting:
        node = producer.get(waiting.pop())
        if node is not None and node.name not in nodes:
            nodes[node.name] = node
            waiting.extend(node.input)
    return _Part(
        tuple(tensors), tuple(nodes[name] for name in sorted(nodes, key=order.__getitem__))
    )


def _computed(
    model: onnx.ModelProto, part: _Part, external_dir: Path | None
) -> dict[str, TensorProto]:
    """The values of `part`; what onnxruntime cannot compute is left out."""
    alone = _alone(model, part, external_dir)
    with _quiet():
        surgeon = gs.import_onnx(alone)
        surgeon.fold_constants(
            fold_shapes=False,
            recurse_subgraphs=False,
            flatten_subgraphs=False,
            recurse_functions=False,
        )
        tensors = surgeon.tensors()
        found = {
            name: numpy_helper.from_array(np.asarray(tensors[name].values), name)
            for name in part.tensors
            if isinstance(tensors.get(name), gs.Constant)
        }
    if found or len(part.tensors) == 1:
        return found
    halves = _halved(part)
    return {
        name: value
        for half in halves
        for name, value in _computed(model, half, external_dir).items()
    }


def _halved(part: _Part) -> tuple[_Part, _Part]:
    producer = {name: node for node in part.nodes for name in node.output if name}
    order = {node.name: k for k, node in enumerate(part.nodes)}
    middle = len(part.tensors) // 2
    left, right = part.tensors[:middle], part.tensors[middle:]
    return _part(left, producer, order), _part(right, producer, order)


def _alone(model: onnx.ModelProto, part: _Part, external_dir: Path | None) -> onnx.ModelProto:
    """A model of nothing but the constants and nodes of `part`."""
    read = {name for node in part.nodes for name in node.input}
    weights = [_stored(t, external_dir) for t in model.graph.initializer if t.name in read]
    made = [name for node in part.nodes for name in node.output if name]
    infos = {info.name: info for info in model.graph.value_info}
    graph = helper.make_graph(
        part.nodes, "constants", [], [infos[name] for name in part.tensors], weights
    )
    graph.value_info.extend(infos[name] for name in made if name in infos)
    alone = helper.make_model(graph, opset_imports=list(model.opset_import))
    alone.ir_version = model.ir_version
    return alone


def _stored(tensor: TensorProto, external_dir: Path | None) -> TensorProto:
    """`tensor` with its values inside it."""
    if not is_external(tensor):
        return tensor
    array = numpy_helper.to_array(tensor, str(external_dir or ""))
    return numpy_helper.from_array(array, tensor.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lines of theirs on stderr: what cannot be folded shows in the result."""
    before = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        G_LOGGER.severity = before
        onnxruntime.set_default_logger_severity(2)  # as it is when onnxruntime is imported


def _put(
    graph: onnx.GraphProto,
    taken: Iterable[onnx.NodeProto],
    values: Mapping[str, TensorProto],
    gone: dict[str, Folded],
) -> int:
    """Put `values` in the place of the nodes that nothing needs any longer; how many those are."""
    candidates = {node.name for node in taken}
    used = {output.name for output in graph.output}
    kept, sources = [], set()
    for node in reversed(graph.node):
        needed = any(name in used and name not in values for name in node.output)
        if node.name in candidates and not needed:
            gone[node.name] = Folded(node.op_type)
            sources.update(node.input)
        else:
            kept.append(node)
            used.update(inputs_of(node))
    folded = len(graph.node) - len(kept)
    replace_field(graph.node, reversed(kept))
    unused = sources - used
    replace_field(graph.initializer, [t for t in graph.initializer if t.name not in unused])
    graph.initializer.extend(values[name] for name in values if name in used)
    made = {name for node in kept for name in node.output}
    replace_field(graph.value_info, [info for info in graph.value_info if info.name in made])
    return folded
