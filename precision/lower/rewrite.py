"""Inserting quantization into a copy of a model: what the lowerings have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.calibrate.float8 import float8_codes, float8_dtype, float8_weight_scales
from trtune.configs.errors import ModelError
from trtune.precision.graph.proto import FreshNames, copy_fields, copy_of, names_in, used_tensors
from trtune.precision.graph.view import GraphView, Model

QMAX = 127
FLOAT8_IR = 9
"""The first version of the file format that holds float8."""


def weight_scales(
    weights: NDArray[np.floating[Any]],
    axis: int,
    *,
    least: NDArray[np.floating[Any]] | None = None,
) -> NDArray[np.float32]:
    """Symmetric scales, max|w| / 127 of each channel along `axis`, float32 of shape (channels,).

    A channel of zeros gets scale 1: any positive one is exact there, and zero is not allowed.
    None is below that of `least`, which has the same shape.

    >>> weight_scales(np.float32([[1.27, -0.5], [0, 0]]), 0).tolist()
    [0.009999999776482582, 1.0]
    """
    rest = tuple(i for i in range(weights.ndim) if i != axis)
    amax = np.abs(weights).max(axis=rest, initial=0).astype(np.float32)
    scales: NDArray[np.float32] = amax / np.float32(QMAX)
    if least is not None:
        scales = np.maximum(scales, least.astype(np.float32))
    # A subnormal scale would make w / scale overflow or lose all precision.
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def quantize_weights(
    weights: NDArray[np.floating[Any]],
    scales: NDArray[np.float32],
    axis: int,
    *,
    lowest: int = -QMAX,
) -> NDArray[np.int8]:
    """int8 codes: w / scale rounded half to even, within lowest..127; the shape of `weights`."""
    shape = [1] * weights.ndim
    shape[axis] = -1
    codes = np.rint(weights.astype(np.float32) / scales.reshape(shape))
    quantized: NDArray[np.int8] = np.clip(codes, lowest, QMAX).astype(np.int8)
    return quantized


class Rewrite:
    """Edits on a copy of a model; `finish` gives it, sorted and without unused weights.

    New tensors and nodes are named after what they belong to, so that the same plan and table give
    the same bytes; a name that the model has already gets a number. `weights` are the scales of
    `CalibrationTable.weights`, `float8` those of its `float8_weights`.
    """

    def __init__(
        self,
        model: Model,
        view: GraphView,
        weights: Mapping[str, Sequence[float]] = MappingProxyType({}),
        float8: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> None:
        self.view = view
        self._given, self._float8 = weights, float8
        self._model = model
        self._nodes = {node.name: copy_of(node) for node in view.nodes}
        self._fresh = FreshNames(names_in(model.proto.graph)).new
        self._first: list[onnx.NodeProto] = []
        self._after: dict[str, list[onnx.NodeProto]] = {}
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._pairs: dict[tuple[str, str], str] = {}
        self._weights: dict[tuple[str, int, str, bytes], str] = {}
        self._removed: set[str] = set()
        self._before: dict[str, list[onnx.NodeProto]] = {}

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
        """A new initializer with `value`; its name is `name`, or like it."""
        name = self._fresh(name)
        self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def quantize_pair(
        self,
        tensor: str,
        scale: float,
        zero_point: int,
        dtype: type[Any] | np.dtype[Any],
        *,
        before: str = "",
    ) -> str:
        """QuantizeLinear and DequantizeLinear behind `tensor`, once a type; the name of the result.

        With `before` they stand before that node, as what made `tensor` does. The scale is a 0-d
        float32: one of shape [1] makes TensorRT compute everything in float without a word.
        Raises ValueError unless it is above zero.
        """
        key = (tensor, np.dtype(dtype).name)
        if key not in self._pairs:
            pair = self._pair(tensor, scale, zero_point, dtype)
            places = self._before if before else self._after
            places.setdefault(before or tensor, []).extend(pair)
            self._pairs[key] = pair[-1].output[0]
        return self._pairs[key]

    def _pair(
        self, tensor: str, scale: float, zero_point: int, dtype: type[Any] | np.dtype[Any]
    ) -> list[onnx.NodeProto]:
        if not scale > 0:
            raise ValueError(f"scale of {tensor!r} is {scale}; `without_zero_ranges` was not used")
        base = f"{tensor}/fp8" if dtype == float8_dtype() else tensor
        parameters = [
            self.constant(f"{base}/scale", np.array(scale, np.float32)),
            self.constant(f"{base}/zero_point", np.array(zero_point, dtype)),
        ]
        quantize = self._make("QuantizeLinear", [tensor, *parameters], base, "quantized")
        return [quantize, self._dequantize([quantize.output[0], *parameters], base)]

    def is_dequantized(self, tensor: str) -> bool:
        """Whether `tensor` is the result of a pair made here."""
        return tensor in self._pairs.values()

    def quantized_weight(
        self, name: str, axis: int, scales: NDArray[np.float32] | None = None
    ) -> str:
        """The initializer `name` as int8 codes behind a DequantizeLinear; the result's name.

        `scales` are by default those of the method `weight_scales`; where a table gives some, -128
        is a code too. The same weight with the same axis and scales is stored once.
        """
        value = self.view.constant(name)
        scales = self.weight_scales(name, axis) if scales is None else scales
        key = (name, axis, "int8", scales.tobytes())
        if key not in self._weights:
            lowest = -QMAX - 1 if name in self._given else -QMAX
            codes = quantize_weights(value, scales, axis, lowest=lowest)
            self._weights[key] = self._constant_behind(name, "int8", codes, scales, axis)
        return self._weights[key]

    def float8_weight(self, name: str, axis: int, scales: NDArray[np.float32]) -> str:
        """The initializer `name` as float8 codes behind a DequantizeLinear; the result's name.

        The same weight with the same axis and scales is stored once.
        """
        key = (name, axis, "fp8", scales.tobytes())
        if key not in self._weights:
            value = self.view.constant(name).astype(np.float32)
            shape = [1] * value.ndim
            shape[axis] = -1
            codes = float8_codes(value / scales.reshape(shape))
            self._weights[key] = self._constant_behind(name, "fp8", codes, scales, axis)
        return self._weights[key]

    def float8_scales(self, name: str, axis: int) -> NDArray[np.float32]:
        """The float8 scales of the initializer `name` along `axis`: the table's, or max|w| / 448.

        Raises ModelError if the table gives another number of scales than there are channels.
        """
        value = self.view.constant(name)
        if name not in self._float8:
            return float8_weight_scales(value, axis)
        return _for_channels(name, self._float8[name], value.shape[axis])

    def weight_scales(self, name: str, axis: int) -> NDArray[np.float32]:
        """The scales of the initializer `name` along `axis`: the table's, or max|w| / 127.

        Raises ModelError if the table gives another number of scales than there are channels.
        """
        value = self.view.constant(name)
        if name not in self._given:
            return weight_scales(value, axis)
        return _for_channels(name, self._given[name], value.shape[axis])

    def dequantized_constant(
        self, name: str, codes: NDArray[Any], scales: NDArray[np.float32]
    ) -> str:
        """A one-dimensional integer constant behind a DequantizeLinear (an int32 bias)."""
        return self._constant_behind(name, "codes", codes, scales, 0)

    def _constant_behind(
        self, name: str, what: str, codes: NDArray[Any], scales: NDArray[np.float32], axis: int
    ) -> str:
        inputs = [
            self.constant(f"{name}/{what}", codes),
            self.constant(f"{name}/scale", scales),
            self.constant(f"{name}/zero_point", np.zeros(scales.shape, codes.dtype)),
        ]
        self._first.append(self._dequantize(inputs, name, axis=axis))
        return str(self._first[-1].output[0])

    def _dequantize(self, inputs: Sequence[str], name: str, **attributes: int) -> onnx.NodeProto:
        return self._make("DequantizeLinear", inputs, name, "dequantized", **attributes)

    def _make(
        self, op: str, inputs: Sequence[str], name: str, result: str, **attributes: int
    ) -> onnx.NodeProto:
        output = self._fresh(f"{name}/{result}")
        node = helper.make_node(op, inputs, [output], name=self._fresh(f"{name}/{op}"))
        node.attribute.extend(helper.make_attribute(k, value) for k, value in attributes.items())
        return node

    def shield(self, node: str, index: int) -> None:
        """Put a Max of one tensor before an input: it changes nothing, and no optimizer takes it
        away, so that what lies behind it is not seen together with what lies before."""
        source = self._nodes[node].input[index]
        self.reconnect((node, index), self.before(node, "Max", [source], f"shielded{index}"))

    def before(self, node: str, op: str, inputs: Sequence[str], result: str) -> str:
        """A new node before `node`, which is named after it; the name of its output."""
        made = self._make(op, inputs, node, result)
        self._before.setdefault(node, []).append(made)
        return str(made.output[0])

    def finish(self) -> onnx.ModelProto:
        """The rewritten model."""
        model, source = onnx.ModelProto(producer_name="trtune"), self._model.proto
        other = {"graph", "producer_name", "producer_version", "training_info"}
        copy_fields(source, model, leave_out=other)
        if any(key[1] == float8_dtype().name for key in self._pairs):
            model.ir_version = max(model.ir_version, FLOAT8_IR)
        graph, old = model.graph, source.graph
        copy_fields(old, graph, leave_out={"node", "initializer", "value_info"})
        graph.node.extend(self._sorted_nodes())
        made = {name for node in graph.node for name in node.output}
        graph.value_info.extend(info for info in old.value_info if info.name in made)
        used = used_tensors(graph)
        entries = [*old.initializer, *self._initializers.values()]
        graph.initializer.extend(entry for entry in entries if entry.name in used)
        return model

    def _sorted_nodes(self) -> list[onnx.NodeProto]:
        nodes = list(self._first)
        for name in self.view.graph_inputs:
            nodes.extend(self._after.get(name, ()))
        for old in self.view.nodes:
            if old.name not in self._removed:
                nodes.extend(self._before.get(old.name, ()))
                nodes.append(self._nodes[old.name])
            for name in old.output:
                nodes.extend(self._after.get(name, ()))
        return nodes


def _for_channels(name: str, given: Sequence[float], channels: int) -> NDArray[np.float32]:
    """`given` scales of the weights `name`, one for all or one a channel, as one a channel."""
    scales = np.asarray(given, np.float32)
    if scales.size not in (1, channels):
        raise ModelError(
            f"the table has {scales.size} scales for the weights {name!r}, which have "
            f"{channels} output channels: it belongs to another model"
        )
    return np.ascontiguousarray(np.broadcast_to(scales, (channels,)))
