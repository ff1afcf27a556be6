"""CUDA on a GPU: streams, buffers, events, graphs, and how long work takes; checked and freed.

Nothing here takes a TensorRT object, so that it runs on any NVIDIA GPU with cuda-python 13.
Everything that holds memory is used in `with`, or given back with `free`.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.runtime import (
    CudaError,
    DeviceProperties,
    check,
    device_properties,
    load_runtime,
    size_text,
    use_device,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CudaError",
    "DeviceBuffer",
    "DeviceProperties",
    "Event",
    "GpuTiming",
    "Graph",
    "PinnedBuffer",
    "Spread",
    "Stream",
    "capture",
    "device_properties",
    "read_device",
    "time_gpu",
    "try_capture",
    "use_device",
]

log = logging.getLogger(__name__)


class Owned:
    """Something that CUDA holds for this process until `free`, or the end of a `with` block."""

    what: ClassVar[str]
    freed_by: ClassVar[str]

    def __init__(self, handle: Any) -> None:
        self._handle: Any = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.free()
        except CudaError as failure:
            if error is None:
                raise
            # Often the same failure again, which CUDA tells at every call from then on.
            log.debug("while another error was on its way: %s", failure)

    @property
    def handle(self) -> Any:
        """What CUDA's functions take. Raises ValueError once it is freed."""
        if self._handle is None:
            raise ValueError(f"the {self.what} is freed; use it inside its `with` block")
        return self._handle

    def free(self) -> None:
        """Give it back to CUDA; nothing happens the second time. Raises CudaError."""
        handle, self._handle = self._handle, None
        if handle is not None:
            check(getattr(load_runtime(), self.freed_by)(handle), f"freeing a {self.what}")


class Stream(Owned):
    """A queue of work on the current GPU, which does not wait for the default one."""

    what = "stream"
    freed_by = "cudaStreamDestroy"

    def __init__(self) -> None:
        runtime = load_runtime()
        flags = runtime.cudaStreamNonBlocking
        super().__init__(check(runtime.cudaStreamCreateWithFlags(flags), "making a stream"))

    @property
    def address(self) -> int:
        """The stream as a number, for libraries that take a cudaStream_t so."""
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait until everything queued is done. Raises CudaError with what failed on the GPU."""
        check(load_runtime().cudaStreamSynchronize(self.handle), "waiting for work on the GPU")


class Event(Owned):
    """A mark in a stream; two of them give the time that the GPU took in between."""

    what = "event"
    freed_by = "cudaEventDestroy"

    def __init__(self) -> None:
        super().__init__(check(load_runtime().cudaEventCreate(), "making an event"))

    def record(self, stream: Stream) -> None:
        """Set the mark behind what is queued in `stream` by now."""
        check(load_runtime().cudaEventRecord(self.handle, stream.handle), "recording an event")

    def milliseconds_since(self, start: Event) -> float:
        """GPU time from `start` to here, with a resolution of about half a microsecond.

        Both must be recorded and reached.
        """
        result = load_runtime().cudaEventElapsedTime(start.handle, self.handle)
        return float(check(result, "reading the time between two events"))


class DeviceBuffer(Owned):
    """`nbytes` bytes of memory on the current GPU."""

    what = "device buffer"
    freed_by = "cudaFree"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = _not_negative(nbytes)
        doing = f"allocating {size_text(nbytes)} on the GPU"
        # A tensor may be empty, but its address must be one.
        super().__init__(check(load_runtime().cudaMalloc(max(nbytes, 1)), doing))

    @property
    def pointer(self) -> int:
        """The address on the GPU."""
        return int(self.handle)

    def upload(self, array: NDArray[Any], stream: Stream | None = None) -> None:
        """Copy `array`, in C order, to the beginning of the buffer.

        With `stream` the copy is queued there; a pinned array must then stay as it is until that
        is done. Without, it is done on return. Raises ValueError if `array` is larger.
        """
        source = np.ascontiguousarray(array)
        self._fits(source.nbytes)
        self._copy(self.pointer, source, "cudaMemcpyHostToDevice", stream)

    def download(self, into: NDArray[Any], stream: Stream | None = None) -> NDArray[Any]:
        """Copy the beginning of the buffer over `into`, which is given back.

        With `stream` the copy is queued there, and `into` must live, and is right, only once that
        is done. Raises ValueError if `into` is larger, or not one piece of writable memory.
        """
        if not (into.flags.c_contiguous and into.flags.writeable):
            raise ValueError("`into` must be a writable array in C order")
        self._fits(into.nbytes)
        self._copy(self.pointer, into, "cudaMemcpyDeviceToHost", stream)
        return into

    def _fits(self, nbytes: int) -> None:
        if nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes do not fit a buffer of {self.nbytes}")

    @staticmethod
    def _copy(pointer: int, array: NDArray[Any], kind: str, stream: Stream | None) -> None:
        runtime = load_runtime()
        to_gpu = kind == "cudaMemcpyHostToDevice"
        ends = (pointer, array.ctypes.data) if to_gpu else (array.ctypes.data, pointer)
        way = getattr(runtime.cudaMemcpyKind, kind)
        doing = f"copying {size_text(array.nbytes)} {'to' if to_gpu else 'from'} the GPU"
        if stream is None:
            check(runtime.cudaMemcpy(*ends, array.nbytes, way), doing)
        else:
            check(runtime.cudaMemcpyAsync(*ends, array.nbytes, way, stream.handle), doing)


class PinnedBuffer(Owned):
    """`nbytes` bytes of the CPU's memory that the GPU copies from and to by itself."""

    what = "pinned buffer"
    freed_by = "cudaFreeHost"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = _not_negative(nbytes)
        runtime = load_runtime()
        doing = f"allocating {size_text(nbytes)} of pinned memory"
        super().__init__(
            check(runtime.cudaHostAlloc(max(nbytes, 1), runtime.cudaHostAllocDefault), doing)
        )

    @property
    def pointer(self) -> int:
        """The address in the CPU's memory."""
        return int(self.handle)

    def view(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array over the beginning of the buffer, good until `free`: copy what is kept.

        Raises ValueError if it is larger than the buffer.
        """
        kind = np.dtype(dtype)
        wanted = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if wanted > self.nbytes:
            raise ValueError(f"{wanted} bytes do not fit a buffer of {self.nbytes}")
        memory = (ctypes.c_ubyte * max(self.nbytes, 1)).from_address(self.pointer)
        return np.ndarray(shape, dtype=kind, buffer=memoryview(memory).cast("B"))


def _not_negative(nbytes: int) -> int:
    if nbytes < 0:
        raise ValueError(f"nbytes is {nbytes}")
    return nbytes


def read_device(pointer: int, into: NDArray[Any], stream: int) -> None:
    """Copy from address `pointer` of the GPU over `into`, behind what is queued in `stream`.

    `stream` is a stream's number; the copy is done on return. For memory that someone else holds.
    """
    runtime = load_runtime()
    way = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
    doing = f"copying {size_text(into.nbytes)} from the GPU"
    check(runtime.cudaMemcpyAsync(into.ctypes.data, pointer, into.nbytes, way, stream), doing)
    check(runtime.cudaStreamSynchronize(stream), doing)


class Graph(Owned):
    """Work captured once and launched with one call, without the CPU's time for each kernel."""

    what = "graph"
    freed_by = "cudaGraphExecDestroy"

    def launch(self, stream: Stream) -> None:
        """Queue the captured work in `stream`."""
        check(load_runtime().cudaGraphLaunch(self.handle, stream.handle), "launching a graph")


def capture(enqueue: Callable[[Stream], None], stream: Stream) -> Graph:
    """What `enqueue(stream)` queues, as a graph; nothing of it is run.

    Raises what `enqueue` raises, or CudaError if its work cannot be captured; `stream` then works
    on as before.
    """
    runtime = load_runtime()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    check(runtime.cudaStreamBeginCapture(stream.handle, mode), "starting to capture a graph")
    try:
        enqueue(stream)
    except BaseException:  # raised again below, once the stream is out of capture mode
        status, graph = runtime.cudaStreamEndCapture(stream.handle)
        if int(status):
            runtime.cudaGetLastError()
        elif graph is not None:
            runtime.cudaGraphDestroy(graph)
        raise
    graph = check(runtime.cudaStreamEndCapture(stream.handle), "capturing a graph")
    try:
        return Graph(check(runtime.cudaGraphInstantiate(graph, 0), "preparing a captured graph"))
    finally:
        check(runtime.cudaGraphDestroy(graph), "freeing a captured graph")


def try_capture(enqueue: Callable[[Stream], None], stream: Stream) -> tuple[Graph | None, str]:
    """The graph of `enqueue(stream)` and "", or None and why it cannot be captured."""
    try:
        return capture(enqueue, stream), ""
    except TrtuneError as error:
        return None, str(error)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 95th and 99th percentile of some times, in milliseconds."""

    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Spread:
        """Percentiles interpolated linearly. Raises ValueError if nothing was measured.

        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(median=2.0, p95=2.9, p99=2.98)
        """
        if not milliseconds:
            raise ValueError("no runs were measured")
        values = np.percentile(np.asarray(milliseconds, dtype=np.float64), [50, 95, 99])
        return cls(*(round(float(value), 6) for value in values))


@dataclass(frozen=True, slots=True)
class GpuTiming:
    """How long one call takes.

    `compute` is the time between two events around the call, each call alone on the GPU;
    `end_to_end` is the CPU's clock from before the upload until the result is back in the CPU's
    memory, None without transfers. `throughput` is calls a second, queued one behind another
    without transfers. `graph` says whether a CUDA graph was launched; if one was wanted and could
    not be, `graph_reason` says why.
    """

    compute: Spread
    end_to_end: Spread | None
    throughput: float
    warmup: int
    runs: int
    graph: bool
    graph_reason: str = ""


def time_gpu(
    enqueue: Callable[[Stream], None],
    *,
    stream: Stream,
    warmup: int = 10,
    runs: int = 50,
    graph: bool = False,
    upload: Callable[[Stream], None] | None = None,
    download: Callable[[Stream], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> GpuTiming:
    """Time the work that `enqueue(stream)` queues, after `warmup` calls that are not timed.

    With `graph` it is captured once and launched as a CUDA graph; if that fails, it is timed
    without one. `upload` and `download` queue the copies to and from the GPU, for `end_to_end`.
    `clock` gives seconds.

    Raises ValueError if `runs` is below 1, and what `enqueue` and CUDA raise.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; at least one run must be measured")
    with ExitStack() as stack:
        start, end = stack.enter_context(Event()), stack.enter_context(Event())
        if upload is not None:
            upload(stream)
        for _ in range(warmup):
            enqueue(stream)
        stream.synchronize()
        captured, reason = try_capture(enqueue, stream) if graph else (None, "")
        call = enqueue
        if captured is not None:
            stack.enter_context(captured)
            call = captured.launch
            call(stream)  # the first launch also moves the graph to the GPU
            stream.synchronize()
        elif reason:
            log.info("timed without a CUDA graph: %s", reason)
        compute = [_between(start, end, call, stream) for _ in range(runs)]
        queued = _between(start, end, call, stream, times=runs)
        whole = []
        if upload is not None or download is not None:
            steps = [step for step in (upload, call, download) if step is not None]
            whole = [_clocked(steps, stream, clock) for _ in range(warmup + runs)][warmup:]
    return GpuTiming(
        compute=Spread.of(compute),
        end_to_end=Spread.of(whole) if whole else None,
        throughput=round(1e3 * runs / queued, 6) if queued else 0.0,
        warmup=warmup,
        runs=runs,
        graph=captured is not None,
        graph_reason=reason,
    )


def _between(
    start: Event, end: Event, call: Callable[[Stream], None], stream: Stream, *, times: int = 1
) -> float:
    """Milliseconds of GPU time for `times` calls queued one behind another."""
    start.record(stream)
    for _ in range(times):
        call(stream)
    end.record(stream)
    stream.synchronize()
    return end.milliseconds_since(start)


def _clocked(
    steps: Sequence[Callable[[Stream], None]], stream: Stream, clock: Callable[[], float]
) -> float:
    """Milliseconds of `clock` until all `steps` are done on the GPU."""
    begun = clock()
    for step in steps:
        step(stream)
    stream.synchronize()
    return 1e3 * (clock() - begun)
