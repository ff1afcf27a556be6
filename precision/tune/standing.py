"""Which of a few whole tables of ranges leaves the least error: a race over pictures.

What 48 pictures say of two tables can be off by a decibel, for a few of them hold most of the
noise; hundreds say it better, and cost as many runs of the network. So all are tried on a few, and
only those that are not clearly behind on twice as many, and so on (racing, as Maron and Moore,
1994, do it, with the paired standard error in place of Hoeffding's bound).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trtune.configs.progress import Progress, silent
from trtune.precision.tune.company import Company, Errors
from trtune.precision.tune.judge import gain, level, worst
from trtune.precision.tune.ranges import Choice

log = logging.getLogger(__name__)

CERTAIN = 3.0
"""A table is out where the leader's gain over it is so many standard errors: two happen by chance,
with several tables and errors of which a few pictures have most."""

DOUBTED = 8
"""Of fewer pictures the standard error is not known, and no table is out."""

ALIKE = 0.035
"""... or where it certainly differs from the leader by less than this part (0.15 dB)."""

CLOSE_DB = 0.1
"""Of tables whose worst output differs by less, the one with the best mean of outputs is taken."""


def race(
    names: Sequence[str],
    errors: Callable[[str, range], Errors],
    pictures: Sequence[int],
    *,
    first: int,
) -> str:
    """The best of `names`.

    `errors` gives those of one table on some batches, as `Judge` does; `pictures` is how many each
    batch holds. All are tried on the batches that hold `first` pictures, the rest of the field on
    twice as many each time. The worst output decides.

    >>> flat = {"a": 1.0, "b": 0.5}
    >>> race(["a", "b"], lambda n, k: [np.full((1, 8), flat[n]) for _ in k], [8, 8], first=8)
    'b'
    """
    found: dict[str, Errors] = {name: [] for name in names}
    field, done, wanted = list(names), 0, first
    while True:
        enough = int(np.searchsorted(np.cumsum(pictures[done:]), wanted)) + 1
        until = min(done + enough, len(pictures))
        for name in field:
            found[name] += errors(name, range(done, until))
        wanted, done = sum(pictures[:until]), until
        leader = min(field, key=lambda name: (worst(found[name]), names.index(name)))
        field = [n for n in field if n == leader or not _is_out(found[n], found[leader])]
        if len(field) == 1 or done == len(pictures):
            break
    best = _best(field, found, leader)
    log.info(
        "on %d pictures: %s",
        sum(pictures[:done]),
        ", ".join(f"{n} {_decibels(worst(found[n])):.2f} dB" for n in names),
    )
    return best


class Standing:
    """The tables that a race is between, on pictures that no range was chosen on.

    Each is measured once on each batch, whatever the races that it takes part in.
    """

    def __init__(self, company: Company, first: int, progress: Progress = silent) -> None:
        self._company, self._first, self._progress = company, first, progress
        self._tables: dict[str, Mapping[str, float]] = {}
        self._found: dict[str, Errors] = {}
        self._trials = 0

    def best(self, tables: Mapping[str, Mapping[str, Choice]]) -> str:
        """The name of the best of `tables`, the first of equals."""
        self._tables |= {n: {r: c.amax for r, c in t.items()} for n, t in tables.items()}
        return race(list(tables), self._errors, self._company.pictures, first=self._first)

    def _errors(self, name: str, batches: range) -> Errors:
        held = self._found.setdefault(name, [])
        held += self._company.errors(self._tables[name], range(len(held), batches.stop))
        self._trials += 1
        self._progress("compare methods", self._trials, None)
        return held[batches.start : batches.stop]


def _is_out(errors: Errors, leading: Errors) -> bool:
    """Whether a table is certainly behind, or as good as the leader is."""
    if sum(part.shape[1] for part in leading) < DOUBTED:
        return False
    part, noise = gain(errors, leading)
    if not np.isfinite(part):
        return True
    alike = abs(part) + CERTAIN * noise < ALIKE and level(errors) >= level(leading)
    return alike or part >= max(CERTAIN * noise, ALIKE)


def _best(field: Sequence[str], found: Mapping[str, Errors], leader: str) -> str:
    limit = worst(found[leader]) * 10 ** (CLOSE_DB / 10)
    close = [name for name in field if worst(found[name]) <= limit]
    return min(close or [leader], key=lambda name: (level(found[name]), field.index(name)))


def _decibels(error: float) -> float:
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(error)) if error >= 0 else float("nan")
