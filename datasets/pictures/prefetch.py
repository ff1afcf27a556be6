"""Work that runs ahead in threads while the model computes, in order and bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch, BatchSource

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Threads to decode with: one a core, at most eight."""
    return min(8, usable_cores())


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int = 2,
    depth: int = 8,
) -> Generator[R, None, None]:
    """`function` of each of `items`, in their order, computed by `workers` threads.

    At most `depth` results are made and not yet taken. What `function` raises is raised at its
    place in the order. The threads are gone when the generator ends or is closed, also by Ctrl-C:
    what has not begun is cancelled, what has is waited for.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="trtune-data")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Steps:
    """An iterator that threads step through one at a time, and not at all once it is closed.

    A signal may end the start of a thread before its pool knows of it; no pool waits for that one
    then, and it may be inside the iterator when that is to be closed.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self._closed = batches, False
        self._inside = threading.Lock()

    def take(self) -> Batch | None:
        """The next batch, or None at the end or once closed."""
        with self._inside:
            return None if self._closed else next(self._batches, None)

    def close(self) -> None:
        """Close the iterator as soon as nobody is inside."""
        with self._inside:
            self._closed = True
            if isinstance(self._batches, Generator):
                self._batches.close()


def made_ahead(batches: Iterator[Batch], *, depth: int = 2) -> Generator[Batch, None, None]:
    """`batches`, of which up to `depth` are made in a thread before they are asked for.

    What the iterator raises is raised where its batch would have come. The thread ends with the
    last batch, or when the consumer stops early.
    """
    steps = _Steps(batches)
    pool = ThreadPoolExecutor(1, thread_name_prefix="trtune-batches")
    try:
        waiting = deque(pool.submit(steps.take) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(steps.take))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        steps.close()


@dataclass(frozen=True, slots=True)
class Prefetched:
    """A source whose next batches are made in a thread while this one is used."""

    source: BatchSource
    depth: int = 2

    def __iter__(self) -> Iterator[Batch]:
        return made_ahead(iter(self.source), depth=self.depth)

    @property
    def count(self) -> int | None:
        """As the source's."""
        return self.source.count

    @property
    def identity(self) -> str:
        """As the source's."""
        return self.source.identity

    @property
    def skipped(self) -> tuple[str, ...]:
        """As the source's."""
        return self.source.skipped


def prefetched(source: BatchSource, *, depth: int = 2) -> BatchSource:
    """`source` with up to `depth` batches made ahead in one thread, since its order matters.

    An exception of the source is raised where the batch would have come. The thread ends with the
    pass, or when the consumer stops early.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, found {depth}")
    return Prefetched(source, depth)
