"""What TensorRT calls back: its log, layer times, inner tensors, memory for outputs.

Each function makes an object of a class that derives from one of `trt`'s, which is known only once
a flavour of TensorRT is loaded. An exception in a callback would be printed by TensorRT and be
gone: these keep it, and `reraise` throws it.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.precision.backends.gpu.memory import DeviceBuffer, read_device

log = logging.getLogger(__name__)

Sink = Callable[[str, str], None]

LAST_WORDS = 20
LOG_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG,
}


@cache
def process_logger(trt: ModuleType) -> Any:
    """The ILogger of this process for `trt`; it keeps the last errors in `words`.

    One for all: TensorRT and its plugins hold on to a logger without counting as its owner, so
    that one which goes away is a crash later. `messages_to` says where else it writes for a while.
    """

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.words: deque[str] = deque(maxlen=LAST_WORDS)
            self.sink: Sink | None = None

        def log(self, severity: Any, msg: str) -> None:
            if self.sink is not None:
                self.sink(severity.name, msg)
                return
            level = LOG_LEVELS.get(severity.name, logging.DEBUG)
            if level == logging.ERROR:
                self.words.append(" ".join(msg.split()))
            log.log(level, "TensorRT: %s", msg)

    return Logger()


@contextmanager
def messages_to(trt: ModuleType, sink: Sink) -> Iterator[Any]:
    """`process_logger`, which gives its messages to `sink(severity, text)` alone in the block."""
    logger = process_logger(trt)
    before, logger.sink = logger.sink, sink
    try:
        yield logger
    finally:
        logger.sink = before


def make_profiler(trt: ModuleType) -> Any:
    """An IProfiler whose `taken()` gives {layer: milliseconds} since it was last asked."""

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            # A layer inside a loop is reported once a turn.
            self.times[layer_name] = self.times.get(layer_name, 0.0) + float(ms)

        def taken(self) -> dict[str, float]:
            times, self.times = self.times, {}
            return times

    return Profiler()


def make_listener(
    trt: ModuleType,
    names: Collection[str] | None,
    numpy_type: Callable[[str], np.dtype[Any] | None],
) -> Any:
    """An IDebugListener that copies inner tensors, all or `names`, into `tensors`."""
    on_gpu = trt.TensorLocation.DEVICE

    class Listener(trt.IDebugListener):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IDebugListener.__init__(self)
            self.tensors: dict[str, NDArray[Any]] = {}
            self.error: BaseException | None = None

        def process_debug_tensor(
            self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: Any
        ) -> bool:
            try:
                dtype = numpy_type(type.name)
                if dtype is None:
                    log.info("inner tensor %r is %s, which NumPy lacks", name, type.name)
                elif names is None or name in names:
                    found = np.empty(tuple(shape), dtype)
                    _read(address_of(addr), found, location == on_gpu, stream)
                    self.tensors[name] = found
            except Exception as error:  # TensorRT would swallow it; raised after the call
                self.error = self.error or error
                return False
            return True

        def reraise(self) -> None:
            if self.error is not None:
                raise self.error

    return Listener()


def _read(address: int, found: NDArray[Any], on_gpu: bool, stream: Any) -> None:
    if on_gpu:
        read_device(address, found, int(stream))
    else:
        ctypes.memmove(found.ctypes.data, address, found.nbytes)


def address_of(pointer: Any) -> int:
    """A `void*` from TensorRT's bindings, which hand it over as a number or as a capsule."""
    if isinstance(pointer, int):
        return pointer
    read = ctypes.pythonapi.PyCapsule_GetPointer
    read.argtypes, read.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return int(read(pointer, None) or 0)


def make_allocator(trt: ModuleType) -> Any:
    """An IOutputAllocator for one output whose shape depends on the data; its memory grows.

    `array(dtype)` gives a copy once the run is done; `free` gives the memory back.
    """

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer: DeviceBuffer | None = None
            self.shape: tuple[int, ...] = ()
            self.error: BaseException | None = None

        def reallocate_output(
            self, tensor_name: str, memory: int, size: int, alignment: int
        ) -> int:
            try:
                if self.buffer is None or self.buffer.nbytes < size:
                    self.free()
                    self.buffer = DeviceBuffer(size)
                return self.buffer.pointer
            except Exception as error:  # TensorRT would swallow it; raised after the call
                self.error = self.error or error
                return 0

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def array(self, dtype: np.dtype[Any]) -> NDArray[Any]:
            found = np.empty(self.shape, dtype)
            return found if self.buffer is None else self.buffer.download(found)

        def free(self) -> None:
            held, self.buffer = self.buffer, None
            if held is not None:
                held.free()

        def reraise(self) -> None:
            error, self.error = self.error, None
            if error is not None:
                raise error

    return Allocator()
