"""The steps of tuning, and pins against value."""

from __future__ import annotations

from collections.abc import Sequence

from trtune.precision.tune.walk import Step, Tuned
from trtune.reports.record import FrontPoint, TuningStep


def tuning_steps(steps: Sequence[Step], *, sign: int = 1) -> list[TuningStep]:
    """Every evaluated set of pins, in order; `sign` -1 where less is better, as the search's."""
    return [
        TuningStep(
            step=number,
            action=step.action,
            pinned=list(step.pinned),
            moved=list(step.moved),
            value=sign * step.score.value,
            builds=step.score.builds,
            seconds=round(step.seconds, 3),
            sqnr_db=step.score.sqnr_db,
            met=step.score.met,
            cached=step.score.cached,
            values=dict(step.score.values),
            error=step.score.error,
            samples=step.score.samples,
            whole=step.score.whole,
            reason="; ".join(filter(None, (step.reason, step.score.note))),
        )
        for number, step in enumerate(steps)
    ]


def front_points(tuned: Tuned, *, sign: int = 1) -> list[FrontPoint]:
    """Pins against value, the fewest first."""
    return [
        FrontPoint(
            pins=len(step.pinned),
            pinned=list(step.pinned),
            value=sign * step.score.value,
            met=step.score.met,
            error=step.score.error,
            sqnr_db=step.score.sqnr_db,
        )
        for step in tuned.front
    ]
