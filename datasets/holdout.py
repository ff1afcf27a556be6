"""A few pictures set apart: the same ones whatever the order of the data and the batch size."""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from trtune.configs.errors import DataError
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch, BatchSource, rebatch, take_rows

log = logging.getLogger(__name__)

SHARE = 4
"""At most one picture in this many is set apart."""


def hold_out(source: BatchSource, count: int) -> tuple[Batch, ...]:
    """At most `count` pictures of `source`, each a batch of its own, chosen by their content.

    They are those whose content has the smallest hashes, in that order, and at most a quarter of
    all (one at least), so neither order nor batch size of the data matters. Equal pictures count
    once. Reads the data once and keeps `count` pictures. Raises DataError for an empty source,
    ValueError for a count below one.
    """
    kept, total = _smallest(source, count)
    return kept[: max(1, total // SHARE)]


def hold_out_more(
    source: BatchSource, count: int, more: int, *, part: float = 0.5
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """The pictures of `hold_out(source, count)`, and up to `more` others that come next.

    Both together are at most `part` of all. Reads the data once; raises what `hold_out` raises.
    """
    kept, total = _smallest(source, count + more)
    first = min(count, max(1, total // SHARE))
    return kept[:first], kept[first : max(first, min(first + more, int(part * total)))]


def fitting_pictures(source: BatchSource, size: float) -> int:
    """How many pictures like the first batch's take `size` bytes; 0 for an empty source."""
    first = next(iter(source), None)
    if first is None:
        return 0
    each = sum(array.nbytes for array in first.feeds.values()) / max(len(first), 1)
    return int(size / max(each, 1))


def _smallest(source: BatchSource, count: int) -> tuple[tuple[Batch, ...], int]:
    """The `count` different pictures with the smallest hashes, and how many there are in all."""
    if count < 1:
        raise ValueError(f"count is {count}; at least one picture must be set apart")
    kept: list[tuple[int, Batch]] = []
    seen: set[int] = set()
    total = 0
    for code, picture in _coded(source):
        total += 1
        if code in seen or (len(kept) == count and code <= kept[0][0]):
            continue
        own = replace(picture, feeds={name: np.array(a) for name, a in picture.feeds.items()})
        seen.add(code)
        heapq.heappush(kept, (code, own))
        if len(kept) > count:
            seen.discard(heapq.heappop(kept)[0])
    if not total:
        raise DataError("the calibration data is empty; check path, take and skip")
    ordered = tuple(picture for _, picture in sorted(kept, key=lambda entry: -entry[0]))
    return ordered, total


def _coded(source: BatchSource) -> Iterator[tuple[int, Batch]]:
    """Each picture with its hash, negated; those of a batch are hashed on all usable cores."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        for batch in source:
            pictures = [take_rows(batch, slice(row, row + 1)) for row in range(len(batch))]
            for picture, digest in zip(pictures, pool.map(_digest, pictures), strict=True):
                yield -int.from_bytes(digest, "big"), picture


def _digest(picture: Batch) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(picture.feeds):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(picture.feeds[name]).data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Without:
    """`source` less some items, by name. A `BatchSource`."""

    source: BatchSource
    items: frozenset[str]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            rows = [i for i, item in enumerate(batch.items) if item not in self.items]
            if len(rows) == len(batch):
                yield batch
            elif rows:
                yield take_rows(batch, rows)

    @property
    def count(self) -> int | None:
        """Samples a pass yields, as far as the source knows."""
        return None if self.source.count is None else self.source.count - len(self.items)

    @property
    def identity(self) -> str:
        """The source's identity with the names that are missing."""
        names = "\n".join(sorted(self.items))
        return hashlib.sha256(f"{self.source.identity}\n{names}".encode()).hexdigest()

    @property
    def skipped(self) -> tuple[str, ...]:
        """What the source skipped."""
        return self.source.skipped


@dataclass(frozen=True, slots=True)
class WholeBatches:
    """`source` in batches of exactly `size`, for models that fix theirs. A `BatchSource`.

    A padded batch would count its filling twice, so what is left at the end (and before a picture
    of another shape) is left out, and the log says how much.
    """

    source: BatchSource
    size: int

    def __iter__(self) -> Iterator[Batch]:
        for batch in rebatch(self.source, self.size):
            if len(batch) == self.size:
                yield batch
            else:
                log.warning(
                    "the last %d pictures are left out: the model takes %d at a time",
                    len(batch),
                    self.size,
                )

    @property
    def count(self) -> int | None:
        """Samples a pass yields, as far as the source knows."""
        count = self.source.count
        return None if count is None else count // self.size * self.size

    @property
    def identity(self) -> str:
        """The source's."""
        return self.source.identity

    @property
    def skipped(self) -> tuple[str, ...]:
        """What the source skipped."""
        return self.source.skipped


def join(pictures: tuple[Batch, ...], size: int) -> list[Batch]:
    """Single pictures put together into batches of at most `size`, in order, without labels.

    The last may be short, and so may one before a picture of another shape.
    """
    return list(rebatch((replace(picture, labels=None) for picture in pictures), size))
