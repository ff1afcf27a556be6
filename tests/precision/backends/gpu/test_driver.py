"""Streams, buffers, graphs and timing, on the double everywhere and on a real GPU where one is."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cudadouble import MEMORY, CudaDouble, Status
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu import driver as cuda
from trtune.precision.backends.gpu import runtime as cudaruntime
from trtune.precision.backends.gpu.driver import (
    CudaError,
    DeviceBuffer,
    Event,
    GpuTiming,
    PinnedBuffer,
    Spread,
    Stream,
    capture,
    device_properties,
    read_device,
    time_gpu,
    try_capture,
    use_device,
)

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


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    made = CudaDouble()
    monkeypatch.setitem(sys.modules, RUNTIME, made)
    return made


@pytest.fixture(params=["double", pytest.param("gpu", marks=[needs_gpu, pytest.mark.gpu])])
def runtime(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The double, then a real GPU: what holds for the one must hold for the other."""
    if request.param == "gpu":
        yield cuda.load_runtime()
        return
    made: CudaDouble = request.getfixturevalue("double")
    yield made
    assert made.held == {}, "not freed by the test"


def copier(source: DeviceBuffer, target: DeviceBuffer, times: int = 1) -> Callable[[Stream], None]:
    """Queues copies from one GPU buffer to another: the work of these tests."""
    runtime = cuda.load_runtime()
    way = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def enqueue(stream: Stream) -> None:
        for _ in range(times):
            cudaruntime.check(
                runtime.cudaMemcpyAsync(
                    target.pointer, source.pointer, source.nbytes, way, stream.handle
                ),
                "copying on the GPU",
            )

    return enqueue


# errors


@pytest.mark.parametrize(
    ("code", "says"),
    [
        pytest.param(
            Status.cudaErrorMemoryAllocation,
            ["allocating 4.0 KiB on the GPU", "out of memory", "1.0 GiB of 1.0 GiB are free",
             "model.shapes"],
            id="out of memory: how much is free, and a smaller batch",
        ),
        pytest.param(
            Status.cudaErrorNoDevice, ["no CUDA-capable device", "CUDA_VISIBLE_DEVICES"],
            id="no GPU: where it may hide",
        ),
        pytest.param(
            Status.cudaErrorInsufficientDriver, ["insufficient", "or a newer"],
            id="driver too old: a newer one",
        ),
        pytest.param(
            Status.cudaErrorIllegalAddress, ["illegal memory access", "start it again"],
            id="a kernel went wrong: the process is lost",
        ),
        pytest.param(
            Status.cudaErrorInvalidValue, ["invalid argument", "trtune doctor"],
            id="anything else: look at the machine",
        ),
    ],
)  # fmt: skip
def test_a_failed_call_says_what_where_and_what_to_do(
    double: CudaDouble, code: Status, says: list[str]
) -> None:
    double.fail("cudaMalloc", code)
    with pytest.raises(CudaError) as caught:
        DeviceBuffer(4096)
    for part in ("CUDA failed while", code.name, *says):
        assert part in str(caught.value)
    assert caught.value.code == code.name
    assert double.cudaGetLastError() == (0,), "told once, not again at the next call"


def test_without_a_driver_the_error_says_that_a_gpu_machine_is_needed(double: CudaDouble) -> None:
    double.driver = 0
    with pytest.raises(CudaError, match="no NVIDIA driver is loaded here"):
        device_properties()


def test_without_cuda_python_the_error_has_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RUNTIME, None)
    with pytest.raises(TrtuneError, match=re.escape("pip install 'cuda-python>=13,<14'")):
        Stream()


def test_importing_the_module_imports_no_cuda() -> None:
    code = (
        "import sys, trtune.precision.backends.gpu.driver; sys.exit('cuda.bindings' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_such_gpu_names_the_setting(double: CudaDouble) -> None:
    with (
        pytest.raises(CudaError, match=r"choosing GPU 7: cudaErrorInvalidDevice.*`device`"),
        use_device(7),
    ):
        raise AssertionError("never entered")


# devices


def test_use_device_goes_back_also_after_an_error(double: CudaDouble) -> None:
    double.devices = 2

    def fail_there() -> None:
        with use_device(1):
            assert double.device == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_there()
    assert double.device == 0


def test_device_properties_of_the_double(double: CudaDouble) -> None:
    found = device_properties()
    assert (found.name, found.compute_capability) == ("Double", "8.9")
    assert (found.driver_cuda, found.runtime_cuda) == ("13.0", "13.0")
    assert (found.total_bytes, found.free_bytes) == (MEMORY, MEMORY)


@needs_gpu
@pytest.mark.gpu
def test_device_properties_of_a_real_gpu() -> None:
    found = device_properties()
    assert re.fullmatch(r"\d+\.\d", found.compute_capability)
    assert re.fullmatch(r"\d{3,}\.\d+(\.\d+)?", found.driver)
    assert found.name
    assert "\0" not in found.name
    assert 0 < found.free_bytes <= found.total_bytes


@pytest.mark.parametrize(
    ("text", "version"),
    [
        pytest.param(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
            "GCC version:  gcc version 12.3.0\n",
            "580.159.04",
            id="open kernel module",
        ),
        pytest.param(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82  Tue\n",
            "470.82",
            id="two parts",
        ),
        pytest.param("something else", "", id="nothing that looks like one"),
    ],
)
def test_driver_version_from_the_kernel_module(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert cudaruntime.driver_version(tmp_path / "version") == version


@pytest.mark.parametrize(
    ("script", "version"),
    [
        pytest.param("echo 535.104.05", "535.104.05", id="nvidia-smi tells"),
        pytest.param("echo NVIDIA-SMI has failed; exit 9", "", id="nvidia-smi fails"),
        pytest.param(None, "", id="no nvidia-smi"),
    ],
)
def test_driver_version_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, version: str
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cudaruntime.driver_version(tmp_path / "missing") == version


# memory


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("queued", [False, True], ids=["at once", "in a stream"])
def test_what_goes_up_comes_down(runtime: ModuleType, pinned: bool, queued: bool) -> None:
    values = np.arange(6000, dtype=np.float32).reshape(2, 3000) * 0.5
    with (
        Stream() as stream,
        DeviceBuffer(values.nbytes) as buffer,
        PinnedBuffer(values.nbytes) as host,
    ):
        source, target = values, np.empty_like(values)
        if pinned:
            source = target = host.view(values.shape, values.dtype)
            source[...] = values
        buffer.upload(source, stream if queued else None)
        if queued:
            stream.synchronize()
        target[...] = 0
        assert buffer.download(target, stream if queued else None) is target
        if queued:
            stream.synchronize()
        np.testing.assert_array_equal(target, values)


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int64, np.int8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_any_array_comes_back_as_it_was(values: np.ndarray[Any, Any]) -> None:
    before = sys.modules.get(RUNTIME)
    sys.modules[RUNTIME] = made = CudaDouble()
    try:
        with DeviceBuffer(values.nbytes) as buffer:
            buffer.upload(values.T)
            found = buffer.download(np.empty(values.T.shape, values.dtype))
    finally:
        if before is None:
            del sys.modules[RUNTIME]
        else:
            sys.modules[RUNTIME] = before
    assert found.tobytes() == np.ascontiguousarray(values.T).tobytes()
    assert made.held == {}


def test_an_array_that_does_not_fit_is_refused(runtime: ModuleType) -> None:
    with DeviceBuffer(8) as buffer, PinnedBuffer(8) as host:
        with pytest.raises(ValueError, match="12 bytes do not fit a buffer of 8"):
            buffer.upload(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="12 bytes do not fit a buffer of 8"):
            buffer.download(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="12 bytes do not fit a buffer of 8"):
            host.view((3,), np.float32)
        with pytest.raises(ValueError, match="C order"):
            buffer.download(np.zeros((2, 3), np.int8).T)
    with pytest.raises(ValueError, match="nbytes is -1"):
        DeviceBuffer(-1)


def test_a_buffer_is_freed_once_and_then_refuses(runtime: ModuleType) -> None:
    buffer = DeviceBuffer(16)
    assert buffer.pointer > 0
    buffer.free()
    buffer.free()
    with pytest.raises(ValueError, match="the device buffer is freed"):
        buffer.upload(np.zeros(1, np.int8))


def test_an_empty_tensor_still_has_an_address(runtime: ModuleType) -> None:
    with DeviceBuffer(0) as buffer, PinnedBuffer(0) as host:
        assert buffer.pointer > 0
        assert host.view((0, 4), np.float32).shape == (0, 4)


def test_read_device_copies_what_someone_else_holds(runtime: ModuleType) -> None:
    with Stream() as stream, DeviceBuffer(16) as buffer:
        buffer.upload(np.arange(4, dtype=np.int32), stream)
        found = np.zeros(4, np.int32)
        read_device(buffer.pointer, found, stream.address)
        assert found.tolist() == [0, 1, 2, 3]


def test_an_allocation_beyond_the_memory_is_told_and_harms_nothing(runtime: ModuleType) -> None:
    _, free, total = runtime.cudaMemGetInfo()
    with pytest.raises(
        CudaError, match=r"cudaErrorMemoryAllocation, out of memory \(.* are free\)"
    ):
        DeviceBuffer(2 * total)
    with DeviceBuffer(1024) as buffer:
        buffer.upload(np.ones(1024, np.int8))
        assert buffer.download(np.zeros(1024, np.int8)).all()
    assert runtime.cudaMemGetInfo()[2] == total
    assert free <= total


@needs_gpu
@pytest.mark.gpu
def test_memory_of_a_real_gpu_is_given_back() -> None:
    size = 1 << 30
    before = device_properties().free_bytes

    def fail_holding_it() -> None:
        with DeviceBuffer(size):
            assert device_properties().free_bytes <= before - size
            raise KeyError

    for _ in range(20):
        with pytest.raises(KeyError):
            fail_holding_it()
    assert device_properties().free_bytes == before


def test_leaving_with_an_error_does_not_hide_it(double: CudaDouble) -> None:
    double.fail("cudaFree", Status.cudaErrorIllegalAddress)
    with pytest.raises(KeyError), DeviceBuffer(4):
        raise KeyError("the first error")
    double.fail("cudaStreamDestroy", Status.cudaErrorIllegalAddress)
    with pytest.raises(CudaError, match="freeing a stream"), Stream():
        pass


# graphs


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


# timing


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        pytest.param([4.0], Spread(4.0, 4.0, 4.0), id="one run"),
        pytest.param([3.0, 1.0, 2.0], Spread(2.0, 2.9, 2.98), id="any order, interpolated"),
        pytest.param(
            [float(n) for n in range(101)], Spread(50.0, 95.0, 99.0), id="a hundred and one"
        ),
    ],
)
def test_percentiles(milliseconds: list[float], expected: Spread) -> None:
    assert Spread.of(milliseconds) == expected


def test_no_percentiles_of_nothing() -> None:
    with pytest.raises(ValueError, match="no runs"):
        Spread.of([])


class Clock:
    """Seconds that grow by the next step each time that it is asked."""

    def __init__(self, steps: list[float]) -> None:
        self.steps, self.now = steps, 0.0

    def __call__(self) -> float:
        self.now += self.steps.pop(0)
        return self.now


@pytest.mark.parametrize("graph", [False, True], ids=["calls", "graph"])
def test_compute_transfers_and_throughput_are_apart(double: CudaDouble, graph: bool) -> None:
    order: list[str] = []
    durations = iter([9.0] + [5.0] * 30)

    def enqueue(stream: Stream) -> None:
        double.work(stream.handle, lambda: order.append("run"), next(durations))

    def upload(stream: Stream) -> None:
        double.work(stream.handle, lambda: order.append("up"), 100.0)

    def download(stream: Stream) -> None:
        double.work(stream.handle, lambda: order.append("down"), 100.0)

    # Warm-up once and three runs; in between the clock stands at what the test itself takes.
    clock = Clock([0.0, 0.5, 0.0, 0.010, 0.0, 0.030, 0.0, 0.020])
    with Stream() as stream:
        found = time_gpu(
            enqueue, stream=stream, warmup=1, runs=3, graph=graph,
            upload=upload, download=download, clock=clock,
        )  # fmt: skip
    assert found == GpuTiming(
        compute=Spread(5.0, 5.0, 5.0),
        end_to_end=Spread(20.0, 29.0, 29.8),
        throughput=200.0,
        warmup=1,
        runs=3,
        graph=graph,
    )
    once = ["up", "run", "down"]
    assert order == ["up"] + ["run"] * (8 if graph else 7) + once * 4
    assert double.held == {}


def test_timing_without_transfers_has_no_end_to_end(double: CudaDouble) -> None:
    def enqueue(stream: Stream) -> None:
        double.work(stream.handle, lambda: None)

    with Stream() as stream:
        found = time_gpu(enqueue, stream=stream, warmup=0, runs=2)
    assert found.end_to_end is None
    assert (found.compute.median, found.throughput) == (1.0, 1000.0)


def test_no_runs_is_the_callers_mistake(double: CudaDouble) -> None:
    with Stream() as stream, pytest.raises(ValueError, match="runs is 0"):
        time_gpu(lambda stream: None, stream=stream, runs=0)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param("cudaEventCreate", 2, id="the second event"),
        pytest.param("cudaEventRecord", 3, id="recording"),
        pytest.param("cudaStreamSynchronize", 2, id="waiting"),
        pytest.param("cudaEventElapsedTime", 2, id="reading the time"),
        pytest.param("cudaGraphLaunch", 2, id="launching"),
        pytest.param("cudaMemcpyAsync", 2, id="the work itself"),
    ],
)
def test_everything_is_freed_when_timing_fails(double: CudaDouble, name: str, at: int) -> None:
    def all_of_it() -> None:
        with Stream() as stream, DeviceBuffer(64) as source, DeviceBuffer(64) as target:
            double.fail(name, Status.cudaErrorLaunchFailure, at=at)
            time_gpu(copier(source, target), stream=stream, warmup=2, runs=3, graph=True)

    with pytest.raises(CudaError, match="cudaErrorLaunchFailure"):
        all_of_it()
    assert double.held == {}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["calls", "graph"])
def test_times_of_a_real_gpu_are_those_of_its_work(graph: bool) -> None:
    size = 256 << 20
    with (
        Stream() as stream,
        DeviceBuffer(size) as source,
        DeviceBuffer(size) as target,
        PinnedBuffer(size) as host,
    ):
        values = host.view((size,), np.int8)

        def download(stream: Stream) -> None:
            target.download(values, stream)

        found = time_gpu(
            copier(source, target, 4), stream=stream, warmup=3, runs=20, graph=graph,
            upload=lambda s: source.upload(values, s),
            download=download,
        )  # fmt: skip
    log = f"{found}"
    assert found.graph is graph, log
    # Each byte is read and written: no GPU moves 20 TB/s, so a shorter time is one of nothing.
    assert found.compute.median > 1e3 * 2 * 4 * size / 20e12, log
    assert found.compute.median <= found.compute.p95 <= found.compute.p99, log
    assert found.end_to_end is not None
    # Behind PCIe 5, at most 64 GB/s each way.
    assert found.end_to_end.median > found.compute.median + 1e3 * 2 * size / 100e9, log
    assert 0 < found.throughput < 1e3 / (1e3 * 2 * 4 * size / 20e12), log


# the double itself


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
