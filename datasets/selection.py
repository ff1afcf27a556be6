"""Which rows of the data are used: `skip`, `take`, and `sample` with a `seed`."""

from __future__ import annotations

import hashlib
import heapq
import logging
from dataclasses import dataclass

from trtune.configs.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """Leave out the first `skip` rows, keep the next `take`, draw `sample` of those.

    A sample keeps the order of the rows. Each row has a place in a shuffle that depends on
    nothing but `seed` and its number, so a larger sample contains the smaller one, and the draw
    is the same on every machine and version.

    Raises ValueError for a negative `skip` or a `take` or `sample` below 1.
    """

    skip: int = 0
    take: int | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ValueError(f"skip must not be negative, found {self.skip}")
        for name, value in (("take", self.take), ("sample", self.sample)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")

    @property
    def end(self) -> int | None:
        """The row after the last one `skip` and `take` leave in, or None for all."""
        return None if self.take is None else self.skip + self.take

    def rows(self, count: int, where: str) -> range | list[int]:
        """The chosen row numbers out of `count`, ascending.

        Raises DataError, naming `where`, if none is left.

        >>> Selection(skip=2, take=3).rows(10, "x.npz")
        range(2, 5)
        """
        if count == 0:
            raise DataError(f"{where} is empty: there is nothing to feed the model with")
        window = range(self.skip, count if self.end is None else min(count, self.end))
        if not window:
            raise DataError(
                f"no rows are left of {where}: it has {count}, and `skip` leaves out {self.skip}"
            )
        wanted = self.sample or self.take
        if wanted is not None and wanted > len(window):
            log.warning("%s has %d rows to give, %d were asked for", where, len(window), wanted)
        if self.sample is None or self.sample >= len(window):
            return window
        return sorted(heapq.nsmallest(self.sample, window, key=self._place))

    def _place(self, row: int) -> bytes:
        return hashlib.sha256(f"{self.seed}:{row}".encode()).digest()
