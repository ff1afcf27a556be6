"""Q/DQ with an axis in an opset that does not know one: put aside to be read, and back again."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE


def drop_axis(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Mapping[str, int]]:
    """A copy of `proto` without the `axis` of Q/DQ, which older opsets do not know, and the axes by
    the tensor that the node makes."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    axes: dict[str, int] = {}
    for node in model.graph.node:
        for entry in list(node.attribute):
            if node.op_type in (QUANTIZE, DEQUANTIZE) and entry.name == "axis":
                axes[node.output[0]] = int(entry.i)
                node.attribute.remove(entry)
    return model, axes


def restore_axis(proto: onnx.ModelProto, axes: Mapping[str, int]) -> onnx.ModelProto:
    """A copy of `proto` with the axes that `drop_axis` took away."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    for node in model.graph.node:
        if node.output[0] in axes:
            node.attribute.append(helper.make_attribute("axis", axes[node.output[0]]))
    return model
