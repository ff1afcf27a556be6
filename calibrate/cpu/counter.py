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

MOST_NOTED = 256
"""Batches whose largest values are ranked together."""


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
        self._noted: list[tuple[Sequence[str], NDArray[np.uint32]]] = []
        self.overflowed: list[str] = []
        self._best: tuple[int, str] = (-1, "")  # magnitudes as the bits of a float32
        self._second = 0

    def add(self, items: Sequence[str], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Count `values` (pictures x values, C-contiguous), row by row named by `items`.

        Returns the largest finite magnitude of each row, exactly, or NaN where there is one.
        Infinities are no range (masks of attention hold them) and are left out of the counts.
        Releases the GIL while it counts.
        """
        return count_each([(self, items, values)])

    def _place(self, values: NDArray[np.float32]) -> int:
        """The address of tables that have room for `values`."""
        if values.size > self._room:
            self._flush()
        self._room -= values.size
        return self._address

    def _note(self, items: Sequence[str], largest: NDArray[np.uint32]) -> None:
        """Remember the `largest` of each row, as bits; what is made of them is made for many."""
        if len(items) != len(largest):
            raise ValueError(f"{len(items)} names for {len(largest)} pictures")
        self._noted.append((items, largest))
        if len(self._noted) >= MOST_NOTED:
            self._rank_noted()

    def _rank_noted(self) -> None:
        """Count what was noted, and see which picture holds the largest."""
        if not self._noted:
            return
        bits = np.concatenate([largest for _, largest in self._noted])
        names = [item for items, _ in self._noted for item in items]
        self._noted = []
        if not bits.size:
            return
        bins = bits >> SHIFT
        self._touched = max(self._touched, int(bins.max()) + 1)
        self._maxima.update(bins.tolist())
        bits = np.where(bits > INFINITY_BITS, 0, bits)  # NaN is no rank
        first, *others = np.sort(bits)[:-3:-1].tolist()
        best = min(names[row] for row in np.flatnonzero(bits == first).tolist())
        self._rank(best, first, *others)

    def _leave_out_infinities(
        self, items: Sequence[str], values: NDArray[np.float32], largest: NDArray[np.uint32]
    ) -> None:
        self._touched = BINS
        for row in np.flatnonzero(largest == INFINITY_BITS).tolist():
            if np.isposinf(values[row]).any():
                self.overflowed.append(items[row])
            finite = np.isfinite(values[row])
            largest[row : row + 1].view(np.float32)[:] = np.abs(values[row][finite]).max(initial=0)

    @property
    def pictures(self) -> int:
        """How many rows were added."""
        self._rank_noted()
        return sum(self._maxima.values())

    def _flush(self) -> None:
        """Move the small tables into the large one before one of their counts can overflow."""
        self._rank_noted()
        self._counts = self._total()
        self._tables[:, : self._touched] = 0
        self._touched, self._room = 0, TABLE_ROOM

    def _total(self) -> Counts:
        counts = np.zeros(BINS, np.int64) if self._counts is None else self._counts.copy()
        add_tables(self._tables, self._touched, counts)
        return counts

    def _rank(self, item: str, largest: int, second: int = 0) -> None:
        """Rank a picture with what is `largest`, and what is `second` to it beside it."""
        best, name = self._best
        self._second = max(self._second, second, min(best, largest))
        if largest > best or (largest == best and item < name):
            self._best = (largest, item)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: the filled bins."""
        self._rank_noted()
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
        self._rank_noted()
        other._rank_noted()
        self.overflowed += other.overflowed
        counts = np.zeros(BINS, np.int64) if self._counts is None else self._counts
        if other._counts is not None:
            counts += other._counts
        add_tables(other._tables, other._touched, counts)
        self._counts = counts
        self._maxima.update(other._maxima)
        largest, item = other._best
        if item:
            self._rank(item, largest, other._second)

    def histogram(self) -> Histogram:
        """What was counted so far, as a frozen value."""
        self._rank_noted()
        largest, item = self._best
        counts = np.zeros(BINS, np.int64)
        counts[list(self._maxima)] = list(self._maxima.values())
        maxima = PictureMaxima(counts, item, _float(self._second))
        return Histogram(finite_counts(self._total()), _float(max(largest, 0)), maxima)


def count_each(
    jobs: Sequence[tuple[Counter, Sequence[str], NDArray[np.float32]]],
) -> NDArray[np.float32]:
    """`Counter.add` of each, in one call without the GIL: threads wait for it after every call.

    The counters must differ. Returns what each returns, one behind the other.
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
    infinite = largest.max(initial=0) >= INFINITY_BITS
    done = 0
    for counter, items, values in jobs:
        mine = largest[done : done + len(values)]
        if infinite:
            counter._leave_out_infinities(items, values, mine)
        counter._note(items, mine)
        done += len(values)
    return largest.view(np.float32)


def _float(bits: int) -> float:
    """The float32 of these bits."""
    return float(np.uint32(bits).view(np.float32))
