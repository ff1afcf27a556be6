"""What the graph proves of the least value of a tensor: how its codes are laid out."""

from __future__ import annotations

import math

import onnx

from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import is_move

SILU_LOWEST = -0.27846455
"""The least value of x * sigmoid(x), at x = -1.2785."""
KEEPS_LOWEST = frozenset(
    (
        *("MaxPool", "GlobalAveragePool", "AveragePool", "ReduceMean", "ReduceMax", "Concat"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Split"),
    )
)
NEVER_NEGATIVE = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp", "ReduceL2"}
)


def lowest(view: GraphView, tensor: str, known: dict[str, float] | None = None) -> float:
    """A value that the graph proves `tensor` not to go below; 0 at most, -inf if nothing does.

    `known` keeps what was found out on the way, for further calls on the same view.
    """
    known = {} if known is None else known
    waiting = [tensor]
    while waiting:
        current = waiting[-1]
        bound, sources = _bounded_by(view, current)
        missing = [name for name in sources if name not in known]
        waiting.extend(missing)
        if not missing:
            name = view.producer.get(current, "")
            add = bool(name) and view.by_name[name].op_type == "Add"
            bounds = [known[source] for source in sources]
            if bounds:
                bound = sum(bounds) if add else min(bounds)
            known[waiting.pop()] = bound
    return known[tensor]


def never_negative(view: GraphView, tensor: str, known: dict[str, float] | None = None) -> bool:
    """Whether the graph proves that `tensor` holds no negative value; `known` as in `lowest`."""
    return lowest(view, tensor, known) >= 0


def _bounded_by(view: GraphView, tensor: str) -> tuple[float, list[str]]:
    """The bound of `tensor` itself, or the tensors whose bounds decide it."""
    name = view.producer.get(tensor)
    if name is None:
        constant = view.is_constant(tensor) and bool((view.constant(tensor) >= 0).all())
        return (0.0 if constant else -math.inf), []
    node = view.by_name[name]
    if node.op_type in NEVER_NEGATIVE:
        return 0.0, []
    if node.op_type == "Clip":
        low = node.input[1] if len(node.input) > 1 else ""
        least = float(view.constant(low).item()) if low and view.is_constant(low) else -1.0
        return (0.0 if least >= 0 else -math.inf), []
    if is_silu(view, node):
        return SILU_LOWEST, []
    if node.op_type in ("Concat", "Add"):
        return -math.inf, list(node.input)
    moved = is_move(node, 0) and node.op_type in ("Resize", "Upsample")
    return -math.inf, [node.input[0]] if moved or node.op_type in KEEPS_LOWEST else []


def is_silu(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether `node` is the Mul of x * sigmoid(x)."""
    if node.op_type != "Mul" or len(node.input) != 2:
        return False
    for index, name in enumerate(node.input):
        maker = view.by_name.get(view.producer.get(name, ""))
        if maker is not None and maker.op_type == "Sigmoid":
            return bool(maker.input[0] == node.input[1 - index])
    return False
