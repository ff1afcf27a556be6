"""Inserting quantization into a copy of a model: what the lowerings have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.precision.graph import GraphView, Model

QMAX = 127


def weight_scales(weights: NDArray[np.floating[Any]], axis: int) -> NDArray[np.float32]:
    """Symmetric scales, max|w| / 127 of each channel along `axis`, float32 of shape (channels,).

    A channel of zeros gets scale 1: any positive one is exact there, and zero is not allowed.

    >>> weight_scales(np.float32([[1.27, -0.5], [0, 0]]), 0).tolist()
    [0.009999999776482582, 1.0]
    """
    rest = tuple(i for i in range(weights.ndim) if i != axis)
    amax = np.abs(weights).max(axis=rest, initial=0).astype(np.float32)
    scales: NDArray[np.float32] = amax / np.float32(QMAX)
    # A subnormal scale would make w / scale overflow or lose all precision.
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def quantize_weights(
    weights: NDArray[np.floating[Any]], scales: NDArray[np.float32], axis: int
) -> NDArray[np.int8]:
    """int8 codes: w / scale rounded half to even, within -127..127; the shape of `weights`."""
    shape = [1] * weights.ndim
    shape[axis] = -1
    codes = np.rint(weights.astype(np.float32) / scales.reshape(shape))
    return np.clip(codes, -QMAX, QMAX).astype(np.int8)


class Rewrite:
    """Edits on a copy of a model; `finish` gives it, sorted and without unused weights.

    New tensors and nodes are named after the tensor they belong to, so that the same plan and
    table give the same bytes.
    """

    def __init__(self, model: Model, view: GraphView) -> None:
        self.view = view
        self._model = model
        self._nodes = {node.name: _copy(node) for node in view.nodes}
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._after: dict[str, list[onnx.NodeProto]] = {}
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._weights: dict[tuple[str, int], str] = {}
        self._removed: set[str] = set()
        self._shields: dict[str, list[onnx.NodeProto]] = {}

    def node(self, name: str) -> onnx.NodeProto:
        """The copy of a node, to be changed in place."""
        return self._nodes[name]

    def reconnect(self, edge: tuple[str, int], tensor: str) -> None:
        """Let a node read `tensor` at an input."""
        self._nodes[edge[0]].input[edge[1]] = tensor

    def remove(self, name: str) -> None:
        """Take a node out."""
        self._removed.add(name)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer with `value`, made once."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def quantize_pair(
        self, tensor: str, scale: float, zero_point: int, dtype: type[Any], *, source: str = ""
    ) -> str:
        """QuantizeLinear and DequantizeLinear behind `tensor`; the name of the result.

        The scale is a 0-d float32: one of shape [1] makes TensorRT compute everything in float
        without a word. `source` is what the pair reads where that is not `tensor` itself.
        """
        result = f"{tensor}/dequantized"
        if any(node.output[0] == result for node in self._after.get(tensor, ())):
            return result
        scale_name = self.constant(f"{tensor}/scale", np.array(scale, np.float32))
        zero_name = self.constant(f"{tensor}/zero_point", np.array(zero_point, dtype))
        codes = f"{tensor}/quantized"
        pair = [
            helper.make_node(
                "QuantizeLinear",
                [source or tensor, scale_name, zero_name],
                [codes],
                name=f"{tensor}/QuantizeLinear",
            ),
            helper.make_node(
                "DequantizeLinear",
                [codes, scale_name, zero_name],
                [result],
                name=f"{tensor}/DequantizeLinear",
            ),
        ]
        self._after.setdefault(tensor, []).extend(pair)
        return result

    def quantized_weight(self, name: str, axis: int) -> str:
        """The initializer `name` as int8 codes behind a DequantizeLinear; the result's name."""
        if (name, axis) in self._weights:
            return self._weights[name, axis]
        value = self.view.constant(name)
        scales = weight_scales(value, axis)
        suffix = "" if all(known != name for known, _ in self._weights) else f"/axis{axis}"
        codes = self.constant(f"{name}/int8{suffix}", quantize_weights(value, scales, axis))
        inputs = [
            codes,
            self.constant(f"{name}/scale{suffix}", scales),
            self.constant(f"{name}/zero_point{suffix}", np.zeros(scales.shape, np.int8)),
        ]
        return self._first(name, axis, inputs, suffix)

    def _first(self, name: str, axis: int, inputs: Sequence[str], suffix: str) -> str:
        result = f"{name}/dequantized{suffix}"
        node = helper.make_node(
            "DequantizeLinear",
            inputs,
            [result],
            name=f"{name}/DequantizeLinear{suffix}",
            axis=axis,
        )
        self._before.setdefault("", []).append(node)
        self._weights[name, axis] = result
        return result

    def dequantized_constant(
        self, name: str, codes: NDArray[Any], scales: NDArray[np.float32]
    ) -> str:
        """A one-dimensional integer constant behind a DequantizeLinear (an int32 bias)."""
        zero = np.zeros(scales.shape, codes.dtype)
        inputs = [
            self.constant(f"{name}/codes", codes),
            self.constant(f"{name}/scale", scales),
            self.constant(f"{name}/zero_point", zero),
        ]
        if not any(node.output[0] == f"{name}/dequantized" for node in self._before.get("", ())):
            node = helper.make_node(
                "DequantizeLinear",
                inputs,
                [f"{name}/dequantized"],
                name=f"{name}/DequantizeLinear",
                axis=0,
            )
            self._before.setdefault("", []).append(node)
        return f"{name}/dequantized"

    def shield(self, node: str, index: int) -> None:
        """Put a Max of one tensor before an input: it changes nothing, and no optimizer takes it
        away, so that what lies behind it is not seen together with what lies before."""
        tensor = self._nodes[node].input[index]
        result = f"{node}/shielded{index}"
        shield = helper.make_node("Max", [tensor], [result], name=f"{node}/Max{index}")
        self._shields.setdefault(node, []).append(shield)
        self.reconnect((node, index), result)

    def finish(self) -> onnx.ModelProto:
        """The rewritten model."""
        model = onnx.ModelProto()
        source = self._model.proto
        model.ir_version = source.ir_version
        model.producer_name, model.producer_version = "trtune", source.producer_version
        model.opset_import.extend(source.opset_import)
        model.metadata_props.extend(source.metadata_props)
        model.functions.extend(source.functions)
        graph, old = model.graph, source.graph
        graph.name, graph.doc_string = old.name, old.doc_string
        graph.input.extend(old.input)
        graph.output.extend(old.output)
        graph.value_info.extend(old.value_info)
        graph.node.extend(self._sorted_nodes())
        used = {name for node in graph.node for name in node.input}
        used |= {output.name for output in graph.output} | _captured_names(graph)
        graph.initializer.extend(
            entry
            for entry in [*old.initializer, *self._initializers.values()]
            if entry.name in used
        )
        graph.sparse_initializer.extend(old.sparse_initializer)
        return model

    def _sorted_nodes(self) -> list[onnx.NodeProto]:
        nodes = list(self._before.get("", ()))
        for name in self.view.graph_inputs:
            nodes.extend(self._after.get(name, ()))
        for old in self.view.nodes:
            if old.name not in self._removed:
                nodes.extend(self._shields.get(old.name, ()))
                nodes.append(self._nodes[old.name])
            for name in old.output:
                nodes.extend(self._after.get(name, ()))
        return nodes


def _captured_names(graph: onnx.GraphProto) -> set[str]:
    """Names that subgraphs read."""
    found: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                found |= {name for sub in inner.node for name in sub.input} | _captured_names(inner)
    return found


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
