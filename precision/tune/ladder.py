"""Tuning: pin what hurts until the target is met, then take back what was not needed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trtune.precision.plan.pins import first_that_may
from trtune.precision.plan.plan import TUNER, PrecisionPlan

log = logging.getLogger(__name__)

CLOSE = 0.01
"""What is predicted to miss by this part only is tried."""
UNLIKELY = 1.08
"""What is predicted to lose this many times what is allowed is not tried to be taken back."""
REJECTED = 2
"""Where it can be predicted which pins are needed least, so many that are needed end the search."""


@dataclass(frozen=True, slots=True)
class Score:
    """The value of a plan (higher is better) and whether the target is met.

    `cached` says that it was known already, `builds` how many engines were built for it; `note`
    what else there is to say, such as which of several runtimes missed. `loss` is what is lost
    against FP32 as a part of what may be lost, at most 1 where the target is met; None if that
    cannot be said. `values` has that of every runtime it was measured on.
    """

    value: float
    met: bool
    sqnr_db: float | None = None
    cached: bool = False
    note: str = ""
    builds: int = 0
    loss: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluated plan. `action` is start, pin, unpin (taken back) or unpin-rejected."""

    action: str
    pinned: tuple[str, ...]
    score: Score
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """int8 nodes in the order to pin them, each with the reason in words.

    `noises` predicts the noise with the first 0, 1, 2, ... of them pinned, and `noise_of` that with
    any of them; without them nothing is predicted.
    """

    pins: tuple[tuple[str, str], ...]
    noises: tuple[float, ...] = ()
    noise_of: Callable[[Sequence[str]], float] | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best plan found, whether it meets the target, and every step on the way.

    `needed` is how many pins the target would take as far as can be predicted, where it is missed;
    None if not even all would do, or nothing is predicted.
    """

    plan: PrecisionPlan
    met: bool
    steps: tuple[Step, ...]
    needed: int | None = None

    @property
    def chosen(self) -> Step:
        """The step that measured the plan that is kept."""
        plan = self.plan
        pins = {name for name in plan.compute_nodes if plan.nodes[name].origin == TUNER}
        return next((step for step in self.steps if set(step.pinned) == pins), self.steps[0])

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


def pins_for(loss: float, at: int, noises: Sequence[float]) -> int | None:
    """The fewest pins with which a loss of `loss` with `at` pins would come down to 1.

    `noises` are those with 0, 1, 2, ... pins; a loss is taken to follow them. None if no number of
    them would do.

    >>> pins_for(4.0, 0, [8.0, 4.0, 2.0, 1.0])
    2
    """
    if not 0 <= at < len(noises) or noises[at] <= 0:
        return None
    allowed = noises[at] / loss if loss > 0 else math.inf
    return next((k for k, noise in enumerate(noises) if noise <= allowed * (1 + CLOSE)), None)


def tune(
    plan: PrecisionPlan,
    ranking: Sequence[tuple[str, str]] | Callable[[Score], Ranked],
    evaluate: Callable[[PrecisionPlan], Score],
    *,
    max_pins: int,
    precisions: Sequence[str] = ("fp32",),
    evaluations: int | None = None,
    patience: int | None = None,
) -> Tuned:
    """Pin the worst nodes of `plan` until `evaluate` says that the target is met, each to the
    first of `precisions` that `plan.may` allows it (FP32 is always allowed).

    `ranking` names int8 nodes, worst first, each with the reason in words, or is asked for them
    once the score of `plan` itself is known and misses. The number of pins doubles from step to
    step, up to `max_pins`; a pin takes the node's whole fusion group. Once the target is met, pins
    are taken back one at a time, the least harmful node first, as long as it holds. If it is never
    met, the plan with the best value is returned.

    Where the ranking predicts noise, what is lost is taken to follow it: as many are pinned in a
    step as that says, corrected by every step that was measured, until the fewest that do are
    found, and only those are tried to be taken back that may not be needed.

    At most `evaluations` plans are evaluated (at least one), and `patience` rungs in a row that
    gain nothing end the search; None: no such limit.
    """
    walk = _Walk(plan, evaluate, precisions, math.inf if evaluations is None else evaluations)
    score = walk.measure("start", 0, "nothing pinned by the tuner")
    if score.met:
        return Tuned(plan, True, tuple(walk.steps))
    ranked = ranking(score) if callable(ranking) else Ranked(tuple(ranking))
    walk.ranked, most = ranked, min(max_pins, len(ranked.pins))
    idle, low, rung = 0, 0, 0
    while not score.met and rung < most and walk.may_go_on(idle, patience):
        best = walk.best_value
        rung = _next_rung(score.loss, rung, most, ranked.noises)
        score = walk.measure("pin", rung, _about(rung, ranked.noises))
        idle = 0 if score.value > best else idle + 1
        low = low if score.met else rung
    if not score.met:
        needed = None if score.loss is None else pins_for(score.loss, rung, ranked.noises)
        return Tuned(walk.best, False, tuple(walk.steps), needed)
    if ranked.noises:
        rung = _fewest(walk, low, rung)
    return Tuned(_take_back(walk, rung), True, tuple(walk.steps))


def _about(rung: int, noises: Sequence[float]) -> str:
    if noises:
        return f"the {rung} that gain most" if rung > 1 else "what gains most"
    return f"the {rung} worst alone" if rung > 1 else "the worst alone"


class _Walk:
    """The plans measured so far, with the first of a ranking pinned or with any pins."""

    def __init__(
        self,
        plan: PrecisionPlan,
        evaluate: Callable[[PrecisionPlan], Score],
        precisions: Sequence[str],
        limit: float,
    ) -> None:
        self.ranked, self.steps, self.scores = Ranked(()), list[Step](), dict[int, Score]()
        self.best, self.best_value = plan, -math.inf
        self.plans = {0: plan}
        self._plan, self._evaluate, self._precisions = plan, evaluate, precisions
        self._limit = limit

    @property
    def is_over(self) -> bool:
        return len(self.steps) >= self._limit

    def may_go_on(self, idle: int, patience: int | None) -> bool:
        return not self.is_over and (patience is None or idle < patience)

    def measure(self, action: str, rung: int, about: str) -> Score:
        """The score with the first `rung` of the ranking pinned."""
        self.plans[rung], score = self.of(action, self.ranked.pins[:rung], about)
        self.scores[rung] = score
        if score.value > self.best_value or not self.steps[1:]:
            self.best, self.best_value = self.plans[rung], score.value
        return score

    def of(
        self, action: str, pins: Sequence[tuple[str, str]], about: str
    ) -> tuple[PrecisionPlan, Score]:
        """The plan with `pins`, and its score."""
        candidate = self._plan
        for node, why in pins:
            precision = first_that_may(self._plan, node, self._precisions)
            reason = f"pinned by the tuner: {why}"
            candidate = candidate.pin([node], precision, reason, origin=TUNER)
        started = time.perf_counter()
        score = self._evaluate(candidate)
        names = tuple(node for node, _ in pins)
        self.steps.append(Step(action, names, score, time.perf_counter() - started, about))
        log.info("%s %s: %.5g%s", action, names, score.value, ", target met" if score.met else "")
        return candidate, score

    def predicted(self, rung: int, noise: float) -> float:
        """The loss with a noise, by the step of at most `rung` pins that says most; 0 if none."""
        noises = self.ranked.noises
        for known in sorted((k for k in self.scores if k <= rung), reverse=True):
            loss = self.scores[known].loss
            if loss is not None and loss > 0 and noises[known] > 0:
                return loss * noise / noises[known]
        return 0.0

    def reject(self, about: str) -> None:
        """The last step took back what is needed."""
        last = self.steps[-1]
        self.steps[-1] = Step("unpin-rejected", last.pinned, last.score, last.seconds, about)


def _next_rung(loss: float | None, rung: int, most: int, noises: Sequence[float]) -> int:
    """How many to pin next: as many as are predicted to do, or twice as many as before."""
    wanted = None if loss is None else pins_for(loss, rung, noises)
    if wanted is not None and wanted <= most:
        return max(wanted, rung + 1)
    return min(max(2 * rung, 1), most)


def _fewest(walk: _Walk, low: int, high: int) -> int:
    """The fewest of the ranking that meet the target; `low` miss it and `high` do."""
    noises = walk.ranked.noises
    while high - low > 1 and not walk.is_over:
        losses = {k: walk.predicted(high, noises[k]) for k in range(low + 1, high)}
        middle = next((k for k, loss in losses.items() if loss <= 1 + CLOSE), high - 1)
        if losses[middle] > UNLIKELY:
            break
        if walk.measure("unpin", middle, f"{middle} of {high} may do").met:
            high = middle
        else:
            low = middle
            walk.reject(f"{middle} are not enough")
    return high


def _take_back(walk: _Walk, rung: int) -> PrecisionPlan:
    """Try each pin's removal, the one needed least first, as long as the target holds."""
    best, pins, rejected = walk.plans[rung], walk.ranked.pins[:rung], 0
    for pin in _needed_last(walk, pins, rung):
        fewer = tuple(other for other in pins if other != pin)
        if not fewer or walk.is_over or (walk.ranked.noise_of and rejected == REJECTED):
            break  # no pin at all was tried first, and missed
        candidate, score = walk.of("unpin", fewer, f"without {pin[0]}")
        if score.met:
            best, pins = candidate, fewer
        else:
            rejected += 1
            walk.reject(f"{pin[0]} is needed")
    return best


def _needed_last(walk: _Walk, pins: Sequence[tuple[str, str]], rung: int) -> list[tuple[str, str]]:
    """The pins that may be taken back, the one whose removal is predicted to cost least first."""
    order, noise_of = list(reversed(pins)), walk.ranked.noise_of
    if noise_of is None:
        return order
    cost = {}
    for pin in order:
        fewer = tuple(other for other in pins if other != pin)
        tried = len(fewer) in walk.scores and walk.ranked.pins[: len(fewer)] == fewer
        loss = 0.0 if tried or not fewer else walk.predicted(rung, noise_of([n for n, _ in fewer]))
        if not tried and loss <= UNLIKELY:
            cost[pin] = loss
    return sorted(cost, key=lambda pin: cost[pin])
