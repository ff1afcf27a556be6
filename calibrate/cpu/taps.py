"""An onnxruntime session that hands out inner tensors at nearly no cost.

Four things make marking tensors expensive, and each is avoided here:

- *Layout.* onnxruntime computes convolutions on CPUs in a blocked layout (NCHWc). A marked tensor
  is copied back to NCHW for every batch. A histogram does not care in which order the values of
  a picture stand, so the optimized graph is taken and the blocked tensor read instead, wherever
  its channels fill whole blocks (otherwise padding would be counted).
- *Page faults.* Outputs that onnxruntime allocates are fresh memory each time. Outputs are bound
  to buffers that are used again.
- *Threads.* One batch on all cores leaves cores waiting after each layer. Each worker runs a batch
  of its own on one thread.
- *Caches.* What is counted after the whole inference has long left the caches. The model runs in
  segments, and each one's tensors are counted before the next runs (see `segments`).
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.calibrate.cpu.segments import cut, holds_graphs, pack
from trtune.calibrate.sessions import SharedWeights, open_session, with_outputs
from trtune.configs.errors import ModelError

log = logging.getLogger(__name__)

LARGEST_BLOCK = 16
"""Channels in a block of the widest NCHWc layout; the narrower ones divide it."""

PROTOBUF_LIMIT = 1 << 31
ALIGNMENT = 64
SEGMENT_BYTES = 4 << 20
"""Tapped tensors of a segment: they stay in a core's share of the caches until they are counted."""

NUMPY_TYPES: Mapping[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}
"""What can pass between segments; a model that passes anything else is not cut."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the model: a session, and for each tapped tensor the output that holds it."""

    session: ort.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, session: ort.InferenceSession, outputs: Mapping[str, str]) -> Segment:
        """The segment that `session` is; `outputs` maps tapped tensors of any segment."""
        made = tuple(output.name for output in session.get_outputs())
        tensors = {tensor: name for tensor, name in outputs.items() if name in made}
        return cls(session, tuple(i.name for i in session.get_inputs()), made, tensors)


@dataclass(frozen=True, slots=True)
class Tapped:
    """What to run one after the other for one batch; each tapped tensor is in one segment.

    The values of a picture may stand in another order than in the model (see the module). `weights`
    hold the memory that the segments read.
    """

    segments: tuple[Segment, ...]
    weights: SharedWeights | None = None


def tap(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    *,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    external_dir: Path | None = None,
) -> Tapped:
    """Sessions for `model` whose `tensors` can be read; `model` is not touched.

    `sizes` are the bytes of each tensor in the batches to come: with them the model is cut so
    that a segment's tensors fit a cache. External weights, and models that hold graphs within
    graphs, are not cut.

    Raises ModelError with onnxruntime's words if it cannot load the model.
    """
    if not tensors:
        return Tapped(())
    given = {info.name for info in model.graph.input} & set(tensors)
    if given:
        raise ValueError(f"inputs are known without running the model: {sorted(given)}")
    marked = with_outputs(model, tensors)
    try:
        # What onnxruntime writes of a graph within a graph it may not read again.
        small = external_dir is None and len(marked) < PROTOBUF_LIMIT
        if small and not holds_graphs(model.graph):
            return _tap_optimized(marked, tensors, sizes or {}, threads)
        session = open_session(marked, threads=threads, external_dir=external_dir)
    except ModelError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ModelError(f"onnxruntime cannot load the model for calibration: {error}") from error
    return Tapped((_whole(session, {tensor: tensor for tensor in tensors}),))


def _whole(session: ort.InferenceSession, outputs: Mapping[str, str]) -> Segment:
    """The uncut model; its own outputs are not fetched unless they are tapped."""
    segment = Segment.of(session, outputs)
    return replace(segment, outputs=tuple(dict.fromkeys(segment.tensors.values())))


def _tap_optimized(
    marked: bytes, tensors: Sequence[str], sizes: Mapping[str, int], threads: int
) -> Tapped:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(marked, threads=threads, prepack=False, write_optimized=path)
        optimized = onnx.load(path)
    outputs = _skip_reorders(optimized, tensors)
    known = {outputs[tensor]: size for tensor, size in sizes.items() if tensor in outputs}
    weights = SharedWeights(optimized.graph.initializer)
    pieces = cut(weights.without(optimized), set(outputs.values()), known, SEGMENT_BYTES)
    if pieces:
        try:
            return Tapped(_segments(pieces, weights, outputs, threads), weights)
        except Exception as error:  # onnxruntime's exceptions have no common base
            log.debug("not cut into %d pieces: %s", len(pieces), error)
    session = open_session(optimized.SerializeToString(), threads=threads, optimize="none")
    return Tapped((_whole(session, outputs),))


def _segments(
    pieces: Sequence[onnx.ModelProto],
    weights: SharedWeights,
    outputs: Mapping[str, str],
    threads: int,
) -> tuple[Segment, ...]:
    """Sessions for `pieces`; the types of what passes between them are asked of onnxruntime."""
    types: dict[str, onnx.TypeProto] = {}
    segments = []
    for piece in pieces:
        for info in piece.graph.input:
            if not info.HasField("type"):
                info.type.CopyFrom(types[info.name])
        session = open_session(
            piece.SerializeToString(),
            threads=threads,
            optimize="none",
            weights=weights.read_by(piece),
        )
        for output in session.get_outputs():
            element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(NUMPY_TYPES[output.type]))
            types[output.name] = onnx.helper.make_tensor_type_proto(element, None)
        segments.append(Segment.of(session, outputs))
    return tuple(segments)


def _skip_reorders(optimized: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, str]:
    """Let outputs of `optimized` be the blocked tensors themselves; tensor -> output name."""
    graph = optimized.graph
    read = {name for node in graph.node for name in node.input}
    wanted = set(tensors) - read
    outputs = {tensor: tensor for tensor in tensors}
    reorders = [node for node in graph.node if node.op_type == "ReorderOutput"]
    for node in reorders:
        channels = next((a.i for a in node.attribute if a.name == "channels"), 0)
        last = next((a.i for a in node.attribute if a.name == "channels_last"), 0)
        if node.output[0] in wanted and channels and channels % LARGEST_BLOCK == 0 and not last:
            outputs[node.output[0]] = node.input[0]
            graph.node.remove(node)
    replaced = {tensor for tensor, output in outputs.items() if tensor != output}
    kept = [output for output in graph.output if output.name not in replaced]
    del graph.output[:]
    graph.output.extend(kept)
    fresh = dict.fromkeys(outputs[tensor] for tensor in tensors if tensor in replaced)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in fresh)
    return outputs


class Reader:
    """Runs tapped sessions again and again into buffers of its own; one a thread."""

    def __init__(self, tapped: Tapped) -> None:
        self._segments = tapped.segments
        self._lives = _lives(tapped.segments)
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        self._bound: dict[tuple[Any, ...], _Bound] = {}
        self._shapes_vary = False

    def read(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The tapped tensors for one batch, a segment at a time.

        The arrays are overwritten when the next segment is asked for.
        """
        held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        key = tuple((name, array.shape) for name, array in held.items())
        if self._shapes_vary or key not in self._shapes:
            yield from self._read_fresh(key, held, 0)
            return
        if key not in self._bound:  # one set of buffers at a time
            self._bound = {key: _Bound(self._segments, self._shapes[key], self._lives)}
        bound = self._bound[key]
        for number, segment in enumerate(self._segments):
            try:
                bound.run(number, held)
            except Exception:  # a shape that depends on the data: onnxruntime allocates then
                self._shapes_vary, self._bound = True, {}
                yield from self._read_fresh(key, bound.arrays | held, number)
                return
            yield {tensor: bound.arrays[name] for tensor, name in segment.tensors.items()}

    def _read_fresh(
        self, key: tuple[Any, ...], values: Mapping[str, NDArray[Any]], start: int
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The segments from `start` on, into memory that onnxruntime allocates."""
        known = dict(values)
        shapes: dict[str, tuple[int, ...]] = {}
        for number, segment in enumerate(self._segments[start:], start):
            feeds = {name: known[name] for name in segment.inputs}
            arrays = segment.session.run(list(segment.outputs), feeds)
            known.update(zip(segment.outputs, arrays, strict=True))
            shapes.update((name, known[name].shape) for name in segment.outputs)
            yield {tensor: known[name] for tensor, name in segment.tensors.items()}
            for name in [n for n in known if self._lives.get(n, (0, -1))[1] == number]:
                del known[name]
        if start == 0:
            self._shapes[key] = shapes


def _lives(segments: Sequence[Segment]) -> dict[str, tuple[int, int]]:
    """For each output: the segment that makes it and the last that needs it."""
    lives = {name: (n, n) for n, segment in enumerate(segments) for name in segment.outputs}
    for number, segment in enumerate(segments):
        for name in segment.inputs:
            if name in lives:
                lives[name] = (lives[name][0], number)
    return lives


class _Bound:
    """Segments bound to buffers: `arrays` holds every output, valid as `_lives` says."""

    def __init__(
        self,
        segments: Sequence[Segment],
        shapes: Mapping[str, tuple[int, ...]],
        lives: Mapping[str, tuple[int, int]],
    ) -> None:
        types = {o.name: NUMPY_TYPES[o.type] for s in segments for o in s.session.get_outputs()}
        self.arrays = _carve(shapes, types, lives)
        self._segments = segments
        self._quiet = ort.RunOptions()
        self._quiet.log_severity_level = 4  # a shape that follows the data is no error of anybody's
        self._bindings = [segment.session.io_binding() for segment in segments]
        for segment, binding in zip(segments, self._bindings, strict=True):
            for name in segment.outputs:
                binding.bind_output(name, *_place(self.arrays[name]))
            for name in self.arrays.keys() & segment.inputs:
                binding.bind_input(name, *_place(self.arrays[name]))

    def run(self, number: int, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Run one segment; `feeds` are the model's inputs, C-contiguous."""
        segment, binding = self._segments[number], self._bindings[number]
        for name in feeds.keys() & segment.inputs:
            binding.bind_input(name, *_place(feeds[name]))
        segment.session.run_with_iobinding(binding, self._quiet)


def _place(array: NDArray[Any]) -> tuple[str, int, Any, tuple[int, ...], int]:
    return "cpu", 0, array.dtype, array.shape, array.ctypes.data


def _carve(
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, type[Any]],
    lives: Mapping[str, tuple[int, int]],
) -> dict[str, NDArray[Any]]:
    """Uninitialised arrays in one block: NumPy asks for huge pages for a large one."""
    sizes = {
        name: math.prod(shape) * np.dtype(types[name]).itemsize for name, shape in shapes.items()
    }
    rounded = {name: -(-size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
    offsets, end = pack(rounded, lives)
    block = np.empty(end + ALIGNMENT, np.uint8)
    block = block[-block.ctypes.data % ALIGNMENT :]
    return {
        name: block[start : start + sizes[name]].view(types[name]).reshape(shapes[name])
        for name, start in offsets.items()
    }
