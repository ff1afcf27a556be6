"""cuda-python: the one place that imports it, its errors in words, and what GPU there is.

Without it this module imports, and `load_runtime` says what to install.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from trtune.configs.errors import TrtuneError

RUNTIME = "cuda.bindings.runtime"
INSTALL_CUDA = "pip install 'cuda-python>=13,<14'"

LOST = "the GPU work of this process is lost: start it again; `compute-sanitizer` finds the cause"
UNCAPTURED = "this work cannot be one CUDA graph: queue it call by call"
REMEDIES = MappingProxyType(
    {
        "cudaErrorMemoryAllocation": "take a smaller batch (`model.shapes`, `data.*.batch`), or "
        "end what else holds the GPU's memory (`nvidia-smi` lists it)",
        "cudaErrorNoDevice": "`nvidia-smi` shows the GPUs of this machine; CUDA_VISIBLE_DEVICES "
        "may hide them",
        "cudaErrorInsufficientDriver": "install an NVIDIA driver for this CUDA version or a newer "
        "one; `nvidia-smi` shows what is there",
        "cudaErrorInvalidDevice": "set the backend's `device` to one of the GPUs that "
        "`nvidia-smi -L` lists",
        "cudaErrorDevicesUnavailable": "another process has the GPU for itself (`nvidia-smi`)",
        "cudaErrorStreamCaptureUnsupported": UNCAPTURED,
        "cudaErrorStreamCaptureInvalidated": UNCAPTURED,
        "cudaErrorIllegalAddress": LOST,
        "cudaErrorLaunchFailure": LOST,
        "cudaErrorLaunchTimeout": LOST,
    }
)
OTHERWISE = "`nvidia-smi` shows whether the GPU works; `trtune doctor` what is installed"
NO_DRIVER = (
    "no NVIDIA driver is loaded here: this needs a machine with an NVIDIA GPU; `backends: "
    "[{name: onnxruntime}]` runs without one"
)


class CudaError(TrtuneError):
    """A CUDA call failed. `code` is CUDA's name for it, such as "cudaErrorMemoryAllocation"."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def load_runtime() -> ModuleType:
    """`cuda.bindings.runtime`; the only place that imports cuda-python.

    Raises TrtuneError with the pip command if it is not installed.
    """
    try:
        return importlib.import_module(RUNTIME)
    except ImportError as error:
        raise TrtuneError(
            f"running on an NVIDIA GPU needs cuda-python 13, and {RUNTIME} cannot be imported "
            f"({error}): {INSTALL_CUDA}"
        ) from error


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a `cuda.bindings.runtime` function gave behind its status: one value, or a tuple.

    `doing` says what for, as in "allocating 4.0 MiB". Raises CudaError if the status is one.
    """
    status, *values = result
    if int(status):
        raise cuda_error(status, doing)
    return values[0] if len(values) == 1 else tuple(values)


def cuda_error(status: Any, doing: str) -> CudaError:
    """The error for `status`: CUDA's name and text, what was being done, what to do."""
    runtime = load_runtime()
    name, text = (
        ask(status)[1].decode(errors="replace")
        for ask in (runtime.cudaGetErrorName, runtime.cudaGetErrorString)
    )
    # CUDA keeps the error for the next one who asks; it is told here.
    runtime.cudaGetLastError()
    remedy, note = REMEDIES.get(name, OTHERWISE), ""
    if name == "cudaErrorMemoryAllocation":
        note = _memory_note(runtime)
    if name == "cudaErrorInsufficientDriver" and not runtime.cudaDriverGetVersion()[1]:
        remedy = NO_DRIVER
    return CudaError(f"CUDA failed while {doing}: {name}, {text}{note}; {remedy}", name)


def _memory_note(runtime: ModuleType) -> str:
    status, free, total = runtime.cudaMemGetInfo()
    return "" if int(status) else f" ({binary_size(free)} of {binary_size(total)} are free)"


def binary_size(nbytes: int) -> str:
    """A number of bytes for a reader.

    >>> binary_size(512), binary_size(3 * 1024**3 // 2)
    ('512 B', '1.5 GiB')
    """
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """A GPU and what drives it.

    `compute_capability` as "9.0"; `driver` is the driver's own version ("580.159.04", or "" if it
    cannot be read), `driver_cuda` the newest CUDA it can run and `runtime_cuda` the one that
    cuda-python brings, both as "13.0". Bytes of the GPU's memory.
    """

    index: int
    name: str
    compute_capability: str
    driver: str
    driver_cuda: str
    runtime_cuda: str
    total_bytes: int
    free_bytes: int


def device_properties(index: int = 0) -> DeviceProperties:
    """What GPU `index` is. Raises TrtuneError if there is none such, or no cuda-python."""
    runtime = load_runtime()
    with use_device(index):
        found = checked(runtime.cudaGetDeviceProperties(index), f"asking what GPU {index} is")
        free, total = checked(runtime.cudaMemGetInfo(), f"asking for the memory of GPU {index}")
    return DeviceProperties(
        index=index,
        name=found.name.decode(errors="replace").rstrip("\0"),
        compute_capability=f"{found.major}.{found.minor}",
        driver=driver_version(),
        driver_cuda=_cuda_version(checked(runtime.cudaDriverGetVersion(), "asking the driver")),
        runtime_cuda=_cuda_version(checked(runtime.cudaRuntimeGetVersion(), "asking the runtime")),
        total_bytes=int(total),
        free_bytes=int(free),
    )


def _cuda_version(number: int) -> str:
    """13000 is CUDA 13.0, 12080 is CUDA 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version(kernel_file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The NVIDIA driver's version, such as "580.159.04"; "" if neither it nor nvidia-smi tells."""
    try:
        text = kernel_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = _ask_nvidia_smi()
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else ""


def _ask_nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


@contextmanager
def use_device(index: int) -> Iterator[None]:
    """Make GPU `index` this thread's, and then again the one that was.

    Raises CudaError if there is no such GPU.
    """
    runtime = load_runtime()
    before = checked(runtime.cudaGetDevice(), "asking for the current GPU")
    checked(runtime.cudaSetDevice(index), f"choosing GPU {index}")
    try:
        yield
    finally:
        checked(runtime.cudaSetDevice(before), f"going back to GPU {before}")
