"""The networks of the double: layers as TensorRT's parser makes them from a real ONNX file."""

from __future__ import annotations

from typing import Any

import onnx
from trtstrict import new

LAYER_TYPES = {
    **{"Conv": "CONVOLUTION", "ConvTranspose": "DECONVOLUTION", "TopK": "TOPK", "Shape": "SHAPE"},
    **{
        "Gemm": "MATRIX_MULTIPLY",
        "MatMul": "MATRIX_MULTIPLY",
        "Cast": "CAST",
        "Concat": "CONCATENATION",
    },
    **{"Relu": "ACTIVATION", "Sigmoid": "ACTIVATION", "Clip": "ACTIVATION", "Tanh": "ACTIVATION"},
    **{"Add": "ELEMENTWISE", "Mul": "ELEMENTWISE", "Div": "ELEMENTWISE", "Softmax": "SOFTMAX"},
    **{"QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Constant": "CONSTANT"},
    **{"Reshape": "SHUFFLE", "Flatten": "SHUFFLE", "Transpose": "SHUFFLE", "Gather": "GATHER"},
    **{"GlobalAveragePool": "REDUCE", "ReduceMean": "REDUCE", "MaxPool": "POOLING"},
}
TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL"}
FLOAT8 = 17


class OfNetwork:
    def _get_num_layers(self) -> int:
        return len(self._layers)

    def _do_get_layer(self, index: int) -> Any:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)


class OfLayer:
    def _get_num_inputs(self) -> int:
        return len(self._ins)

    def _get_num_outputs(self) -> int:
        return len(self._outs)

    def _do_get_input(self, index: int) -> Any:
        return self._ins[index]

    def _do_get_output(self, index: int) -> Any:
        return self._outs[index]

    def _put_precision(self, value: Any) -> None:
        self._world.events.append("precision")
        if self._world.refuses_pins:  # the real one logs, and does not raise
            text = "ILayer::setPrecision: Error Code 3: API Usage Error (Parameter check failed)"
            self._world.logger.log(self._trt.ILogger.ERROR, text)

    def _do_set_output_type(self, index: int, dtype: Any) -> None:
        self._world.events.append("set_output_type")
        self._types[index] = dtype


class OfTensor:
    def _get_dtype(self) -> Any:
        return getattr(self._trt.DataType, self._kind)

    def _get_is_shape_tensor(self) -> bool:
        return bool(self._network._complete and self._computes_shape)


class OfParser:
    def _start(self, network: Any, logger: Any) -> None:
        self._network, self._errors = network, []

    def _get_num_errors(self) -> int:
        return len(self._errors)

    def _do_get_error(self, index: int) -> Any:
        return self._errors[index]

    def _do_parse_from_file(self, path: str) -> bool:
        proto = onnx.shape_inference.infer_shapes(onnx.load(path))
        for index, node in enumerate(proto.graph.node):
            if node.op_type in self._world.unsupported:
                state = {"index": index, "name": node.name, "op": node.op_type}
                self._errors.append(new(self._trt.ParserError, **state))
        if not self._errors:
            fill(self._trt, self._network, proto)
        return not self._errors


class OfParserError:
    def _do_node(self) -> int:
        return int(self._index)

    def _do_node_name(self) -> str:
        return str(self._name)

    def _do_node_operator(self) -> str:
        return str(self._op)

    def _do_desc(self) -> str:
        return f"No importer registered for op: {self._op}"


class Filling:
    """A network in the making from an ONNX graph, layer by layer as the parser goes."""

    def __init__(self, trt: Any, network: Any, graph: onnx.GraphProto) -> None:
        self.trt, self.network = trt, network
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        infos = (*graph.input, *graph.value_info, *graph.output)
        self.types = {info.name: info.type.tensor_type for info in infos}
        self.tensors: dict[str, Any] = {}

    def tensor(self, name: str, codes: str = "", computes_shape: bool = False) -> Any:
        """The tensor called `name`, made at first sight."""
        if name not in self.tensors:
            typed = self.types.get(name)
            element = typed.elem_type if typed is not None else 1
            if name in self.weights:
                element = self.weights[name].data_type
            dims = () if typed is None else typed.shape.dim
            self.tensors[name] = new(
                self.trt.ITensor,
                name=name,
                kind=TYPES.get(element, "FLOAT"),
                shape=[dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims],
                network=self.network,
                computes_shape=computes_shape,
                dequantized=codes,
            )
        return self.tensors[name]

    def codes(self, node: onnx.NodeProto) -> str:
        """What a DequantizeLinear reads, int8 or fp8; empty for other nodes."""
        if node.op_type != "DequantizeLinear":
            return ""
        zero = self.weights.get((*node.input, "", "")[2])
        return "fp8" if zero is not None and zero.data_type == FLOAT8 else "int8"

    def layer(self, kind: str, ins: list[Any], outs: list[Any], node: Any = None) -> None:
        """A layer with the node's name and metadata, or one that the parser adds."""
        unnamed = f"(Unnamed Layer* {len(self.network._layers)}) [{kind.title()}]"
        made = new(
            self.trt.ILayer,
            name=unnamed if node is None else node.name,
            type=getattr(self.trt.LayerType, kind),
            metadata="" if node is None else f"[ONNX Layer: {node.name}]",
            ins=ins,
            outs=outs,
            types={},
            node="" if node is None else node.name,
            op="" if node is None else node.op_type,
            precision=None,
        )
        self.network._layers.append(made)

    def node(self, node: onnx.NodeProto) -> None:
        """The layers of one node: constants for the weights it reads, itself, a bias."""
        weighted = node.op_type in ("Conv", "ConvTranspose")
        sources = [t for t in node.input if t and not (weighted and t in self.weights)]
        for name in sources:
            if name in self.weights and name not in self.tensors:
                self.layer("CONSTANT", [], [self.tensor(name)])
        reads = [self.tensor(name) for name in sources]
        moving = [tensor for tensor in reads if tensor.name not in self.weights]
        shapes = node.op_type == "Shape" or (
            bool(moving) and all(tensor._computes_shape for tensor in moving)
        )
        makes = [self.tensor(name, self.codes(node), shapes) for name in node.output if name]
        kind = LAYER_TYPES.get(node.op_type, "IDENTITY")
        if node.op_type == "Gemm" and len(reads) == 3:
            inner = self.tensor(f"(Unnamed Layer* {len(self.network._layers)}) output")
            self.layer(kind, reads[:2], [inner], node)
            self.layer("ELEMENTWISE", [inner, reads[2]], makes)
        else:
            self.layer(kind, reads, makes, node)


def fill(trt: Any, network: Any, proto: onnx.ModelProto) -> None:
    """All layers of a model; only then is the network complete."""
    filling = Filling(trt, network, proto.graph)
    inputs = [info.name for info in proto.graph.input if info.name not in filling.weights]
    network._inputs.extend(map(filling.tensor, inputs))
    for node in proto.graph.node:
        filling.node(node)
    network._outputs.extend(filling.tensor(info.name) for info in proto.graph.output)
    object.__setattr__(network, "_proto", proto)
    object.__setattr__(network, "_complete", True)
