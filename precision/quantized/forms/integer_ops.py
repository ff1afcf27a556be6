"""Integer operators written as QuantizeLinear and DequantizeLinear around float ones.

QLinearConv(x, w) = Q(Conv(DQ(x), DQ(w))): the same numbers but for the order in which a float sum
rounds. What takes its scales from the data at run time cannot be written so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

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
        self.nodes: list[onnx.NodeProto] = []
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
        if node.op_type in WITH_SCALES and node.domain == "":
            self.rewritten[node.name] = self._with_scales(node)
        elif node.op_type in FLOAT_OP and node.domain == "":
            made = self._integer_product(node)
            if made is None:
                self._refuse(node)
                return
            self.rewritten[node.name] = made
        else:
            self._refuse(node)
            return
        self.findings.append(
            finding(
                node.name,
                "integer-operator",
                node.op_type,
                f"{FLOAT_OP[node.op_type]} between DequantizeLinear and QuantizeLinear",
                EXACT,
            )
        )

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
