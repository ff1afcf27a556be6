"""Work that runs ahead in threads while the model computes, in order and bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from trtune.datasets.batches import Batch, BatchSource

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Threads to decode with: one a core, at most eight."""
    return max(1, min(8, os.cpu_count() or 1))


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


@dataclass(frozen=True, slots=True)
class Prefetched:
    """A source whose next batches are made in a thread while this one is used."""

    source: BatchSource
    depth: int = 2

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.source)
        pool = ThreadPoolExecutor(1, thread_name_prefix="trtune-batches")
        try:
            waiting = deque(pool.submit(next, batches, None) for _ in range(self.depth))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, batches, None))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(batches, Generator):
                batches.close()

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
