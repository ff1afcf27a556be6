"""Calibration where the tensors are: a CUDA device counts |x|, and only the counts come back.

The network runs in onnxruntime's CUDA provider with the tensors of interest bound to memory of the
device; one launch of `histogram.cu` counts all of them; pictures of the next batch are copied
meanwhile. Everything is put on two streams in order, so that neither the host nor the device waits
for a batch to end. The bins are those of `calibrate.histogram`: for the same activations the
histograms are those of a CPU, bit for bit.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.calibrate.gpu.layout import KINDS, TENSOR, Counted, pieces
from trtune.calibrate.gpu.memory import Memory, count_kernel, cuda_core
from trtune.calibrate.gpu.ranking import Ranking
from trtune.calibrate.histogram import BINS, Histogram, finite_counts, not_a_number
from trtune.calibrate.sessions import SharedWeights, open_session, with_outputs
from trtune.configs.errors import ModelError

log = logging.getLogger(__name__)

THREADS = 512


NAN_BITS = 0x7F800001
RANKED_AT_ONCE = 1024
COUNT_LIMIT = (1 << 32) - 1


@dataclass(slots=True)
class _Slot:
    """What one of the two batches under way occupies."""

    inputs: dict[str, Memory]
    tensors: Memory
    maxima: Memory
    bindings: tuple[Any, ...]
    items: tuple[str, ...] = ()
    started: Any = None
    done: Any = None


@dataclass(frozen=True, slots=True)
class _Bound:
    """Everything that holds for batches of one shape."""

    layout: tuple[Counted, ...]
    pieces: Memory
    blocks: int
    values: int
    outputs: Mapping[str, Any]
    slots: tuple[_Slot, _Slot]

    def close(self) -> None:
        for memory in (self.pieces, *(m for s in self.slots for m in _memories(s))):
            memory.close()


def _memories(slot: _Slot) -> Iterable[Memory]:
    return (*slot.inputs.values(), slot.tensors, slot.maxima)


class GpuCounter:
    """Counts tensors of some sessions of a network, batch by batch.

    `sessions` run on `device` with `stream` as their compute stream, one after the other. `axes`
    names the tensors, each with the axis of its pictures or None; each is an output of the first
    session that has it, and those that are inputs are counted as they are given.
    """

    def __init__(
        self,
        sessions: Sequence[ort.InferenceSession],
        device: int,
        stream: Any,
        axes: Mapping[str, int | None],
    ) -> None:
        core = cuda_core()
        self._core, self._device, self._number = core, core.Device(device), device
        self._sessions, self._stream, self._axes = tuple(sessions), stream, dict(axes)
        self._given = {i.name: i.type for session in sessions for i in session.get_inputs()}
        self._types = {o.name: o.type for session in sessions for o in session.get_outputs()}
        self._names = self._shared_out()
        self._copies = self._device.create_stream()
        self._kernel = count_kernel(device)
        self._counts = self._device.allocate(4 * BINS * max(len(axes), 1), stream=stream)
        self._counts.fill(0, stream=stream)
        self._total = np.zeros((len(axes), BINS), np.int64)
        self._room = COUNT_LIMIT
        self._ranking = Ranking(len(axes))
        self._waiting: list[tuple[tuple[str, ...], NDArray[np.intp], NDArray[np.uint32]]] = []
        self._bound: tuple[tuple[Any, ...], _Bound] | None = None
        self._turn = 0
        self._shapes_vary = False
        self.busy = 0.0

    def add(self, feeds: Mapping[str, NDArray[Any]], items: tuple[str, ...], held: int) -> None:
        """Run a batch of `held` pictures and count the first `len(items)`, named by `items`.

        Returns before that is done. Raises ModelError if an earlier batch held NaN.
        """
        key = (held, *((name, array.shape, array.dtype.str) for name, array in feeds.items()))
        if self._bound is None or self._bound[0] != key or self._shapes_vary:
            self._settle()
            self._bound = key, self._open(feeds, held)
        bound = self._bound[1]
        if bound.values > self._room:
            self._flush()
        self._room -= bound.values
        slot = bound.slots[self._turn]
        self._turn = 1 - self._turn
        self._drain(slot)
        for name, memory in slot.inputs.items():
            memory.put(feeds[name], self._copies)
        self._stream.wait(self._copies.record())
        slot.items, slot.started = items, self._stream.record(options=self._timed())
        try:
            for session, binding in zip(self._sessions, slot.bindings, strict=True):
                session.run_with_iobinding(binding, _asynchronous())
        except Exception:  # a shape that depends on the data: the buffers bound do not fit
            if self._shapes_vary:
                raise
            log.info("shapes follow the data: the buffers of each batch are made anew")
            self._shapes_vary = True
            slot.items = ()
            self._room += bound.values
            self.add(feeds, items, held)
            return
        self._launch(bound, slot, len(items))

    def histograms(self) -> dict[str, Histogram]:
        """Wait for everything, and the histogram of each tensor; in order of `axes`."""
        self._settle()
        self._flush()
        self._rank()
        found = {}
        for number, tensor in enumerate(self._axes):
            maximum, pictures = self._ranking.maxima(number)
            found[tensor] = Histogram(finite_counts(self._total[number]), maximum, pictures)
        self._counts.close()
        return found

    def _timed(self) -> Any:
        return self._core.EventOptions(timing_enabled=True)

    def _launch(self, bound: _Bound, slot: _Slot, valid: int) -> None:
        slot.maxima.device.fill(0, stream=self._stream)
        if bound.blocks:
            stride = max(t.pictures for t in bound.layout)
            self._core.launch(
                self._stream,
                self._core.LaunchConfig(grid=bound.blocks, block=THREADS),
                self._kernel,
                *(np.uint64(m) for m in (slot.tensors.address, bound.pieces.address)),
                *(np.uint64(m) for m in (int(self._counts.handle), slot.maxima.address)),
                np.int32(stride),
                np.int32(valid),
            )
        slot.maxima.fetch(self._stream)
        slot.done = self._stream.record(options=self._timed())

    def _open(self, feeds: Mapping[str, NDArray[Any]], held: int) -> _Bound:
        """Run once to learn the shapes; what that gave is where later batches go."""
        inputs = [self._inputs(feeds) for _ in range(2)]
        for name, memory in inputs[0].items():
            memory.put(feeds[name], self._stream)
        outputs: dict[str, Any] = {}
        for session, names in zip(self._sessions, self._names, strict=True):
            binding = session.io_binding()
            self._bind_inputs(binding, session, inputs[0], feeds)
            for name in names:
                binding.bind_output(name, "cuda", self._number)
            session.run_with_iobinding(binding)
            outputs |= zip(names, binding.get_outputs(), strict=True)
        layout = self._layout(feeds, outputs, held)
        table = pieces(layout)
        held_pieces = Memory(self._core, self._device, table.nbytes, self._stream)
        held_pieces.put(table, self._stream)
        slots = [self._slot(layout, inputs[i], outputs, feeds) for i in range(2)]
        values = max((t.size for t in layout), default=0)
        return _Bound(layout, held_pieces, len(table), values, outputs, (slots[0], slots[1]))

    def _layout(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Mapping[str, Any], held: int
    ) -> tuple[Counted, ...]:
        types = {**self._given, **self._types}
        found = []
        for tensor, axis in self._axes.items():
            shape = feeds[tensor].shape if tensor in self._given else outputs[tensor].shape()
            if types[tensor] not in KINDS:
                raise ModelError(f"tensor {tensor!r} is {types[tensor]}, not a float: no range")
            found.append(Counted.of(shape, axis, held, KINDS[types[tensor]][0]))
        return tuple(found)

    def _inputs(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Memory]:
        return {
            name: Memory(self._core, self._device, array.nbytes, self._stream)
            for name, array in feeds.items()
            if name in self._given
        }

    def _shared_out(self) -> tuple[list[str], ...]:
        """The outputs that each session gives: those that are counted, or one, for it must give
        something."""
        left = [tensor for tensor in self._axes if tensor not in self._given]
        found = []
        for session in self._sessions:
            made = [output.name for output in session.get_outputs()]
            own = [tensor for tensor in left if tensor in set(made)]
            left = [tensor for tensor in left if tensor not in set(own)]
            found.append(own or made[:1])
        return tuple(found)

    def _bind_inputs(
        self,
        binding: Any,
        session: ort.InferenceSession,
        inputs: Mapping[str, Memory],
        feeds: Mapping[str, NDArray[Any]],
    ) -> None:
        for name in (i.name for i in session.get_inputs()):
            array, address = feeds[name], inputs[name].address
            binding.bind_input(name, "cuda", self._number, array.dtype, array.shape, address)

    def _slot(
        self,
        layout: Sequence[Counted],
        inputs: dict[str, Memory],
        outputs: Mapping[str, Any],
        feeds: Mapping[str, NDArray[Any]],
    ) -> _Slot:
        bindings = []
        for session, names in zip(self._sessions, self._names, strict=True):
            binding = session.io_binding()
            self._bind_inputs(binding, session, inputs, feeds)
            for name in names:
                binding.bind_ortvalue_output(name, outputs[name])
            bindings.append(binding)
        table = np.zeros(len(layout), TENSOR)
        for number, (tensor, counted) in enumerate(zip(self._axes, layout, strict=True)):
            given = tensor in self._given
            data = inputs[tensor].address if given else outputs[tensor].data_ptr()
            table[number] = (data, counted.inner, counted.pictures, counted.kind)
        tensors = Memory(self._core, self._device, table.nbytes, self._stream)
        tensors.put(table, self._stream)
        stride = max((t.pictures for t in layout), default=1)
        maxima = Memory(self._core, self._device, 4 * stride * len(layout), self._stream)
        return _Slot(inputs, tensors, maxima, tuple(bindings))

    def _drain(self, slot: _Slot) -> None:
        """Wait for the batch that `slot` holds, and keep its maxima."""
        if not slot.items:
            return
        slot.done.sync()
        self.busy += (slot.done - slot.started) / 1e3
        assert self._bound is not None
        layout = self._bound[1].layout
        stride = max(t.pictures for t in layout)
        bits = slot.maxima.bytes[: 4 * stride * len(layout)].view(np.uint32).copy()
        bits = bits.reshape(len(layout), stride)
        apart = np.array([axis is not None for axis in self._axes.values()])
        together = f"{slot.items[0]} to {slot.items[-1]}" if len(slot.items) > 1 else slot.items[0]
        for chosen, names in ((apart, slot.items), (~apart, (together,))):
            which = np.flatnonzero(chosen)
            self._check_numbers(which, bits[which, : len(names)], names)
            self._waiting.append((names, which, bits[which, : len(names)]))
        slot.items = ()
        if sum(len(names) for names, *_ in self._waiting) >= RANKED_AT_ONCE:
            self._rank()

    def _check_numbers(
        self, which: NDArray[np.intp], bits: NDArray[np.uint32], names: Sequence[str]
    ) -> None:
        bad = np.argwhere(bits >= NAN_BITS)
        if len(bad):
            tensors = tuple(self._axes)
            raise not_a_number(tensors[which[bad[0][0]]], names[bad[0][1]])

    def _rank(self) -> None:
        for names, which, bits in self._waiting:
            if len(which):
                self._ranking.add(names, which, bits)
        self._waiting = []

    def _settle(self) -> None:
        if self._bound is None:
            return
        for slot in (self._bound[1].slots[self._turn], self._bound[1].slots[1 - self._turn]):
            self._drain(slot)
        self._stream.sync()
        self._bound[1].close()
        self._bound = None

    def _flush(self) -> None:
        """Move the device's table into the large one before a count can overflow."""
        table = np.empty((max(len(self._axes), 1), BINS), np.uint32)
        memory = self._core.LegacyPinnedMemoryResource().allocate(table.nbytes, stream=self._stream)
        self._counts.copy_to(memory, stream=self._stream)
        self._stream.sync()
        ctypes.memmove(table.ctypes.data, int(memory.handle), table.nbytes)
        memory.close()
        self._total += table[: len(self._axes)]
        self._counts.fill(0, stream=self._stream)
        self._room = COUNT_LIMIT


@lru_cache(maxsize=1)
def _asynchronous() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def count_on_gpu(
    model: onnx.ModelProto,
    groups: Sequence[Mapping[str, int | None]],
    batches: Iterable[tuple[Mapping[str, NDArray[Any]], tuple[str, ...], int]],
    device: int,
    *,
    external_dir: Path | None = None,
    counted: Callable[[int], None],
) -> tuple[dict[str, Histogram], float]:
    """Histograms of |x| of the tensors in `groups`, and the seconds the device was busy.

    Each group names tensors, with the axis of their pictures or None, and is marked in a session of
    its own: what is found of one is the same with and without the others. `batches` gives feeds,
    the names of the pictures that count, and how many the batch holds; `counted` is told of each.
    Raises ModelError for NaN or a model that CUDA's provider refuses.
    """
    core = cuda_core()
    where = core.Device(device)
    where.set_current()
    stream = where.create_stream()
    present = {info.name for info in model.graph.input}
    weights = SharedWeights(model.graph.initializer)
    light = weights.without(model)

    def session_of(axes: Mapping[str, int | None]) -> ort.InferenceSession:
        return open_session(
            with_outputs(light, [tensor for tensor in axes if tensor not in present]),
            device=f"cuda:{device}",
            stream=int(stream.handle),
            external_dir=external_dir,
            weights=weights.read_by(light),
        )

    axes = {tensor: axis for group in groups for tensor, axis in group.items()}
    counter = GpuCounter([session_of(group) for group in groups], device, stream, axes)
    for feeds, items, held in batches:
        counter.add(feeds, items, held)
        counted(len(items))
    return counter.histograms(), counter.busy
