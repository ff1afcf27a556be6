"""What helps where TensorRT-RTX does not take a quantized node as it stands.

It may refuse one outright: that node loses its Q/DQ. Or it takes a product apart in an
optimization of its own, and computes it in float without a word: a Clip that changes nothing keeps
it together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import onnx
from onnx import TensorProto, helper

from trtune.precision.backends.rtx.log import FLOATS
from trtune.precision.backends.rtx.support import FLOAT_ONLY
from trtune.precision.graph.proto import copy_of, replace_field
from trtune.precision.plan.plan import COMPILER, PrecisionPlan

REFUSAL = re.compile(r"could not find any implementation for|cannot compile operation", re.I)
PRODUCTS = ("MatMul", "Gemm", "Conv")
LARGEST: Mapping[int, float] = MappingProxyType(
    {
        TensorProto.FLOAT: float.fromhex("0x1.fffffep+127"),
        TensorProto.FLOAT16: 65504.0,
        TensorProto.BFLOAT16: float.fromhex("0x1.fep+127"),
    }
)
"""The largest finite value of each type."""


def refused_nodes(problems: Sequence[str], plan: PrecisionPlan) -> dict[str, str]:
    """The quantized nodes that the compiler says it cannot build -> its words."""
    found: dict[str, str] = {}
    for problem in problems:
        if not REFUSAL.search(problem):
            continue
        for node in plan.quantized_nodes:
            if re.search(rf"(?<![\w/.]){re.escape(node)}(?![\w/])", problem):
                found.setdefault(node, " ".join(problem.split())[:300])
    return found


def unquantized(plan: PrecisionPlan, nodes: Mapping[str, str]) -> PrecisionPlan:
    """`plan` with `nodes` in its fallback; the reasons are the words of the compiler."""
    what = "TensorRT-RTX has no INT8 implementation of it"
    reasons = {node: f"{what}: {words}" for node, words in nodes.items()}
    return plan.without_int8(reasons, origin=COMPILER)


def without_float_only(
    model: onnx.ModelProto, plan: PrecisionPlan, operators: Collection[str] = FLOAT_ONLY
) -> PrecisionPlan:
    """`plan` without int8 for the nodes of `operators`, which the compiler has in float only: pairs
    around them would cost and give nothing."""
    ops = {node.name: node.op_type for node in model.graph.node}
    reasons = {
        node: f"TensorRT-RTX computes every {ops[node]} in float"
        for node in plan.quantized_nodes
        if ops[node] in operators
    }
    return plan.without_int8(reasons, origin=COMPILER)


def torn_apart(
    model: onnx.ModelProto, plan: PrecisionPlan, precisions: Mapping[str, str]
) -> tuple[str, ...]:
    """Planned-int8 products that came out in float though the compiler has INT8 for their kind.

    It moves a Split behind a product to before it, onto the weights, and no longer sees that those
    were quantized: the joint projection of an attention to query, key and value.
    """
    operators = {node.name: node.op_type for node in model.graph.node}
    return tuple(
        node
        for node in plan.quantized_nodes
        if operators[node] in PRODUCTS and precisions[node] in FLOATS
    )


def insert_guards(proto: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Put a Clip to the whole range of its type behind each of `nodes`, in place.

    It changes no finite value, and the compiler moves nothing past it. A node whose weights do not
    come from a DequantizeLinear is left alone.
    """
    graph = proto.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    scales = {
        node.output[0]: kinds.get(node.input[1], 0)
        for node in graph.node
        if node.op_type == "DequantizeLinear"
    }
    result: list[onnx.NodeProto] = []
    for node in graph.node:
        copy = copy_of(node)
        result.append(copy)
        kind = scales.get(node.input[1], 0) if node.name in nodes else 0
        if kind in LARGEST:
            result.append(_guard(graph, copy, kind))
    replace_field(graph.node, result)


def _guard(graph: onnx.GraphProto, node: onnx.NodeProto, kind: int) -> onnx.NodeProto:
    """The Clip behind `node`, whose output gets another name."""
    output = node.output[0]
    node.output[0] = f"{output}/unguarded"
    bounds = {f"{output}/least": -LARGEST[kind], f"{output}/greatest": LARGEST[kind]}
    graph.initializer.extend(
        helper.make_tensor(name, kind, [], [value]) for name, value in bounds.items()
    )
    return helper.make_node("Clip", [node.output[0], *bounds], [output], name=f"{node.name}/guard")
