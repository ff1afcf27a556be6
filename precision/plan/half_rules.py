"""Which nodes of a half-precision plan stay FP32, and why: by measured range and by what they do.

- Range: a tensor beyond half of the type's largest value keeps everything that touches it in FP32
  (`HEADROOM`: the calibration pictures are not all pictures). So does one that never reaches the
  smallest normal number.
- Precision: rounding to a half is relative, so a large activation is no worse than a small one,
  until something takes its absolute value: exp, softmax and rounding see steps of 0.5 from 512 on
  in float16 (64 in bfloat16), and a difference of large numbers that is itself small has lost its
  digits (`SPARE_BITS`). Only what leads to those stays FP32.
- Sums: an average or sum over more than `LONG_SUM` values, a product over more than `LONG_PRODUCT`.
- Normalisation and softmax written as elementary nodes, and the normalisation operators whose
  definition does not put their statistics into float32.
- Constants beyond the range, or a scalar (the epsilon of a division) that would become zero.

A quantized node gives its result in FP32 where the range demands it (`Assignment.around`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from trtune.configs.errors import ModelError
from trtune.precision.graph.proto import default_opset
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_ranges import Range, bounds, tensors_for_ranges
from trtune.precision.plan.half_types import HALF_WORDS, HALVES, QDQ, Half, to_half
from trtune.precision.plan.patterns import (
    OWN_STATISTICS,
    SUMS,
    float32_statistics,
    internals,
    summands,
)
from trtune.precision.plan.plan import (
    COMPUTE,
    FOLLOWS,
    QUANTIZED,
    RANGE,
    SHAPE,
    Assignment,
    PrecisionPlan,
)

__all__ = [
    "Flushed",
    "flushed_weights",
    "keep_fp32",
    "refuse_half_model",
    "tensors_for_ranges",
]

log = logging.getLogger(__name__)

HEADROOM = 2
SPARE_BITS = 5
"""Bits that a difference must keep: one whose result is 64 times smaller than its terms has lost 6
of the 11 of a float16."""
LONG_SUM = 1024
"""A half sum of equal terms stops growing at 2048 of them; at half of that an eighth is lost."""
LONG_PRODUCT = 1 << 15
"""A running half sum of K random terms is off by about sqrt(K) / 4096 of itself: 4 % here. Tensor
cores sum in float32, so shorter ones, which are all that is common, need no care."""

ABSOLUTE = {
    *("Exp", "Softmax", "LogSoftmax", "Sin", "Cos", "Tan", "Floor", "Ceil", "Round", "Mod"),
}
"""Operators to which the absolute error of their input matters."""
DIFFERENCES = {"Add", "Sub"}
PASSES_ERRORS = {
    *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Expand", "Concat"),
    *("Add", "Sub", "Mul", "Div", "Where", "Slice", "Split", "Gather", "Relu", "Clip"),
}
"""Operators behind which an error made before them is still the same part of the value."""
LOG_SUMS = {"ReduceLogSumExp", "ReduceLogSum"}
AVERAGES = {"ReduceMean", "GlobalAveragePool", "AveragePool"}


@dataclass(frozen=True, slots=True)
class Flushed:
    """Weights of a node that a half type does not hold: of `total` values not zero, `zeroed`
    become zero, and `subnormal` others lose digits below the smallest normal number."""

    zeroed: int
    subnormal: int
    total: int


def keep_fp32(view: GraphView, plan: PrecisionPlan, ranges: Mapping[str, Range]) -> PrecisionPlan:
    """`plan` with the nodes in FP32 that would overflow or lose their precision in half.

    `ranges` maps tensors (those of `tensors_for_ranges`) to histograms of |x|, or to their largest
    magnitude; what it lacks is not judged. Pins stay. What is fused with a node that stays FP32,
    and what stands between such nodes only, does so too. The plan then also refuses these halves
    to nodes that are quantized now (`may`): a tuner that takes them out of that has to ask.

    Raises ModelError if the model is half already, or if nothing is left in half (a warning for a
    plan with quantized nodes, which are worth something without).
    """
    if not plan.halves:
        return plan
    refuse_half_model(view)
    missing = [tensor for tensor in tensors_for_ranges(view) if tensor not in ranges]
    if missing:
        log.warning("%d tensors have no measured range, such as %s", len(missing), missing[0])
    judge = _Judge(view, plan, bounds(view, ranges))
    kept = _with_reasons(plan, judge.reasons())
    kept = _fused_alike(kept)
    kept = _without_lonely(view, kept)
    _require_some(plan, kept)
    for precision in plan.halves:
        forbidden = judge.forbidden(HALVES[precision])
        kept = kept.refusing(precision, forbidden)
        _warn_of_pins(kept, precision, forbidden)
    return kept


def _warn_of_pins(plan: PrecisionPlan, precision: str, forbidden: Mapping[str, str]) -> None:
    """Say which pins of the user's hold against what was measured."""
    for name in plan.pinned:
        if plan.precision(name) == precision and name in forbidden:
            why = forbidden[name]
            log.warning("precision.pin: %s stays %s as you say, although %s", name, precision, why)


def _is_half(plan: PrecisionPlan, name: str) -> bool:
    """Whether the node's floats are half, and not because somebody pinned it."""
    found = plan.nodes[name]
    pinned = found.precision not in QUANTIZED and found.is_pinned
    return found.role != SHAPE and not pinned and plan.float_type(name) in HALVES


def _with_reasons(plan: PrecisionPlan, reasons: Mapping[str, str]) -> PrecisionPlan:
    return replace(
        plan,
        nodes={n: _in_fp32(a, reasons[n]) if n in reasons else a for n, a in plan.nodes.items()},
    )


def _in_fp32(found: Assignment, reason: str) -> Assignment:
    if found.precision in QUANTIZED:
        return replace(found, around="fp32", reason=f"{found.reason}; its result in fp32: {reason}")
    return replace(found, precision="fp32", reason=reason, origin=RANGE)


def _fused_alike(plan: PrecisionPlan) -> PrecisionPlan:
    """What is fused behind a node that stays FP32 does so too."""
    reasons = {
        member: f"fused with {leader!r}, which stays fp32"
        for leader, members in plan.groups.items()
        if plan.nodes[leader].role == COMPUTE and plan.float_type(leader) == "fp32"
        for member in members
        if _is_half(plan, member)
    }
    return _with_reasons(plan, reasons)


def _without_lonely(view: GraphView, plan: PrecisionPlan) -> PrecisionPlan:
    """Half nodes without weights of their own that have only FP32 nodes around them stay FP32."""
    reasons: dict[str, str] = {}
    seen: set[str] = set()
    for name, found in plan.nodes.items():
        if name in seen or found.role != FOLLOWS or not _is_half(plan, name):
            continue
        region, neighbours = _region(view, plan, name)
        seen |= region
        if neighbours and all(plan.float_type(other) == "fp32" for other in neighbours):
            reasons.update(dict.fromkeys(region, "there are only fp32 nodes around it"))
    return _with_reasons(plan, reasons)


def _region(view: GraphView, plan: PrecisionPlan, name: str) -> tuple[set[str], set[str]]:
    """The half nodes without weights around `name`, connected by floats, and what borders them."""
    region, neighbours, waiting = {name}, set[str](), [name]
    while waiting:
        for other in _touching(view, view.by_name[waiting.pop()]):
            if plan.nodes[other].role == SHAPE:
                continue
            if plan.nodes[other].role == FOLLOWS and _is_half(plan, other):
                if other not in region:
                    region.add(other)
                    waiting.append(other)
            else:
                neighbours.add(other)
    return region, neighbours


def _touching(view: GraphView, node: onnx.NodeProto) -> Iterable[str]:
    for tensor in (*node.input, *node.output):
        if tensor and view.dtypes.get(tensor) == "float32":
            if tensor in view.producer:
                yield view.producer[tensor]
            yield from (reader for reader, _ in view.consumers.get(tensor, ()))


def _require_some(plan: PrecisionPlan, kept: PrecisionPlan) -> None:
    if kept.halves:
        return
    reasons = [
        f"{name} ({a.reason})"
        for name, a in kept.nodes.items()
        if a.role != SHAPE and a != plan.nodes[name]
    ]
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    message = (
        f"nothing in this model can run in {' or '.join(plan.halves)}: "
        f"{', '.join(reasons[:3])}{more}"
    )
    if not kept.quantized_nodes:
        raise ModelError(f"{message}; use precision.default fp32, or pin nodes to it yourself")
    log.warning("%s; what is not int8 runs in fp32", message)


class _Judge:
    """Why nodes of `plan` have to stay FP32, given the largest magnitudes of tensors."""

    def __init__(self, view: GraphView, plan: PrecisionPlan, bound: Mapping[str, float]) -> None:
        self._view, self._plan, self._bound = view, plan, bound
        opset = default_opset(view.proto)
        assert opset is not None
        self._opset = opset
        self._internal = internals(view)

    def reasons(self) -> dict[str, str]:
        """Node -> reason, in graph order."""
        found: dict[str, str] = {}
        for node in self._view.nodes:
            if _is_half(self._plan, node.name) and node.op_type not in QDQ:
                half = HALVES[self._plan.float_type(node.name)]
                codes = self._plan.is_quantized(node.name)
                reason = self._of_node(node, half, codes=codes) or self._of_tensors(node, half)
                if reason:
                    found[node.name] = reason
        for name, reason in self._coarse(HALVES.values(), everywhere=False).items():
            found.setdefault(name, reason)
        return {node.name: found[node.name] for node in self._view.nodes if node.name in found}

    def forbidden(self, half: Half) -> dict[str, str]:
        """Node -> why it may not compute in `half`, whatever it computes in now."""
        found: dict[str, str] = {}
        for node in self._view.nodes:
            if self._plan.nodes[node.name].role == SHAPE or node.op_type in QDQ:
                continue
            reason = self._of_node(node, half, codes=False) or self._of_tensors(node, half)
            if reason:
                found[node.name] = reason
        for name, reason in self._coarse([half], everywhere=True).items():
            found.setdefault(name, reason)
        return found

    def _of_node(self, node: onnx.NodeProto, half: Half, *, codes: bool) -> str:
        """What speaks against half in the node itself: what it is, how much it sums, constants."""
        if node.name in self._internal:
            return self._internal[node.name]
        if node.op_type in LOG_SUMS:
            return "it sums exponentials or takes the logarithm of a sum"
        if node.op_type in OWN_STATISTICS and not float32_statistics(node, self._opset):
            return f"{node.op_type} computes its statistics in the type of its input"
        count = summands(self._view, node)
        if not codes and count > (LONG_SUM if node.op_type in SUMS else LONG_PRODUCT):
            return f"it sums {count} values"
        if node.op_type in AVERAGES:
            total = count * self._bound.get(node.output[0], 0.0)
            if total > half.max / HEADROOM:
                return f"the sum that it divides by {count} reaches {total:.6g}"
        return self._of_constants(node, half)

    def _of_constants(self, node: onnx.NodeProto, half: Half) -> str:
        for tensor in float_constants(self._view, node):
            value = self._view.constant(tensor)
            largest = float(np.abs(value).max(initial=0))
            if half.max < largest < math.inf:
                return f"its constant {tensor!r} reaches {largest:.6g}, {half.word} {half.max:g}"
            if value.size == 1 and largest > 0 and not np.any(to_half(value, half)):
                return f"its constant {tensor!r} ({largest:.3g}) would become zero"
        return ""

    def _of_tensors(self, node: onnx.NodeProto, half: Half) -> str:
        for role, names in (("input", node.input), ("output", node.output)):
            for tensor in names:
                largest = self._bound.get(tensor) if tensor else None
                if largest is None or tensor in self._view.initializers:
                    continue
                if largest > half.max / HEADROOM:
                    return (
                        f"its {role} {tensor!r} reaches {largest:.6g}, and {half.word} ends at "
                        f"{half.max:.6g} (half of it is kept free for other data)"
                    )
                if 0 < largest < half.tiny:
                    return (
                        f"its {role} {tensor!r} stays below {largest:.3g}, where {half.word} has "
                        "lost its precision"
                    )
        return ""

    def _coarse(self, halves: Iterable[Half], *, everywhere: bool) -> dict[str, str]:
        """The nodes whose result, or something that it leads to, is too coarse in half: those that
        are to run in it, or, `everywhere`, all."""
        found: dict[str, str] = {}
        for node in self._view.nodes:
            for half in halves:
                limit, reason = self._coarseness(node, half)
                names = self._leading_to(node, limit) if reason else []
                for name in names if everywhere else self._of_those_in(half, names):
                    found.setdefault(name, reason if name == node.name else f"before {reason}")
        return found

    def _coarseness(self, node: onnx.NodeProto, half: Half) -> tuple[float, str]:
        """From which magnitude on the inputs of `node` are too coarse for it, and why; or ""."""
        bound = self._bound
        inputs = [bound[t] for t in node.input if t in bound]
        largest = max(inputs, default=0.0)
        if node.op_type in ABSOLUTE and largest > half.coarse:
            steps = f"where {half.word} has steps of 0.5"
            return half.coarse, f"{node.op_type} {node.name!r} at {largest:.6g}, {steps}"
        result = bound.get(node.output[0], 0.0) if node.op_type in DIFFERENCES else 0.0
        limit = result * 2.0 ** (half.bits - SPARE_BITS)
        if 0 < limit < largest:
            return limit, f"difference {node.name!r} of {largest:.6g} that is at most {result:.6g}"
        return math.inf, ""

    def _leading_to(self, node: onnx.NodeProto, limit: float) -> list[str]:
        """`node`, and the nodes that made what it reads beyond `limit`, back to those that
        computed it anew."""
        found: list[str] = []
        waiting = [node.name]
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            found.append(name)
            current = self._view.by_name[name]
            if name == node.name or current.op_type in PASSES_ERRORS:
                waiting.extend(
                    self._view.producer[tensor]
                    for tensor in current.input
                    if tensor in self._view.producer and self._bound.get(tensor, 0.0) > limit
                )
        return found

    def _of_those_in(self, half: Half, names: Iterable[str]) -> list[str]:
        """Those of `names` that are to run in `half`."""
        plan = self._plan
        return [n for n in names if _is_half(plan, n) and plan.float_type(n) == half.name]


def float_constants(view: GraphView, node: onnx.NodeProto) -> tuple[str, ...]:
    """The float32 initializers that `node` would read in half."""
    return tuple(
        tensor
        for index, tensor in enumerate(node.input)
        if tensor in view.initializers
        and view.dtypes.get(tensor) == "float32"
        and not (node.op_type == "Resize" and index)
    )


def flushed_weights(view: GraphView, plan: PrecisionPlan) -> dict[str, Flushed]:
    """For each node in half whose constants lose something below the normal numbers: how much.

    Of quantized nodes only the bias counts: their weights are codes. Nodes without such a loss are
    left out.
    """
    found: dict[str, Flushed] = {}
    for node in view.nodes:
        assignment = plan.nodes[node.name]
        half = HALVES.get(plan.float_type(node.name))
        if half is None or assignment.role == SHAPE or node.op_type in QDQ:
            continue
        quantized = {node.input[1]} if plan.is_quantized(node.name) else set()
        counts = [0, 0, 0]
        for tensor in float_constants(view, node):
            if tensor not in quantized:
                value = view.constant(tensor)
                rounded = np.abs(to_half(value, half).astype(np.float32))
                counts[0] += int(((rounded == 0) & (value != 0)).sum())
                counts[1] += int(((rounded > 0) & (rounded < half.tiny)).sum())
                counts[2] += int((value != 0).sum())
        if counts[0] or counts[1]:
            found[node.name] = Flushed(*counts)
    return found


def refuse_half_model(view: GraphView) -> None:
    """Raise ModelError if `view` is of a model in half precision, or computes with half inputs.

    Inputs with nothing but Casts behind are fine: that is what a file in half precision becomes on
    loading (`precision.graph.widen`), if it can be raised. A model that is float32 but for some
    nodes passes too; those stay as they are.
    """
    advice = (
        "it could not be raised to float32 on loading (the log says why). Export it in float32 "
        "throughout (PyTorch: model.float() before torch.onnx.export), or run it as it is with "
        "precision.default fp32"
    )
    for name in view.graph_inputs:
        readers = {view.by_name[node].op_type for node, _ in view.consumers.get(name, ())}
        if view.dtypes.get(name) in HALF_WORDS and not readers <= {"Cast"}:
            raise ModelError(
                f"the model computes in {view.dtypes[name]} already: so is its input {name!r}; "
                f"{advice}"
            )
    counts = {"float32": 0, "half": 0}
    name = ""
    for tensor, proto in view.initializers.items():
        kind = view.dtypes[tensor]
        if kind in HALF_WORDS:
            name = name or tensor
            counts["half"] += math.prod(proto.dims)
        elif kind == "float32":
            counts["float32"] += math.prod(proto.dims)
    if counts["half"] > counts["float32"]:
        raise ModelError(
            f"the model is {view.dtypes[name]} already: {counts['half']} of "
            f"{sum(counts.values())} weights are, such as {name!r}; {advice}"
        )
