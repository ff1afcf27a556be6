"""How long one inference takes: warm-up, median, 95th percentile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from trtune.configs.progress import Progress, silent
from trtune.reports.record import Latency

BURST = 5


def summarise(seconds: list[float], *, batch: int) -> Latency:
    """`Latency` in milliseconds of measured `seconds`; p95 is interpolated linearly.

    Raises ValueError if nothing was measured.

    >>> summarise([0.001, 0.002, 0.003], batch=1).median
    2.0
    """
    if not seconds:
        raise ValueError("no runs were measured")
    median, p95 = np.percentile(np.asarray(seconds, dtype=np.float64) * 1e3, [50, 95])
    return Latency(
        median=round(float(median), 6), p95=round(float(p95), 6), runs=len(seconds), batch=batch
    )


def measure_latency(
    run: Callable[[], object], *, warmup: int = 10, runs: int = 50, batch: int = 1
) -> Latency:
    """Wall-clock time of `run()`, one inference of `batch` samples with its inputs ready.

    `run` must return only when the result is there. Raises ValueError if `runs` is below 1.
    """
    return measure_together({"": run}, warmup=warmup, runs=runs, batch=batch)[""]


def measure_together(
    candidates: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 10,
    runs: int = 50,
    batch: int = 1,
    progress: Progress = silent,
) -> dict[str, Latency]:
    """Latencies of several candidates, measured in turn so that a noisy machine hurts all alike.

    Each is warmed up by `warmup` runs; then they take turns of up to `BURST` runs, in an order
    that shifts by one each round, until each has `runs`. The first run of a turn is not timed:
    onnxruntime's idle threads spin for a moment after the candidate before, and its caches are
    still warm with another model.

    Raises ValueError if `runs` is below 1.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; at least one run must be measured")
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    done = 0
    while done < runs:
        burst = min(BURST, runs - done)
        for name in names:
            candidates[name]()
            seconds[name].extend(_time(candidates[name], burst))
        names = names[1:] + names[:1]
        done += burst
        progress("latency", done, runs)
    return {name: summarise(seconds[name], batch=batch) for name in candidates}


def _time(run: Callable[[], object], times: int) -> list[float]:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return spent
