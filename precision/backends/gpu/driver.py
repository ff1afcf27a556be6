"""CUDA on a GPU: streams, events and graphs; checked and freed.

Nothing here takes a TensorRT object, so that it runs on any NVIDIA GPU with cuda-python 13.
Everything that holds memory is used in `with`, or given back with `free`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.runtime import CudaError, checked, load_runtime

if TYPE_CHECKING:
    from typing_extensions import Self

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
            checked(getattr(load_runtime(), self.freed_by)(handle), f"freeing a {self.what}")


class Stream(Owned):
    """A queue of work on the current GPU, which does not wait for the default one."""

    what = "stream"
    freed_by = "cudaStreamDestroy"

    def __init__(self) -> None:
        runtime = load_runtime()
        flags = runtime.cudaStreamNonBlocking
        super().__init__(checked(runtime.cudaStreamCreateWithFlags(flags), "making a stream"))

    @property
    def address(self) -> int:
        """The stream as a number, for libraries that take a cudaStream_t so."""
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait until everything queued is done. Raises CudaError with what failed on the GPU."""
        checked(load_runtime().cudaStreamSynchronize(self.handle), "waiting for work on the GPU")


class Event(Owned):
    """A mark in a stream; two of them give the time that the GPU took in between."""

    what = "event"
    freed_by = "cudaEventDestroy"

    def __init__(self) -> None:
        super().__init__(checked(load_runtime().cudaEventCreate(), "making an event"))

    def record(self, stream: Stream) -> None:
        """Set the mark behind what is queued in `stream` by now."""
        checked(load_runtime().cudaEventRecord(self.handle, stream.handle), "recording an event")

    def milliseconds_since(self, start: Event) -> float:
        """GPU time from `start` to here, with a resolution of about half a microsecond.

        Both must be recorded and reached.
        """
        result = load_runtime().cudaEventElapsedTime(start.handle, self.handle)
        return float(checked(result, "reading the time between two events"))


class Graph(Owned):
    """Work captured once and launched with one call, without the CPU's time for each kernel."""

    what = "graph"
    freed_by = "cudaGraphExecDestroy"

    def launch(self, stream: Stream) -> None:
        """Queue the captured work in `stream`."""
        checked(load_runtime().cudaGraphLaunch(self.handle, stream.handle), "launching a graph")


def capture(enqueue: Callable[[Stream], None], stream: Stream) -> Graph:
    """What `enqueue(stream)` queues, as a graph; nothing of it is run.

    Raises what `enqueue` raises, or CudaError if its work cannot be captured; `stream` then works
    on as before.
    """
    runtime = load_runtime()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(runtime.cudaStreamBeginCapture(stream.handle, mode), "starting to capture a graph")
    try:
        enqueue(stream)
    except BaseException:  # raised again below, once the stream is out of capture mode
        status, graph = runtime.cudaStreamEndCapture(stream.handle)
        if int(status):
            runtime.cudaGetLastError()
        elif graph is not None:
            runtime.cudaGraphDestroy(graph)
        raise
    graph = checked(runtime.cudaStreamEndCapture(stream.handle), "capturing a graph")
    try:
        return Graph(checked(runtime.cudaGraphInstantiate(graph, 0), "preparing a captured graph"))
    finally:
        checked(runtime.cudaGraphDestroy(graph), "freeing a captured graph")


def try_capture(enqueue: Callable[[Stream], None], stream: Stream) -> tuple[Graph | None, str]:
    """The graph of `enqueue(stream)` and "", or None and why it cannot be captured."""
    try:
        return capture(enqueue, stream), ""
    except TrtuneError as error:
        return None, str(error)
