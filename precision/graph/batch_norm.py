"""Batch normalization behind a convolution, written into its weights and bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    inputs_of,
    is_external,
    names_in,
    replace_field,
    tensor_bytes,
    used_tensors,
)


def fold_batch_norms(
    model: onnx.ModelProto, external_dir: Path | None, *, room: int
) -> dict[str, str]:
    """Put each batch normalization into the Conv or ConvTranspose before it; gives norm -> conv.

    Only where nothing else reads what lies between them and all their constants are stored, in
    float32. Weights are multiplied in double precision and rounded once. What comes out of an
    external file, or is shared, is new in memory: up to `room` bytes of that.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: Counter[str] = Counter(name for node in graph.node for name in inputs_of(node))
    readers.update(output.name for output in graph.output)
    producer = {name: node for node in graph.node for name in node.output if name}
    names = FreshNames(names_in(graph))
    merged: dict[str, str] = {}
    replaced: dict[str, TensorProto] = {}
    for node in graph.node:
        conv = producer.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or readers[node.input[0]] != 1 or not _merges(node, conv, stored):
            continue
        weight = stored[conv.input[1]]
        room -= tensor_bytes(weight) if is_external(weight) or readers[weight.name] > 1 else 0
        found = _merged_values(node, conv, stored, external_dir) if room >= 0 else None
        if found is None:
            continue
        for slot, value in zip((1, 2), found, strict=True):
            old = conv.input[slot] if slot < len(conv.input) else ""
            own = old if old and readers[old] == 1 else names.new(old or f"{conv.name}/bias")
            replaced[own] = numpy_helper.from_array(value, own)
            readers[old] -= 1
            readers[own] = 1
            if slot < len(conv.input):
                conv.input[slot] = own
            else:
                conv.input.append(own)
            stored[own] = replaced[own]
        readers.subtract(node.input[1:])
        conv.output[0] = node.output[0]
        producer[node.output[0]] = conv
        merged[node.name] = conv.name
    if merged:
        _drop_merged(graph, merged, replaced)
    return merged


def _drop_merged(
    graph: onnx.GraphProto, merged: Mapping[str, str], replaced: Mapping[str, TensorProto]
) -> None:
    norms = [node for node in graph.node if node.name in merged]
    replace_field(graph.node, [node for node in graph.node if node.name not in merged])
    used = used_tensors(graph)
    old = {name for node in norms for name in node.input} - used
    weights = [replaced.get(t.name, t) for t in graph.initializer if t.name not in old]
    present = {tensor.name for tensor in weights}
    weights += [tensor for name, tensor in replaced.items() if name not in present]
    replace_field(graph.initializer, [t for t in weights if t.name in used or t.name in present])
    made = {name for node in graph.node for name in node.output}
    outputs = {output.name for output in graph.output}
    replace_field(
        graph.value_info,
        [info for info in graph.value_info if info.name in made and info.name not in outputs],
    )


def _merges(node: onnx.NodeProto, conv: onnx.NodeProto, stored: Mapping[str, TensorProto]) -> bool:
    """Whether a batch normalization can go into the node that makes its input."""
    constants = [*node.input[1:], *(name for name in conv.input[1:] if name)]
    return (
        node.domain == conv.domain == ""
        and conv.op_type in ("Conv", "ConvTranspose")
        and not attribute(node, "training_mode", 0)
        and sum(bool(name) for name in node.output) == 1
        and all(
            name in stored and stored[name].data_type == TensorProto.FLOAT for name in constants
        )
    )


def _merged_values(
    node: onnx.NodeProto,
    conv: onnx.NodeProto,
    stored: Mapping[str, TensorProto],
    external_dir: Path | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Weight and bias of the convolution with the normalization in it; None if not finite."""
    scale, shift, mean, variance = (
        constant_array(stored[name], external_dir).astype(np.float64) for name in node.input[1:5]
    )
    weight = constant_array(stored[conv.input[1]], external_dir)
    bias: Any = 0.0
    if len(conv.input) > 2 and conv.input[2]:
        bias = constant_array(stored[conv.input[2]], external_dir).astype(np.float64)
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
        if conv.op_type == "Conv":
            factors = factor.reshape(-1, *[1] * (weight.ndim - 1))
        else:  # input channels first, in groups; each has its share of the outputs
            groups = int(attribute(conv, "group", 1))
            each = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
            factors = each.reshape(*each.shape, *[1] * (weight.ndim - 2))
        found = (
            (weight * factors).astype(np.float32),
            ((bias - mean) * factor + shift).astype(np.float32),
        )
    return found if all(np.isfinite(value).all() for value in found) else None


def constant_array(tensor: TensorProto, external_dir: Path | None) -> NDArray[Any]:
    """The values of `tensor`, which may lie in a file under `external_dir`."""
    return numpy_helper.to_array(tensor, str(external_dir or ""))
