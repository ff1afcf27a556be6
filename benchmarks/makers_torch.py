"""A small ONNX network as a torch module, for quantizers that take nothing else.

Convolutions, matrix products and activations become modules of their own, which is what they
replace; Adds are `FloatFunctional`s, which eager quantization asks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional


class Run(nn.Module):
    """One operator without weights as a module, so that what traces sees a leaf."""

    def __init__(self, kind: str, attributes: dict[str, Any], constants: list[Tensor]) -> None:
        super().__init__()
        self.kind, self.attributes = kind, attributes
        for k, value in enumerate(constants):
            self.register_buffer(f"constant{k}", value)

    def forward(self, *inputs: Tensor) -> Tensor:
        a = self.attributes
        match self.kind:
            case "GlobalAveragePool":
                return inputs[0].mean((2, 3), keepdim=True)
            case "ReduceMean":
                return inputs[0].mean(tuple(a["axes"]), keepdim=bool(a.get("keepdims", 1)))
            case "Flatten":
                return torch.flatten(inputs[0], 1)
            case "Transpose":
                return inputs[0].permute(*a["perm"])
            case "MatMul":
                return torch.matmul(inputs[0], inputs[1])
            case "Mul":
                return inputs[0] * self.constant0
            case "Add":
                return inputs[0] + self.constant0
        raise NotImplementedError(self.kind)


def module_of(proto: onnx.ModelProto) -> torch.fx.GraphModule:
    """`proto` in torch, for inference. Raises NotImplementedError for an operator not listed."""
    return _Builder(proto).build()


class _Builder:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        graph = proto.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.root = nn.Module()
        self.graph = torch.fx.Graph()
        self.values: dict[str, Any] = {}

    def build(self) -> torch.fx.GraphModule:
        graph = self.proto.graph
        for info in graph.input:
            if info.name not in self.constants:
                self.values[info.name] = self.graph.placeholder(info.name)
        skip: set[str] = set()
        for node in graph.node:
            if node.op_type != "Constant" and node.output[0] not in skip:
                self._add(node, skip)
        self.graph.output(self.values[graph.output[0].name])
        made = torch.fx.GraphModule(self.root, self.graph)
        return made.eval()

    def _add(self, node: onnx.NodeProto, skip: set[str]) -> None:
        name = "m_" + node.output[0].replace(".", "_").replace("/", "_").replace(":", "_")
        data = [self.values[t] for t in node.input if t in self.values]
        if node.op_type == "Add" and len(data) == 2:
            self.root.add_module(name, FloatFunctional())
            holder = self.graph.get_attr(name)
            made = self.graph.call_method("add", (holder, *data))
        else:
            self.root.add_module(name, self._module(node, skip))
            made = self.graph.call_module(name, tuple(data))
        self.values[node.output[0]] = made
        for tensor in skip:
            self.values.setdefault(tensor, made)

    def _module(self, node: onnx.NodeProto, skip: set[str]) -> nn.Module:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        held = [self.constants[t] for t in node.input if t in self.constants]
        match node.op_type:
            case "Conv":
                return _conv(attributes, held)
            case "Gemm":
                return _linear(held[0] if attributes.get("transB") else held[0].T, held[1])
            case "MatMul" if held:
                bias = self._bias_behind(node)
                skip.update([bias.output[0]] if bias is not None else [])
                added = None if bias is None else self._constants_of(bias)[0]
                return _linear(held[0].T, added)
            case "Relu":
                return nn.ReLU()
            case "Clip":
                return nn.ReLU6() if float(held[-1]) == 6 else nn.Hardtanh(*map(float, held))
            case "Softmax":
                return nn.Softmax(attributes.get("axis", -1))
        tensors = [torch.from_numpy(np.array(value)) for value in held]
        return Run(node.op_type, attributes, tensors)

    def _constants_of(self, node: onnx.NodeProto) -> list[np.ndarray[Any, Any]]:
        return [self.constants[t] for t in node.input if t in self.constants]

    def _bias_behind(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        readers = [n for n in self.proto.graph.node if node.output[0] in n.input]
        one = len(readers) == 1 and readers[0].op_type == "Add"
        return readers[0] if one and self._constants_of(readers[0]) else None


def _conv(attributes: dict[str, Any], held: list[np.ndarray[Any, Any]]) -> nn.Conv2d:
    weight, group = held[0], attributes.get("group", 1)
    pads = attributes.get("pads", [0, 0, 0, 0])
    made = nn.Conv2d(
        weight.shape[1] * group, weight.shape[0], weight.shape[2:],
        stride=tuple(attributes.get("strides", [1, 1])), padding=tuple(pads[:2]), groups=group,
        bias=len(held) > 1,
    )  # fmt: skip
    return _filled(made, held)


def _linear(weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(made, [weight] if bias is None else [weight, bias])


def _filled(module: Any, held: list[np.ndarray[Any, Any]]) -> Any:
    with torch.no_grad():
        for parameter, value in zip((module.weight, module.bias), held, strict=False):
            parameter.copy_(torch.from_numpy(np.array(value)))
    return module
