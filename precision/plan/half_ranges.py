"""How large every tensor gets: what has to be measured for that, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import onnx

from trtune.calibrate.histogram import Histogram
from trtune.precision.graph.operators import MOVES
from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView, elements

Range: TypeAlias = "Histogram | float"
"""A histogram of |x|, or the largest |x| alone."""

WITHIN_ONE = {"Sigmoid", "HardSigmoid", "Tanh", "Softmax", "Erf", "Sin", "Cos", "Softsign"}
NEVER_LARGER = {
    *("Relu", "HardSwish", "Gelu", "Mish", "Neg", "Abs", "Slice", "Split", "Gather", "GatherND"),
    *("GatherElements", "ReduceMax", "ReduceMin", "GlobalMaxPool", "TopK", "Trilu", "Compress"),
}
"""Operators none of whose results exceeds the largest magnitude of their first input."""
ONE_OF = {"Concat", "Max", "Min", "Where"}

Known: TypeAlias = "dict[str, float]"


def tensors_for_ranges(view: GraphView) -> tuple[str, ...]:
    """The float32 tensors whose largest magnitude has to be measured, in graph order.

    That of the others follows: behind operators that move values, activations that never enlarge
    them, and those that end at 1.
    """
    measured: list[str] = []

    def measure(tensor: str) -> float:
        measured.append(tensor)
        return math.inf

    _walk(view, {}, measure)
    return tuple(measured)


def bounds(view: GraphView, ranges: Mapping[str, Range]) -> dict[str, float]:
    """Tensor -> largest magnitude, or a bound above it that follows from measured ones.

    Tensors of which nothing is known are missing.
    """
    given = {
        tensor: found.maximum if isinstance(found, Histogram) else float(found)
        for tensor, found in ranges.items()
    }
    return _walk(view, given, lambda tensor: None)


def _walk(view: GraphView, given: Mapping[str, float], ask: Callable[[str], float | None]) -> Known:
    """Bounds of all float32 tensors: `given`, or what follows, or what `ask` says."""
    known: Known = {}
    for tensor in view.graph_inputs:
        if view.dtypes.get(tensor) == "float32":
            _note(known, tensor, given[tensor] if tensor in given else ask(tensor))
    for node in view.nodes:
        if node.name in view.shape_nodes:
            continue
        derived = _derived(view, node, known)
        for tensor in node.output:
            if view.is_constant(tensor):
                _constant(view, tensor, known)
            elif view.dtypes.get(tensor) == "float32":
                found = given.get(tensor, derived)
                _note(known, tensor, ask(tensor) if found is None else found)
    return known


def _note(known: Known, tensor: str, found: float | None) -> None:
    if found is not None:
        known[tensor] = found


def _constant(view: GraphView, tensor: str, known: Known) -> float | None:
    """The largest magnitude of a float32 constant."""
    if tensor not in known and view.dtypes.get(tensor) == "float32" and view.is_constant(tensor):
        values = np.abs(view.constant(tensor))
        known[tensor] = float(values[np.isfinite(values)].max(initial=0))
    return known.get(tensor)


def _derived(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    """The largest magnitude that the outputs of `node` can have, if its inputs tell."""
    op = node.op_type
    if op in WITHIN_ONE:
        return 1.0
    if op in DERIVATIONS:
        return DERIVATIONS[op](view, node, known)
    if op in ONE_OF:
        return _one_of(view, node, known)
    if op in NEVER_LARGER or op in MOVES:
        return _constant(view, node.input[0], known)
    return None


def _one_of(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    data = list(node.input)[1 if node.op_type == "Where" else 0 :]
    found = [_constant(view, tensor, known) for tensor in data]
    return max((v for v in found if v is not None), default=None) if None not in found else None


def _leaky(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    slope = abs(float(attribute(node, "alpha", 0.01)))
    return _constant(view, node.input[0], known) if slope <= 1 else None


def _clip(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    source = _constant(view, node.input[0], known)
    low, high = -math.inf, math.inf
    for index, tensor in enumerate(node.input[1:3]):
        if tensor and not view.is_constant(tensor):
            return None
        if tensor:
            value = float(view.constant(tensor).item())
            low, high = (value, high) if index == 0 else (low, value)
    largest = max(abs(low), abs(high))
    if low <= 0 <= high and source is not None:
        return min(largest, source)
    return largest if math.isfinite(largest) else None


def _product(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    """A product with a scalar constant, or with what never exceeds 1, such as x * sigmoid(x)."""
    left, right = (_constant(view, tensor, known) for tensor in node.input)
    if left is None or right is None:
        return None
    scalar = any(t in view.initializers and elements(view.shapes[t]) == 1 for t in node.input)
    if not scalar and min(left, right) > 1:
        return None
    return 0.0 if 0.0 in (left, right) else left * right


def _resize(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    cubic = attribute(node, "mode", b"nearest") == b"cubic"  # which overshoots
    return None if cubic else _constant(view, node.input[0], known)


def _cast(view: GraphView, node: onnx.NodeProto, known: Known) -> float | None:
    return known.get(node.input[0])


DERIVATIONS: Mapping[str, Callable[[GraphView, onnx.NodeProto, Known], float | None]] = (
    MappingProxyType(
        {
            "Cast": _cast,
            "Clip": _clip,
            "LeakyRelu": _leaky,
            "Mul": _product,
            "Resize": _resize,
            "Upsample": _resize,
        }
    )
)
