from __future__ import annotations

import pytest

from trtune.reports.latency import BURST, measure_latency, measure_together, summarise


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
        measure_latency(lambda: None, runs=0)


def test_runs_are_counted_without_the_warm_up() -> None:
    calls: list[int] = []
    latency = measure_latency(lambda: calls.append(1), warmup=3, runs=7, batch=4)
    turns = -(-7 // BURST)
    assert len(calls) == 3 + 7 + turns
    assert (latency.runs, latency.batch) == (7, 4)
    assert 0 <= latency.median <= latency.p95


def test_candidates_take_turns_in_a_shifting_order() -> None:
    order: list[str] = []
    steps: list[tuple[str, int, int | None]] = []
    measured = measure_together(
        {name: lambda name=name: order.append(name) for name in "abc"},  # type: ignore[misc]
        warmup=0,
        runs=2 * BURST,
        progress=lambda *step: steps.append(step),
    )
    turns = [order[i] for i in range(0, len(order), BURST + 1)]
    assert turns == ["a", "b", "c", "b", "c", "a"]
    assert {name: latency.runs for name, latency in measured.items()} == dict.fromkeys("abc", 10)
    assert steps == [("latency", BURST, 2 * BURST), ("latency", 2 * BURST, 2 * BURST)]
