"""Asymmetric activations kept as they are: every level of the file, as int8 around 0.

x_hat = (q - z) s is s times an int8 code plus c = (128 - z) s, for uint8. So x - c is quantized
with scale s and zero point 0, and what reads it gets c back in a bias: c times the sum of its
weights, or c itself behind a skip connection. A convolution that pads with 0 pads with -c then, by
a Pad in front of the pair, which a compiler computes together with the quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.configs.files import hash_bytes
from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.rewrite import quantize_weights
from trtune.precision.plan.placement import Edge, is_move
from trtune.precision.plan.rules import weight_axis
from trtune.precision.prepare.affine import add_to_bias, bias_edge, reader_axis
from trtune.precision.prepare.draft import Draft
from trtune.precision.prepare.fold import Scalar, absorbed
from trtune.precision.quantized.find import INT8_RANGE
from trtune.precision.quantized.repair import Requantized
from trtune.precision.quantized.strip import EXACT_METHOD, Stripped, renormalised

SHIFTED_METHOD = f"{EXACT_METHOD}, shifted"
LEVELS = 255


@dataclass(frozen=True, slots=True)
class _Sink:
    """A node that gets the shift back: `bias` is the node with the bias, `weighted` whether it is
    multiplied by that node's weights."""

    bias: str
    weighted: bool


@dataclass(frozen=True, slots=True)
class _Reader:
    """An input that can read its tensor shifted: who gets the shift back, and the padding of the
    convolution that reads it directly (() if it does not pad)."""

    edge: Edge
    sinks: tuple[_Sink, ...]
    pads: tuple[int, ...] = ()


def with_shifts(stripped: Stripped) -> Stripped:
    """`stripped` with the levels of the file wherever a shift gives them, in place of a symmetric
    range. FP32 computes what it did, but for the order in which floats are added.

    Inputs that cannot be shifted (averages, products without a bias, operators that are not linear)
    keep the symmetric scale. Without any that can, the result is `stripped` itself.
    """
    view = GraphView.of(stripped.model)
    offsets = _offsets(stripped.changes)
    table = _without_repeats(view, stripped.table, offsets)
    work = _Shifting(stripped.model, view, table)
    changes: dict[str, list[Requantized]] = {}
    for old in stripped.changes:
        if old.tensor not in changes:
            offset = offsets[old.tensor][1] if old.tensor in offsets else None
            changes[old.tensor] = list(work.shift(old, offset))
    if not work.draft.changed:
        return stripped
    model = renormalised(stripped.model, work.draft.finish().proto)
    model = replace(model, sha256=hash_bytes(model.proto.SerializeToString()))
    return Stripped(model, work.finish(model), tuple(chain.from_iterable(changes.values())))


def _offsets(changes: Iterable[Requantized]) -> dict[str, tuple[float, float]]:
    """Step and shift of each tensor that has one of each in the file."""
    found: dict[str, set[tuple[float, float]]] = {}
    for change in changes:
        offset = offset_of(change)
        if offset is not None:
            found.setdefault(change.tensor, set()).add((change.step_before, offset))
    return {tensor: values.pop() for tensor, values in found.items() if len(values) == 1}


def offset_of(change: Requantized) -> float | None:
    """What has to be taken off a tensor for its levels to be int8 codes around 0; None for
    weights, and where the file has other than 256 levels in one scale.

    >>> offset_of(Requantized("x", "activation", 0.5, 1.0, (0.0, 127.5), (-128.0, 127.0)))
    64.0
    """
    low, high = change.range_before
    step = change.step_before
    if change.role != "activation" or not step > 0:
        return None
    if abs((high - low) / step - LEVELS) > 1e-3:
        return None
    return low - INT8_RANGE[0] * step


def _without_repeats(
    view: GraphView, table: CalibrationTable, offsets: Mapping[str, tuple[float, float]]
) -> CalibrationTable:
    """`table` less the pairs in front of a moving operator whose result has the same pair: moving
    values that are quantized then gives nothing else."""
    reads = {}
    for tensor, edges in table.reads.items():
        reads[tensor] = tuple(
            edge for edge in edges if not _repeated(view, table, offsets, tensor, edge)
        )
    return replace(table, reads={tensor: edges for tensor, edges in reads.items() if edges})


def _repeated(
    view: GraphView,
    table: CalibrationTable,
    offsets: Mapping[str, tuple[float, float]],
    tensor: str,
    edge: Edge,
) -> bool:
    node = view.by_name.get(edge[0])
    if node is None or tensor not in offsets or not is_move(node, edge[1]):
        return False
    (result, *more) = node.output
    same = offsets.get(result) == offsets[tensor]
    read = set(view.consumers.get(result, ()))
    all_quantized = bool(read) and read <= set(table.reads.get(result, ()))
    single = node.op_type != "Concat" and not any(more) and result not in view.graph_outputs
    return same and all_quantized and single


class _Shifting:
    def __init__(self, model: Model, view: GraphView, table: CalibrationTable) -> None:
        self.view, self.table = view, table
        self.draft = Draft(model)
        self.reads = {t: list(edges) for t, edges in table.reads.items()}
        self.scales, self.methods = dict(table.scales), dict(table.methods)
        self.weights = dict(table.weights)

    def shift(self, change: Requantized, offset: float | None) -> Iterator[Requantized]:
        """Shift the tensor of `change` by `offset` where it is read so; what is left to say."""
        tensor = change.tensor
        edges = self.reads.get(tensor, [])
        found = [self._reader(edge) for edge in edges] if offset is not None else []
        readers = [reader for reader in found if reader is not None]
        if offset is None or not readers:
            yield change
            return
        left = [edge for edge in edges if edge not in {reader.edge for reader in readers}]
        name = self._shifted(tensor, offset, readers, whole=not left)
        for pads in dict.fromkeys(reader.pads for reader in readers):
            mine = [reader.edge for reader in readers if reader.pads == pads]
            read = self._padded(name, offset, pads, mine) if pads else name
            self.reads[read] = mine
            self.scales[read], self.methods[read] = change.step_before, SHIFTED_METHOD
        for sink in dict.fromkeys(sink for reader in readers for sink in reader.sinks):
            add_to_bias(self.draft, sink.bias, offset * self._sums(sink))
        if left:
            self.reads[tensor] = left
            yield change
        elif name != tensor or all(reader.pads for reader in readers):
            del self.reads[tensor], self.scales[tensor], self.methods[tensor]
        yield replace(
            change,
            tensor=name,
            step_after=change.step_before,
            range_after=change.range_before,
            shift=offset,
        )

    def _reader(self, edge: Edge) -> _Reader | None:
        node = self.view.by_name[edge[0]]
        sinks = self._sinks(edge, padded=True)
        return _Reader(edge, sinks, _padding(node) or ()) if sinks else None

    def _sinks(self, edge: Edge, *, padded: bool = False) -> tuple[_Sink, ...]:
        """Who gets back what is taken off at `edge`; () if not all of them can."""
        node = self.view.by_name[edge[0]]
        if is_move(node, edge[1]):
            return self._behind(node)
        if node.op_type == "Add":
            return self._skip(node, edge[1])
        if reader_axis(self.view, (edge,)) is None or bias_edge(self.view, node) is None:
            return ()
        pads = _padding(node)
        if node.op_type == "ConvTranspose" or pads is None or (pads and not padded):
            return ()
        if node.op_type == "MatMul" and node.output[0] in self.table.reads:
            return ()  # it is quantized before its bias is added
        return (_Sink(node.name, True),)

    def _behind(self, node: onnx.NodeProto) -> tuple[_Sink, ...]:
        if node.op_type == "Concat" or len(node.output) != 1:
            return ()
        (result,) = node.output
        edges = self.view.consumers.get(result, ())
        if result in self.view.graph_outputs or result in self.table.reads or not edges:
            return ()
        found = [self._sinks(edge) for edge in edges]
        return tuple(sink for sinks in found for sink in sinks) if all(found) else ()

    def _skip(self, node: onnx.NodeProto, index: int) -> tuple[_Sink, ...]:
        """The convolution or product on the other side of an Add, if that alone reads it."""
        if node.input[0] == node.input[1]:
            return ()
        other = node.input[1 - index]
        maker = self.view.by_name.get(self.view.producer.get(other, ""))
        shapes = [self.view.shapes.get(name) for name in node.input]
        if maker is None or maker.op_type not in ("Conv", "Gemm") or shapes[0] != shapes[1]:
            return ()
        alone = self.view.consumers.get(other, ()) == ((node.name, 1 - index),)
        if not alone or other in self.view.graph_outputs or other in self.table.reads:
            return ()
        return (_Sink(maker.name, False),) if bias_edge(self.view, maker) is not None else ()

    def _shifted(self, tensor: str, offset: float, readers: list[_Reader], *, whole: bool) -> str:
        """The tensor less `offset`: made so by its own convolution, or by an Add."""
        edges = [reader.edge for reader in readers]
        steps = None
        if whole and set(self.draft.consumers(tensor)) == set(edges) and self._plain(tensor):
            maker = self._maker(tensor)
            weights = self.view.initializers[maker.input[1]].dims
            outputs = int(weights[0]) if maker.op_type == "Conv" else self._columns(maker)
            axis = 1 if maker.op_type == "Conv" else -1
            steps = absorbed(self.draft, tensor, Scalar(np.ones(outputs), offset, axis))
        if steps is None:
            return self.draft.insert_behind(tensor, "Add", np.array(-offset), "shifted", edges)
        for step in steps:
            step()
        self.draft.changed = True
        return tensor

    def _columns(self, gemm: onnx.NodeProto) -> int:
        dims = self.view.initializers[gemm.input[1]].dims
        return int(dims[0] if attribute(gemm, "transB", 0) else dims[1])

    def _maker(self, tensor: str) -> onnx.NodeProto:
        node = self.view.by_name[self.view.producer[tensor]]
        while node.op_type in ("Relu", "Clip"):
            node = self.view.by_name[self.view.producer[node.input[0]]]
        return node

    def _plain(self, tensor: str) -> bool:
        """Whether a convolution or Gemm makes `tensor`, with nothing but cuts in between, none of
        which is quantized itself."""
        if tensor in self.view.graph_outputs or tensor not in self.view.producer:
            return False
        node = self.view.by_name[self.view.producer[tensor]]
        while node.op_type in ("Relu", "Clip"):
            before = node.input[0]
            if before in self.table.reads or before not in self.view.producer:
                return False
            node = self.view.by_name[self.view.producer[before]]
        return node.op_type in ("Conv", "Gemm") and node.input[1] in self.view.initializers

    def _padded(self, tensor: str, offset: float, pads: tuple[int, ...], edges: list[Edge]) -> str:
        half = len(pads) // 2
        whole = [0, 0, *pads[:half], 0, 0, *pads[half:]]
        name = self.draft.pad_behind(tensor, whole, -offset, edges)
        for reader, _ in edges:
            node = self.draft.node(reader)
            for entry in [a for a in node.attribute if a.name == "pads"]:
                node.attribute.remove(entry)
        return name

    def _sums(self, sink: _Sink) -> NDArray[np.float64]:
        """The sum of a node's quantized weights for each output channel; ones for a skip.

        The float weights become what their codes stand for, so that the sum is right for them too.
        """
        node = self.draft.node(sink.bias)
        axis = weight_axis(node)
        weights = self.draft.constant(node.input[1])
        if not sink.weighted:
            return np.ones(weights.shape[axis])
        name = node.input[1]
        if name in self.weights:
            scales = np.broadcast_to(
                np.asarray(self.weights[name], np.float32), (weights.shape[axis],)
            )
            codes = quantize_weights(weights, scales, axis, lowest=INT8_RANGE[0])
            shape = [-1 if k == axis else 1 for k in range(weights.ndim)]
            weights = codes * scales.reshape(shape)
            self.draft.set_constant((sink.bias, 1), weights)
            self.weights[node.input[1]] = self.weights[name]
        rest = tuple(k for k in range(weights.ndim) if k != axis)
        return np.asarray(weights.astype(np.float64).sum(axis=rest))

    def finish(self, model: Model) -> CalibrationTable:
        """The table of the model as it is now."""
        kept = {tensor.name for tensor in model.proto.graph.initializer}
        made = (name for node in model.proto.graph.node for name in node.output)
        place = {name: k for k, name in enumerate((*self.view.graph_inputs, *made))}
        ranked = sorted(self.scales, key=lambda name: place.get(name, -1))
        return replace(
            self.table,
            scales={t: self.scales[t] for t in ranked},
            methods={t: self.methods[t] for t in ranked if t in self.methods},
            provenance={**self.table.provenance, "model": model.sha256},
            weights={t: held for t, held in self.weights.items() if t in kept},
            reads={t: tuple(self.reads[t]) for t in ranked if self.reads.get(t)},
        )


def _padding(node: onnx.NodeProto) -> tuple[int, ...] | None:
    """How a Conv pads each spatial axis, () if it does not; None if that is not written down."""
    if node.op_type != "Conv":
        return ()
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    pads = tuple(int(n) for n in attribute(node, "pads", ()))
    return pads if any(pads) else ()
