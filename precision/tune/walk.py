"""Plans that were measured on the way to a target, and what they say of those that were not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trtune.precision.plan.pins import first_that_may
from trtune.precision.plan.plan import TUNER, PrecisionPlan

log = logging.getLogger(__name__)

CLOSE = 0.01
"""What is predicted to miss by this part only is tried."""
NOTHING = 0.02
"""A step whose noise is less by no more than this part (0.09 dB) gained nothing."""


@dataclass(frozen=True, slots=True)
class Score:
    """The value of a plan (higher is better) and whether the target is met.

    `cached` says that it was known already, `builds` how many engines were built for it; `note`
    what else there is to say, such as which of several runtimes missed. `loss` is what is lost
    against FP32 as a part of what may be lost, at most 1 where the target is met; None if that
    cannot be said; `loss_error` is its standard error over pictures, where it has one that matters.
    `noise` is error energy by signal energy at the output that suffers most, on the same pictures.
    `error` is the standard error of `value` (paired with FP32 where the target asks for a
    difference), `samples` how many pictures were seen, and `whole` false if that was enough to see
    that the rest cannot meet the target. `values` has the value on every runtime it was measured
    on.
    """

    value: float
    met: bool
    sqnr_db: float | None = None
    cached: bool = False
    note: str = ""
    builds: int = 0
    loss: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    noise: float | None = None
    loss_error: float | None = None
    error: float | None = None
    samples: int = 0
    whole: bool = True

    @property
    def is_sure(self) -> bool:
        """Whether what is lost is less than what may be by more than its standard error."""
        if self.loss is None or self.loss_error is None:
            return self.met
        return self.loss + self.loss_error <= 1

    @property
    def rank(self) -> float:
        """More is better: less noise, or where that is not known a higher value."""
        return self.value if self.noise is None else -self.noise


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluated plan. `action` is start, move (to fp8), pin, unpin (taken back) or
    unpin-rejected; `moved` are the nodes in fp8 by then, which cost no speed."""

    action: str
    pinned: tuple[str, ...]
    score: Score
    seconds: float
    reason: str
    moved: tuple[str, ...] = ()


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
        own = {name for name in plan.compute_nodes if plan.nodes[name].origin == TUNER}
        moved = own & {*plan.fp8_nodes}
        ends = (own - moved, moved)
        found = (step for step in self.steps if ({*step.pinned}, {*step.moved}) == ends)
        return next(found, self.steps[0])

    @property
    def front(self) -> tuple[Step, ...]:
        """Pins against value: the steps that no other reaches with as few pins, fewest first.

        What was not measured on all pictures is no point of it.
        """
        best: list[Step] = []
        found = [step for step in self.steps if step.score.whole]
        for step in sorted(found, key=lambda s: (len(s.pinned), -s.score.rank)):
            if not best or step.score.rank > best[-1].score.rank:
                best.append(step)
        return tuple(best)


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


def expected_loss(noise: float, known: Iterable[tuple[float, float]]) -> float | None:
    """What `noise` is expected to lose, by the (noise, loss) of plans that were measured.

    Least squares through the origin: what is lost grows with error energy. The nearer a plan's
    noise, the more it counts (by the square of the ratio). None if none says anything.

    >>> expected_loss(2.0, [(4.0, 2.4), (2.0, 0.8)])
    1.0
    """
    weights = moments = 0.0
    for other, loss in known:
        near = (min(noise, other) / max(noise, other)) ** 2 if noise > 0 and other > 0 else 0.0
        weights += near * other * other
        moments += near * other * loss
    return noise * moments / weights if weights > 0 else None


class Walk:
    """The plans measured so far, with the first of a ranking pinned or with any pins."""

    def __init__(
        self,
        plan: PrecisionPlan,
        evaluate: Callable[[PrecisionPlan], Score],
        precisions: Sequence[str],
        *,
        evaluations: int | None = None,
        whole: Callable[[PrecisionPlan], Score] | None = None,
    ) -> None:
        self.ranked, self.steps, self.scores = Ranked(()), list[Step](), dict[int, Score]()
        self.plans = {0: plan}
        self._plan, self._precisions = plan, precisions
        self._evaluate, self._whole = evaluate, whole or evaluate
        self._limit = math.inf if evaluations is None else evaluations
        self._idle = 0

    @property
    def is_over(self) -> bool:
        """Whether as many plans were measured as may be."""
        return len(self.steps) >= self._limit

    def may_go_on(self, patience: int | None) -> bool:
        """Whether another plan may be measured, and not `patience` in a row gained nothing."""
        return not self.is_over and (patience is None or self._idle < patience)

    def measure(self, action: str, rung: int, about: str) -> Score:
        """The score with the first `rung` of the ranking pinned."""
        before = max((step.score.rank for step in self.steps), default=-math.inf)
        self.plans[rung], score = self.of(action, self.ranked.pins[:rung], about)
        self.scores[rung] = score
        least = before if score.noise is None else before * (1 - NOTHING)
        gained = score.rank > least or score.rank == -math.inf  # what has no end says nothing
        self._idle = 0 if gained else self._idle + 1
        return score

    def of(
        self, action: str, pins: Sequence[tuple[str, str]], about: str
    ) -> tuple[PrecisionPlan, Score]:
        """The plan with `pins`, and its score."""
        candidate = self._pinned(pins)
        started = time.perf_counter()
        score = (self._evaluate if self.steps else self._whole)(candidate)
        names = tuple(node for node, _ in pins)
        self.steps.append(Step(action, names, score, time.perf_counter() - started, about))
        log.info("%s %s: %.5g%s", action, names, score.value, ", target met" if score.met else "")
        return candidate, score

    def _pinned(self, pins: Sequence[tuple[str, str]]) -> PrecisionPlan:
        candidate = self._plan
        for node, why in pins:
            precision = first_that_may(self._plan, node, self._precisions)
            reason = f"pinned by the tuner: {why}"
            candidate = candidate.pin([node], precision, reason, origin=TUNER)
        return candidate

    def plan_of(self, step: Step) -> PrecisionPlan:
        """The plan that a step measured."""
        reasons = dict(self.ranked.pins)
        return self._pinned([(node, reasons[node]) for node in step.pinned])

    def holds(self, score: Score) -> bool:
        """Whether a plan is taken to meet the target: it does, and not by chance.

        That is beyond its standard error, or by what its noise is expected to lose.
        """
        loss = self.loss(score)
        return score.met and (score.is_sure or loss is None or loss <= 1 + CLOSE)

    def loss(self, score: Score) -> float | None:
        """What a plan loses, as far as all that were measured can tell."""
        plans = {frozenset(step.pinned): step.score for step in self.steps}  # each counts once
        known = [
            (other.noise, other.loss)
            for other in plans.values()
            if other.noise is not None and other.loss is not None and math.isfinite(other.noise)
        ]
        found = None if score.noise is None else expected_loss(score.noise, known)
        return score.loss if found is None else found

    def predicted(self, rung: int, noise: float) -> float:
        """The loss with a noise, by the step of at most `rung` pins that says most; 0 if none."""
        noises = self.ranked.noises
        for known in sorted((k for k in self.scores if k <= rung), reverse=True):
            loss = self.loss(self.scores[known])
            if loss is not None and loss > 0 and noises[known] > 0:
                return loss * noise / noises[known]
        return 0.0

    def reject(self, about: str) -> None:
        """The last step took back what is needed."""
        last = self.steps[-1]
        chance = "; it meets the target by chance" if last.score.met else ""
        self.steps[-1] = replace(last, action="unpin-rejected", reason=about + chance)

    def met_by_chance(self) -> Step | None:
        """The step that meets the target with the least noise, though it was not expected to."""
        met = [step for step in self.steps if step.score.met]
        return max(met, key=lambda step: step.score.rank, default=None)

    def best(self) -> PrecisionPlan:
        """The plan with the least noise, the first of equals; measured on all pictures, if it was
        not yet."""
        step = max(self.steps, key=lambda step: step.score.rank)
        plan = self.plan_of(step)
        if not step.score.whole:
            started = time.perf_counter()
            score = self._whole(plan)
            seconds = step.seconds + time.perf_counter() - started
            place = self.steps.index(step)
            self.steps[place] = replace(step, score=score, seconds=seconds)
        return plan
