from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtune.datasets.batches import Batch
from trtune.datasets.pictures.prefetch import default_workers, map_ahead, prefetched


class Counting:
    """Batches of one number; remembers how many were made and by which threads."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.total, self.fail_at = count, fail_at
        self.made, self.closed = 0, False
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        try:
            for number in range(self.total):
                if number == self.fail_at:
                    raise RuntimeError(f"batch {number} is broken")
                self.made += 1
                self.threads.add(threading.current_thread().name)
                yield Batch({"x": np.array([number])}, (str(number),))
        finally:
            self.closed = True

    @property
    def count(self) -> int | None:
        return self.total

    @property
    def identity(self) -> str:
        return "numbers"

    @property
    def skipped(self) -> tuple[str, ...]:
        return ("7",)


def data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("trtune-")]


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(), max_size=20),
    workers=st.integers(1, 3),
    depth=st.integers(1, 5),
)
def test_results_come_in_order(numbers: list[int], workers: int, depth: int) -> None:
    doubled = map_ahead(lambda n: 2 * n, numbers, workers=workers, depth=depth)
    assert list(doubled) == [2 * n for n in numbers]
    assert data_threads() == []


def test_no_more_than_depth_are_made_ahead() -> None:
    begun: list[int] = []
    results = map_ahead(lambda n: begun.append(n) or n, range(100), workers=2, depth=3)
    assert next(results) == 0
    assert next(results) == 1
    results.close()
    assert sorted(begun) == list(range(len(begun)))
    assert len(begun) <= 4


def test_an_exception_comes_at_its_place() -> None:
    results = map_ahead(lambda n: 1 // n, [1, 1, 0, 1], workers=2, depth=4)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert data_threads() == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_stopping_early_ends_the_threads(stop: type[BaseException]) -> None:
    results = map_ahead(str, range(1000), workers=2, depth=4)
    assert next(results) == "0"
    with pytest.raises(stop):
        results.throw(stop)
    assert data_threads() == []


def test_a_prefetched_source_gives_the_same_batches_from_another_thread() -> None:
    source = Counting(5)
    ahead = prefetched(source)
    for _ in range(2):
        assert [batch.items[0] for batch in ahead] == ["0", "1", "2", "3", "4"]
    assert threading.current_thread().name not in source.threads
    assert (ahead.count, ahead.identity, ahead.skipped) == (5, "numbers", ("7",))
    assert data_threads() == []


def test_a_source_stops_with_its_consumer() -> None:
    source = Counting(100)
    for batch in prefetched(source, depth=2):
        if batch.items == ("3",):
            break
    assert source.closed
    assert source.made <= 7
    assert data_threads() == []


def test_a_signal_while_the_thread_starts_closes_the_source_after_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, goes_on, start = threading.Event(), threading.Event(), threading.Thread.start

    class Slow(Counting):
        def __iter__(self) -> Iterator[Batch]:
            inside.set()
            assert goes_on.wait(30)
            yield from super().__iter__()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("trtune-"):
            assert inside.wait(30)
            threading.Timer(0.05, goes_on.set).start()
            raise KeyboardInterrupt

    source = Slow(5)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(prefetched(source)))
    assert source.closed
    assert source.made == 1


def test_a_source_that_fails_does_so_after_its_good_batches() -> None:
    batches = iter(prefetched(Counting(5, fail_at=2), depth=3))
    assert [next(batches).items, next(batches).items] == [("0",), ("1",)]
    with pytest.raises(RuntimeError, match="batch 2 is broken"):
        next(batches)
    assert data_threads() == []


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="found 0"):
        prefetched(Counting(1), depth=0)


def test_there_is_always_a_worker() -> None:
    assert 1 <= default_workers() <= 8
