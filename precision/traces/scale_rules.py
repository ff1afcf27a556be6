"""Scales that follow from others without data: for caches from the Q/DQ of a model.

Explicit quantization writes scales where its pairs stand; TensorRT 10 asks for them at every
tensor. What an operator can give bounds the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.deploy import clip_bounds
from trtune.precision.lower.implicit import (
    constant_scales,
    implicit_tensors,
    in_cache_order,
    with_moves,
)
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import weight_axis

FOLLOWED, HELD = "implied", "constant"
"""How a table says where such scales come from."""
UNIT = float(np.float32(1) / np.float32(127))
BOUNDED = frozenset({"Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Erf", "Sin", "Cos"})
"""Operators that give nothing above one."""
NARROWING = frozenset(
    {
        *("Relu", "LeakyRelu", "Clip", "HardSwish", "Gelu", "Swish", "Elu", "Selu", "PRelu"),
        *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"),
        *("Slice", "Split", "Gather", "Neg", "Abs"),
    }
)
"""Operators whose result is nowhere larger than what they read."""
ROUNDS = 8


def complete_scales(
    view: GraphView, plan: PrecisionPlan, scales: Mapping[str, float]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """`scales` with those that follow from them, and the tensors that TensorRT wants and that
    still have none.

    In this order, until nothing is added: moving operators pass scales on; what is fused behind a
    weighted node gives the tensors inside the group its own; bounded and narrowing operators and
    sums bound what they give; an output of the network gets the bound that the weights give, which
    never clips. None that was there is changed.
    """
    wanted = implicit_tensors(view, plan)
    found = dict(scales)
    for _ in range(ROUNDS):
        before = len(found)
        found = with_moves(view, found)
        _inside_groups(view, plan, found)
        for node in view.nodes:
            _bound(view, node, found)
        _outputs(view, plan, found)
        if len(found) == before:
            break
    found.update({n: s for n, s in constant_scales(view, plan).items() if n not in found})
    known = {*wanted, *scales, *constant_scales(view, plan)}
    kept = {tensor: scale for tensor, scale in found.items() if tensor in known}
    return kept, tuple(tensor for tensor in wanted if not kept.get(tensor, 0) > 0)


def with_implied(view: GraphView, plan: PrecisionPlan, table: CalibrationTable) -> CalibrationTable:
    """`table` with the scales that follow from its own (`complete_scales`), those of constants
    behind the tensors. No entry of its own is changed, nor where its pairs stand."""
    found, _ = complete_scales(view, plan, table.scales)
    methods = {t: table.methods.get(t, "") if t in table.scales else FOLLOWED for t in found}
    return replace(table, scales=in_cache_order(view, found), methods=methods)


def with_constants(
    view: GraphView, plan: PrecisionPlan, table: CalibrationTable
) -> CalibrationTable:
    """`table` with entries for the constants that are layers of their own in TensorRT 10."""
    found = {n: s for n, s in constant_scales(view, plan).items() if n not in table.scales}
    methods = dict.fromkeys(found, HELD)
    return replace(table, scales={**table.scales, **found}, methods={**table.methods, **methods})


def _inside_groups(view: GraphView, plan: PrecisionPlan, found: dict[str, float]) -> None:
    """Tensors between fused nodes: computed in registers, so what is written counts."""
    for leader, members in plan.groups.items():
        chain = [view.by_name[name].output[0] for name in (leader, *members)]
        for earlier, later in reversed(list(pairwise(chain))):
            if later in found and view.by_name[view.producer[later]].op_type not in BOUNDED:
                found.setdefault(earlier, found[later])


def _bound(view: GraphView, node: onnx.NodeProto, found: dict[str, float]) -> None:
    if not node.output or node.output[0] in found:
        return
    read = [t for t in node.input if t and not view.is_constant(t)]
    known = [found[t] for t in read if t in found]
    scale: float | None = None
    low, high = clip_bounds(view, node) if node.op_type == "Clip" else (None, None)
    if node.op_type in BOUNDED:
        scale = UNIT
    elif low is not None and high is not None:
        limit = max(abs(low), abs(high)) * UNIT
        scale = min(found.get(node.input[0], limit), limit)
    elif node.op_type in NARROWING and node.input[0] in found:
        scale = found[node.input[0]]
    elif node.op_type == "Add" and len(known) == len(node.input):
        scale = sum(known)
    elif node.op_type == "Mul" and len(known) == len(node.input):
        scale = known[0] * known[1] * 127
    if scale:
        for tensor in node.output:
            if tensor:
                found.setdefault(tensor, float(np.float32(scale)))


def _outputs(view: GraphView, plan: PrecisionPlan, found: dict[str, float]) -> None:
    for name in plan.int8_nodes:
        node = view.by_name[name]
        chain = [node.output[0], *(view.by_name[m].output[0] for m in plan.groups.get(name, ()))]
        weighted = len(node.input) > 1 and view.is_constant(node.input[1])
        at_end = set(chain) & set(view.graph_outputs)
        if not weighted or not at_end or node.input[0] not in found:
            continue
        bound = _weights_bound(view, node) * found[node.input[0]]
        for tensor in chain:
            if bound > 0:
                found.setdefault(tensor, float(np.float32(bound)))


def _weights_bound(view: GraphView, node: onnx.NodeProto) -> float:
    """The largest sum of |w| over an output channel: how much the node can enlarge its input."""
    values = np.abs(view.constant(node.input[1]).astype(np.float64))
    axis = weight_axis(node)
    if node.op_type == "ConvTranspose":
        group = int(attribute(node, "group", 1))
        return float(values.sum(axis=(0, *range(2, values.ndim))).max()) / max(group, 1)
    axes = tuple(k for k in range(values.ndim) if k != axis)
    return float(values.sum(axis=axes).max())
