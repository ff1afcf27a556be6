from __future__ import annotations

import pytest

from trtune.reports.latency import (
    BURST,
    in_all,
    measure_turns,
    speedup_of,
    summarise,
)
from trtune.reports.record import Speedup


@pytest.mark.parametrize(
    ("seconds", "median", "p95"),
    [
        pytest.param([0.001, 0.002, 0.003], 2.0, 2.9, id="p95 lies between the two highest"),
        pytest.param([0.004], 4.0, 4.0, id="a single run is both"),
        pytest.param([0.001] * 99 + [1.0], 1.0, 1.0, id="one hiccup in a hundred moves neither"),
    ],
)
def test_summarise(seconds: list[float], median: float, p95: float) -> None:
    latency = summarise(seconds, batch=8)
    assert latency.median == pytest.approx(median)
    assert latency.p95 == pytest.approx(p95)
    assert (latency.runs, latency.batch) == (len(seconds), 8)


def test_nothing_measured_is_a_callers_bug() -> None:
    with pytest.raises(ValueError, match="no runs"):
        summarise([], batch=1)
    with pytest.raises(ValueError, match="runs is 0"):
        measure_turns({"": lambda: None}, runs=0)


def test_runs_are_counted_without_the_warm_up() -> None:
    calls: list[int] = []
    measured = measure_turns({"": lambda: calls.append(1)}, warmup=3, runs=7)
    latency = in_all(measured[""], batch=4)
    turns = -(-7 // BURST)
    assert len(calls) == 3 + 7 + turns
    assert (latency.runs, latency.batch) == (7, 4)
    assert 0 <= latency.median <= latency.p95


def test_candidates_take_turns_in_a_shifting_order() -> None:
    order: list[str] = []
    steps: list[tuple[str, int, int | None]] = []
    measured = measure_turns(
        {name: lambda name=name: order.append(name) for name in "abc"},  # type: ignore[misc]
        warmup=0,
        runs=2 * BURST,
        progress=lambda *step: steps.append(step),
    )
    turns = [order[i] for i in range(0, len(order), BURST + 1)]
    assert turns == ["a", "b", "c", "b", "c", "a"]
    runs = {name: in_all(found, batch=1).runs for name, found in measured.items()}
    assert runs == dict.fromkeys("abc", 10)
    assert steps == [("latency", BURST, 2 * BURST), ("latency", 2 * BURST, 2 * BURST)]


@pytest.mark.parametrize(
    ("ratios", "low", "high"),
    [
        pytest.param([0.9, 0.8, 1.0, 1.1, 0.7], None, None, id="five turns bound nothing"),
        pytest.param([0.9, 0.8, 1.0, 1.1, 0.7, 1.2], 0.7, 1.2, id="six: from first to last"),
        pytest.param([0.1 * k for k in range(1, 11)], 0.2, 0.9, id="ten: but for one at each end"),
    ],
)
def test_a_speed_up_is_bounded_by_the_sign_test(
    ratios: list[float], low: float | None, high: float | None
) -> None:
    found = speedup_of([[1.0, 1.0, 9.0]] * len(ratios), [[r, r, r] for r in ratios])
    assert found is not None
    assert found.median == pytest.approx(sum(sorted(ratios)[(len(ratios) - 1) // 2 :][:1]
        + sorted(ratios)[len(ratios) // 2 :][:1]) / 2)  # fmt: skip
    assert (found.low, found.high) == (
        low and pytest.approx(low),
        high and pytest.approx(high),
    )
    assert found.turns == len(ratios)


def test_without_turns_there_is_no_speed_up() -> None:
    assert speedup_of([], []) is None
    assert speedup_of([[1.0]], [[1.5]]) == Speedup(median=1.5, turns=1)
