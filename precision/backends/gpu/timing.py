"""How long work takes on a GPU, alone, with its copies, and one call behind another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from trtune.precision.backends.gpu.driver import Event, Stream, try_capture

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 95th and 99th percentile of some times, in milliseconds."""

    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Spread:
        """Percentiles interpolated linearly. Raises ValueError if nothing was measured.

        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(median=2.0, p95=2.9, p99=2.98)
        """
        if not milliseconds:
            raise ValueError("no runs were measured")
        values = np.percentile(np.asarray(milliseconds, dtype=np.float64), [50, 95, 99])
        return cls(*(round(float(value), 6) for value in values))


@dataclass(frozen=True, slots=True)
class GpuTiming:
    """How long one call takes.

    `compute` is the time between two events around the call, each call alone on the GPU;
    `end_to_end` is the CPU's clock from before the upload until the result is back in the CPU's
    memory, None without transfers. `throughput` is calls a second, queued one behind another
    without transfers. `graph` says whether a CUDA graph was launched; if one was wanted and could
    not be, `graph_reason` says why.
    """

    compute: Spread
    end_to_end: Spread | None
    throughput: float
    warmup: int
    runs: int
    graph: bool
    graph_reason: str = ""


def time_gpu(
    enqueue: Callable[[Stream], None],
    *,
    stream: Stream,
    warmup: int = 10,
    runs: int = 50,
    graph: bool = False,
    upload: Callable[[Stream], None] | None = None,
    download: Callable[[Stream], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> GpuTiming:
    """Time the work that `enqueue(stream)` queues, after `warmup` calls that are not timed.

    With `graph` it is captured once and launched as a CUDA graph; if that fails, it is timed
    without one. `upload` and `download` queue the copies to and from the GPU, for `end_to_end`.
    `clock` gives seconds.

    Raises ValueError if `runs` is below 1, and what `enqueue` and CUDA raise.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; at least one run must be measured")
    with ExitStack() as stack:
        start, end = stack.enter_context(Event()), stack.enter_context(Event())
        if upload is not None:
            upload(stream)
        for _ in range(warmup):
            enqueue(stream)
        stream.synchronize()
        captured, reason = try_capture(enqueue, stream) if graph else (None, "")
        call = enqueue
        if captured is not None:
            stack.enter_context(captured)
            call = captured.launch
            call(stream)  # the first launch also moves the graph to the GPU
            stream.synchronize()
        elif reason:
            log.info("timed without a CUDA graph: %s", reason)
        compute = [_between(start, end, call, stream) for _ in range(runs)]
        queued = _between(start, end, call, stream, times=runs)
        whole = []
        if upload is not None or download is not None:
            steps = [step for step in (upload, call, download) if step is not None]
            whole = [_clocked(steps, stream, clock) for _ in range(warmup + runs)][warmup:]
    return GpuTiming(
        compute=Spread.of(compute),
        end_to_end=Spread.of(whole) if whole else None,
        throughput=round(1e3 * runs / queued, 6) if queued else 0.0,
        warmup=warmup,
        runs=runs,
        graph=captured is not None,
        graph_reason=reason,
    )


def _between(
    start: Event, end: Event, call: Callable[[Stream], None], stream: Stream, *, times: int = 1
) -> float:
    """Milliseconds of GPU time for `times` calls queued one behind another."""
    start.record(stream)
    for _ in range(times):
        call(stream)
    end.record(stream)
    stream.synchronize()
    return end.milliseconds_since(start)


def _clocked(
    steps: Sequence[Callable[[Stream], None]], stream: Stream, clock: Callable[[], float]
) -> float:
    """Milliseconds of `clock` until all `steps` are done on the GPU."""
    begun = clock()
    for step in steps:
        step(stream)
    stream.synchronize()
    return 1e3 * (clock() - begun)
