"""NVIDIA's own FP8 operators, from before ONNX had the type, as those of ONNX.

`trt::TRT_FP8QuantizeLinear` and `trt::TRT_FP8DequantizeLinear` compute what those do with a zero
point of float8 E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from trtune.calibrate.float8 import float8_dtype
from trtune.precision.graph.proto import FreshNames, copy_model, names_in, replace_field
from trtune.precision.graph.view import Model
from trtune.precision.lower.casts import raise_opset
from trtune.precision.lower.rewrite import FLOAT8_IR
from trtune.precision.plan.float8 import OPSET
from trtune.precision.quantized.findings import EXACT, Finding, finding

OWN_OPERATORS: Mapping[str, str] = {
    "TRT_FP8QuantizeLinear": "QuantizeLinear",
    "TRT_FP8DequantizeLinear": "DequantizeLinear",
}


def with_standard_float8(model: Model) -> tuple[Model, tuple[Finding, ...]]:
    """`model` with ONNX's operators in the place of NVIDIA's own, and a finding for each; itself if
    there are none.

    Raises ModelError if the rest of it cannot be written in the opset that has float8.
    """
    own = {node.name: node for node in model.proto.graph.node if node.op_type in OWN_OPERATORS}
    if not own:
        return model, ()
    bare = copy_model(model.proto)
    for node in bare.graph.node:
        if node.name in own:  # the converter knows no others than ONNX's
            node.op_type, node.domain = "Abs", ""
            del node.input[1:]
            del node.attribute[:]
    _forget(bare.graph, own)
    raised = raise_opset(replace(model, proto=bare), OPSET)
    proto = copy_model(raised.proto)
    zero = FreshNames(names_in(proto.graph)).new("float8_zero_point")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), float8_dtype()), zero))
    for node in proto.graph.node:
        if node.name in own:
            before = own[node.name]
            node.op_type = OWN_OPERATORS[before.op_type]
            node.input.extend([before.input[1], zero])
            node.attribute.extend(entry for entry in before.attribute if entry.name == "axis")
    _forget(proto.graph, own)
    kept = [entry for entry in proto.opset_import if entry.domain != "trt"]
    replace_field(proto.opset_import, kept)
    proto.ir_version = max(proto.ir_version, FLOAT8_IR)
    rows = tuple(
        finding(name, "own-fp8", f"trt::{node.op_type}", OWN_OPERATORS[node.op_type], EXACT)
        for name, node in own.items()
    )
    return replace(raised, proto=proto), rows


def _forget(graph: onnx.GraphProto, nodes: Mapping[str, onnx.NodeProto]) -> None:
    """Take out what is said of the types of the outputs of `nodes`."""
    made = {output for node in nodes.values() for output in node.output}
    replace_field(graph.value_info, [info for info in graph.value_info if info.name not in made])
