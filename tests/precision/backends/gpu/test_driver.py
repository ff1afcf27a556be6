"""Streams, events and graphs, on the double everywhere and on a real GPU where one is."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cudadouble import CudaDouble, Status
from gpuparts import RUNTIME, copier

from trtune.precision.backends.gpu.driver import Event, Stream, capture, try_capture
from trtune.precision.backends.gpu.memory import DeviceBuffer
from trtune.precision.backends.gpu.runtime import CudaError
from trtune.precision.backends.gpu.timing import time_gpu


def test_leaving_with_an_error_does_not_hide_it(double: CudaDouble) -> None:
    double.fail("cudaFree", Status.cudaErrorIllegalAddress)
    with pytest.raises(KeyError), DeviceBuffer(4):
        raise KeyError("the first error")
    double.fail("cudaStreamDestroy", Status.cudaErrorIllegalAddress)
    with pytest.raises(CudaError, match="freeing a stream"), Stream():
        pass


def test_a_captured_graph_runs_when_launched_not_when_captured(runtime: ModuleType) -> None:
    values = np.arange(100, dtype=np.float32)
    with Stream() as stream, DeviceBuffer(400) as source, DeviceBuffer(400) as target:
        source.upload(values)
        target.upload(np.zeros(100, np.float32))
        with capture(copier(source, target), stream) as graph:
            stream.synchronize()
            assert not target.download(np.empty(100, np.float32)).any()
            graph.launch(stream)
            stream.synchronize()
            np.testing.assert_array_equal(target.download(np.empty(100, np.float32)), values)
            source.upload(values + 1)
            graph.launch(stream)
            stream.synchronize()
            np.testing.assert_array_equal(target.download(np.empty(100, np.float32)), values + 1)


def test_work_that_cannot_be_captured_gives_the_reason_and_a_working_stream(
    runtime: ModuleType,
) -> None:
    with Stream() as stream, DeviceBuffer(400) as source, DeviceBuffer(400) as target:
        enqueue = copier(source, target)

        def waits(stream: Stream) -> None:
            enqueue(stream)
            stream.synchronize()

        graph, reason = try_capture(waits, stream)
        assert graph is None
        assert "waiting for work on the GPU: cudaErrorStreamCaptureUnsupported" in reason
        source.upload(np.ones(100, np.float32))
        enqueue(stream)
        stream.synchronize()
        assert target.download(np.empty(100, np.float32)).all()
        timing = time_gpu(waits, stream=stream, warmup=1, runs=3, graph=True)
        assert not timing.graph
        assert "cudaErrorStreamCaptureUnsupported" in timing.graph_reason


def test_a_bug_in_what_is_captured_comes_through(runtime: ModuleType) -> None:
    def wrong(stream: Stream) -> None:
        raise KeyError("a bug")

    with Stream() as stream:
        with pytest.raises(KeyError, match="a bug"):
            try_capture(wrong, stream)
        stream.synchronize()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("cudaStreamBeginCapture", Status.cudaErrorInvalidValue, id="begin"),
        pytest.param("cudaStreamEndCapture", Status.cudaErrorStreamCaptureInvalidated, id="end"),
        pytest.param("cudaGraphInstantiate", Status.cudaErrorMemoryAllocation, id="instantiate"),
    ],
)
def test_a_capture_that_fails_frees_what_it_made(
    double: CudaDouble, name: str, code: Status
) -> None:
    with Stream() as stream, DeviceBuffer(4) as source, DeviceBuffer(4) as target:
        double.fail(name, code)
        graph, reason = try_capture(copier(source, target), stream)
        assert graph is None
        assert code.name in reason
        assert double.held == {"stream": 1, "device": 2}


def real_parameters(function: Any) -> list[str]:
    """Names of the parameters as the first line of cuda-python's docstring has them."""
    inside = (function.__doc__ or "").splitlines()[0].partition("(")[2].rpartition(")")[0]
    return [part.partition(":")[0].split()[-1] for part in inside.split(",") if part.strip()]


FUNCTIONS = sorted(n for n in vars(CudaDouble) if re.match(r"cuda[A-Z]", n) and n[4:5].isupper())


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if callable(getattr(CudaDouble, n))])
def test_the_double_has_the_parameters_of_cuda_python(name: str) -> None:
    real = pytest.importorskip(RUNTIME, reason="cuda-python is not installed")
    mine, theirs = getattr(CudaDouble, name), getattr(real, name)
    if isinstance(mine, type):
        known = {member.name: int(member) for member in theirs}
        assert {member.name: known.get(member.name) for member in mine} == dict(mine.__members__)
    else:
        assert list(inspect.signature(mine).parameters)[1:] == real_parameters(theirs)


def test_the_double_refuses_what_is_wrong(double: CudaDouble) -> None:
    with pytest.raises(AttributeError):
        double.cudaMallocManaged  # noqa: B018
    assert double.cudaFree(12345) == (Status.cudaErrorInvalidValue,)
    assert double.cudaStreamDestroy(12345) == (Status.cudaErrorInvalidResourceHandle,)
    with DeviceBuffer(4) as buffer, Event() as event, Event() as other:
        kind = double.cudaMemcpyKind.cudaMemcpyDeviceToHost
        over = np.zeros(8, np.int8)
        wrong = double.cudaMemcpy(over.ctypes.data, buffer.pointer, 8, kind)
        assert wrong == (Status.cudaErrorInvalidValue,), "past the end"
        times = double.cudaEventElapsedTime(event.handle, other.handle)
        assert times == (Status.cudaErrorInvalidResourceHandle, None), "never recorded"
