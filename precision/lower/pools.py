"""Averages over whole pictures in integers: what `deploy` changes so that a kernel takes them.

onnxruntime has one for GlobalAveragePool between codes, and none for a ReduceMean of the same
values, nor where a Flatten stands before the QuantizeLinear. All that the average reads is then
dequantized, and laid out anew: a squeeze-and-excitation block reads each of its tensors twice so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.rewrite import Rewrite
from trtune.precision.plan.placement import Edge
from trtune.precision.plan.plan import PrecisionPlan

RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Average:
    """The node that averages, and the input that reads its result, if only reshaping nodes stand
    between it and the quantized tensor."""

    node: str
    reader: Edge | None = None


def average_behind(view: GraphView, plan: PrecisionPlan, tensor: str) -> Average | None:
    """The average over all places of a picture that `tensor` holds, perhaps in another shape.

    None if it is something else or an output of the model, if what stands between is read by
    others too, or pinned.
    """
    reader: Edge | None = None
    if tensor in view.graph_outputs:
        return None
    while (name := view.producer.get(tensor, "")) and not plan.nodes[name].is_pinned:
        node = view.by_name[name]
        if node.op_type not in RESHAPES:
            return Average(name, reader) if averages_places(view, node) else None
        tensor, reader = node.input[0], (name, 0)
        if len(view.consumers.get(tensor, ())) != 1 or tensor in view.graph_outputs:
            return None
    return None


def averages_places(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether `node` gives the mean of each channel of each picture, over all places."""
    if node.op_type == "GlobalAveragePool":
        return True
    rank = len(view.shapes.get(node.input[0], ())) if node.op_type == "ReduceMean" else 0
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and view.is_constant(node.input[1]):
        axes = np.asarray(view.constant(node.input[1])).reshape(-1).tolist()
    if rank < 3 or not axes:
        return False
    return sorted(int(axis) % rank for axis in axes) == list(range(2, rank))


def average_codes(
    rewrite: Rewrite, view: GraphView, found: Average, scale: float, zero_point: int
) -> None:
    """Let the integer kernel make the average `found`, if it reads codes, in these codes."""
    node = rewrite.node(found.node)
    if not rewrite.is_dequantized(node.input[0]):
        return
    if node.op_type == "ReduceMean" and not attribute(node, "keepdims", 1):
        pooled = rewrite.before(found.node, "GlobalAveragePool", [node.input[0]], "pooled")
        codes = rewrite.quantize_pair(pooled, scale, zero_point, np.uint8, before=found.node)
        _become(node, "Flatten", codes)  # (N, C, 1, ...) to (N, C), as its output was
        return
    _become(node, "GlobalAveragePool", node.input[0])
    if found.reader is not None:
        result = view.by_name[found.node].output[0]
        rewrite.reconnect(found.reader, rewrite.quantize_pair(result, scale, zero_point, np.uint8))


def _become(node: onnx.NodeProto, op: str, source: str) -> None:
    """Make `node` an `op` of `source`, without attributes."""
    node.op_type = op
    del node.attribute[:], node.input[:]
    node.input.append(source)
