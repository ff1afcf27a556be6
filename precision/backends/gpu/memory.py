"""Memory that the GPU reads and writes: its own, and pinned pages of the CPU's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtune.precision.backends.gpu.driver import Owned, Stream
from trtune.precision.backends.gpu.runtime import binary_size, checked, load_runtime


class DeviceBuffer(Owned):
    """`nbytes` bytes of memory on the current GPU."""

    what = "device buffer"
    freed_by = "cudaFree"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = _not_negative(nbytes)
        doing = f"allocating {binary_size(nbytes)} on the GPU"
        # A tensor may be empty, but its address must be one.
        super().__init__(checked(load_runtime().cudaMalloc(max(nbytes, 1)), doing))

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
        doing = f"copying {binary_size(array.nbytes)} {'to' if to_gpu else 'from'} the GPU"
        if stream is None:
            checked(runtime.cudaMemcpy(*ends, array.nbytes, way), doing)
        else:
            checked(runtime.cudaMemcpyAsync(*ends, array.nbytes, way, stream.handle), doing)


class PinnedBuffer(Owned):
    """`nbytes` bytes of the CPU's memory that the GPU copies from and to by itself."""

    what = "pinned buffer"
    freed_by = "cudaFreeHost"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = _not_negative(nbytes)
        runtime = load_runtime()
        doing = f"allocating {binary_size(nbytes)} of pinned memory"
        super().__init__(
            checked(runtime.cudaHostAlloc(max(nbytes, 1), runtime.cudaHostAllocDefault), doing)
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
    doing = f"copying {binary_size(into.nbytes)} from the GPU"
    checked(runtime.cudaMemcpyAsync(into.ctypes.data, pointer, into.nbytes, way, stream), doing)
    checked(runtime.cudaStreamSynchronize(stream), doing)
