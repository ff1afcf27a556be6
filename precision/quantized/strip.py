"""Quantization taken out of a model: what is left is FP32, what was taken is a table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.calibrate.table import FLOAT8_MAX, CalibrationTable
from trtune.configs.files import hash_bytes
from trtune.precision.graph.normalise import normalise
from trtune.precision.graph.proto import (
    FreshNames,
    copy_model,
    copy_of,
    replace_field,
    used_tensors,
)
from trtune.precision.graph.view import GraphView, Model, model_from_proto
from trtune.precision.lower.bounds import never_negative
from trtune.precision.lower.rewrite import QMAX
from trtune.precision.plan.placement import Edge
from trtune.precision.plan.plan import QUANTIZED
from trtune.precision.plan.rules import weight_axis
from trtune.precision.quantized.find import (
    ACTIVATION,
    BIAS,
    CONSTANT,
    DEQUANTIZE,
    QUANTIZE,
    WEIGHT,
    Found,
    Pair,
    carried_by,
    dequantized,
)
from trtune.precision.quantized.repair import (
    Requantized,
    channel_axis,
    cuts_at_zero,
    float_range,
    requantized_activation,
    requantized_weights,
    symmetric_activation,
    symmetric_weights,
    weight_value,
)

EXACT_METHOD = "qat"
RELU6 = 6.0
REQUANTIZED_METHOD = "qat, made symmetric"


@dataclass(frozen=True, slots=True)
class Stripped:
    """An FP32 model, the table of the quantization that was in it, and what had to be changed to
    make that symmetric (empty if it was)."""

    model: Model
    table: CalibrationTable
    changes: tuple[Requantized, ...] = ()


@dataclass(slots=True)
class _Taken:
    """What is collected while pairs are taken out; `scales` by tensor and codes (int8 or fp8),
    and in `float8` the weights that are in it."""

    renamed: dict[Edge, str] = field(default_factory=dict)
    reads: dict[str, list[Edge]] = field(default_factory=dict)
    scales: dict[tuple[str, str], float] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    float8: set[str] = field(default_factory=set)
    axes: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    copies: list[onnx.NodeProto] = field(default_factory=list)
    changes: list[Requantized] = field(default_factory=list)


def strip_quantization(model: Model, found: Found) -> Stripped:
    """`model` without the pairs of `found`, and the table that puts them back.

    A tensor has one scale in a table: where the model has two quantizations of one tensor, or of
    what was quantized already, and where a quantized tensor is an output of the model, an Identity
    keeps them apart. Every pair must be sound (`qdq_lint` blocks the others).
    """
    strip = _Strip(model, GraphView.of(model), found)
    for pair in found.of_role(ACTIVATION):
        strip.take_activation(pair)
    strip.take_weights()
    strip.take_constants()
    return strip.finish()


class _Strip:
    """Takes pairs out one by one; `floats` maps what a pair gave to the float tensor in its place.

    Readers of a pair are pointed at the float tensor that it quantized, and the table says that
    they read it quantized. A table has one scale a tensor, and a file need not: where a tensor
    is quantized twice, each further scale gets a copy of it (an Identity) to stand at. An
    asymmetric range that begins at 0 did the work of a Relu that the exporter left out, so one is
    put there: a symmetric range would let negative values through.
    """

    def __init__(self, model: Model, view: GraphView, found: Found) -> None:
        self.model, self.view, self.found = model, view, found
        self.taken = _Taken()
        self.floats: dict[str, str] = {}
        taken = {*view.producer, *view.initializers, *view.graph_inputs, *view.by_name}
        self.names = FreshNames(taken)
        self.gone = {pair.name for pair in found.pairs} | set(found.passed)
        self.gone |= {pair.quantize for pair in found.pairs}
        self.cuts: dict[tuple[str, str], str] = {}
        self.signs = {pair.result: 0.0 for pair in found.pairs if cuts_at_zero(pair)}

    def take_activation(self, pair: Pair) -> None:
        """Let the readers of `pair` read its float tensor, and note that they do so quantized."""
        made = symmetric_activation(pair)
        scale = float(made.scales[0])
        tensor = self._float_tensor(pair, scale)
        if not made.exact:
            change = requantized_activation(pair, scale)
            self.taken.changes.append(replace(change, tensor=tensor))
        self.taken.scales[tensor, pair.codes] = scale
        self.taken.methods[tensor] = EXACT_METHOD if made.exact else REQUANTIZED_METHOD
        self.floats[pair.result] = tensor
        inside = False
        for name, index in pair.readers:
            node = self.view.by_name[name]
            if index >= len(node.input):
                inside = True
            elif node.op_type not in (QUANTIZE, DEQUANTIZE):
                self._read(tensor, (name, index))
        if inside or pair.is_output:
            self._identity(tensor, pair.result, quantized=True)

    def _read(self, tensor: str, edge: Edge) -> None:
        self.taken.renamed[edge] = tensor
        self.taken.reads.setdefault(tensor, []).append(edge)

    def _float_tensor(self, pair: Pair, scale: float) -> str:
        """The tensor that has `scale` in the table and the float values that `pair` quantizes."""
        before = self.floats.get(pair.source)
        source = before if before is not None else pair.source
        if cuts_at_zero(pair) and not never_negative(self.view, pair.source, self.signs):
            source, before = self._cut(pair, source, quantized=before is not None), None
        if self.taken.scales.get((source, pair.codes), scale) == scale:
            return source
        quantized = before is not None
        for node in self.taken.copies:
            known = self.taken.scales.get((node.output[0], pair.codes)) == scale
            same = ((node.name, 0) in self.taken.reads.get(source, ())) == quantized
            if node.op_type == "Identity" and node.input[0] == source and known and same:
                return str(node.output[0])
        return self._identity(source, self.names.new(f"{source}/again"), quantized=quantized)

    def _cut(self, pair: Pair, source: str, *, quantized: bool) -> str:
        """The Relu (or Clip to 6) that the range of `pair`, which begins at 0, stood for: exporters
        leave it out there, and a symmetric range would let negative values through."""
        if (source, pair.quantize) in self.cuts:
            return self.cuts[(source, pair.quantize)]
        result = self.names.new(f"{source}/cut")
        high = float_range(pair)[1]
        inputs = [source]
        if abs(high - RELU6) < RELU6 / 255:
            bounds = {"low": 0.0, "high": RELU6}
            for part, value in bounds.items():
                inputs.append(self.names.new(f"{result}/{part}"))
                self.taken.values[inputs[-1]] = np.array(value, np.float32)
        op = "Relu" if len(inputs) == 1 else "Clip"
        node = helper.make_node(op, inputs, [result], name=self.names.new(f"{result}/{op}"))
        self.taken.copies.append(node)
        if quantized:
            self._read_copy(source, node)
        self.cuts[(source, pair.quantize)] = result
        return result

    def _read_copy(self, source: str, node: onnx.NodeProto) -> None:
        self.taken.reads.setdefault(source, []).append((node.name, 0))

    def _identity(self, source: str, result: str, *, quantized: bool) -> str:
        name = self.names.new(f"{result}/copy")
        node = helper.make_node("Identity", [source], [result], name=name)
        self.taken.copies.append(node)
        if quantized:
            self._read_copy(source, node)
        return result

    def take_weights(self) -> None:
        """Float weights for the int8 nodes, with their scales."""
        for (name, index), source in self.found.weights.items():
            if name not in self.found.int8:
                continue
            node, pair = self.view.by_name[name], source.pair
            axis = channel_axis(node, source)
            made = symmetric_weights(self.view, source, axis)
            value = weight_value(self.view, source)
            plain = bool(pair.quantize) and source.order is None
            stored = plain and pair.source in self.view.initializers
            wanted = node.input[index] if source.order is None else f"{node.input[index]}/weights"
            base = pair.source if stored else wanted
            tensor = self._weight_name(base, made.scales, float8=pair.codes == "fp8")
            if not made.exact and tensor not in self.taken.weights:
                self.taken.changes.append(requantized_weights(pair, tensor, made.scales))
            self.taken.weights[tensor] = made.scales
            if axis != weight_axis(node):
                self.taken.axes[tensor] = axis
            self.taken.values[tensor] = value
            self.taken.renamed[(name, index)] = tensor

    def _weight_name(self, name: str, scales: NDArray[np.float32], *, float8: bool) -> str:
        """`name`, or one like it if that weight has other scales or codes already."""
        number, found, taken = 1, name, self.taken
        while found in taken.weights and (
            (found in taken.float8) != float8 or not np.array_equal(taken.weights[found], scales)
        ):
            number += 1
            found = f"{name}_{number}"
        self.names.take(found)
        if float8:
            taken.float8.add(found)
        return found

    def take_constants(self) -> None:
        """The other quantized constants as the float values that they give."""
        for pair in self.found.of_role(BIAS, CONSTANT, WEIGHT):
            edges = [edge for edge in pair.readers if edge not in self.taken.renamed]
            if not edges and not pair.is_output:
                continue
            inner = any(index >= len(self.view.by_name[n].input) for n, index in edges)
            clash = pair.result in self.taken.values and not (inner or pair.is_output)
            name = self.names.new(f"{pair.result}/value") if clash else pair.result
            self.taken.values[name] = dequantized(self.view, pair)
            for edge in edges:
                if edge[1] < len(self.view.by_name[edge[0]].input):
                    self.taken.renamed[edge] = name

    def finish(self) -> Stripped:
        """The model without its pairs, normalised again, and the table."""
        proto = copy_model(self.model.proto)
        graph = proto.graph
        del graph.value_info[:]
        replace_field(graph.node, self._nodes())
        drop_dead_constants(self.view, graph)
        read = used_tensors(graph)
        kept = [t for t in graph.initializer if t.name in read and t.name not in self.taken.values]
        replace_field(graph.initializer, kept)
        for name, value in self.taken.values.items():
            if name in read:
                graph.initializer.append(numpy_helper.from_array(value, name))
        found = model_from_proto(
            proto, self.model.path, external_dir=self.model.external_dir, fold="none"
        )
        digest = hash_bytes(found.proto.SerializeToString())  # as the file that it is written to
        found = replace(found, notes=self.model.notes, sha256=digest, tail=self.model.tail)
        return Stripped(found, self._table(found), tuple(self.taken.changes))

    def _nodes(self) -> list[onnx.NodeProto]:
        passed = {}
        for name in self.found.passed:
            node = self.view.by_name[name]
            passed[node.output[0]] = node.input[0]
            if node.output[0] in self.view.graph_outputs:
                self._identity(node.input[0], node.output[0], quantized=False)
        made: list[onnx.NodeProto] = []
        for old in self.view.nodes:
            if old.name in self.gone:
                continue
            node = copy_of(old)
            for index, name in enumerate(old.input):
                renamed = self.taken.renamed.get((old.name, index), passed.get(name, name))
                node.input[index] = renamed
            made.append(node)
        return [*made, *self.taken.copies]

    def _table(self, model: Model) -> CalibrationTable:
        reads = {t: tuple(edges) for t, edges in self.taken.reads.items() if edges}
        own = {key: scale for key, scale in self.taken.scales.items() if key[0] in reads}
        methods = {t: self.taken.methods[t] for t, _ in own}
        for key, scale in self._carried().items():
            if not {(key[0], codes) for codes in QUANTIZED} & own.keys():
                own[key], methods[key[0]] = scale, EXACT_METHOD
        float8 = {tensor: scale for (tensor, codes), scale in own.items() if codes == "fp8"}
        scales = {tensor: as_int8(scale) for tensor, scale in float8.items()}
        scales |= {tensor: scale for (tensor, codes), scale in own.items() if codes == "int8"}
        made = (t for node in model.proto.graph.node for t in node.output)
        order = [*self.view.graph_inputs, *made]
        place = {tensor: k for k, tensor in enumerate(order)}
        ranked = sorted(scales, key=lambda t: place.get(t, -1))
        return CalibrationTable(
            {t: scales[t] for t in ranked},
            {t: methods[t] for t in ranked},
            {
                "source": "quantized model",
                "quantized_model": self.model.sha256,
                "model": model.sha256,
            },
            self._weights(float8=False),
            {t: reads[t] for t in ranked if t in reads},
            axes=self.taken.axes,
            float8=float8,
            float8_weights=self._weights(float8=True),
        )

    def _weights(self, *, float8: bool) -> dict[str, tuple[float, ...]]:
        return {
            name: tuple(values.tolist())
            for name, values in self.taken.weights.items()
            if (name in self.taken.float8) == float8
        }

    def _carried(self) -> dict[tuple[str, str], float]:
        """Scales, by tensor and codes, of what quantized nodes read behind operators that move
        quantized tensors."""
        pairs = {pair.result: pair for pair in self.found.of_role(ACTIVATION)}
        passed = set(self.found.passed)
        found: dict[tuple[str, str], float] = {}
        for name in self.found.int8:
            tensor = self.view.by_name[name].input[0]
            if tensor not in pairs:
                sources = carried_by(self.view, tensor, pairs, passed)
                bare = tensor
                while self.view.producer.get(bare, "") in passed:
                    bare = self.view.by_name[self.view.producer[bare]].input[0]
                codes = sources[0].codes
                found[bare, codes] = max(
                    self.taken.scales[self.floats[p.result], codes] for p in sources
                )
        return found


def as_int8(scale: float) -> float:
    """The scale with which int8 reaches as far as float8 does with `scale`."""
    return float(np.float32(np.float32(scale) * np.float32(FLOAT8_MAX)) / np.float32(QMAX))


def drop_dead_constants(view: GraphView, graph: onnx.GraphProto) -> None:
    """Take out nodes that computed something of constants which nothing reads any more."""
    while True:
        read = used_tensors(graph)
        dead = [
            node
            for node in graph.node
            if not read.intersection(node.output) and all(view.is_constant(t) for t in node.output)
        ]
        if not dead:
            return
        for node in dead:
            graph.node.remove(node)


def renormalised(model: Model, proto: onnx.ModelProto) -> Model:
    """`model` with other nodes, put into normal form."""
    normal, _ = normalise(proto)
    return replace(model, proto=normal)
