"""What tests of CUDA share: the double, a real GPU where there is one, and work for it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import pytest

from trtune.precision.backends.gpu import driver as cuda
from trtune.precision.backends.gpu import runtime as cudaruntime
from trtune.precision.backends.gpu.driver import Stream
from trtune.precision.backends.gpu.memory import DeviceBuffer

RUNTIME = cudaruntime.RUNTIME


def no_gpu() -> str:
    """Why no real GPU can be used here, or ''."""
    try:
        runtime = importlib.import_module(RUNTIME)
    except ImportError as error:
        return f"cuda-python is not installed ({error})"
    status, count = runtime.cudaGetDeviceCount()
    if int(status) or not count:
        return f"no GPU: cudaGetDeviceCount gives {status.name}"
    return ""


WHY_NO_GPU = no_gpu()


needs_gpu = pytest.mark.skipif(bool(WHY_NO_GPU), reason=WHY_NO_GPU or "there is one")


def copier(source: DeviceBuffer, target: DeviceBuffer, times: int = 1) -> Callable[[Stream], None]:
    """Queues copies from one GPU buffer to another: the work of these tests."""
    runtime = cuda.load_runtime()
    way = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def enqueue(stream: Stream) -> None:
        for _ in range(times):
            cudaruntime.checked(
                runtime.cudaMemcpyAsync(
                    target.pointer, source.pointer, source.nbytes, way, stream.handle
                ),
                "copying on the GPU",
            )

    return enqueue


def require_onnxruntime_gpu() -> str:
    """ "cuda:0"; skips where onnxruntime has no use for a GPU, or fails where it is required."""
    from trtune.calibrate.sessions import why_no_gpu

    reason = why_no_gpu(0)
    if reason:
        required = os.environ.get("TRTUNE_REQUIRE", "").split(",")
        (pytest.fail if "onnxruntime-gpu" in required else pytest.skip)(reason)
    return "cuda:0"
