"""The device through cuda-python: its memory, and the kernel compiled for it."""

from __future__ import annotations

import ctypes
import importlib
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import TrtuneError


@lru_cache(maxsize=1)
def cuda_core() -> Any:
    """The module `cuda.core`. Raises TrtuneError where cuda-python is not installed."""
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise TrtuneError(
            "calibration on a GPU needs cuda-python: pip install 'trtune[gpu]', or "
            "runtime.device: cpu"
        ) from error


@lru_cache(maxsize=4)
def count_kernel(device: int) -> Any:
    """The kernel of histogram.cu. Raises TrtuneError if NVRTC cannot compile it."""
    core = cuda_core()
    core.Device(device).set_current()
    source = files("trtune.calibrate.gpu").joinpath("histogram.cu").read_text("utf-8")
    options = core.ProgramOptions(std="c++17")
    try:
        code = core.Program(source, "c++", options).compile("cubin")
    except Exception as error:  # NVRTC's errors have no common base
        raise TrtuneError(f"NVRTC cannot compile histogram.cu: {error}") from error
    return code.get_kernel("count")


class Memory:
    """Device memory and its pinned twin on the host, seen as a NumPy array."""

    def __init__(self, core: Any, device: Any, size: int, stream: Any) -> None:
        size = max(size, 16)
        self.device = device.allocate(size, stream=stream)
        self.pinned = core.LegacyPinnedMemoryResource().allocate(size, stream=stream)
        raw = (ctypes.c_uint8 * size).from_address(int(self.pinned.handle))
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(raw)

    def put(self, array: NDArray[Any], stream: Any) -> None:
        """Copy `array` here; its own memory may be used again at once, the pinned one not."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.bytes[: flat.size] = flat
        self.device.copy_from(self.pinned, stream=stream)

    def fetch(self, stream: Any) -> None:
        """Start the copy back into `bytes`."""
        self.device.copy_to(self.pinned, stream=stream)

    @property
    def address(self) -> int:
        """Where it is on the device."""
        return int(self.device.handle)

    def close(self) -> None:
        """Free both."""
        self.device.close()
        self.pinned.close()


def device_memory(device: int) -> int:
    """Bytes of memory of CUDA device `device`, used or not."""
    cuda_core().Device(device).set_current()
    driver = importlib.import_module("cuda.bindings.driver")
    status, _, total = driver.cuMemGetInfo()
    if int(status):
        raise TrtuneError(f"CUDA device {device} does not answer: {status}")
    return int(total)
