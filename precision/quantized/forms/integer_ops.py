"""Integer operators written as QuantizeLinear and DequantizeLinear around float ones.

QLinearConv(x, w) = Q(Conv(DQ(x), DQ(w))): the same numbers but for the order in which a float sum
rounds. What takes its scales from the data at run time cannot be written so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.precision.graph.proto import attribute, default_opset
from trtune.precision.graph.view import GraphView
from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE
from trtune.precision.quantized.findings import EXACT, Finding, finding

FLOAT_OP = {
    "QLinearConv": "Conv",
    "QLinearMatMul": "MatMul",
    "ConvInteger": "Conv",
    "MatMulInteger": "MatMul",
}
WITH_SCALES = ("QLinearConv", "QLinearMatMul")


@dataclass(frozen=True, slots=True)
class ScaledOp:
    """How an operator of onnxruntime's own domain holds its scales: `data` are the positions of
    the codes, each followed by its scale and zero point; `result` those of the result's scale and
    zero point; `attributes` what the float operator has of it."""

    op: str
    data: tuple[int, ...]
    result: tuple[int, int]
    attributes: tuple[str, ...] = ()


POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
SCALED_OPS: Mapping[str, ScaledOp] = MappingProxyType(
    {
        "QLinearAdd": ScaledOp("Add", (0, 3), (6, 7)),
        "QLinearMul": ScaledOp("Mul", (0, 3), (6, 7)),
        "QLinearSigmoid": ScaledOp("Sigmoid", (0,), (3, 4)),
        "QLinearLeakyRelu": ScaledOp("LeakyRelu", (0,), (3, 4), ("alpha",)),
        "QLinearSoftmax": ScaledOp("Softmax", (0,), (3, 4), ("axis",)),
        "QLinearGlobalAveragePool": ScaledOp("GlobalAveragePool", (0,), (3, 4)),
        "QLinearAveragePool": ScaledOp("AveragePool", (0,), (3, 4), POOLING),
        "QLinearReduceMean": ScaledOp("ReduceMean", (0,), (3, 4), ("axes", "keepdims")),
        "QLinearWhere": ScaledOp("Where", (1, 4), (7, 8)),
        "QGemm": ScaledOp("Gemm", (0, 3), (7, 8), ("alpha", "transA", "transB")),
    }
)
CONCAT = "QLinearConcat"
SOFTMAX_OPSET = 13
"""From here on Softmax is taken along one axis; before, along that and all behind it."""
AXES_OPSET = 18
"""From here on ReduceMean has its axes as an input."""
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
MICROSOFT = "com.microsoft"


def is_integer_operator(node: onnx.NodeProto) -> bool:
    """Whether a node computes with integer codes itself."""
    if node.op_type in FLOAT_OP or node.op_type in DYNAMIC:
        return True
    quantized = node.op_type.startswith(("QLinear", "QGemm", "QAttention", "MatMulInteger"))
    return node.domain == MICROSOFT and quantized


def write_as_pairs(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Finding, ...]]:
    """A copy of a normalised model without integer operators, and what was found of them.

    Those that cannot be converted stay, with a finding that says why.
    """
    view = GraphView(proto)
    if not any(is_integer_operator(node) for node in view.nodes):
        return proto, ()
    return _Operators(view).convert()


class _Operators:
    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.opset = default_opset(view.proto) or 0
        self.initializers: list[onnx.TensorProto] = []
        self.removed: set[str] = set()
        self.rewritten: dict[str, list[onnx.NodeProto]] = {}
        self.findings: list[Finding] = []

    def convert(self) -> tuple[onnx.ModelProto, tuple[Finding, ...]]:
        for node in self.view.nodes:
            if is_integer_operator(node):
                self._convert(node)
        model = onnx.ModelProto()
        model.CopyFrom(self.view.proto)
        del model.graph.node[:]
        for node in self.view.nodes:
            if node.name in self.rewritten:
                model.graph.node.extend(self.rewritten[node.name])
            elif node.name not in self.removed:
                model.graph.node.append(node)
        model.graph.initializer.extend(self.initializers)
        return model, tuple(self.findings)

    def _convert(self, node: onnx.NodeProto) -> None:
        made = self._written(node)
        if made is None:
            self._refuse(node)
            return
        self.rewritten[node.name] = made
        op = next(n.op_type for n in made if n.op_type not in (QUANTIZE, DEQUANTIZE))
        remedy = f"{op} between DequantizeLinear and QuantizeLinear"
        self.findings.append(finding(node.name, "integer-operator", node.op_type, remedy, EXACT))

    def _written(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """The nodes that do what `node` does; None if it cannot be written so."""
        if node.domain == MICROSOFT:
            return self._microsoft(node)
        if node.domain or node.op_type not in FLOAT_OP:
            return None
        if node.op_type in WITH_SCALES:
            return self._with_scales(node)
        return self._integer_product(node)

    def _microsoft(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == CONCAT:
            count = (len(node.input) - 2) // 3
            form = ScaledOp("Concat", tuple(2 + 3 * k for k in range(count)), (0, 1), ("axis",))
        elif node.op_type in SCALED_OPS:
            form = SCALED_OPS[node.op_type]
        else:
            return None
        if attribute(node, "channels_last", 0) or not self._means_the_same(node, form):
            return None
        nodes = []
        inputs = list(node.input[:1]) if form.op == "Where" else []
        for number, index in enumerate(form.data):
            codes, scale, zero = node.input[index : index + 3]
            axis = self._gemm_axis(node, number) if form.op == "Gemm" else 1
            nodes.append(self._dequantize(node, f"in{number}", codes, scale, zero, axis))
            inputs.append(nodes[-1].output[0])
        if form.op == "Gemm" and len(node.input) > 6 and node.input[6]:
            scale = self._product(node, node.input[1], node.input[4])
            nodes.append(self._dequantize(node, "b", node.input[6], scale, "", 0))
            inputs.append(nodes[-1].output[0])
        compute = helper.make_node(form.op, inputs, [f"{node.output[0]}/float"], name=node.name)
        compute.attribute.extend(a for a in node.attribute if a.name in form.attributes)
        self._adapt(node, compute)
        return [*nodes, *self._quantized(node, compute, form)]

    def _quantized(
        self, node: onnx.NodeProto, compute: onnx.NodeProto, form: ScaledOp
    ) -> list[onnx.NodeProto]:
        """`compute` with the QuantizeLinear behind it, or none where the result is float."""
        scale, zero = ([*node.input, "", ""][k] if k < len(node.input) else "" for k in form.result)
        if not scale:
            compute.output[0] = node.output[0]
            return [compute]
        inputs = [compute.output[0], scale, *([zero] if zero else [])]
        name = f"{node.name}/{QUANTIZE}"
        return [compute, helper.make_node(QUANTIZE, inputs, [node.output[0]], name=name)]

    def _means_the_same(self, node: onnx.NodeProto, form: ScaledOp) -> bool:
        """Whether the float operator, in the model's opset, does what the integer one does."""
        if form.op != "Softmax":
            return True
        rank = len(self.view.shapes.get(node.input[0], ()))
        axis = attribute(node, "axis", -1)
        last = axis == -1 or (rank > 0 and axis == rank - 1)
        return last or int(attribute(node, "opset", SOFTMAX_OPSET)) >= SOFTMAX_OPSET

    def _gemm_axis(self, node: onnx.NodeProto, number: int) -> int:
        return 0 if number == 1 and attribute(node, "transB", 0) else 1

    def _adapt(self, node: onnx.NodeProto, compute: onnx.NodeProto) -> None:
        """What the float operator has in another place than the integer one."""
        if compute.op_type == "Gemm":  # the bias, too, is multiplied by alpha there
            compute.attribute.append(
                helper.make_attribute("beta", float(attribute(node, "alpha", 1.0)))
            )
        axes = attribute(node, "axes")
        if compute.op_type == "ReduceMean" and axes and self.opset >= AXES_OPSET:
            for entry in [a for a in compute.attribute if a.name == "axes"]:
                compute.attribute.remove(entry)
            name = self._constant(f"{node.name}/axes", np.asarray(axes, np.int64))
            compute.input.append(name)

    def _refuse(self, node: onnx.NodeProto) -> None:
        maker = self.view.by_name.get(self.view.producer.get(node.input[0], ""))
        dynamic = node.op_type in DYNAMIC or (maker is not None and maker.op_type in DYNAMIC)
        kind = "dynamic-quantization" if dynamic else "integer-operator"
        remedy = (
            "quantize the FP32 model with calibration instead of dynamically"
            if dynamic
            else "export in Q/DQ form (onnxruntime: QuantFormat.QDQ)"
        )
        self.findings.append(finding(node.name, kind, node.op_type, remedy))

    def _with_scales(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.input[:8]
        op = FLOAT_OP[node.op_type]
        nodes = [
            self._dequantize(node, "x", x, x_scale, x_zero, self._rows(op, x)),
            self._dequantize(node, "w", w, w_scale, w_zero, self._channels(op, w)),
        ]
        if len(node.input) > 8 and node.input[8]:
            scale = self._product(node, x_scale, w_scale)
            nodes.append(self._dequantize(node, "b", node.input[8], scale, "", 0))
        inputs = [made.output[0] for made in nodes]
        compute = helper.make_node(op, inputs, [f"{node.output[0]}/float"], name=node.name)
        compute.attribute.extend(node.attribute)
        quantize = helper.make_node(
            QUANTIZE,
            [compute.output[0], y_scale, y_zero],
            [node.output[0]],
            name=f"{node.name}/{QUANTIZE}",
        )
        return [*nodes, compute, quantize]

    def _rows(self, op: str, tensor: str) -> int:
        return len(self.view.shapes.get(tensor, (0, 0))) - 2 if op == "MatMul" else 1

    def _channels(self, op: str, tensor: str) -> int:
        return len(self.view.shapes.get(tensor, (0, 0))) - 1 if op == "MatMul" else 0

    def _dequantize(
        self, node: onnx.NodeProto, part: str, codes: str, scale: str, zero: str, axis: int
    ) -> onnx.NodeProto:
        name = f"{node.name}/{part}"
        inputs = [codes, scale, zero] if zero else [codes, scale]
        output = f"{name}/dequantized"
        made = helper.make_node(DEQUANTIZE, inputs, [output], name=f"{name}/{DEQUANTIZE}")
        if len(self.view.shapes.get(scale, ())) == 1 or part == "b":
            made.attribute.append(helper.make_attribute("axis", axis))
        return made

    def _product(self, node: onnx.NodeProto, a: str, b: str) -> str:
        """A constant: the product of two scales. One that is computed is left to the linter."""
        if not (self.view.is_constant(a) and self.view.is_constant(b)):
            return b
        value = self.view.constant(a).astype(np.float32) * self.view.constant(b)
        return self._constant(f"{node.name}/bias_scale", value.astype(np.float32))

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _integer_product(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """ConvInteger or MatMulInteger, a Cast and a Mul by a constant scale; None if it is not
        that, or its data were not quantized with a constant scale."""
        x, w = node.input[0], node.input[1]
        maker = self.view.by_name.get(self.view.producer.get(x, ""))
        tail = self._tail(node)
        if maker is None or maker.op_type != QUANTIZE or tail is None:
            return None
        if not self.view.is_constant(maker.input[1]):
            return None
        cast, multiply, total = tail
        x_scale = self.view.constant(maker.input[1]).astype(np.float32)
        w_scale = (total.astype(np.float32) / x_scale).reshape(-1)
        value = w_scale.reshape(()) if w_scale.size == 1 else w_scale
        scale = self._constant(f"{node.name}/w_scale", value)
        zeros = [*node.input[2:4], "", ""][:2]
        op = FLOAT_OP[node.op_type]
        x_zero = zeros[0] or (maker.input[2] if len(maker.input) > 2 else "")
        data = self._dequantize(node, "x", x, maker.input[1], x_zero, 1)
        weights = self._dequantize(node, "w", w, scale, zeros[1], self._channels(op, w))
        if w_scale.size > 1:
            del weights.attribute[:]
            weights.attribute.append(helper.make_attribute("axis", self._channels(op, w)))
        inputs = [data.output[0], weights.output[0]]
        compute = helper.make_node(op, inputs, [multiply.output[0]], name=node.name)
        compute.attribute.extend(node.attribute)
        self.removed |= {cast.name, multiply.name}
        return [data, weights, compute]

    def _tail(
        self, node: onnx.NodeProto
    ) -> tuple[onnx.NodeProto, onnx.NodeProto, NDArray[Any]] | None:
        """The Cast and the Mul behind an integer product, and the constant factor."""
        cast = self._only_reader(node, "Cast")
        multiply = self._only_reader(cast, "Mul") if cast is not None else None
        if cast is None or multiply is None:
            return None
        factors = [name for name in multiply.input if self.view.is_constant(name)]
        if len(factors) != 1:
            return None
        return cast, multiply, self.view.constant(factors[0])

    def _only_reader(self, node: onnx.NodeProto, op: str) -> onnx.NodeProto | None:
        readers = self.view.consumers.get(node.output[0], ())
        if len(readers) != 1 or node.output[0] in self.view.graph_outputs:
            return None
        reader = self.view.by_name[readers[0][0]]
        return reader if reader.op_type == op else None
