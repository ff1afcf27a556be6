"""What the pins of a plan cost, in speed."""

from __future__ import annotations

from trtune.precision.graph.macs import macs
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import ELEMENTWISE_OPS, PrecisionPlan
from trtune.reports.record import PinCost

SPEED_COSTS = {
    "fp8": "none: it multiplies as fast as INT8",
    "int8": "none",
    "fp16": "multiplies at half the rate of INT8",
    "bf16": "multiplies at half the rate of INT8",
    "fp32": "multiplies without INT8's tensor cores",
}
MOVE_COSTS = {
    "fp8": "none",
    "int8": "none",
    "fp16": "moves twice the bytes of INT8",
    "bf16": "moves twice the bytes of INT8",
    "fp32": "moves four times the bytes of INT8",
}
"""Of nodes that multiply no matrices: sums and products of elements that a file quantizes."""


def pin_costs(view: GraphView, plan: PrecisionPlan) -> list[PinCost]:
    """The nodes with a precision of their own that the user or the tuner pinned, in graph order,
    and what that costs."""
    total = sum(macs(view, name) for name in plan.compute_nodes) or 1
    moves = {n.name for n in view.nodes if n.op_type in ELEMENTWISE_OPS}
    return [
        PinCost(
            node=name,
            precision=plan.precision(name),
            origin=plan.nodes[name].origin,
            part=round(macs(view, name) / total, 6),
            cost=(MOVE_COSTS if name in moves else SPEED_COSTS)[plan.precision(name)],
        )
        for name in plan.pinned
    ]
