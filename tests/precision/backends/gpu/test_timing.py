"""Times on a GPU: what is measured apart, and what is freed."""

from __future__ import annotations

import numpy as np
import pytest
from cudadouble import CudaDouble, Status
from gpuparts import copier, needs_gpu

from trtune.precision.backends.gpu.driver import Stream
from trtune.precision.backends.gpu.memory import DeviceBuffer, PinnedBuffer
from trtune.precision.backends.gpu.runtime import CudaError
from trtune.precision.backends.gpu.timing import GpuTiming, Spread, time_gpu


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
