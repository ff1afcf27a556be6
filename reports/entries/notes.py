"""The notes of a report: what became of nodes and weights, and why a target was missed."""

from __future__ import annotations

from trtune.configs.schema import Target
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_rules import flushed_weights
from trtune.precision.plan.plan import QUANTIZED, PrecisionPlan
from trtune.precision.tune.walk import Tuned
from trtune.reports.summary import metric_label, metric_text, plural


def flushed(view: GraphView, plan: PrecisionPlan) -> list[str]:
    """What becomes of small weights in half precision, in words."""
    found = flushed_weights(view, plan) if plan.halves else {}
    zeroed = sum(flushed.zeroed for flushed in found.values())
    total = sum(flushed.total for flushed in found.values())
    if not zeroed:
        return []
    worst = max(found, key=lambda name: found[name].zeroed)
    return [
        f"{zeroed} of {total} weights are too small for half precision and become 0, most of them "
        f"in {worst}"
    ]


def float_notes(plan: PrecisionPlan) -> list[str]:
    """The nodes that were to be quantized, are not, and that nobody pinned; with the reasons."""
    if plan.default not in QUANTIZED:
        return []
    found = {name: plan.nodes[name] for name in plan.compute_nodes}
    return [
        f"{name} stays {assignment.precision}: {assignment.reason}"
        for name, assignment in found.items()
        if assignment.precision not in QUANTIZED and not assignment.is_pinned
    ]


def missed_notes(
    target: Target | None,
    tuned: Tuned,
    nothing: str,
    *,
    quantized: bool,
    limit: int,
    fp32: float | None,
    compared: bool = True,
) -> list[str]:
    """Why a missed target could not be met, or counts as missed though its value was reached.

    `nothing` says that nothing runs in int8, if so; `quantized` whether anything was to. `limit` is
    how many pins were allowed, `fp32` the FP32 model's own value of the metric, if it has one, and
    `compared` whether any output could be compared with FP32's, where that is what is measured.
    """
    notes = [nothing] if nothing else []
    if nothing and quantized and target is not None and tuned.met:
        return [
            "the target is reached only with every node in float, which is the model that was "
            f"given, so it counts as missed: {nothing}"
        ]
    if target is None or tuned.met:
        return notes
    if not compared:
        notes.append(
            "nothing was compared: for no sample has an output the shape that FP32 gives it. Where "
            "samples lie along another axis of an input, data.calibration.axis: {INPUT: N} says so"
        )
    if not nothing and not quantized:
        notes.append("the target cannot be met by tuning: no node is quantized")
    if tuned.needed is not None:
        notes.append(
            f"about {plural(tuned.needed, 'pin')} would meet the target, as far as held-out "
            f"pictures can tell; precision.max_pins is {limit}"
        )
    if target.min is not None and fp32 is not None and fp32 < target.min:
        label, least = metric_label(target.metric), metric_text(target.metric, target.min)
        notes.append(
            f"the FP32 model itself misses the target: its {label} is "
            f"{metric_text(target.metric, fp32)}, and {least} is asked for"
        )
    return notes
