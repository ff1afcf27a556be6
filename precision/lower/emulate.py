"""Lowerings: a plan and a table written as an ONNX model in one runtime's language.

`emulate` is explicit quantization and strong typing as TensorRT reads them, so what a CPU computes
is TensorRT's arithmetic (`emulation.in_float32` where there are half types). `deploy` says the same
in the form that onnxruntime's integer CPU kernels take over; what is not int8 is float32 there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.float8 import float8_dtype
from trtune.calibrate.table import FLOAT8_MAX, CalibrationTable
from trtune.configs.errors import ModelError
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.casts import insert_casts, needed_opset, raise_opset
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.lower.rewrite import QMAX, Rewrite
from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.half_rules import refuse_half_model
from trtune.precision.plan.half_types import HALVES, half_above
from trtune.precision.plan.placement import codes_read, place
from trtune.precision.plan.plan import SHAPE, PrecisionPlan

__all__ = ["LOWERINGS", "lower_deploy", "lower_emulate"]


def lower_emulate(model: Model, plan: PrecisionPlan, table: CalibrationTable) -> onnx.ModelProto:
    """A copy of `model` with QuantizeLinear/DequantizeLinear pairs as TensorRT wants them, and
    every node in the float type that `plan` gives it.

    Activations: int8 or float8, zero point 0, one 0-d scale a tensor and type, one pair of each
    however many nodes read it. Weights: int8 or float8 initializers behind a DequantizeLinear, one
    scale an output channel (max|w| / 127 or 448 unless the table has others). Biases stay float.
    Casts stand between nodes of different float types; scales that are read as halves are rounded
    up to one. The opset is raised where half types or float8 need a later one. Inputs and outputs
    keep name, type and shape.

    Raises MissingScaleError; ModelError if the model is half already, if its opset cannot be
    raised, or if a constant or range exceeds the type that the plan gives it.
    """
    if not plan.halves and not plan.fp8_nodes:
        return _with_pairs(model, plan, table)
    view = GraphView.of(model)
    if plan.halves:
        refuse_half_model(view)
    model = raise_opset(model, needed_opset(view, plan))
    proto = _with_pairs(model, plan, table)
    if not plan.halves:
        return proto
    types = {name: plan.float_type(name) for name, a in plan.nodes.items() if a.role != SHAPE}
    return insert_casts(proto, types, external_dir=model.external_dir)


def _with_pairs(model: Model, plan: PrecisionPlan, table: CalibrationTable) -> onnx.ModelProto:
    view = GraphView.of(model)
    placement = place(view, plan)
    rewrite = Rewrite(model, view, table.weights, table.float8_weights)
    for tensor, edges in placement.activations.items():
        kinds = [plan.float_type(name) for name, _ in edges]
        if tensor in view.producer:
            kinds.append(plan.float_type(view.producer[tensor]))
        for edge in edges:
            codes = codes_read(plan, edge)
            scale = _scale(tensor, table, set(kinds), codes)
            dtype = float8_dtype() if codes == FP8 else np.int8
            rewrite.reconnect(edge, rewrite.quantize_pair(tensor, scale, 0, dtype))
    for edge, (name, axis) in placement.weights.items():
        kind = plan.float_type(edge[0])
        halves = [kind] if kind in HALVES else []
        if plan.precision(edge[0]) == FP8:
            scales = _above(rewrite.float8_scales(name, axis), halves)
            rewrite.reconnect(edge, rewrite.float8_weight(name, axis, scales))
        else:
            scales = _above(rewrite.weight_scales(name, axis), halves)
            rewrite.reconnect(edge, rewrite.quantized_weight(name, axis, scales))
    return rewrite.finish()


def _scale(tensor: str, table: CalibrationTable, kinds: set[str], codes: str) -> float:
    """The scale of `tensor` as int8 or fp8 `codes`, rounded up to one that `kinds` hold."""
    scale = table.float8_scale(tensor) if codes == FP8 else table.scale(tensor)
    amax = float(np.float32(scale) * np.float32(FLOAT8_MAX if codes == FP8 else QMAX))
    for name in HALVES:
        if name in kinds and amax > HALVES[name].max:
            raise ModelError(
                f"tensor {tensor!r} reaches {amax:g}, and {HALVES[name].word} ends "
                f"at {HALVES[name].max:g}: the nodes around it have to stay fp32 (`precision.pin`)"
            )
    return float(_above(np.array(scale, np.float32), [name for name in HALVES if name in kinds]))


def _above(scales: NDArray[np.float32], kinds: Iterable[str]) -> NDArray[np.float32]:
    for name in kinds:
        scales = half_above(scales, HALVES[name])
    return scales


LOWERINGS: Mapping[str, Callable[[Model, PrecisionPlan, CalibrationTable], onnx.ModelProto]] = {
    "emulate": lower_emulate,
    "deploy": lower_deploy,
}
