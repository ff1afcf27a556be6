"""Shapes and types of inner tensors, as far as they can be known without running the model."""

from __future__ import annotations

import onnx

from trtune.precision.graph.proto import replace_field, without_weights


def infer_shapes(model: onnx.ModelProto) -> str | None:
    """Fill `value_info` with every type and shape that can be known without running the model."""
    graph = model.graph
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"shape inference failed, so some shapes are unknown: {reason[:200]}"
    known = {info.name: info for info in inferred.value_info}
    outputs = {output.name for output in graph.output}
    inner = [name for node in graph.node for name in node.output if name not in outputs]
    replace_field(graph.value_info, [known[name] for name in inner if name in known])
    for output, found in zip(graph.output, inferred.output, strict=True):
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(found)
    return None
