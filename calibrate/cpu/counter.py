"""A histogram of |x| that is being filled."""

from __future__ import annotations

import mmap
from collections import Counter as Tally
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.cpu.fill import SPREAD, TABLES, add_tables, fill_each
from trtune.calibrate.histogram import (
    BINS,
    INFINITY_BITS,
    SHIFT,
    Counts,
    Histogram,
    PictureMaxima,
    finite_counts,
)

TABLE_ROOM = 1 << 32
"""Values that the uint32 tables can take before one of their counts could overflow."""


def _empty_tables() -> NDArray[np.uint32]:
    """Zeros from the operating system, which gives memory only to what is touched: few bins are."""
    width = BINS + SPREAD
    size = TABLES * width * np.dtype(np.uint32).itemsize
    block = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    return np.frombuffer(block, np.uint32).reshape(TABLES, width)


class Counter:
    """A histogram being filled; one a thread, merged at the end.

    `overflowed` names the pictures that held plus infinity.
    """

    def __init__(self) -> None:
        self._tables = _empty_tables()
        self._address = self._tables.ctypes.data
        self._touched = 0  # bins of the tables, from the first on, that may hold something
        self._counts: Counts | None = None
        self._maxima: Tally[int] = Tally()  # by bin
        self._room = TABLE_ROOM
        self.overflowed: list[str] = []
        self._best: tuple[int, str] = (-1, "")  # magnitudes as the bits of a float32
        self._second = 0

    def add(self, items: Sequence[str], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Count `values` (pictures x values, C-contiguous), row by row named by `items`.

        Returns the largest finite magnitude of each row, exactly, or NaN where there is one.
        Infinities are no range (masks of attention hold them) and are left out of the counts.
        Releases the GIL while it counts.
        """
        (maxima,) = count_each([(self, items, values)])
        return maxima

    def _place(self, values: NDArray[np.float32]) -> int:
        """The address of tables that have room for `values`."""
        if values.size > self._room:
            self._flush()
        self._room -= values.size
        return self._address

    def _note(
        self, items: Sequence[str], values: NDArray[np.float32], largest: NDArray[np.uint32]
    ) -> None:
        """Remember the `largest` of each row of `values`, and mend them where one is infinite."""
        found = largest.tolist()
        top = max(found, default=0)
        self._touched = max(self._touched, (top >> SHIFT) + 1)
        if top >= INFINITY_BITS:
            self._leave_out_infinities(items, values, largest)
            found = largest.tolist()
        if len(items) != len(found):
            raise ValueError(f"{len(items)} names for {len(found)} pictures")
        self._maxima.update([bits >> SHIFT for bits in found])
        if top >= self._second:
            for item, bits in zip(items, found, strict=True):
                if self._second <= bits <= INFINITY_BITS:
                    self._rank(item, bits)

    def _leave_out_infinities(
        self, items: Sequence[str], values: NDArray[np.float32], largest: NDArray[np.uint32]
    ) -> None:
        for row in np.flatnonzero(largest == INFINITY_BITS).tolist():
            if np.isposinf(values[row]).any():
                self.overflowed.append(items[row])
            finite = np.isfinite(values[row])
            largest[row : row + 1].view(np.float32)[:] = np.abs(values[row][finite]).max(initial=0)

    @property
    def pictures(self) -> int:
        """How many rows were added."""
        return sum(self._maxima.values())

    def _flush(self) -> None:
        """Move the small tables into the large one before one of their counts can overflow."""
        self._counts = self._total()
        self._tables[:, : self._touched] = 0
        self._touched, self._room = 0, TABLE_ROOM

    def _total(self) -> Counts:
        counts = np.zeros(BINS, np.int64) if self._counts is None else self._counts.copy()
        add_tables(self._tables, self._touched, counts)
        return counts

    def _rank(self, item: str, largest: int) -> None:
        best, name = self._best
        if largest > best or (largest == best and item < name):
            self._second = max(self._second, best)
            self._best = (largest, item)
        else:
            self._second = max(self._second, largest)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: the filled bins."""
        total = self._total()
        filled = np.flatnonzero(total)
        return {
            "bins": filled,
            "counts": total[filled],
            "maxima": self._maxima,
            "overflowed": self.overflowed,
            "best": self._best,
            "second": self._second,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Counter.__init__(self)
        counts = np.zeros(BINS, np.int64)
        counts[state["bins"]] = state["counts"]
        self._counts, self._maxima = counts, state["maxima"]
        self.overflowed, self._best = state["overflowed"], state["best"]
        self._second = state["second"]

    def merge(self, other: Counter) -> None:
        """Add what another thread, or another process, counted."""
        self.overflowed += other.overflowed
        counts = np.zeros(BINS, np.int64) if self._counts is None else self._counts
        if other._counts is not None:
            counts += other._counts
        add_tables(other._tables, other._touched, counts)
        self._counts = counts
        self._maxima.update(other._maxima)
        best, name = other._best
        if name and best >= self._second:
            self._rank(name, best)
        self._second = max(self._second, other._second)

    def histogram(self) -> Histogram:
        """What was counted so far, as a frozen value."""
        largest, item = self._best
        counts = np.zeros(BINS, np.int64)
        counts[list(self._maxima)] = list(self._maxima.values())
        maxima = PictureMaxima(counts, item, _float(self._second))
        return Histogram(finite_counts(self._total()), _float(max(largest, 0)), maxima)


def count_each(
    jobs: Sequence[tuple[Counter, Sequence[str], NDArray[np.float32]]],
) -> list[NDArray[np.float32]]:
    """`Counter.add` of each, in one call without the GIL: threads wait for it after every call.

    The counters must differ.
    """
    arrays = [values for _, _, values in jobs]
    rows = [len(values) for values in arrays]
    largest = np.zeros(sum(rows), np.uint32)
    fill_each(
        np.array([values.ctypes.data for values in arrays], np.uint64),
        np.array(rows, np.int64),
        np.array([values.shape[1] for values in arrays], np.int64),
        np.array([counter._place(values) for counter, _, values in jobs], np.uint64),
        largest,
    )
    found = []
    done = 0
    for counter, items, values in jobs:
        mine = largest[done : done + len(values)]
        counter._note(items, values, mine)
        found.append(mine.view(np.float32))
        done += len(values)
    return found


def _float(bits: int) -> float:
    """The float32 of these bits."""
    return float(np.uint32(bits).view(np.float32))
