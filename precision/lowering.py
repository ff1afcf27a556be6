"""Lowerings: a plan and a table written as an ONNX model in one runtime's language.

`emulate` is explicit quantization as TensorRT reads it, so what a CPU computes is TensorRT's
arithmetic. `deploy` says the same in the form that onnxruntime's integer CPU kernels take over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.precision.deploy import lower_deploy
from trtune.precision.graph import GraphView, Model
from trtune.precision.placement import place
from trtune.precision.plan import PrecisionPlan
from trtune.precision.rewrite import Rewrite

__all__ = ["LOWERINGS", "lower_deploy", "lower_emulate"]


def lower_emulate(model: Model, plan: PrecisionPlan, table: CalibrationTable) -> onnx.ModelProto:
    """A copy of `model` with QuantizeLinear/DequantizeLinear pairs as TensorRT wants them.

    Activations: int8, zero point 0, one 0-d scale a tensor, one pair however many nodes read it.
    Weights: int8 initializers behind a DequantizeLinear, one scale an output channel. Biases stay
    float. Inputs and outputs keep name, type and shape. Raises MissingScaleError.
    """
    view = GraphView.of(model)
    placement = place(view, plan)
    rewrite = Rewrite(model, view)
    for tensor, edges in placement.activations.items():
        quantized = rewrite.quantize_pair(tensor, table.scale(tensor), 0, np.int8)
        for edge in edges:
            rewrite.reconnect(edge, quantized)
    for edge, (name, axis) in placement.weights.items():
        rewrite.reconnect(edge, rewrite.quantized_weight(name, axis))
    return rewrite.finish()


LOWERINGS: Mapping[str, Callable[[Model, PrecisionPlan, CalibrationTable], onnx.ModelProto]] = {
    "emulate": lower_emulate,
    "deploy": lower_deploy,
}
