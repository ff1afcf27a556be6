"""The `deploy` lowering: the same plan and table in the form that CPU kernels take over.

onnxruntime puts an integer kernel in place of a convolution only if every input comes from a
DequantizeLinear, the bias as int32, and its output goes into a QuantizeLinear. TensorRT wants
neither of the latter. So here the outputs of int8 convolutions are quantized as well, biases are
int32, and activations are uint8: with zero point 128 and scale amax / 127 a signed one has exactly
the codes of `emulate`; one that is never negative (behind ReLU, Clip, Sigmoid) gets zero point 0
and scale amax / 255, half the step. A ReLU or Clip whose bounds the uint8 range enforces anyway is
absorbed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph import GraphView, Model
from trtune.precision.placement import place
from trtune.precision.plan import COMPUTE_OPS, PrecisionPlan
from trtune.precision.rewrite import Rewrite, weight_scales

KEEPS_SIGN = {
    *("MaxPool", "GlobalAveragePool", "AveragePool", "ReduceMean", "ReduceMax", "Concat", "Add"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Split"),
}
NEVER_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp", "ReduceL2"}
INT32_MAX = 2**31 - 1


def deploy_tensors(view: GraphView, plan: PrecisionPlan) -> tuple[str, ...]:
    """Tensors that `lower_deploy` needs scales for, in graph order: those of `place`, and the
    outputs of int8 convolutions (behind an activation that is absorbed)."""
    wanted = set(place(view, plan).activations) | set(_quantized_outputs(view, plan))
    order = [*view.graph_inputs, *(name for node in view.nodes for name in node.output)]
    return tuple(tensor for tensor in order if tensor in wanted)


def lower_deploy(model: Model, plan: PrecisionPlan, table: CalibrationTable) -> onnx.ModelProto:
    """A copy of `model` that onnxruntime's CPU provider runs with integer kernels.

    Inputs and outputs keep name, type and shape. Raises MissingScaleError.
    """
    view = GraphView.of(model)
    lowering = _Deploy(model, view, plan, table)
    lowering.quantize_activations()
    lowering.quantize_weights()
    lowering.shield_float_nodes()
    return lowering.rewrite.finish()


def never_negative(view: GraphView, tensor: str, *, depth: int = 64) -> bool:
    """Whether the graph proves that `tensor` holds no negative value."""
    name = view.producer.get(tensor)
    if name is None or depth == 0:
        return bool(view.is_constant(tensor) and (view.constant(tensor) >= 0).all())
    node = view.by_name[name]
    if node.op_type in NEVER_NEGATIVE:
        return True
    if node.op_type == "Clip":
        lower = clip_bounds(view, node)[0]
        return lower is not None and lower >= 0
    inputs = list(node.input) if node.op_type in ("Concat", "Add") else list(node.input[:1])
    return node.op_type in KEEPS_SIGN and all(
        never_negative(view, name, depth=depth - 1) for name in inputs
    )


def clip_bounds(view: GraphView, node: onnx.NodeProto) -> tuple[float | None, float | None]:
    """Lower and upper bound of a Clip; None where there is none or it is computed."""
    bounds = [
        float(view.constant(name)) if name and view.is_constant(name) else None
        for name in [*node.input[1:3], "", ""][:2]
    ]
    return bounds[0], bounds[1]


def _quantized_outputs(view: GraphView, plan: PrecisionPlan) -> dict[str, str]:
    """Tensor -> the int8 convolution whose output it is, if that is quantized.

    With a single Relu or Clip behind it that is the activation's output, and its range decides;
    a tensor that is an output of the model stays float.
    """
    found: dict[str, str] = {}
    for name in plan.int8_nodes:
        node = view.by_name[name]
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        tensor = behind_activation(view, node.output[0])
        if tensor not in view.graph_outputs:
            found[tensor] = name
    return found


def behind_activation(view: GraphView, tensor: str) -> str:
    """`tensor`, or what the one Relu or Clip that reads it makes of it."""
    readers = view.consumers.get(tensor, ())
    if len(readers) != 1 or tensor in view.graph_outputs:
        return tensor
    reader = view.by_name[readers[0][0]]
    if reader.op_type == "Relu":
        return reader.output[0]
    if reader.op_type == "Clip" and readers[0][1] == 0 and None not in clip_bounds(view, reader):
        return reader.output[0] if clip_bounds(view, reader)[0] == 0 else tensor
    return tensor


class _Deploy:
    def __init__(
        self, model: Model, view: GraphView, plan: PrecisionPlan, table: CalibrationTable
    ) -> None:
        self.rewrite = Rewrite(model, view)
        self._view, self._plan, self._table = view, plan, table
        self._outputs: Mapping[str, str] = _quantized_outputs(view, plan)
        self._scales: dict[str, float] = {}

    def quantize_activations(self) -> None:
        """Pairs behind every quantized tensor, and their readers connected to them."""
        for tensor in deploy_tensors(self._view, self._plan):
            if tensor in self._view.graph_outputs:
                self._quantize(tensor, self._int8_edges(tensor))
                continue
            integer = tensor in self._outputs
            readers = self._view.consumers.get(tensor, ())
            edges = [e for e in readers if integer or not self._is_float_compute(e[0])]
            self._quantize(tensor, edges)
            self._absorb(tensor)

    def _int8_edges(self, tensor: str) -> list[tuple[str, int]]:
        return [e for e in self._view.consumers.get(tensor, ()) if self._plan.is_int8(e[0])]

    def _is_float_compute(self, node: str) -> bool:
        operator = self._view.by_name[node].op_type
        return operator in COMPUTE_OPS and not self._plan.is_int8(node)

    def _quantize(self, tensor: str, edges: list[tuple[str, int]]) -> None:
        amax = self._table.amax(tensor)
        if never_negative(self._view, tensor):
            scale, zero_point = float(np.float32(amax) / np.float32(255)), 0
        else:
            scale, zero_point = self._table.scale(tensor), 128
        self._scales[tensor] = scale
        result = self.rewrite.quantize_pair(tensor, scale, zero_point, np.uint8)
        for edge in edges:
            if edge[1] < len(self._view.by_name[edge[0]].input):
                self.rewrite.reconnect(edge, result)

    def _absorb(self, tensor: str) -> None:
        """Leave out the Relu or Clip that made `tensor` if its uint8 range enforces the bounds."""
        name = self._view.producer.get(tensor)
        activation = self._view.by_name[name] if name else None
        if activation is None or activation.op_type not in ("Relu", "Clip"):
            return
        source = activation.input[0]
        maker = self._view.producer.get(source)
        alone = len(self._view.consumers.get(source, ())) == 1
        if maker is None or not alone or source in self._view.graph_outputs:
            return
        if not (tensor in self._outputs or self._view.by_name[maker].op_type == "Add"):
            return
        lower, upper = (
            (0.0, None) if activation.op_type == "Relu" else clip_bounds(self._view, activation)
        )
        enforced = upper is None or 255 * self._scales[tensor] <= upper * (1 + 1e-5)
        if lower == 0 and enforced:
            self.rewrite.remove(activation.name)
            outputs = self.rewrite.node(maker).output
            outputs[list(outputs).index(source)] = tensor

    def quantize_weights(self) -> None:
        """int8 weights, and int32 biases on the scale of the products."""
        for edge, (name, axis) in place(self._view, self._plan).weights.items():
            node = self._view.by_name[edge[0]]
            self.rewrite.reconnect(edge, self.rewrite.quantized_weight(name, axis))
            self._quantize_bias(node, name, axis)

    def _quantize_bias(self, node: onnx.NodeProto, weight: str, axis: int) -> None:
        if len(node.input) < 3 or not node.input[2] or not self._view.is_constant(node.input[2]):
            return
        bias = self._view.constant(node.input[2])
        scales = weight_scales(self._view.constant(weight), axis) * np.float32(
            self._scales[node.input[0]]
        )
        if bias.shape != scales.shape:
            return
        codes = np.rint(bias.astype(np.float64) / scales)
        if np.abs(codes).max(initial=0) > INT32_MAX:
            return  # a channel so small that its bias does not fit stays float
        name = f"{node.name}/bias"
        value = self.rewrite.dequantized_constant(name, codes.astype(np.int32), scales)
        self.rewrite.reconnect((node.name, 2), value)

    def shield_float_nodes(self) -> None:
        """Keep pinned nodes float: onnxruntime would quantize one that stands between DQ and Q.

        A Max of one tensor is that tensor, and no optimizer takes it away.
        """
        for node in self._view.nodes:
            copy = self.rewrite.node(node.name)
            if self._is_float_compute(node.name) and copy.input[0].endswith("/dequantized"):
                self.rewrite.shield(node.name, 0)
