"""One pass over the data: every tensor that will carry a scale gets its histogram.

Memory does not depend on the number of pictures. The result depends neither on their order nor on
the source's batch size: pictures are put together anew into batches of one size, the last one
filled up, because a runtime may round the same picture differently in a smaller batch.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.cpu.counter import Counter, count_each
from trtune.calibrate.cpu.taps import Reader, Tapped, tap
from trtune.calibrate.extents import Extent, measure, pictures_fixed
from trtune.calibrate.gpu.counter import count_on_gpu
from trtune.calibrate.gpu.memory import device_memory
from trtune.calibrate.histogram import Histogram, not_a_number, overflowed
from trtune.calibrate.sessions import cuda_number
from trtune.configs.errors import DataError
from trtune.configs.files import hash_json
from trtune.configs.progress import Progress, silent
from trtune.configs.system.cluster import Cluster, kept
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    fit_batch,
    rebatch,
)
from trtune.datasets.pictures.prefetch import made_ahead
from trtune.datasets.wrapped import in_parts

log = logging.getLogger(__name__)

DEFAULT_MEMORY = 2 << 30
READ_BYTES = 128 << 20
LARGEST_STEP = 16
"""Pictures an inference: enough to amortise a call, few enough for caches and for memory."""

LARGEST_STEP_ON_GPU = 64
DEVICE_SHARE = 4
"""The part of a GPU's memory that marked tensors may take: 1 / DEVICE_SHARE."""


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


def collect(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    source: BatchSource,
    *,
    beside: Sequence[str] = (),
    extents: Mapping[str, Extent] | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "cpu",
    external_dir: Path | None = None,
    cluster: Cluster | None = None,
    progress: Progress = silent,
) -> Collection:
    """Histograms of |x| of `tensors` over all pictures of `source`, and of those `beside`.

    `tensors` are names of float tensors in `model` (inner ones or inputs), in graph order. Marking
    a tensor keeps the runtime from fusing the nodes around it, which moves the last bits of what
    follows. Those `beside` are therefore marked in a copy of the model of their own: what is found
    of `tensors` is the same with and without them. `extents` are what `measure` found before of
    some of them.
    `memory` bounds the bytes of marked tensors held at once: a smaller one means fewer workers,
    then further passes, each over some of the tensors. `workers` defaults to the number of
    usable cores. `device` is cpu, cuda or cuda:N; on a GPU the inference runs there and a share of
    its memory takes the place of `memory`. `external_dir` is where external weights of `model` lie.
    A `cluster` counts parts of the data at a time; the histograms are the same, bit for bit, on the
    same processors.

    Raises DataError if there is no picture, ModelError if a tensor holds NaN, naming tensor and
    picture, or if the runtime cannot load or run the model.
    """
    started = time.perf_counter()
    first = next((batch for batch in source if len(batch)), None)
    if first is None:
        raise DataError("calibration data: no picture was read; check path, take and skip")
    # A session does not write an input that it is asked for into the memory it was given for it.
    tensors = [*tensors, *(tensor for tensor in beside if tensor in first.feeds)]
    beside = [tensor for tensor in beside if tensor not in first.feeds]
    gpu = cuda_number(device)
    known = dict(extents or {})
    missing = [tensor for tensor in (*tensors, *beside) if tensor not in known]
    if missing:
        known |= measure(model, missing, first, external_dir=external_dir)
    passes, workers = _planned(
        (tensors, beside), known, pictures_fixed(model, first), first, source.count, memory,
        workers or usable_cores(), gpu,
    )  # fmt: skip
    histograms: dict[str, Histogram] = {}
    busy, pictures = 0.0, 0
    for number, (groups, batching) in enumerate(passes):
        fed = [] if number else [tensor for tensor in tensors if tensor in first.feeds]
        what = "calibrate" if len(passes) == 1 else f"calibrate, pass {number + 1} of {len(passes)}"
        work = _Work(model, groups, fed, known, batching, workers, external_dir)
        told = partial(progress, what)
        told(0, source.count)
        if cluster is not None:
            found, pictures, ran = count_in_parts(work, gpu, source, cluster, told)
        elif gpu is None:
            found, pictures, ran = _on_cpu(work, source, told)
        else:
            found, pictures, ran = _on_gpu(gpu, work, source, told)
        histograms.update(found)
        busy += ran
    ordered = {tensor: histograms[tensor] for tensor in (*tensors, *beside)}
    return Collection(ordered, pictures, len(passes), time.perf_counter() - started, busy)


def _planned(
    tensors: tuple[Sequence[str], Sequence[str]],
    extents: Mapping[str, Extent],
    fixed: int,
    first: Batch,
    count: int | None,
    memory: int,
    workers: int,
    gpu: int | None,
) -> tuple[list[tuple[_Groups, Batching]], int]:
    """What each pass reads of `tensors` and of those beside them, and how many workers there are.

    `fixed` is the batch size of the model or 0, `first` the first of the `count` pictures' batches.
    """
    wanted, beside = tensors
    largest = LARGEST_STEP
    if gpu is not None:
        memory, workers, largest = device_memory(gpu) // DEVICE_SHARE, 1, LARGEST_STEP_ON_GPU
    inner = [tensor for tensor in wanted if tensor not in first.feeds]
    layout, workers = _schedule(
        fixed,
        max(sum(extents[tensor].bytes for tensor in inner), 1),
        mixed=any(extents[tensor].axis is None for tensor in wanted),
        given=len(first),
        count=count or largest,
        memory=memory,
        workers=workers,
        largest=largest,
    )
    apart = layout
    if any(extents[tensor].axis is None for tensor in beside):
        apart = Batching(fixed or len(first), fill=bool(fixed))
    passes = _passes((inner, layout), (beside, apart), extents, memory // workers)
    if len(passes) > 1:
        log.info(
            "%d tensors in %d passes, to stay within %d bytes",
            len(wanted) + len(beside), len(passes), memory,
        )  # fmt: skip
    return passes, workers


@dataclass(frozen=True, slots=True)
class Batching:
    """Pictures an inference, and whether a short last batch is filled up to that."""

    step: int
    fill: bool


def _schedule(
    fixed: int,
    each: int,
    *,
    mixed: bool,
    given: int,
    count: int,
    memory: int,
    workers: int,
    largest: int = LARGEST_STEP,
) -> tuple[Batching, int]:
    """Pictures an inference, and workers: as many as caches like, within `memory`.

    `fixed` is the batch size of the model or 0, `each` the bytes of a picture's tensors, `count`
    the number of pictures. Tensors in which pictures are `mixed` are the same only for the same
    batches, so those stay as `given`. A source of single pictures may have one shape each.
    """
    cached = READ_BYTES if largest == LARGEST_STEP else memory
    step = max(min(cached // each, memory // each, largest, count), 1)
    step = fixed or (given if mixed or given == 1 else step)
    workers = max(1, min(workers, memory // (each * step)))
    return Batching(step, fill=bool(fixed) or not mixed), workers


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


_Groups = tuple[Sequence[str], ...]


def _passes(
    first: tuple[Sequence[str], Batching],
    beside: tuple[Sequence[str], Batching],
    extents: Mapping[str, Extent],
    budget: int,
) -> list[tuple[_Groups, Batching]]:
    """What each pass over the data reads: groups of tensors, each marked in a session of its own.

    `budget` is the bytes a worker may hold. One pass for all where they fit; else the parts of
    `first`, which do not depend on what is `beside`, and then the parts of that.
    """
    (inner, layout), (others, apart) = first, beside
    room = budget // layout.step
    if not others:
        return [((chunk,), layout) for chunk in _chunks(inner, extents, room) or [[]]]
    if layout == apart and len(_chunks([*inner, *others], extents, room)) == 1:
        return [((inner, others), layout)]
    rest = _chunks(others, extents, budget // apart.step)
    return [
        *_passes(first, ((), apart), extents, budget),
        *(((chunk,), apart) for chunk in rest),
    ]


@dataclass(frozen=True, slots=True)
class _Work:
    """One pass: `groups` of inner tensors, each with a session of its own, and the `fed` inputs."""

    model: onnx.ModelProto
    groups: _Groups
    fed: Sequence[str]
    extents: Mapping[str, Extent]
    layout: Batching
    workers: int
    external_dir: Path | None

    @property
    def wanted(self) -> list[str]:
        """All tensors of this pass."""
        return [*self.fed, *(tensor for group in self.groups for tensor in group)]


def _with_outputs(work: _Work) -> list[list[str]]:
    """The groups of `work`. Outputs of the model need no mark, so the first session has them."""
    outputs = {output.name for output in work.model.graph.output}
    first, *others = map(list, work.groups)
    given = [tensor for group in others for tensor in group if tensor in outputs]
    rest = ([tensor for tensor in group if tensor not in outputs] for group in others)
    return [[*first, *given], *(group for group in rest if group)]


Told = Callable[[int, int | None], None]


def _on_cpu(
    work: _Work, source: BatchSource, progress: Told
) -> tuple[dict[str, Histogram], int, float]:
    run = _Pass(_tapped(work), work.wanted, work.extents, work.layout, work.workers)
    counters, pictures = run.over(source, progress)
    return _histograms(counters), pictures, run.busy / work.workers


def _tapped(work: _Work) -> list[Tapped]:
    return [
        tap(
            work.model,
            group,
            sizes={tensor: work.extents[tensor].bytes * work.layout.step for tensor in group},
            threads=1 if work.workers > 1 else usable_cores(),
            external_dir=work.external_dir,
        )
        for group in _with_outputs(work)
    ]


def _histograms(counters: Mapping[str, Counter]) -> dict[str, Histogram]:
    for tensor, counter in counters.items():
        if 0 < len(counter.overflowed) < counter.pictures:
            raise overflowed(tensor, min(counter.overflowed))
    return {tensor: counter.histogram() for tensor, counter in counters.items()}


def _on_gpu(
    gpu: int, work: _Work, source: BatchSource, progress: Told
) -> tuple[dict[str, Histogram], int, float]:
    done = 0

    def counted(pictures: int) -> None:
        nonlocal done
        done += pictures
        progress(done, source.count)

    def batches() -> Iterator[tuple[Mapping[str, NDArray[Any]], tuple[str, ...], int]]:
        for batch in made_ahead(rebatch(source, work.layout.step)):
            full = fit_batch(batch, work.layout.step) if work.layout.fill else batch
            yield full.feeds, batch.items, len(full)

    first, *others = _with_outputs(work)
    groups = [[*work.fed, *first], *others]
    found, busy = count_on_gpu(
        work.model,
        [{tensor: work.extents[tensor].axis for tensor in group} for group in groups],
        batches(),
        gpu,
        external_dir=work.external_dir,
        counted=counted,
    )
    return found, done, busy


PARTS = 4
"""Parts of the data for each task that runs at a time: what is lost with a node is small."""


def count_in_parts(
    work: _Work, gpu: int | None, source: BatchSource, cluster: Cluster, progress: Told
) -> tuple[dict[str, Histogram], int, float]:
    """One pass whose parts are counted by the tasks of `cluster`."""
    step = work.layout.step
    count = source.count or PARTS * cluster.slots * step
    size = -(-count // (PARTS * cluster.slots * step)) * step
    key = hashlib.sha256(work.model.SerializeToString()).hexdigest()
    held = in_parts(source, size, whole=not work.layout.fill)
    counters: dict[str, Counter] = {}
    histograms: dict[str, Histogram] = {}
    pictures, busy = 0, 0.0
    tasks = ((part,) for part in held)
    shared = (work, key, gpu)
    for _, (found, seen, ran) in cluster.each(count_part, tasks, shared=shared, what="calibrate"):
        for tensor, one in found.items():
            if isinstance(one, Histogram):
                before = histograms.get(tensor)
                histograms[tensor] = one if before is None else before.plus(one)
            elif tensor in counters:
                counters[tensor].merge(one)
            else:
                counters[tensor] = one
        pictures, busy = pictures + seen, busy + ran
        progress(pictures, source.count)
    return histograms or _histograms(counters), pictures, busy / cluster.slots


def count_part(
    work: _Work, key: str, gpu: int | None, part: BatchSource
) -> tuple[Mapping[str, Counter | Histogram], int, float]:
    """In a worker: the counts of `part`, its pictures, and the seconds of the runtime.

    Sessions are kept for the next part of the same pass.
    """
    if gpu is not None:
        return _on_gpu(0, work, part, _untold)
    work = replace(work, workers=min(work.workers, usable_cores()))
    name = hash_json([key, [list(group) for group in work.groups], work.layout.step, work.workers])
    tapped = kept(name, partial(_tapped, work))
    run = _Pass(tapped, work.wanted, work.extents, work.layout, work.workers)
    counters, pictures = run.over(part, _untold)
    return counters, pictures, run.busy / work.workers


def _untold(done: int, total: int | None) -> None:
    """A worker's progress is told when its part is done."""


class _Pass:
    """One pass over the data: workers run and count, each into counters of its own."""

    def __init__(
        self,
        tapped: Sequence[Tapped],
        tensors: Sequence[str],
        extents: Mapping[str, Extent],
        layout: Batching,
        workers: int,
    ) -> None:
        self.busy = 0.0
        self._tapped, self._tensors, self._extents = tapped, tensors, extents
        self._layout, self._workers = layout, workers
        self._mine = threading.local()
        self._all: list[dict[str, Counter]] = []
        self._lock = threading.Lock()

    def over(self, source: BatchSource, progress: Told) -> tuple[dict[str, Counter], int]:
        pictures = 0
        waiting: deque[Future[int]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="calibrate")
        try:
            for batch in rebatch(source, self._layout.step):
                waiting.append(pool.submit(self._count, batch))
                if len(waiting) > 2 * self._workers:
                    pictures += waiting.popleft().result()
                    progress(pictures, source.count)
            for future in waiting:
                pictures += future.result()
                progress(pictures, source.count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return self._merged(), pictures

    def _merged(self) -> dict[str, Counter]:
        merged, *others = self._all or [{tensor: Counter() for tensor in self._tensors}]
        for counters in others:
            for tensor, counter in counters.items():
                merged[tensor].merge(counter)
        return merged

    def _count(self, batch: Batch) -> int:
        if not hasattr(self._mine, "readers"):
            self._mine.readers = [Reader(tapped) for tapped in self._tapped]
            self._mine.counters = {tensor: Counter() for tensor in self._tensors}
            with self._lock:
                self._all.append(self._mine.counters)
        fed = {t: batch.feeds[t] for t in self._mine.counters if t in batch.feeds}
        self._add(fed, len(batch), batch.items)
        full = fit_batch(batch, self._layout.step) if self._layout.fill else batch
        started = time.perf_counter()
        ran = 0.0
        for values in chain.from_iterable(r.read(full.feeds) for r in self._mine.readers):
            ran += time.perf_counter() - started
            self._add(values, len(full), batch.items)
            started = time.perf_counter()
        with self._lock:
            self.busy += ran
        return len(batch)

    def _add(self, arrays: Mapping[str, NDArray[Any]], held: int, items: tuple[str, ...]) -> None:
        jobs = [
            (self._mine.counters[tensor], *_by_picture(a, held, items, self._extents[tensor].axis))
            for tensor, a in arrays.items()
        ]
        maxima = count_each(jobs)
        if np.isnan(maxima).any():
            row = int(np.argmax(np.isnan(maxima)))
            rows = [
                (tensor, name) for tensor, job in zip(arrays, jobs, strict=True) for name in job[1]
            ]
            raise not_a_number(*rows[row])


def _by_picture(
    array: NDArray[Any], held: int, items: tuple[str, ...], axis: int | None
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """The names and rows of `items`, the first of the `held` pictures in `array`.

    One row for all if pictures cannot be told apart.
    """
    if axis is None:
        name = items[0] if len(items) == 1 else f"{items[0]} to {items[-1]}"
        return (name,), _as_float(array).reshape(1, -1)
    plain = axis == 0 and array.dtype == np.float32 and array.flags.c_contiguous
    rows = array if plain else _as_float(np.moveaxis(array, axis, 0))
    return items, rows.reshape(held, -1)[: len(items)]


def _as_float(array: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a double too large for float32 is infinity
        return np.ascontiguousarray(array, np.float32)
