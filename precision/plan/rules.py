"""The plan before anything was measured: what can be quantized, what each type allows, pins."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from trtune.precision.graph.proto import attribute, default_opset
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.fusion import fusion_groups
from trtune.precision.plan.half_types import HALVES, QDQ, half_slots
from trtune.precision.plan.pins import with_pins
from trtune.precision.plan.plan import (
    COMPUTE_OPS,
    DEFAULT,
    FOLLOWS,
    QUANTIZED,
    SHAPE,
    Assignment,
    PrecisionPlan,
)


def make_plan(
    view: GraphView,
    *,
    default: str = "int8",
    fallback: str = "fp32",
    pins: Mapping[str, str] | None = None,
) -> PrecisionPlan:
    """The plan before tuning: every node that can be quantized is, but for the user's pins.

    `pins` maps a node name, `op:TYPE` or `re:EXPRESSION` (matched against the whole node name) to
    a precision; of several that match a node the last one counts. A pin holds for the whole group
    of the node. Pinned to anything but fp32, a node that cannot run in it stays what it was, and
    the log says so. `fallback` is for what an int8 or fp8 plan does not quantize; in a plan of
    another default the nodes without weights run in that default too. What ONNX does not define in
    a half type stays fp32. Raises ConfigError for a pin that matches nothing.
    """
    nodes = {node.name: _assignment(view, node, default, fallback) for node in view.nodes}
    plan = PrecisionPlan(default, fallback, nodes, fusion_groups(view), refusals(view))
    return with_pins(view, plan, pins or {})


def refusals(view: GraphView) -> dict[str, dict[str, str]]:
    """Precision -> node -> why it cannot run in it, as far as types and operators tell."""
    found: dict[str, dict[str, str]] = {name: {} for name in (*QUANTIZED, *HALVES)}
    for node in view.nodes:
        if node.name in view.shape_nodes:
            continue
        reasons = {name: half_refusal(view, node, name) for name in HALVES}
        if node.op_type in COMPUTE_OPS:
            reasons |= dict.fromkeys(QUANTIZED, refusal_of(view, node))
        for precision, reason in reasons.items():
            if reason:
                found[precision][node.name] = reason
    return found


def _assignment(view: GraphView, node: onnx.NodeProto, default: str, fallback: str) -> Assignment:
    if node.name in view.shape_nodes:
        return Assignment("fp32", "shape computation", SHAPE)
    floats = fallback if default in QUANTIZED else default
    against = half_refusal(view, node, floats)
    if node.op_type not in COMPUTE_OPS:
        wanted = Assignment(floats, "follows its neighbours", FOLLOWS, origin=DEFAULT)
        if not against:
            return wanted
        if not any(view.dtypes.get(t, "float32") == "float32" for t in node.output if t):
            return Assignment("fp32", against, FOLLOWS, origin=DEFAULT)  # nothing to hold it to
        return Assignment("fp32", against, FOLLOWS)
    if default not in QUANTIZED:
        if against:
            return Assignment("fp32", against)
        return Assignment(default, "default", origin=DEFAULT)
    refusal = refusal_of(view, node)
    if not refusal:
        return Assignment(default, "default", around="fp32" if against else "", origin=DEFAULT)
    return Assignment("fp32", f"{refusal}; {against}") if against else Assignment(floats, refusal)


def half_refusal(view: GraphView, node: onnx.NodeProto, precision: str) -> str:
    """Why `node` cannot run in fp16 or bf16 by its types; empty if it can, or for another type."""
    if precision not in HALVES or node.op_type in QDQ:  # Q/DQ take what they stand between
        return ""
    opset = default_opset(view.proto)
    assert opset is not None
    return half_slots(node, view.dtypes, opset, HALVES[precision]).refusal


def refusal_of(view: GraphView, node: onnx.NodeProto) -> str:
    """Why a Conv, ConvTranspose, Gemm or MatMul cannot be quantized; empty if it can."""
    data, weight = node.input[0], node.input[1]
    if view.is_constant(data):
        return "its data input is a constant"
    if view.dtypes.get(data, "float32") != "float32":
        return f"its data input is {view.dtypes[data]}"
    if not view.is_constant(weight):
        return "its weights are computed at run time (attention pattern)"
    if weight not in view.initializers:
        return "its weights are the result of other nodes"
    rank = len(view.initializers[weight].dims)
    if node.op_type == "MatMul" and rank != 2:
        return f"its weights have {rank} dimension{'s' if rank != 1 else ''}"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its data input is transposed (transA)"
    if not view.is_finite(weight):
        return "its weights have NaN or infinite values"
    return ""


def weight_axis(node: onnx.NodeProto) -> int:
    """The output-channel axis of a compute node's weights."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if node.op_type == "MatMul" else 0
