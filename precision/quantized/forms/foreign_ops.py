"""Quantizers that are no operators of ONNX: what each is, as far as their names are known.

Some toolkits write operators of their own where ONNX had no type yet (TRT_FP8QuantizeLinear), or
keep fake quantization as one node (QONNX, OpenVINO). TensorRT parses the first kind alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import onnx

from trtune.precision.quantized.findings import Finding, finding

NVIDIA = "TRT_"
NVIDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {"MXFP8": "mxfp8", "FP8": "fp8", "INT4": "int4", "FP4": "fp4"}
)
"""How the names of NVIDIA's operators go on, and the type that it stands for."""
FAKE_QUANTIZERS = frozenset(
    {
        *("Quant", "BipolarQuant", "Trunc", "FakeQuantize", "FixedPoint"),
        *("ExtendedQuantizeLinear", "ExtendedDequantizeLinear", "ExtendedInstanceNormalization"),
        *("BFPQuantizeDequantize", "MXQuantizeDequantize", "FixNeuron", "BFPFixNeuron"),
    }
)
"""QONNX's and OpenVINO's; AMD Quark's."""
OWN = frozenset({"", "com.microsoft"})


def foreign_quantizers(proto: onnx.ModelProto) -> Iterator[Finding]:
    """A finding for each node of `proto` that quantizes with an operator ONNX does not have."""
    for node in proto.graph.node:
        kind = foreign_kind(node)
        if not kind or kind == "fp8":  # those are read as ONNX's
            continue
        where = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if kind == "foreign-quantizer":
            remedy = "export in Q/DQ form"
        else:
            remedy = "give the float model, to be quantized to int8 here"
        yield finding(node.name, kind, where, remedy)


def foreign_kind(node: onnx.NodeProto) -> str:
    """The kind of finding that a node is; "" if it is no foreign quantizer."""
    if node.op_type.startswith(NVIDIA):
        word = node.op_type.removeprefix(NVIDIA)
        return next((kind for name, kind in NVIDIA_TYPES.items() if word.startswith(name)), "")
    fake = node.op_type in FAKE_QUANTIZERS and node.domain not in OWN
    return "foreign-quantizer" if fake else ""
