"""What onnxruntime made of a lowered model: which precision each node really runs in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx

from trtune.precision.runtime.api import UNKNOWN
from trtune.precision.runtime.not_honoured import PRECISION_OF_DTYPE

FLOAT_OUT = frozenset({"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
INTEGER_KERNELS = frozenset(
    (
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
    )
)
ABSORBED = frozenset(
    ("Add", "Clip", "LeakyRelu", "Mul", "QuantizeLinear", "Relu", "Sigmoid", "Tanh")
)
"""What onnxruntime may fold into the node before it."""


def read_precisions(
    original: onnx.ModelProto, lowered: onnx.ModelProto, optimized: onnx.ModelProto
) -> dict[str, str]:
    """What each node of `original` runs in, read from what onnxruntime made of `lowered`.

    A node is found by its name, else by the tensor it makes, else as absorbed: into the Q or
    activation behind it, or, an activation, into its producer. "unknown" if all of that fails,
    as for nodes that were computed beforehand; nodes on integers have their numpy type.
    """
    dtypes = {**_dtypes(lowered.graph), **_dtypes(optimized.graph)}
    kernels, makers = _kernels(optimized.graph, dtypes)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in lowered.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    made_by = {t: node.name for node in original.graph.node for t in node.output}
    found: dict[str, str] = {}
    for node in original.graph.node:
        precision = kernels.get(node.name) or _downstream(node.output, makers, readers)
        if precision is None and node.op_type in ABSORBED:
            precision = found.get(made_by.get(node.input[0], ""))
        found[node.name] = precision or UNKNOWN
    return found


def _downstream(
    tensors: Iterable[str],
    makers: Mapping[str, str],
    readers: Mapping[str, Sequence[onnx.NodeProto]],
) -> str | None:
    waiting = list(tensors)
    for tensor in waiting:
        if tensor in makers:
            return makers[tensor]
        for reader in readers.get(tensor, ()):
            if reader.op_type in ABSORBED:
                waiting.extend(t for t in reader.output if t not in waiting)
    return None


def _kernels(
    graph: onnx.GraphProto, dtypes: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What each node of a graph that onnxruntime wrote runs in, by its name and by its outputs.

    That is the type of its first input; where `dtypes` lacks it (onnxruntime writes the types of
    few tensors) it is followed from node to node.
    """
    holds = {name: PRECISION_OF_DTYPE.get(dtype, dtype) for name, dtype in dtypes.items()}
    by_name: dict[str, str] = {}
    by_output: dict[str, str] = {}
    for node in graph.node:
        integer = node.op_type.startswith("QLinear") or node.op_type in INTEGER_KERNELS
        runs = "int8" if integer else holds.get(node.input[0] if node.input else "", UNKNOWN)
        made = runs
        if node.op_type in FLOAT_OUT:
            made = "fp32"
        elif node.op_type == "QuantizeLinear":
            made = "int8"
        by_name[node.name] = runs
        for tensor in node.output:
            by_output[tensor] = runs
            holds.setdefault(tensor, made)
    return by_name, by_output


def _dtypes(graph: onnx.GraphProto) -> dict[str, str]:
    kinds = {i.name: i.type.tensor_type.elem_type for i in (*graph.value_info, *graph.input)}
    kinds.update({t.name: t.data_type for t in graph.initializer})
    return {
        name: onnx.helper.tensor_dtype_to_np_dtype(kind).name
        for name, kind in kinds.items()
        if kind
    }
