"""Weights that are reshaped behind their DequantizeLinear, stored in the shape that is read.

A linear layer kept as a 1 x 1 convolution squeezes its weights, others reshape or copy them.
TensorRT folds that and multiplies in int8; here the codes are moved and dequantized behind it,
which gives the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    copy_model,
    copy_of,
    names_in,
    replace_field,
)
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import COMPUTE_OPS
from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE
from trtune.precision.quantized.strip import drop_dead_constants

RESHAPES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True, slots=True)
class _Chain:
    """What stands between a DequantizeLinear of a constant and the weights `tensor`: `nodes`, in
    order, and the `axis` that its scales have there."""

    tensor: str
    dequantize: onnx.NodeProto
    nodes: tuple[onnx.NodeProto, ...]
    axis: int


def with_weights_in_place(proto: onnx.ModelProto, view: GraphView) -> onnx.ModelProto:
    """A copy of `proto` whose weights are dequantized in the shape that they are read in; `proto`
    itself if they are, or are only transposed, and where scales a channel would be torn apart."""
    chains = {chain.tensor: chain for chain in _chains(view)}
    if not chains:
        return proto
    model = copy_model(proto)
    names = FreshNames(names_in(model.graph))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        chain = chains.get(node.output[0]) if node.output else None
        if chain is None:
            nodes.append(copy_of(node))
        else:
            made, value = _in_place(view, chain, names)
            nodes += made
            model.graph.initializer.append(value)
    replace_field(model.graph.node, nodes)
    drop_dead_constants(view, model.graph)
    return model


def _chains(view: GraphView) -> Iterator[_Chain]:
    seen: set[str] = set()
    for node in view.nodes:
        tensor = node.input[1] if node.op_type in COMPUTE_OPS else ""
        if tensor and tensor not in seen and view.is_constant(tensor):
            seen.add(tensor)
            chain = _chain(view, tensor)
            if chain is not None:
                yield chain


def _chain(view: GraphView, tensor: str) -> _Chain | None:
    nodes: list[onnx.NodeProto] = []
    name = tensor
    while (node := view.by_name.get(view.producer.get(name, ""))) is not None:
        if node.op_type == DEQUANTIZE:
            break
        if node.op_type not in (*RESHAPES, "Transpose"):
            return None
        nodes.insert(0, node)
        name = node.input[0]
    moved = any(n.op_type in RESHAPES for n in nodes)
    if node is None or not moved or attribute(node, "block_size", 0):
        return None
    axis = _axis_behind(view, node, nodes)
    return None if axis is None else _Chain(tensor, node, tuple(nodes), axis)


def _axis_behind(
    view: GraphView, dequantize: onnx.NodeProto, nodes: list[onnx.NodeProto]
) -> int | None:
    """Where the axis of the scales is behind `nodes`; None if it is no axis there."""
    shape = view.constant(dequantize.output[0]).shape
    axis = int(attribute(dequantize, "axis", 1))
    if view.constant(dequantize.input[1]).size == 1:
        return 0
    axis += len(shape) if axis < 0 else 0
    for node in nodes:
        if node.op_type == "Transpose":
            axis = list(_order(node, len(shape))).index(axis)
        after = view.constant(node.output[0]).shape
        if node.op_type in RESHAPES:
            before = int(np.prod(shape[:axis]))
            fits = [
                k
                for k, size in enumerate(after)
                if size == shape[axis] and int(np.prod(after[:k])) == before
            ]
            if not fits:
                return None
            axis = fits[0]
        shape = after
    return axis


def _order(node: onnx.NodeProto, rank: int) -> tuple[int, ...]:
    return tuple(attribute(node, "perm", tuple(reversed(range(rank)))))


def _in_place(
    view: GraphView, chain: _Chain, names: FreshNames
) -> tuple[list[onnx.NodeProto], onnx.TensorProto]:
    """The nodes that dequantize moved codes, and the constant that they read."""
    maker = view.by_name.get(view.producer.get(chain.dequantize.input[0], ""))
    quantize = [maker] if maker is not None and maker.op_type == QUANTIZE else []
    value = view.constant((quantize or [chain.dequantize])[0].input[0])
    for node in chain.nodes:
        if node.op_type == "Transpose":
            value = value.transpose(_order(node, value.ndim))
        else:
            value = value.reshape(view.constant(node.output[0]).shape)
    name = names.new(f"{chain.tensor}/moved")
    held = numpy_helper.from_array(np.ascontiguousarray(value), name)
    single = view.constant(chain.dequantize.input[1]).size == 1
    made = []
    for old in (*quantize, chain.dequantize):
        output = chain.tensor if old is chain.dequantize else names.new(f"{name}/codes")
        inputs = [name, *old.input[1:]]
        node = helper.make_node(old.op_type, inputs, [output], names.new(f"{old.name}/moved"))
        node.attribute.extend(a for a in old.attribute if a.name != "axis")
        if not single:
            node.attribute.append(helper.make_attribute("axis", chain.axis))
        made.append(node)
        name = output
    return made, held
