"""The convolutions of a lowered model that integer kernels compute, to be given other constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    is_external,
    names_in,
    replace_field,
    used_tensors,
)


@dataclass(frozen=True, slots=True)
class IntegerConvolution:
    """A dense convolution of codes with constant int8 weights: it, what dequantizes its data and
    its weights, and the codes of these."""

    node: onnx.NodeProto
    data: onnx.NodeProto
    weight: onnx.NodeProto
    codes: onnx.TensorProto


def integer_convolutions(graph: onnx.GraphProto) -> list[IntegerConvolution]:
    """Those whose result goes into a QuantizeLinear and nowhere else, in graph order."""
    makers = {tensor: node for node in graph.node for tensor in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {info.name for info in graph.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node.op_type)
    found = []
    for node in graph.node:
        one = _dense(node, makers, constants)
        alone = one is not None and readers.get(node.output[0]) == ["QuantizeLinear"]
        if one is not None and alone and node.output[0] not in outputs:
            found.append(one)
    return found


def _dense(
    node: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> IntegerConvolution | None:
    if node.op_type != "Conv" or attribute(node, "group", 1) != 1:
        return None
    data, weight = (makers.get(name) for name in node.input[:2])
    for pair in (data, weight):
        if pair is None or pair.op_type != "DequantizeLinear" or len(pair.input) < 3:
            return None
    assert data is not None
    assert weight is not None
    codes = constants.get(weight.input[0])
    if codes is None or codes.data_type != onnx.TensorProto.INT8 or is_external(codes):
        return None
    return IntegerConvolution(node, data, weight, codes)


@dataclass(slots=True)
class Constants:
    """New nodes and constants of `graph`; `finish` puts them in, and takes out what nothing reads
    any more. What is made of the same weights once is shared."""

    graph: onnx.GraphProto
    _fresh: FreshNames = field(init=False)
    _before: dict[str, list[onnx.NodeProto]] = field(init=False, default_factory=dict)
    _weights: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._fresh = FreshNames(names_in(self.graph))

    def name(self, name: str) -> str:
        """`name`, or like it if that is taken."""
        return self._fresh.new(name)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """A new initializer; its name."""
        name = self.name(name)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def before(self, node: str, *nodes: onnx.NodeProto) -> None:
        """Let `nodes` stand before that of the name."""
        self._before.setdefault(node, []).extend(nodes)

    def reweight(
        self,
        one: IntegerConvolution,
        what: str,
        codes: NDArray[np.int8],
        zero_point: NDArray[np.int8] | None = None,
    ) -> None:
        """Let `one` read weights of these codes, named after its own and `what` they are."""
        source = one.weight.output[0]
        if source not in self._weights:
            other = onnx.NodeProto()
            other.CopyFrom(one.weight)
            other.name = self.name(f"{one.weight.name}/{what}")
            other.input[0] = self.constant(f"{one.codes.name}/{what}", codes)
            if zero_point is not None:
                other.input[2] = self.constant(f"{one.weight.input[2]}/{what}", zero_point)
            other.output[0] = self.name(f"{source}/{what}")
            self.before(one.node.name, other)
            self._weights[source] = other.output[0]
        one.node.input[1] = self._weights[source]

    def finish(self) -> None:
        """Change the graph."""
        graph = self.graph
        nodes = [n for old in graph.node for n in (*self._before.get(old.name, ()), old)]
        wanted = used_tensors(graph) | {name for node in nodes for name in node.input}
        kept = [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in wanted]
        replace_field(graph.node, kept)
        wanted = used_tensors(graph)
        replace_field(graph.initializer, [t for t in graph.initializer if t.name in wanted])
