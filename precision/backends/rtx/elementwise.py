"""Sums and products of elements that read nothing but codes, as a quantized graph has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from trtune.precision.graph.proto import attribute
from trtune.precision.plan.placement import carries
from trtune.precision.plan.plan import ELEMENTWISE_OPS


@dataclass(frozen=True, slots=True)
class ReadCodes:
    """What a node reads of all its inputs: int8 or fp8 codes, and the DequantizeLinears that they
    come through."""

    precision: str
    dequantizers: frozenset[str]


def read_as_codes(
    graph: onnx.GraphProto, nodes: Iterable[str] | None = None
) -> dict[str, ReadCodes]:
    """The operators on elements in `graph`, of `nodes` if those are given, whose inputs are all
    dequantized data, directly or behind operators that move them."""
    makers = {output: node for node in graph.node for output in node.output if output}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    wanted = None if nodes is None else {*nodes}
    found = {}
    for node in graph.node:
        if node.op_type not in ELEMENTWISE_OPS or (wanted is not None and node.name not in wanted):
            continue
        sides = [_dequantizers(makers, kinds, name) for name in node.input]
        if len(sides) > 1 and all(sides):
            made = {n.name: n for side in sides for n in side}
            types = {_codes(makers, kinds, n) for n in made.values()}
            if len(types) == 1:
                found[node.name] = ReadCodes(types.pop(), frozenset(made))
    return found


def _dequantizers(
    makers: Mapping[str, onnx.NodeProto], kinds: Mapping[str, int], tensor: str
) -> list[onnx.NodeProto]:
    """The DequantizeLinears of data whose values `tensor` holds; [] if some come from elsewhere."""
    node = makers.get(tensor)
    if node is None:
        return []
    if node.op_type == "DequantizeLinear":
        return [] if node.input[0] in kinds else [node]
    moving = [k for k in range(len(node.input)) if carries(node, k)]
    if node.op_type == "Cast":
        moving = [0]
    sides = [_dequantizers(makers, kinds, node.input[k]) for k in moving]
    return [n for side in sides for n in side] if all(sides) else []


def _codes(
    makers: Mapping[str, onnx.NodeProto], kinds: Mapping[str, int], node: onnx.NodeProto
) -> str:
    """int8 or fp8, by the zero point of a DequantizeLinear, or by what the codes are made as."""
    maker = makers.get(node.input[0])
    made = 0 if maker is None else int(attribute(maker, "output_dtype", 0))
    zero = kinds.get(node.input[2], 0) if len(node.input) > 2 else 0
    return "fp8" if onnx.TensorProto.FLOAT8E4M3FN in (zero, made) else "int8"
