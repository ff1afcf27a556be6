"""x' = x c - z in place of a tensor, and what its readers have to become: nothing changes in FP32.

Readers are convolutions and products with constant weights: W' = W / c, and the bias gets W' z.
The factor goes into what makes the tensor where that is possible (`fold`); otherwise a Mul, an Add
stay behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import Edge, is_move
from trtune.precision.prepare.draft import Draft
from trtune.precision.prepare.fold import Scalar, absorbed

Array = NDArray[Any]

POINTWISE = {
    *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu"),
    *("Selu", "Softplus", "Mish", "Gelu", "Mul", "Add", "Sub", "Div", "BatchNormalization"),
    *("LayerNormalization", "Conv"),
}
"""What a Mul or Add that stays is fused with."""


@dataclass(frozen=True, slots=True)
class Affine:
    """`tensor` is replaced by itself times `scale` less `shift` where `edges` read it.

    `scale` has an entry a channel, above zero; channels lie along `axis` (1 or -1). `shift` is one
    number for all.
    """

    tensor: str
    edges: tuple[Edge, ...]
    scale: NDArray[np.float32]
    shift: float
    axis: int


def reader_axis(view: GraphView, edges: tuple[Edge, ...]) -> int | None:
    """The axis of the input channels that all readers agree on; None if there is none."""
    axes = set()
    for name, index in edges:
        node = view.by_name[name]
        if index != 0 or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return None
        if len(node.input) < 2 or node.input[1] not in view.initializers:
            return None
        if node.op_type == "MatMul" and len(view.initializers[node.input[1]].dims) != 2:
            return None
        if node.op_type == "Gemm" and attribute(node, "transA", 0):
            return None
        axes.add(1 if node.op_type in ("Conv", "ConvTranspose") else -1)
    return axes.pop() if len(axes) == 1 else None


def input_channels(view: GraphView, node: onnx.NodeProto) -> int:
    """How many input channels a compute node has."""
    dims = view.initializers[node.input[1]].dims
    if node.op_type == "Conv":
        return int(dims[1]) * int(attribute(node, "group", 1))
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return int(dims[1])
    return int(dims[0])


def weights_by_channel(view: GraphView, node: onnx.NodeProto, weights: Array) -> Array:
    """`weights` with the input channels in front: shape (channels, whatever reads them).

    In a grouped convolution a channel is read only by the outputs of its group.
    """
    if node.op_type == "Conv":
        group = int(attribute(node, "group", 1))
        parts = weights.reshape(group, weights.shape[0] // group, weights.shape[1], -1)
        return np.moveaxis(parts, 2, 1).reshape(group * weights.shape[1], -1)
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return weights.T
    return weights.reshape(weights.shape[0], -1)


def rescaled(node: onnx.NodeProto, weights: Array, scale: Array) -> NDArray[np.float32]:
    """`weights` divided by `scale` along the input channels."""
    if node.op_type == "Conv":
        group = int(attribute(node, "group", 1))
        parts = weights.reshape(group, weights.shape[0] // group, *weights.shape[1:])
        by = scale.reshape(group, 1, weights.shape[1], *([1] * (weights.ndim - 2)))
        return (parts / by).reshape(weights.shape).astype(np.float32)
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return (weights / scale).astype(np.float32)
    by = scale.reshape(-1, *([1] * (weights.ndim - 1)))
    return (weights / by).astype(np.float32)


def is_depthwise(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether each output channel reads one input channel alone."""
    if node.op_type != "Conv":
        return False
    return int(view.initializers[node.input[1]].dims[1]) == 1


def may_shift(view: GraphView, edges: tuple[Edge, ...]) -> bool:
    """Whether no reader pads its input, and each has, or can get, a bias."""
    nodes = [view.by_name[name] for name, _ in edges]
    return all(not _pads(node) and bias_edge(view, node) is not None for node in nodes)


def _pads(node: onnx.NodeProto) -> bool:
    if node.op_type == "Conv":
        automatic = attribute(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
        return automatic or any(attribute(node, "pads", [0]))
    return bool(node.op_type == "ConvTranspose")


def bias_edge(view: GraphView, node: onnx.NodeProto) -> Edge | None:
    """The input that is, or can become, the bias of a compute node: its own, or for a MatMul the
    constant that its one reader, an Add, adds along the last axis. None if there is none."""
    if node.op_type == "Conv":
        held = node.input[2] if len(node.input) > 2 else ""
        return (node.name, 2) if not held or held in view.initializers else None
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        held = node.input[2] if len(node.input) > 2 else ""
        return (node.name, 2) if plain and (not held or held in view.initializers) else None
    readers = view.consumers.get(node.output[0], ())
    if node.op_type != "MatMul" or len(readers) != 1 or node.output[0] in view.graph_outputs:
        return None
    name, index = readers[0]
    add = view.by_name[name]
    if add.op_type != "Add" or add.input[1 - index] not in view.initializers:
        return None
    dims = tuple(view.initializers[add.input[1 - index]].dims)
    columns = int(view.initializers[node.input[1]].dims[1])
    return (name, 1 - index) if dims and dims[-1] == columns else None


def add_to_bias(draft: Draft, name: str, added: Array) -> None:
    """Add one number an output channel to the bias of a node that has a `bias_edge`."""
    place = bias_edge(draft.view, draft.view.by_name[name])
    assert place is not None
    holder = draft.node(place[0])
    old = holder.input[place[1]] if len(holder.input) > place[1] else ""
    bias = draft.constant(old).astype(np.float64) if old else 0.0
    draft.set_constant(place, bias + added)


def apply_affine(draft: Draft, affine: Affine) -> str | None:
    """Rewrite `draft`; the name of the tensor that the readers read then, None if it cannot be.

    It cannot where a Mul would have to stay behind an operator that only moves values (a concat, a
    max pool), whose result would have to be computed in float for it.
    """
    scale = affine.scale.astype(np.float64)
    whole = set(draft.consumers(affine.tensor)) == set(affine.edges)
    steps = None
    if whole and not draft.is_output(affine.tensor):
        steps = absorbed(draft, affine.tensor, Scalar(scale, affine.shift, affine.axis))
    if steps is None and not _may_stay(draft, affine):
        return None
    name = affine.tensor
    if steps is not None:
        for step in steps:
            step()
    else:
        name = _insert(draft, affine)
    for edge in affine.edges:
        _update_reader(draft, edge, scale, affine.shift)
    return name


def _may_stay(draft: Draft, affine: Affine) -> bool:
    made = draft.producer(affine.tensor)
    if made is None or is_move(made, 0) or made.op_type not in POINTWISE:
        return False
    return affine.axis == -1 or affine.tensor in draft.view.shapes


def _insert(draft: Draft, affine: Affine) -> str:
    rank = len(draft.view.shapes[affine.tensor]) if affine.axis == 1 else 1
    shape = [-1, *([1] * (rank - 2))] if affine.axis == 1 else [-1]
    name, edges = affine.tensor, list(affine.edges)
    if np.any(affine.scale != 1):
        value = affine.scale.reshape(shape)
        name = draft.insert_behind(name, "Mul", value, "scaled", edges)
    if affine.shift:
        name = draft.insert_behind(name, "Add", np.array(-affine.shift), "shifted", edges)
    return name


def _update_reader(draft: Draft, edge: Edge, scale: Array, shift: float) -> None:
    node = draft.node(edge[0])
    weights = draft.constant(node.input[1]).astype(np.float64)
    changed = rescaled(node, weights, scale) if np.any(scale != 1) else weights.astype(np.float32)
    if np.any(scale != 1):
        draft.set_constant((node.name, 1), changed)
    if not shift:
        return
    add_to_bias(draft, node.name, shift * output_sums(node, changed))


def output_sums(node: onnx.NodeProto, weights: Array) -> NDArray[np.float64]:
    """What a compute node makes of ones without padding, one number an output channel."""
    exact = weights.astype(np.float64)
    if node.op_type == "Conv":
        sums: NDArray[np.float64] = exact.reshape(len(exact), -1).sum(axis=1)
        return sums
    return np.asarray(exact.sum(axis=1 if attribute(node, "transB", 0) else 0))
