"""A strict double of `cuda.bindings.runtime` over the CPU's own memory, for machines without a GPU.

It has the functions that this project uses, with the parameters, results and error codes of
cuda-python 13; another name is an AttributeError, another number of arguments a TypeError. "GPU"
addresses are addresses in this process, so that what stands in for a kernel can work on them.
Work is done when it is queued; each copy takes a millisecond of the GPU's clock. `held` counts
what is not freed. What only a GPU can show (speed, asynchrony, alignment) it cannot.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

MEMORY = 1 << 30


class Status(IntEnum):
    """The codes of cudaError_t that the double gives."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


TEXTS = {
    Status.cudaSuccess: "no error",
    Status.cudaErrorInvalidValue: "invalid argument",
    Status.cudaErrorMemoryAllocation: "out of memory",
    Status.cudaErrorInsufficientDriver: "CUDA driver version is insufficient for CUDA runtime "
    "version",
    Status.cudaErrorNoDevice: "no CUDA-capable device is detected",
    Status.cudaErrorInvalidDevice: "invalid device ordinal",
    Status.cudaErrorInvalidResourceHandle: "invalid resource handle",
    Status.cudaErrorIllegalAddress: "an illegal memory access was encountered",
    Status.cudaErrorLaunchFailure: "unspecified launch failure",
    Status.cudaErrorStreamCaptureUnsupported: "operation not permitted when stream is capturing",
    Status.cudaErrorStreamCaptureInvalidated: "operation failed due to a previous error during "
    "capture",
}
OK = Status.cudaSuccess


class Kind(IntEnum):
    """cudaMemcpyKind."""

    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Mode(IntEnum):
    """cudaStreamCaptureMode."""

    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class CudaDouble(ModuleType):
    """One "GPU" of 1 GiB with its runtime; put it into `sys.modules["cuda.bindings.runtime"]`."""

    cudaError_t = Status
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = Mode
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0

    def __init__(self, *, devices: int = 1) -> None:
        super().__init__("cuda.bindings.runtime")
        self.devices, self.device, self.driver = devices, 0, 13000
        self.now = 0.0
        self.calls: Counter[str] = Counter()
        self.live: Counter[str] = Counter()
        self.last = OK
        self._memory: dict[int, tuple[str, Any]] = {}
        self._handles: dict[int, tuple[str, Any]] = {}
        self._planned: dict[str, dict[int, Status]] = {}

    def fail(self, name: str, code: Status, *, at: int = 1) -> None:
        """Make the `at`-th call of `name` from now on give `code`."""
        self._planned.setdefault(name, {})[self.calls[name] + at] = code

    def work(self, stream: Any, do: Callable[[], None], milliseconds: float = 1.0) -> Status:
        """Queue `do` in a stream, as a kernel would be; a capturing stream keeps it."""
        state = self._find("stream", stream)
        if state is None:
            return Status.cudaErrorInvalidResourceHandle
        if state.captured is not None:
            state.captured.append((do, milliseconds))
            return OK
        do()
        self.now += milliseconds
        return OK

    def _enter(self, name: str) -> Status:
        self.calls[name] += 1
        status = self._planned.get(name, {}).get(self.calls[name], OK)
        if not self.driver:
            status = Status.cudaErrorInsufficientDriver
        return self._status(status)

    def _status(self, status: Status) -> Status:
        self.last = status or self.last
        return status

    def _make(self, name: str, kind: str, value: Any) -> tuple[Any, ...]:
        status = self._enter(name)
        if status:
            return status, None
        handle = max(self._handles, default=100) + 1
        self._handles[handle] = (kind, value)
        self.live[kind] += 1
        return OK, handle

    def _find(self, kind: str, handle: Any) -> Any:
        found, value = self._handles.get(int(handle), ("", None))
        return value if found == kind else None

    def _drop(self, name: str, kind: str, handle: Any) -> tuple[Any, ...]:
        status = self._enter(name)
        if status == OK and self._find(kind, handle) is None:
            status = self._status(Status.cudaErrorInvalidResourceHandle)
        # CUDA has let go of it even where it tells an error of earlier work.
        if self._handles.pop(int(handle), None) is not None:
            self.live[kind] -= 1
        return (status,)

    # errors and devices

    def cudaGetErrorName(self, error: Status) -> tuple[Any, ...]:
        return OK, error.name.encode()

    def cudaGetErrorString(self, error: Status) -> tuple[Any, ...]:
        return OK, TEXTS[error].encode()

    def cudaGetLastError(self) -> tuple[Any, ...]:
        last, self.last = self.last, OK
        return (last,)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13000

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        status = self._enter("cudaGetDeviceCount")
        return (status, None) if status else (OK, self.devices)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        status = self._enter("cudaGetDevice")
        return (status, None) if status else (OK, self.device)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        status = self._enter("cudaSetDevice")
        if status == OK and not 0 <= device < self.devices:
            status = self._status(Status.cudaErrorInvalidDevice)
        if status == OK:
            self.device = device
        return (status,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        status = self._enter("cudaGetDeviceProperties")
        found = SimpleNamespace(name=b"Double\0\0", major=8, minor=9, totalGlobalMem=MEMORY)
        return (status, None) if status else (OK, found)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        status = self._enter("cudaMemGetInfo")
        held = sum(ctypes.sizeof(b) for kind, b in self._memory.values() if kind == "device")
        return (status, None, None) if status else (OK, MEMORY - held, MEMORY)

    # memory

    def _allocate(self, name: str, kind: str, size: int) -> tuple[Any, ...]:
        status = self._enter(name)
        if status == OK and (size > MEMORY or size < 1):
            status = self._status(Status.cudaErrorMemoryAllocation)
        if status:
            return status, None
        memory = ctypes.create_string_buffer(b"\xa5" * size, size)
        address = ctypes.addressof(memory)
        self._memory[address] = (kind, memory)
        self.live[kind] += 1
        return OK, address

    def _release(self, name: str, kind: str, address: int) -> tuple[Any, ...]:
        status = self._enter(name)
        if self._memory.get(address, ("", None))[0] != kind:
            return (self._status(status or Status.cudaErrorInvalidValue),)
        del self._memory[address]
        self.live[kind] -= 1
        return (status,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate("cudaMalloc", "device", size)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        return self._release("cudaFree", "device", devPtr)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate("cudaHostAlloc", "pinned", size)

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        return self._release("cudaFreeHost", "pinned", ptr)

    def _on_gpu(self, address: int, count: int) -> bool:
        return any(
            kind == "device" and start <= address and address + count <= start + ctypes.sizeof(b)
            for start, (kind, b) in self._memory.items()
        )

    def _copy(self, dst: int, src: int, count: int, kind: Kind, stream: Any) -> Status:
        ends = {
            Kind.cudaMemcpyHostToDevice: (True, False),
            Kind.cudaMemcpyDeviceToHost: (False, True),
            Kind.cudaMemcpyDeviceToDevice: (True, True),
        }
        found = (self._on_gpu(dst, count), self._on_gpu(src, count))
        if not isinstance(kind, Kind) or (count and found != ends[kind]):
            return Status.cudaErrorInvalidValue

        def do() -> None:
            ctypes.memmove(dst, src, count)

        if stream is not None:
            return self.work(stream, do)
        do()
        return OK

    def cudaMemcpy(self, dst: int, src: int, count: int, kind: Kind) -> tuple[Any, ...]:
        status = self._enter("cudaMemcpy")
        return (status or self._status(self._copy(dst, src, count, kind, None)),)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Kind, stream: Any
    ) -> tuple[Any, ...]:
        status = self._enter("cudaMemcpyAsync")
        return (status or self._status(self._copy(dst, src, count, kind, stream)),)

    # streams, events, graphs

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        state = SimpleNamespace(captured=None, broken=False)
        return self._make("cudaStreamCreateWithFlags", "stream", state)

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        return self._drop("cudaStreamDestroy", "stream", stream)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        status = self._enter("cudaStreamSynchronize")
        state = self._find("stream", stream)
        if status == OK and state is None:
            status = Status.cudaErrorInvalidResourceHandle
        elif status == OK and state.captured is not None:
            state.broken = True
            status = Status.cudaErrorStreamCaptureUnsupported
        return (self._status(status),)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return self._make("cudaEventCreate", "event", SimpleNamespace(time=None))

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        return self._drop("cudaEventDestroy", "event", event)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        status = self._enter("cudaEventRecord")
        mark = self._find("event", event)
        if status == OK and (mark is None or self._find("stream", stream) is None):
            status = self._status(Status.cudaErrorInvalidResourceHandle)
        if status == OK:
            mark.time = self.now
        return (status,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        status = self._enter("cudaEventElapsedTime")
        marks = [self._find("event", event) for event in (start, end)]
        if status == OK and any(mark is None or mark.time is None for mark in marks):
            status = self._status(Status.cudaErrorInvalidResourceHandle)
        return (status, None) if status else (OK, marks[1].time - marks[0].time)

    def cudaStreamBeginCapture(self, stream: Any, mode: Mode) -> tuple[Any, ...]:
        status = self._enter("cudaStreamBeginCapture")
        state = self._find("stream", stream)
        if status == OK and (state is None or state.captured is not None):
            status = self._status(Status.cudaErrorInvalidValue)
        if status == OK:
            state.captured, state.broken = [], False
        return (status,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        state = self._find("stream", stream)
        captured, state.captured = state.captured, None
        status, graph = self._make("cudaStreamEndCapture", "graph", captured)
        if status == OK and state.broken:
            self._handles.pop(graph)
            self.live["graph"] -= 1
            status, graph = self._status(Status.cudaErrorStreamCaptureInvalidated), None
        return status, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        steps = self._find("graph", graph)
        return self._make("cudaGraphInstantiate", "graph executable", steps)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any, ...]:
        status = self._enter("cudaGraphLaunch")
        steps = self._find("graph executable", graphExec)
        if status == OK and steps is None:
            status = Status.cudaErrorInvalidResourceHandle
        for do, milliseconds in steps or ():
            status = status or self.work(stream, do, milliseconds)
        return (self._status(status),)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        return self._drop("cudaGraphExecDestroy", "graph executable", graphExec)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return self._drop("cudaGraphDestroy", "graph", graph)

    @property
    def held(self) -> dict[str, int]:
        """What is not freed yet, by kind."""
        return {kind: count for kind, count in self.live.items() if count}
