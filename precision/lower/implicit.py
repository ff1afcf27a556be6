"""The `implicit` lowering: what TensorRT 10 asks of a calibration cache.

Under implicit quantization there are no pairs in the graph. A layer runs in INT8 where every tensor
that it reads and writes has a scale, so the cache needs far more than the tensors that carry a
pair: without one TensorRT says `MISSING_SCALE` and takes a float kernel. Which models the explicit
runtimes get does not change: these scales stand in the cache alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from trtune.precision.graph.operators import SHAPE_SLOTS
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import is_move
from trtune.precision.plan.plan import PrecisionPlan

MISSING_SCALE = (
    "Missing scale and zero-point for tensor {tensor}, expect fall back to non-int8 implementation "
    "for any layer consuming or producing given tensor"
)
"""TensorRT's words."""
CONSTANT_SUFFIX = "_output"
"""TensorRT 10 calls the tensor of a constant layer by the initializer's name and this."""
INSIDE_LAYER: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "InstanceNormalization", "Clip"), (1, 2)),
    "BatchNormalization": (1, 2, 3, 4),
}
"""Inputs that become weights of the layer itself: no tensor of the network, so no scale."""
FLOATS = ("float32",)


def implicit_tensors(view: GraphView, plan: PrecisionPlan) -> list[str]:
    """Every tensor of `view` that TensorRT wants a scale for if `plan` has int8, in graph order.

    That is all float32 tensors that are no constants and belong to no shape computation: inputs
    and outputs of every layer, whatever the plan says of it.
    """
    if not plan.int8_nodes:
        return []
    found = [name for name in view.graph_inputs if _is_float(view, name) and _is_read(view, name)]
    for node in view.nodes:
        if node.name not in view.shape_nodes:
            found += [t for t in node.output if t and _is_float(view, t) and _is_used(view, t)]
    return [tensor for tensor in found if not view.is_constant(tensor)]


def _is_float(view: GraphView, tensor: str) -> bool:
    return view.dtypes.get(tensor, "float32") in FLOATS


def _is_read(view: GraphView, tensor: str) -> bool:
    """Whether a layer reads its values; not only where and how large."""
    for name, index in view.consumers.get(tensor, ()):
        node = view.by_name[name]
        if name not in view.shape_nodes and index not in SHAPE_SLOTS.get(node.op_type, ()):
            return True
    return False


def _is_used(view: GraphView, tensor: str) -> bool:
    return tensor in view.graph_outputs or bool(view.consumers.get(tensor))


def constant_scales(view: GraphView, plan: PrecisionPlan) -> dict[str, float]:
    """Cache entries for the float constants that are layers of their own in TensorRT 10.

    `<initializer>_output` -> max|values| / 127, for those that some layer computes with; weights
    and biases of convolutions stand in their layer and need none.
    """
    if not plan.int8_nodes:
        return {}
    found: dict[str, float] = {}
    for node in view.nodes:
        if node.name in view.shape_nodes:
            continue
        inside = (*INSIDE_LAYER.get(node.op_type, ()), *SHAPE_SLOTS.get(node.op_type, ()))
        for index, tensor in enumerate(node.input):
            name = f"{tensor}{CONSTANT_SUFFIX}"
            if not tensor or index in inside or name in found or not view.is_constant(tensor):
                continue
            if view.dtypes.get(tensor) in FLOATS and name not in view.producer:
                values = view.constant(tensor)
                largest = float(np.max(np.abs(values))) if values.size else 0.0
                if np.isfinite(largest):
                    found[name] = float(np.float32(largest) / np.float32(127))
    return found


def lacking(
    view: GraphView, node: onnx.NodeProto, scales: Mapping[str, float], plan: PrecisionPlan
) -> str:
    """The first tensor for want of whose scale TensorRT computes `node` in float; empty if none.

    Of constants no scale is asked for here. What the node writes may be that of what is fused
    behind it: the activation, the Add. A scale of zero counts as none.
    """
    read = [name for name in node.input if name and not view.is_constant(name)]
    floats = [name for name in read if _is_float(view, name)]
    for tensor in floats:
        if not scales.get(tensor, 0) > 0:
            return str(tensor)
    behind = [view.by_name[name] for name in plan.groups.get(node.name, ())] or _behind(view, node)
    made = [t for maker in (node, *behind) for t in maker.output if t]
    if made and not any(scales.get(tensor, 0) > 0 for tensor in made):
        return str(made[0])
    return ""


def _behind(view: GraphView, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    readers = view.consumers.get(node.output[0], ())
    return [view.by_name[readers[0][0]]] if len(readers) == 1 else []


def left_in_float(
    view: GraphView, plan: PrecisionPlan, scales: Mapping[str, float]
) -> dict[str, str]:
    """Nodes that `plan` wants in int8 and TensorRT 10 leaves in float -> the tensor without a
    scale that is the reason, in graph order."""
    found = {name: lacking(view, view.by_name[name], scales, plan) for name in plan.int8_nodes}
    return {name: tensor for name, tensor in found.items() if tensor}


def with_moves(
    view: GraphView, scales: Mapping[str, float], *, through_concat: bool = True
) -> dict[str, float]:
    """`scales`, and those of tensors that moving operators connect with one: the same.

    As in TensorRT's own caches, MaxPool, Reshape, Transpose and nearest Resize share one scale.
    The inputs of a Concat keep their own there: they get the output's only when it builds.
    """
    found = dict(scales)
    for nodes, forward in ((view.nodes, True), (tuple(reversed(view.nodes)), False)):
        for node in nodes:
            ends = [name for k, name in enumerate(node.input) if is_move(node, k)]
            if not ends or (node.op_type == "Concat" and not through_concat):
                continue
            source, target = (ends, list(node.output)) if forward else (list(node.output), ends)
            known = [found[name] for name in source if name in found]
            if known and len(known) == len(source):
                for name in target:
                    if name and not view.is_constant(name):
                        found.setdefault(name, max(known))
    return found


def _is_read_once(view: GraphView, tensor: str) -> bool:
    once = len(view.consumers.get(tensor, ())) == 1 and tensor not in view.graph_outputs
    return once and not view.is_constant(tensor)


CLAMPS = ("Relu", "Clip")


def with_clamped(view: GraphView, scales: Mapping[str, float]) -> dict[str, float]:
    """`scales`, those of `with_moves`, and of what only a Relu or Clip reads: its output's.

    The inputs of a Concat keep their own. Nothing is lost by a clamp: what that scale cannot hold,
    the operator or the output's scale cuts off. TensorRT fuses the two and asks the output's alone.
    """
    found = dict(scales)
    while True:
        before = len(found)
        for node in reversed(view.nodes):
            made, read = node.output[0], node.input[0]
            if node.op_type in CLAMPS and made in found and _is_read_once(view, read):
                found.setdefault(read, found[made])
        found = with_moves(view, found, through_concat=False)
        if len(found) == before:
            return found


def in_cache_order(view: GraphView, scales: Mapping[str, float]) -> dict[str, float]:
    """`scales` in graph order, those that are no tensor of the graph behind."""
    order: Iterable[str] = (*view.graph_inputs, *view.producer, *scales)
    return {tensor: scales[tensor] for tensor in dict.fromkeys(order) if tensor in scales}
