"""Which of a few whole tables of ranges leaves the least error: a race over pictures.

What 48 pictures say of two tables can be off by a decibel, for a few of them hold most of the
noise; hundreds say it better, and cost as many runs of the network. So all are tried on a few, and
only those that are not clearly behind on twice as many, and so on (racing, as Maron and Moore,
1994, do it, with the paired standard error in place of Hoeffding's bound).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from trtune.configs.progress import Progress, silent
from trtune.precision.tune.auto.company import Company, Errors
from trtune.precision.tune.auto.ranges import Choice
from trtune.precision.tune.judge import (
    BEYOND_CHANCE,
    Improvement,
    gain,
    improvement,
    level,
    typical_gain,
    worst,
)

log = logging.getLogger(__name__)

DOUBTED = 8
"""Of fewer pictures the standard error is not known, and no table is out."""

ALIKE = 0.035
"""A table is out where it certainly differs from the leader by less than this part (0.15 dB)."""

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
    field = list(names)
    for batches in _doubling(pictures, first):
        for name in field:
            found[name] += errors(name, batches)
        leader = min(field, key=lambda name: (worst(found[name]), names.index(name)))
        field = [n for n in field if n == leader or not _is_out(found[n], found[leader])]
        if len(field) == 1:
            break
    best = _best(field, found, leader)
    log.info(
        "on %d pictures: %s",
        sum(pictures[: batches.stop]),
        ", ".join(f"{n} {_decibels(worst(found[n])):.2f} dB" for n in names),
    )
    return best


def race_of_gains(
    names: Sequence[str],
    errors: Callable[[str, range], Errors],
    pictures: Sequence[int],
    asked: Collection[str],
    *,
    first: int,
) -> tuple[dict[str, tuple[Improvement, bool]], dict[str, float]]:
    """What each of `names` gains over the first of them, and whether it is still in the race at its
    end; and the error of its worst output.

    As `race`, but over those of `asked`, and what leads is what likely gains most. Who is certainly
    behind it (`Improvement.is_certain`) is out; gains, errors and their noise are those of the
    pictures that it was tried on. The others are tried on the first pictures alone.
    """
    found: dict[str, Errors] = {name: [] for name in names}
    field = list(names)
    gains: dict[str, Improvement] = {}
    for batches in _doubling(pictures, first):
        for name in (n for n in names if n in field or n == names[0]):
            found[name] += errors(name, batches)
        none = found[names[0]]
        gains |= {n: improvement(none, found[n]) for n in field}
        lead = max((n for n in field if n in asked), key=lambda n: gains[n].likely)
        rest = [n for n in field if n in asked and n != lead]
        field = [lead, *(n for n in rest if not improvement(found[n], found[lead]).is_certain)]
        if len(field) == 1:
            break
    return {n: (gains[n], n in field) for n in names}, {n: worst(found[n]) for n in names}


def _doubling(pictures: Sequence[int], first: int) -> Iterator[range]:
    """The batches that hold `first` pictures, then again as many as there were, to the last."""
    done, wanted = 0, first
    while done < len(pictures):
        enough = int(np.searchsorted(np.cumsum(pictures[done:]), wanted)) + 1
        until = min(done + enough, len(pictures))
        yield range(done, until)
        done, wanted = until, sum(pictures[:until])


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
    """Whether a table is certainly behind, or as good as the leader is.

    It is behind by `BEYOND_CHANCE` standard errors of the mean's gain, or by one of those and so
    many of the typical picture's: where a few pictures hold most of the error the mean says little.
    """
    if sum(part.shape[1] for part in leading) < DOUBTED:
        return False
    part, noise = gain(errors, leading)
    if not np.isfinite(part):
        return True
    alike = abs(part) + BEYOND_CHANCE * noise < ALIKE and level(errors) >= level(leading)
    if part < max(noise, ALIKE):
        return alike
    return part >= BEYOND_CHANCE * noise or typical_gain(errors, leading) >= BEYOND_CHANCE


def _best(field: Sequence[str], found: Mapping[str, Errors], leader: str) -> str:
    limit = worst(found[leader]) * 10 ** (CLOSE_DB / 10)
    close = [name for name in field if worst(found[name]) <= limit]
    return min(close or [leader], key=lambda name: (level(found[name]), field.index(name)))


def _decibels(error: float) -> float:
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(error)) if error >= 0 else float("nan")
