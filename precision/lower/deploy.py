"""The `deploy` lowering: the same plan and table in the form that CPU kernels take over.

onnxruntime puts an integer kernel in place of a convolution only if every input comes from a
DequantizeLinear, the bias as int32, and its output goes into a QuantizeLinear. TensorRT wants
neither of the latter. So here the outputs of int8 convolutions are quantized as well, biases are
int32, and activations are uint8: with zero point 128 and scale amax / 127 a signed one has exactly
the codes of `emulate`; one that is never negative (behind ReLU, Clip, Sigmoid) gets zero point 0
and scale amax / 255, half the step, and behind SiLU the codes begin at its least value, -0.28. A
ReLU or Clip whose bounds the uint8 range enforces anyway is absorbed, and a matrix product with a
bias becomes a Gemm, which alone has a kernel for both. SiLU and gates are integers too (`gates`),
averages over whole pictures too (`pools`), and input channels are filled up to fours (`channels`).

A node that the user or the tuner pinned to float reads float values, as it does in TensorRT: the
convolution that makes them then gives its result in float, for which there is no integer kernel
here, and the report names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.operators import MOVES
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.bounds import lowest
from trtune.precision.lower.channels import fill_channels
from trtune.precision.lower.gates import GATE_SCALE, find_gates
from trtune.precision.lower.pools import average_behind, average_codes
from trtune.precision.lower.rewrite import Rewrite, weight_scales
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.placement import Edge, place
from trtune.precision.plan.plan import COMPUTE, USER, PrecisionPlan

PASSED_THROUGH = MOVES | {"Slice", "Split", "Gather"}
"""Operators behind which onnxruntime still sees the DequantizeLinear before them."""

NO_FLOAT8 = "onnxruntime has no float8 kernels for a CPU, so it stays float here"

LARGEST_BIAS = 2**30
"""Codes of a bias stay below this: int32 has to hold the sum of the products as well."""


def deploy_tensors(view: GraphView, plan: PrecisionPlan) -> tuple[str, ...]:
    """Tensors that `lower_deploy` needs scales for, in graph order: those of `place`, and the
    outputs of int8 convolutions (behind an activation that is absorbed), and of gates (without
    these, which an older table lacks, the gates stay float)."""
    plan = with_integers(plan)
    wanted = _without_gates(view, plan)
    wanted.update(find_gates(view, plan, wanted).products)
    order = [*view.graph_inputs, *(name for node in view.nodes for name in node.output)]
    return tuple(tensor for tensor in order if tensor in wanted)


def optional_tensors(view: GraphView, plan: PrecisionPlan) -> set[str]:
    """Those of `deploy_tensors` without whose scales only gates stay float."""
    plan = with_integers(plan)
    known = _without_gates(view, plan)
    return set(find_gates(view, plan, known).products) - known


def _without_gates(view: GraphView, plan: PrecisionPlan) -> set[str]:
    return set(place(view, plan).activations) | set(_quantized_outputs(view, plan))


def with_integers(plan: PrecisionPlan) -> PrecisionPlan:
    """`plan` with its fp8 nodes pinned to float32: onnxruntime's CPU kernels multiply no float8."""
    return plan.pin(plan.fp8_nodes, "fp32", NO_FLOAT8, origin=USER)


def lower_deploy(model: Model, plan: PrecisionPlan, table: CalibrationTable) -> onnx.ModelProto:
    """A copy of `model` that onnxruntime's CPU provider runs with integer kernels.

    Inputs and outputs keep name, type and shape. Pairs stand where these kernels want them, also
    where `plan` came with a quantized model. Raises MissingScaleError.
    """
    if isinstance(plan, ImportedPlan):
        plan = plan.by_rules()
    plan = with_integers(plan)
    lowering = _Deploy(model, GraphView.of(model), plan, table)
    lowering.quantize_activations()
    lowering.quantize_gates()
    lowering.quantize_weights()
    lowering.shield_float_nodes()
    lowered = lowering.rewrite.finish()
    fill_channels(lowered)
    return lowered


def clip_bounds(view: GraphView, node: onnx.NodeProto) -> tuple[float | None, float | None]:
    """Lower and upper bound of a Clip; None where there is none or it is computed."""
    lower, upper = (
        float(view.constant(name).item()) if name and view.is_constant(name) else None
        for name in [*node.input[1:3], "", ""][:2]
    )
    return lower, upper


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
    """`tensor`, or what the one Relu, or Clip from 0 on, that reads it makes of it."""
    readers = view.consumers.get(tensor, ())
    if len(readers) != 1 or tensor in view.graph_outputs:
        return tensor
    reader = view.by_name[readers[0][0]]
    is_clip = reader.op_type == "Clip" and readers[0][1] == 0
    if reader.op_type == "Relu" or (is_clip and _bounds(view, reader) is not None):
        return str(reader.output[0])
    return tensor


def _bounds(view: GraphView, activation: onnx.NodeProto) -> tuple[float, float] | None:
    """Where a Relu or Clip cuts off, if that is 0 and perhaps a constant above; else None."""
    if activation.op_type == "Relu":
        return 0.0, math.inf
    if activation.op_type != "Clip" or any(
        name and not view.is_constant(name) for name in activation.input[1:3]
    ):
        return None
    lower, upper = clip_bounds(view, activation)
    return (0.0, math.inf if upper is None else upper) if lower == 0 else None


class _Deploy:
    def __init__(
        self, model: Model, view: GraphView, plan: PrecisionPlan, table: CalibrationTable
    ) -> None:
        self.rewrite = Rewrite(model, view)
        self._view, self._plan, self._table = view, plan, table
        self._placement = place(view, plan)
        self._outputs: Mapping[str, str] = _quantized_outputs(view, plan)
        quantized = {*self._placement.activations, *self._outputs}
        self._gates = find_gates(view, plan, quantized)
        self._optional = set(self._gates.products) - quantized
        self._codes: dict[str, tuple[float, int]] = {}
        self._lowest: dict[str, float] = {}

    def quantize_activations(self) -> None:
        """Pairs behind every quantized tensor, and their readers connected to them."""
        for tensor in deploy_tensors(self._view, self._plan):
            if tensor in self._optional and tensor not in self._table.scales:
                continue
            if self._table.scale(tensor) == 0 and tensor not in self._placement.activations:
                continue  # nothing but zeros was seen: the output of that convolution stays float
            edges = self._reading_quantized(tensor)
            if not edges and tensor not in self._placement.activations:
                continue  # nothing but pinned nodes read it
            self._quantize(tensor, edges)
            if len(edges) == len(self._view.consumers.get(tensor, ())):
                self._absorb(tensor)
                average = average_behind(self._view, self._plan, tensor)
                if average is not None:
                    average_codes(self.rewrite, self._view, average, *self._codes[tensor])

    def _reading_quantized(self, tensor: str) -> list[Edge]:
        """Who is to read the quantized `tensor`: all but pinned readers if an int8 kernel makes
        it."""
        readers = list(self._view.consumers.get(tensor, ()))
        if tensor in self._view.graph_outputs:
            readers = [e for e in readers if self._plan.is_int8(e[0])]
        elif tensor not in self._outputs:
            readers = [e for e in readers if not self._stays_float(e[0])]
        else:
            readers = [e for e in readers if not self._is_pinned(e[0])]
        return [e for e in readers if e[1] < len(self._view.by_name[e[0]].input)]

    def _is_pinned(self, node: str) -> bool:
        """Whether `node` is pinned to float, or moves values for nobody else."""
        found = self._plan.nodes[node]
        if found.is_pinned and found.precision != "int8":
            return True
        outputs = self._view.by_name[node].output
        moves = self._view.by_name[node].op_type in PASSED_THROUGH
        if not moves or any(t in self._view.graph_outputs for t in outputs):
            return False
        readers = [e[0] for t in outputs for e in self._view.consumers.get(t, ())]
        return bool(readers) and all(self._is_pinned(reader) for reader in readers)

    def _stays_float(self, node: str) -> bool:
        """Whether `node` is pinned, or a product that cannot be quantized."""
        found = self._plan.nodes[node]
        return found.precision != "int8" and (found.role == COMPUTE or found.is_pinned)

    def _quantize(self, tensor: str, edges: list[Edge]) -> None:
        low, amax = lowest(self._view, tensor, self._lowest), np.float32(self._table.amax(tensor))
        if -low < amax:
            scale = float((amax - np.float32(low)) / np.float32(255))
            zero_point = int(np.rint(-low / scale))
        else:
            scale, zero_point = self._table.scale(tensor), 128
        self._codes[tensor] = scale, zero_point
        result = self.rewrite.quantize_pair(tensor, scale, zero_point, np.uint8)
        for edge in edges:
            self.rewrite.reconnect(edge, result)

    def quantize_gates(self) -> None:
        """Pairs behind each Sigmoid whose products all got one."""
        for gate, edges in self._gates.sigmoids.items():
            source = self._view.by_name[self._view.producer[gate]].input[0]
            products = [self._view.by_name[name].output[0] for name, _ in edges]
            if all(tensor in self._codes for tensor in (source, *products)):
                result = self.rewrite.quantize_pair(gate, GATE_SCALE, 0, np.uint8)
                for edge in edges:
                    self.rewrite.reconnect(edge, result)

    def _absorb(self, tensor: str) -> None:
        """Leave out the Relu or Clip that made `tensor`, which everything reads quantized, if its
        uint8 range enforces the bounds."""
        name = self._view.producer.get(tensor, "")
        bounds = _bounds(self._view, self._view.by_name[name]) if name else None
        if bounds is None or 255 * self._codes[tensor][0] > bounds[1] * (1 + 1e-5):
            return
        source = self._view.by_name[name].input[0]
        maker = self._view.producer.get(source, "")
        alone = len(self._view.consumers.get(source, ())) == 1
        if not maker or not alone or source in self._view.graph_outputs:
            return
        if tensor in self._outputs or self._view.by_name[maker].op_type == "Add":
            self._merge(maker, name)

    def _merge(self, maker: str, reader: str) -> None:
        """Take out the one `reader` of what `maker` makes; `maker` makes its output instead."""
        self.rewrite.node(maker).output[0] = self.rewrite.node(reader).output[0]
        self.rewrite.remove(reader)

    def quantize_weights(self) -> None:
        """int8 weights, and int32 biases on the scale of the products."""
        for edge, (weight, axis) in self._placement.weights.items():
            self._join_bias(edge[0])
            value = self._view.constant(weight)
            bias = self._bias(edge[0], value.shape[axis])
            step = np.float64(self._codes[self._view.by_name[edge[0]].input[0]][0])
            least = None if bias is None else np.abs(bias) / (step * LARGEST_BIAS)
            scales = weight_scales(value, axis, least=least)
            self.rewrite.reconnect(edge, self.rewrite.quantized_weight(weight, axis, scales))
            if bias is not None:
                products = scales.astype(np.float64) * step
                codes = np.rint(bias / products).astype(np.int32)
                name, stored = f"{edge[0]}/bias", products.astype(np.float32)
                made = self.rewrite.dequantized_constant(name, codes, stored)
                self.rewrite.reconnect((edge[0], 2), made)

    def _bias(self, node: str, channels: int) -> NDArray[np.float64] | None:
        """The constant bias of a node, one value a channel; None if it has none or another."""
        inputs = self.rewrite.node(node).input
        if len(inputs) < 3 or not self._view.is_constant(inputs[2]):
            return None
        value = self._view.constant(inputs[2])
        if value.size not in (1, channels) or any(d != 1 for d in value.shape[:-1]):
            return None
        return np.broadcast_to(value.reshape(-1).astype(np.float64), (channels,))

    def _join_bias(self, name: str) -> None:
        """Make a two-dimensional MatMul and the Add of a bias behind it one Gemm.

        onnxruntime would do that itself, and then find the bias in float.
        """
        node = self.rewrite.node(name)
        tensor = node.output[0]
        readers = self._view.consumers.get(tensor, ())
        flat = len(self._view.shapes.get(self._view.by_name[name].input[0], ())) == 2
        if node.op_type != "MatMul" or not flat or len(readers) != 1:
            return
        add, index = readers[0]
        if self._view.by_name[add].op_type != "Add" or tensor in self._view.graph_outputs:
            return
        node.input.append(self._view.by_name[add].input[1 - index])
        if self._bias(name, self._view.initializers[node.input[1]].dims[1]) is None:
            del node.input[2]
            self.rewrite.shield(add, index)
        else:
            node.op_type = "Gemm"
            self._merge(name, add)

    def shield_float_nodes(self) -> None:
        """Keep what stays float so: onnxruntime would quantize a node that stands between DQ and Q.

        A Max of one tensor is that tensor, and no optimizer takes it away.
        """
        for node in self._view.nodes:
            if not self._stays_float(node.name):
                continue
            inputs = self.rewrite.node(node.name).input
            data = [i for i, name in enumerate(inputs) if name and not self._view.is_constant(name)]
            if data and all(self._is_quantized(inputs[i]) for i in data):
                self.rewrite.shield(node.name, data[0])

    def _is_quantized(self, tensor: str) -> bool:
        """Whether a pair, and nothing but moving operators behind it, makes `tensor`."""
        if self.rewrite.is_dequantized(tensor):
            return True
        name = self._view.producer.get(tensor, "")
        if not name or self._view.by_name[name].op_type not in PASSED_THROUGH:
            return False
        return any(self._is_quantized(source) for source in self.rewrite.node(name).input)
