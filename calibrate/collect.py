"""One pass over the data: every tensor that will carry a scale gets its histogram.

Memory does not depend on the number of pictures; the result does not depend on their order, on
the number of threads, or (up to the runtime's own float noise) on the batch size.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.histogram import Counter, Histogram
from trtune.calibrate.taps import Reader, Tapped, session_of, tap, with_outputs
from trtune.configs.errors import DataError, ModelError
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource

log = logging.getLogger(__name__)

DEFAULT_MEMORY = 2 << 30
READ_BYTES = 64 << 20
"""Marked tensors of one inference: enough pictures to amortise a call, few enough for caches."""


@dataclass(frozen=True, slots=True)
class Collection:
    """What one calibration saw: a histogram a tensor, and what it cost.

    `seconds` is wall time; `inference_seconds` the part of it the runtime took (a share of all
    workers' time); `passes` how often the data was read.
    """

    histograms: Mapping[str, Histogram]
    pictures: int
    passes: int
    seconds: float
    inference_seconds: float


@dataclass(frozen=True, slots=True)
class Extent:
    """How large a tensor is: bytes a picture, and the axis along which pictures lie, if any."""

    bytes: int
    axis: int | None


def collect(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    source: BatchSource,
    *,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    external_dir: Path | None = None,
    progress: Progress = silent,
) -> Collection:
    """Histograms of |x| of `tensors` over all pictures of `source`.

    `tensors` are names of float tensors in `model` (inner ones or inputs), in graph order.
    `memory` bounds the bytes of marked tensors held at once: a smaller one means fewer workers,
    then further passes, each over some of the tensors. `workers` defaults to the number of
    usable cores. `external_dir` is where external weights of `model` lie.

    Raises DataError if there is no picture, ModelError if a tensor holds NaN or infinity, naming
    tensor and picture, or if the runtime cannot load or run the model.
    """
    started = time.perf_counter()
    first = next(iter(source), None)
    if first is None or not len(first):
        raise DataError("calibration data: no picture was read; check path, take and skip")
    inner = [tensor for tensor in tensors if tensor not in first.feeds]
    extents = measure(model, tensors, first, external_dir=external_dir)
    step, workers = _schedule(inner, extents, first, memory, workers or usable_cores())
    chunks = _chunks(inner, extents, memory // workers // step) or [[]]
    if len(chunks) > 1:
        log.info(
            "%d tensors in %d passes, to stay within %d bytes", len(inner), len(chunks), memory
        )
    histograms: dict[str, Histogram] = {}
    busy, pictures = 0.0, 0
    for number, chunk in enumerate(chunks):
        wanted = chunk if number else [*(t for t in tensors if t in first.feeds), *chunk]
        tapped = tap(
            model, chunk, threads=1 if workers > 1 else usable_cores(), external_dir=external_dir
        )
        what = "calibrate" if len(chunks) == 1 else f"calibrate, pass {number + 1} of {len(chunks)}"
        run = _Pass(tapped, wanted, extents, step, workers)
        found, pictures = run.over(source, what, progress)
        histograms.update(found)
        busy += run.busy / workers
    ordered = {tensor: histograms[tensor] for tensor in tensors}
    return Collection(ordered, pictures, len(chunks), time.perf_counter() - started, busy)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batch: Batch,
    *,
    external_dir: Path | None = None,
) -> dict[str, Extent]:
    """Size and picture axis of each tensor, from two inferences that give only shapes back.

    One with two pictures and one with one: the axis whose length follows the number of pictures
    is theirs. A batch of one picture is all of every tensor: axis 0 with one row. A model of
    fixed batch size is asked once.
    """
    names = {tensor: f"{tensor}/trtune_shape" for tensor in tensors if tensor not in batch.feeds}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.node.extend(
        onnx.helper.make_node("Shape", [tensor], [name], name=name)
        for tensor, name in names.items()
    )
    session = session_of(with_outputs(probe, list(names.values())), external_dir)

    def shapes(size: int) -> dict[str, tuple[int, ...]]:
        feeds = {name: array[:size] for name, array in batch.feeds.items()}
        found = session.run(list(names.values()), feeds) if names else []
        inner = {t: tuple(int(d) for d in s) for t, s in zip(names, found, strict=True)}
        return inner | {name: array.shape for name, array in feeds.items()}

    fixed = _is_fixed(session, len(batch))
    size = len(batch) if fixed else min(len(batch), 2)
    full = shapes(size)
    less = full if fixed or size == 1 else shapes(size - 1)
    return {
        tensor: Extent(
            4 * int(np.prod(full[tensor], dtype=np.int64)) // size,
            _picture_axis(full[tensor], less[tensor], size, fixed),
        )
        for tensor in tensors
    }


def _is_fixed(session: Any, size: int) -> bool:
    return any(i.shape and i.shape[0] == size for i in session.get_inputs())


def _picture_axis(
    full: tuple[int, ...], less: tuple[int, ...], size: int, fixed: bool
) -> int | None:
    """The axis of `full` that holds `size` pictures, given the shape for one picture fewer.

    >>> _picture_axis((3, 8, 65), (3, 7, 65), 8, False), _picture_axis((16, 5), (14, 5), 8, False)
    (1, 0)
    """
    if size == 1:
        return 0
    if fixed:
        return 0 if full and full[0] % size == 0 else None
    for axis, (a, b) in enumerate(zip(full, less, strict=True)):
        if a != b:
            return axis if a * (size - 1) == b * size else None
    return None


def _schedule(
    inner: Sequence[str], extents: Mapping[str, Extent], batch: Batch, memory: int, workers: int
) -> tuple[int, int]:
    """Pictures an inference, and workers: enough to fill the caches, within `memory`."""
    each = max(sum(extents[tensor].bytes for tensor in inner), 1)
    fixed = len(batch) if any(e.axis is None for e in extents.values()) else None
    step = fixed or max(1, min(len(batch), READ_BYTES // each))
    return step, max(1, min(workers, memory // (each * step)))


def _chunks(tensors: Sequence[str], extents: Mapping[str, Extent], budget: int) -> list[list[str]]:
    """Split `tensors`, in order, so that each part's bytes a picture stay within `budget`."""
    chunks: list[list[str]] = []
    room = 0
    for tensor in tensors:
        if not chunks or extents[tensor].bytes > room:
            chunks.append([])
            room = budget
        chunks[-1].append(tensor)
        room -= extents[tensor].bytes
    return chunks


class _Pass:
    """One pass over the data: workers run and count, each into counters of its own."""

    def __init__(
        self,
        tapped: Tapped,
        tensors: Sequence[str],
        extents: Mapping[str, Extent],
        step: int,
        workers: int,
    ) -> None:
        self.busy = 0.0
        self._tapped, self._tensors, self._extents = tapped, tensors, extents
        self._step, self._workers = step, workers
        self._mine = threading.local()
        self._all: list[dict[str, Counter]] = []
        self._lock = threading.Lock()

    def over(
        self, source: BatchSource, what: str, progress: Progress
    ) -> tuple[dict[str, Histogram], int]:
        pictures = 0
        waiting: deque[Future[int]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="calibrate")
        try:
            for piece in _pieces(source, self._step):
                waiting.append(pool.submit(self._count, piece))
                if len(waiting) > 2 * self._workers:
                    pictures += waiting.popleft().result()
                    progress(what, pictures, source.count)
            for future in waiting:
                pictures += future.result()
                progress(what, pictures, source.count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return self._merged(), pictures

    def _merged(self) -> dict[str, Histogram]:
        merged, *others = self._all
        for counters in others:
            for tensor, counter in counters.items():
                merged[tensor].merge(counter)
        return {tensor: counter.histogram() for tensor, counter in merged.items()}

    def _count(self, batch: Batch) -> int:
        if not hasattr(self._mine, "reader"):
            self._mine.reader = Reader(self._tapped)
            self._mine.counters = {tensor: Counter() for tensor in self._tensors}
            with self._lock:
                self._all.append(self._mine.counters)
        started = time.perf_counter()
        values = self._mine.reader.read(batch.feeds) if self._tapped.outputs else {}
        ran = time.perf_counter() - started
        for tensor in self._tensors:
            array = values[tensor] if tensor in values else batch.feeds[tensor]
            items, rows = _by_picture(array, batch, self._extents[tensor].axis)
            maxima = self._mine.counters[tensor].add(items, rows)
            if not np.isfinite(maxima).all():
                raise _not_finite(tensor, items[int(np.argmin(np.isfinite(maxima)))], rows)
        with self._lock:
            self.busy += ran
        return len(batch)


def _pieces(source: BatchSource, step: int) -> Iterator[Batch]:
    """The batches of `source` cut into at most `step` pictures."""
    for batch in source:
        for start in range(0, len(batch), step):
            part = slice(start, start + step)
            yield Batch({n: a[part] for n, a in batch.feeds.items()}, batch.items[part])


def _by_picture(
    array: NDArray[Any], batch: Batch, axis: int | None
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """`array` as one row a picture with the pictures' names; one row for all if they are mixed."""
    if axis is None:
        name = batch.items[0] if len(batch) == 1 else f"{batch.items[0]} to {batch.items[-1]}"
        return (name,), np.ascontiguousarray(array, np.float32).reshape(1, -1)
    rows = np.ascontiguousarray(np.moveaxis(array, axis, 0) if axis else array, np.float32)
    return batch.items, rows.reshape(len(batch), -1)


def _not_finite(tensor: str, item: str, rows: NDArray[np.float32]) -> ModelError:
    kind = "NaN" if np.isnan(rows).any() else "infinity"
    return ModelError(
        f"tensor {tensor!r} holds {kind} for picture {item!r}; the FP32 model itself gives it, so "
        "no scale can be right: check the model and the preprocessing of that picture"
    )
