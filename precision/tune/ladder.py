"""Tuning: pin what hurts until the target is met, then take back what was not needed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trtune.precision.plan.pins import first_that_may
from trtune.precision.plan.plan import TUNER, PrecisionPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """The value of a plan (higher is better) and whether the target is met.

    `cached` says that it was known already, `builds` how many engines were built for it; `note`
    what else there is to say, such as which of several runtimes missed.
    """

    value: float
    met: bool
    sqnr_db: float | None = None
    cached: bool = False
    note: str = ""
    builds: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluated plan. `action` is start, pin, unpin (taken back) or unpin-rejected."""

    action: str
    pinned: tuple[str, ...]
    score: Score
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best plan found, whether it meets the target, and every step on the way."""

    plan: PrecisionPlan
    met: bool
    steps: tuple[Step, ...]

    @property
    def front(self) -> tuple[Step, ...]:
        """Pins against value: the steps that no other reaches with as few pins, fewest first."""
        best: list[Step] = []
        for step in sorted(self.steps, key=lambda s: (len(s.pinned), -s.score.value)):
            if not best or step.score.value > best[-1].score.value:
                best.append(step)
        return tuple(best)


def ladder(limit: int) -> Iterator[int]:
    """1, 2, 4, ... and `limit` itself.

    >>> list(ladder(6))
    [1, 2, 4, 6]
    """
    rung = 1
    while rung < limit:
        yield rung
        rung *= 2
    if limit > 0:
        yield limit


def tune(
    plan: PrecisionPlan,
    ranking: Sequence[tuple[str, str]],
    evaluate: Callable[[PrecisionPlan], Score],
    *,
    max_pins: int,
    precisions: Sequence[str] = ("fp32",),
    evaluations: int | None = None,
    patience: int | None = None,
) -> Tuned:
    """Pin the worst nodes of `plan` until `evaluate` says that the target is met, each to the
    first of `precisions` that `plan.may` allows it (FP32 is always allowed).

    `ranking` names int8 nodes, worst first, each with the reason in words. The number of pins
    doubles from step to step, up to `max_pins`; a pin takes the node's whole fusion group. Once
    the target is met, pins are taken back one at a time, the least harmful node first, as long as
    it holds. If it is never met, the plan with the best value is returned.

    At most `evaluations` plans are evaluated (at least one), and `patience` rungs in a row that
    gain nothing end the search; None: no such limit.
    """
    steps: list[Step] = []

    def measure(
        action: str, pins: Sequence[tuple[str, str]], about: str
    ) -> tuple[PrecisionPlan, Score]:
        candidate = plan
        for node, why in pins:
            reason = f"pinned by the tuner: {why}"
            precision = first_that_may(plan, node, precisions)
            candidate = candidate.pin([node], precision, reason, origin=TUNER)
        started = time.perf_counter()
        score = evaluate(candidate)
        names = tuple(node for node, _ in pins)
        steps.append(Step(action, names, score, time.perf_counter() - started, about))
        log.info("%s %s: %.5g%s", action, names, score.value, ", target met" if score.met else "")
        return candidate, score

    best, score = measure("start", [], "nothing pinned by the tuner")
    if score.met:
        return Tuned(best, True, tuple(steps))
    best_value = score.value
    limit = math.inf if evaluations is None else evaluations
    idle = 0
    for rung in ladder(min(max_pins, len(ranking))):
        if len(steps) >= limit or (patience is not None and idle >= patience):
            break
        pins = list(ranking[:rung])
        candidate, score = measure(
            "pin", pins, f"the {rung} worst alone" if rung > 1 else "the worst alone"
        )
        idle = 0 if score.value > best_value else idle + 1
        if score.value > best_value:
            best, best_value = candidate, score.value
        if score.met:
            best = _take_back(candidate, pins, measure, steps, limit)
            return Tuned(best, True, tuple(steps))
    return Tuned(best, False, tuple(steps))


def _take_back(
    plan: PrecisionPlan,
    pins: list[tuple[str, str]],
    measure: Callable[[str, Sequence[tuple[str, str]], str], tuple[PrecisionPlan, Score]],
    steps: list[Step],
    limit: float,
) -> PrecisionPlan:
    """Try each pin's removal, least harmful first, as long as the target holds."""
    best = plan
    for pin in reversed(pins[:]):
        fewer = [other for other in pins if other != pin]
        if not fewer or len(steps) >= limit:
            break  # no pin at all was tried first, and missed
        candidate, score = measure("unpin", fewer, f"without {pin[0]}")
        if score.met:
            best, pins = candidate, fewer
        else:
            rejected = steps[-1]
            steps[-1] = Step(
                "unpin-rejected", rejected.pinned, score, rejected.seconds, f"{pin[0]} is needed"
            )
    return best
