"""How long one inference takes: warm-up, median, 95th percentile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trtune.configs.progress import Progress, silent
from trtune.reports.record import Latency, Shipped, Speedup

BURST = 5
CONFIDENCE = 0.95
Turns = dict[str, list[list[float]]]
"""Candidate -> the seconds of its runs, a list for each of its turns."""


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


def in_all(turns: Sequence[Sequence[float]], *, batch: int) -> Latency:
    """`summarise` of every run of every turn."""
    return summarise([run for turn in turns for run in turn], batch=batch)


def measure_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 10,
    runs: int = 50,
    progress: Progress = silent,
) -> Turns:
    """Seconds of several candidates, measured in turn so that a noisy machine hurts all alike.

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
    turns: Turns = {name: [] for name in candidates}
    names = list(candidates)
    done = 0
    while done < runs:
        burst = min(BURST, runs - done)
        for name in names:
            candidates[name]()
            turns[name].append(_time(candidates[name], burst))
        names = names[1:] + names[:1]
        done += burst
        progress("latency", done, runs)
    return turns


def speedup_of(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> Speedup | None:
    """How many times as fast `ours` is as `theirs`, from turns that were taken beside each other.

    Each turn gives a ratio of medians; the median of the ratios is the speed-up, and two of them,
    counted from both ends, bound the true median with 95 % confidence whatever the distribution
    (the sign test). Fewer than six turns bound nothing. None without turns.

    >>> speedup_of([[1.0]] * 3, [[2.0]] * 3)
    Speedup(median=2.0, low=None, high=None, turns=3)
    """
    ratios = sorted(
        float(np.median(b) / np.median(a)) for a, b in zip(ours, theirs, strict=True) if min(a) > 0
    )
    if not ratios:
        return None
    inside, most = 0, (1 - CONFIDENCE) / 2 * 2 ** len(ratios)
    while sum(math.comb(len(ratios), k) for k in range(inside + 1)) <= most:
        inside += 1
    low, high = (ratios[inside - 1], ratios[-inside]) if inside else (None, None)
    return Speedup(median=float(np.median(ratios)), low=low, high=high, turns=len(ratios))


def is_open(shipped: Shipped | None) -> bool:
    """Whether turns were compared, and did not show the shipped model to be slower than FP32."""
    found = shipped.speedups.get(shipped.model) if shipped else None
    return found is not None and found.high is not None and found.high >= 1


def turns_text(found: Speedup | None) -> str:
    """The interval of a speed-up in words.

    >>> turns_text(Speedup(median=0.9, low=0.85, high=0.954, turns=10))
    ' (0.85 to 0.95 times as fast in 10 turns, with 95 % confidence)'
    """
    if found is None or found.low is None or found.high is None:
        return ""
    return (
        f" ({found.low:.2f} to {found.high:.2f} times as fast in {found.turns} turns, "
        "with 95 % confidence)"
    )


def _time(run: Callable[[], object], times: int) -> list[float]:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return spent
