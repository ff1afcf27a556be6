"""Taking x' = x c - z into what makes x: convolutions, products, normalisations, and through what
lies between (ReLU, Clip, pooling, concat, additions)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.precision.graph.proto import attribute
from trtune.precision.prepare.draft import Draft

Steps = list[Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Scalar:
    """Factors along `axis` (1 or -1), float64, and one number that is taken off behind them."""

    scale: NDArray[np.float64]
    shift: float
    axis: int

    @property
    def scales(self) -> bool:
        """Whether any factor is not 1."""
        return bool(np.any(self.scale != 1))


def absorbed(draft: Draft, tensor: str, by: Scalar) -> Steps | None:
    """The edits that make `tensor` itself times `by.scale` less `by.shift`; None if there are none.

    All readers of `tensor` have to expect that. Nothing is changed before the edits are called.
    """
    node = draft.producer(tensor)
    if node is None:
        return None
    take = TAKERS.get(node.op_type)
    return None if take is None else take(draft, node, by)


def _input(draft: Draft, node: onnx.NodeProto, index: int, by: Scalar) -> Steps | None:
    """The edits for an input of `node`, if nothing else reads it."""
    tensor = node.input[index]
    if draft.is_output(tensor) or draft.consumers(tensor) != [(node.name, index)]:
        return None
    return absorbed(draft, tensor, by)


def _conv(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    if by.axis != 1 or not draft.is_constant(node.input[1]):
        return None
    weights = draft.constant(node.input[1]).astype(np.float64)
    outputs = weights.shape[0]
    if outputs != by.scale.size:
        return None
    shape = [-1, *([1] * (weights.ndim - 1))]
    return _weights_and_bias(draft, node, weights * by.scale.reshape(shape), by)


def _gemm(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    if not plain or not draft.is_constant(node.input[1]):
        return None
    weights = draft.constant(node.input[1]).astype(np.float64)
    turned = bool(attribute(node, "transB", 0))
    if weights.shape[0 if turned else 1] != by.scale.size:
        return None
    factor = by.scale[:, None] if turned else by.scale[None, :]
    return _weights_and_bias(draft, node, weights * factor, by)


def _weights_and_bias(
    draft: Draft, node: onnx.NodeProto, weights: NDArray[np.float64], by: Scalar
) -> Steps | None:
    held = node.input[2] if len(node.input) > 2 else ""
    if held and not draft.is_constant(held):
        return None
    steps: Steps = []
    if by.scales:
        steps.append(lambda: draft.set_constant((node.name, 1), weights))
    if held or by.shift:
        bias = draft.constant(held).astype(np.float64) if held else np.zeros(by.scale.size)
        if bias.shape[-1:] not in ((by.scale.size,), (1,)):
            return None
        value = bias * by.scale - by.shift
        steps.append(lambda: draft.set_constant((node.name, 2), value))
    return steps


def _matmul(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    if by.axis != -1 or by.shift or not draft.is_constant(node.input[1]):
        return None
    weights = draft.constant(node.input[1]).astype(np.float64)
    if weights.ndim != 2 or weights.shape[1] != by.scale.size:
        return None
    return [lambda: draft.set_constant((node.name, 1), weights * by.scale)]


def _layer_norm(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    if by.axis != -1 or attribute(node, "axis", -1) != -1 or len(node.output) > 1:
        return None
    if not draft.is_constant(node.input[1]):
        return None
    gamma = draft.constant(node.input[1]).astype(np.float64)
    if gamma.shape != by.scale.shape:
        return None
    held = node.input[2] if len(node.input) > 2 else ""
    if held and not draft.is_constant(held):
        return None
    beta = draft.constant(held).astype(np.float64) if held else np.zeros_like(gamma)
    steps: Steps = [lambda: draft.set_constant((node.name, 1), gamma * by.scale)]
    if held or by.shift:
        steps.append(lambda: draft.set_constant((node.name, 2), beta * by.scale - by.shift))
    return steps


def _relu(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    steps = _input(draft, node, 0, by)
    if steps is None or (by.shift and draft.opset < 11):
        return None
    if by.shift:
        steps.append(lambda: draft.to_clip(node.name, -by.shift, None))
    return steps


def _clip(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    if by.scales or draft.opset < 11:
        return None
    bounds = []
    for index in (1, 2):
        name = node.input[index] if len(node.input) > index else ""
        if name and not draft.is_constant(name):
            return None
        bounds.append(float(draft.constant(name)) if name else None)
    steps = _input(draft, node, 0, by)
    if steps is None:
        return None
    low, high = (None if bound is None else bound - by.shift for bound in bounds)
    steps.append(lambda: draft.to_clip(node.name, low, high))
    return steps


def _pool(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    if by.axis != 1 or len(node.output) > 1:
        return None
    if by.shift and node.op_type == "AveragePool" and any(attribute(node, "pads", [0])):
        return None
    return _input(draft, node, 0, by)


def _same(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    return _input(draft, node, 0, by) if len(node.output) == 1 else None


def _concat(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    if by.axis != 1 or attribute(node, "axis", 0) != 1:
        return None
    sizes = []
    for name in node.input:
        shape = draft.view.shapes.get(name, ())
        if len(shape) < 2 or not isinstance(shape[1], int):
            return None
        sizes.append(shape[1])
    if sum(sizes) != by.scale.size or len(set(node.input)) != len(node.input):
        return None
    steps: Steps = []
    parts = np.split(by.scale, np.cumsum(sizes)[:-1])
    for index, part in enumerate(parts):
        found = _input(draft, node, index, replace(by, scale=part))
        if found is None:
            return None
        steps += found
    return steps


def _add(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    constant = [k for k in (0, 1) if draft.is_constant(node.input[k])]
    if len(constant) == 1:
        value = _per_channel(draft, node, constant[0], by)
        steps = _input(draft, node, 1 - constant[0], replace(by, shift=0.0))
        if steps is None or value is None:
            return None
        changed = _shaped(draft, node, value * by.scale - by.shift, by)
        return [*steps, lambda: draft.set_constant((node.name, constant[0]), changed)]
    if constant or node.input[0] == node.input[1]:
        return None
    if draft.view.shapes.get(node.input[0]) != draft.view.shapes.get(node.input[1]):
        return None
    first = _input(draft, node, 0, by)
    second = None if first is None else _input(draft, node, 1, replace(by, shift=0.0))
    return None if first is None or second is None else [*first, *second]


def _mul(draft: Draft, node: onnx.NodeProto, by: Scalar) -> Steps | None:
    """A product with a constant takes factors into that; there is nothing to take a shift."""
    constant = [k for k in (0, 1) if draft.is_constant(node.input[k])]
    if by.shift or len(constant) != 1:
        return None
    value = _per_channel(draft, node, constant[0], by)
    if value is None:
        return None
    changed = _shaped(draft, node, value * by.scale, by)
    return [lambda: draft.set_constant((node.name, constant[0]), changed)]


def _per_channel(
    draft: Draft, node: onnx.NodeProto, index: int, by: Scalar
) -> NDArray[np.float64] | None:
    """A constant input as one number a channel, or one for all; None if it is neither."""
    value = draft.constant(node.input[index]).astype(np.float64)
    shape = draft.view.shapes.get(node.output[0])
    if shape is None or value.ndim > len(shape):
        return None
    if value.size == 1:
        return value.reshape(1)
    place = value.ndim - 1 if by.axis == -1 else 1 - (len(shape) - value.ndim)
    if value.size != by.scale.size or place < 0 or value.shape[place] != value.size:
        return None
    return value.reshape(-1)


def _shaped(
    draft: Draft, node: onnx.NodeProto, value: NDArray[np.float64], by: Scalar
) -> NDArray[np.float64]:
    """One number a channel in the shape that stands at its axis."""
    rank = len(draft.view.shapes[node.output[0]])
    return value.reshape([-1, *([1] * (rank - 2))] if by.axis == 1 else [-1])


Taker = Callable[[Draft, onnx.NodeProto, Scalar], "Steps | None"]
TAKERS: dict[str, Taker] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "LayerNormalization": _layer_norm,
    "Relu": _relu,
    "Clip": _clip,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _pool,
    "Identity": _same,
    "Dropout": _same,
    "Concat": _concat,
    "Add": _add,
    "Mul": _mul,
}
