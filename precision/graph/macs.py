"""How much a node computes, and with how many values of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx

from trtune.precision.graph.operators import SHAPE_SLOTS
from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import INDEX_DTYPES, GraphView, elements

NOT_PARAMETERS = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    *("Clip", "Pad", "Constant"),
}


def macs(view: GraphView, name: str) -> int:
    """Multiply-accumulates of a Conv, ConvTranspose, Gemm or MatMul for one sample; else 0.

    Dimensions that are not known count as 1; a fixed batch is divided out.
    """
    node = view.by_name[name]
    count = MACS[node.op_type](view, node) if node.op_type in MACS else 0
    batch = _fixed_batch(view)
    leading = view.shapes.get(node.output[0], ())[:1]
    whole = bool(leading) and isinstance(leading[0], int) and leading[0] % batch == 0
    return count // batch if whole else count


def _fixed_batch(view: GraphView) -> int:
    first = view.shapes.get(view.graph_inputs[0], ())[:1] if view.graph_inputs else ()
    return first[0] if first and isinstance(first[0], int) and first[0] > 0 else 1


def widest_step(view: GraphView) -> int | None:
    """The most values of data that a node reads and makes together, for one sample.

    None if that depends on the data: if more than the first dimension of a tensor is free.
    """
    batch, widest = _fixed_batch(view), 0
    for node in view.nodes:
        values = 0
        for tensor in dict.fromkeys((*view.reads(node.name), *(t for t in node.output if t))):
            if view.is_constant(tensor):
                continue
            shape = view.shapes.get(tensor)
            if shape is None or not all(isinstance(dim, int) for dim in shape[1:]):
                return None
            values += elements(shape)
        widest = max(widest, -(-values // batch))
    return widest


def parameters(view: GraphView, name: str) -> int:
    """Number of constant float or quantized values that the node computes with.

    Weights shared by several nodes count in each of them.
    """
    return sum(elements(view.shapes.get(t, ())) for t in parameter_tensors(view, name))


def parameter_tensors(view: GraphView, name: str) -> tuple[str, ...]:
    """The node's constant inputs that are data: weights, biases, tables; no shape or scale."""
    node = view.by_name[name]
    if node.op_type in NOT_PARAMETERS or name in view.shape_nodes:
        return ()
    slots = SHAPE_SLOTS.get(node.op_type, ())
    return tuple(
        tensor
        for k, tensor in enumerate(node.input)
        if tensor
        and k not in slots
        and view.is_constant(tensor)
        and view.dtypes.get(tensor) not in INDEX_DTYPES
    )


def _conv(view: GraphView, node: onnx.NodeProto) -> int:
    weight = view.shapes.get(node.input[1], ())
    return elements(view.shapes.get(node.output[0], ())) * elements(weight[1:])


def _conv_transpose(view: GraphView, node: onnx.NodeProto) -> int:
    weight = view.shapes.get(node.input[1], ())
    return elements(view.shapes.get(node.input[0], ())) * elements(weight[1:])


def _gemm(view: GraphView, node: onnx.NodeProto) -> int:
    weight = view.shapes.get(node.input[1], ())
    rows = view.shapes.get(node.input[0], ())
    m = rows[1 if attribute(node, "transA", 0) else 0 :][:1]
    return elements(m) * elements(weight)


def _matmul(view: GraphView, node: onnx.NodeProto) -> int:
    left, right = (view.shapes.get(t, ()) for t in node.input)
    inner = left[-1:] if left and isinstance(left[-1], int) else right[-2:][:1]
    return elements(view.shapes.get(node.output[0], ())) * elements(inner)


MACS: Mapping[str, Callable[[GraphView, onnx.NodeProto], int]] = MappingProxyType(
    {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
)
