"""Tuning: pin what hurts until the target is met, then take back what was not needed.

A value such as top-1 is noise over a few hundred pictures: two plans that differ by one pin are
told apart by chance. Error energy at the outputs is not, and what a plan loses follows it. So plans
are compared by their noise, what a plan loses is expected from the losses of all plans measured so
far, and the value itself confirms: a plan is taken that meets the target and is expected to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.tune.leave_one_out import Gains
from trtune.precision.tune.walk import (
    CLOSE,
    Ranked,
    Score,
    Step,
    Tuned,
    Walk,
    pins_for,
)

log = logging.getLogger(__name__)

PARTS = (0.5, 0.9, 1.0)
"""Of the whole gain that single moves promise: the fewest nodes with so much of it are measured."""
UNLIKELY = 1.25
"""What is predicted to lose this many times what is allowed is not tried to be taken back: gains on
held-out pictures are off by as much as themselves in small networks."""
REJECTED = 4
"""Where it can be predicted which pins are needed least, so many that are needed end the search."""
TRIED = 8
"""... and so do so many plans that were measured in all."""


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
    ranking: Sequence[tuple[str, str]] | Callable[[Score], Ranked],
    evaluate: Callable[[PrecisionPlan], Score],
    *,
    max_pins: int,
    precisions: Sequence[str] = ("fp32",),
    evaluations: int | None = None,
    patience: int | None = None,
    whole: Callable[[PrecisionPlan], Score] | None = None,
) -> Tuned:
    """Pin the worst nodes of `plan` until `evaluate` says that the target is met, each to the
    first of `precisions` that `plan.may` allows it (FP32 is always allowed).

    `ranking` names int8 nodes, worst first, each with the reason in words, or is asked for them
    once the score of `plan` itself is known and misses. The number of pins doubles from step to
    step, up to `max_pins`; a pin takes the node's whole fusion group. Once the target is met, pins
    are taken back one at a time, the least harmful node first, as long as it holds. If it is never
    met, the plan with the least noise is returned (without noises: with the best value).

    Where the ranking predicts noise, what is lost is taken to follow it: as many are pinned in a
    step as that says, corrected by every step that was measured, until the fewest that do are
    found, and only those are tried to be taken back that may not be needed.

    At most `evaluations` plans are evaluated (at least one), and `patience` rungs in a row that
    gain nothing end the search; None: no such limit. `evaluate` may end early on a plan that
    misses; `whole` never does, and is asked about the first plan and about the one that is
    returned.
    """
    walk = Walk(plan, evaluate, precisions, evaluations=evaluations, whole=whole)
    score = walk.measure("start", 0, "nothing pinned by the tuner")
    if score.met:
        return Tuned(plan, True, tuple(walk.steps))
    ranked = ranking(score) if callable(ranking) else Ranked(tuple(ranking))
    walk.ranked, most = ranked, min(max_pins, len(ranked.pins))
    low, rung = 0, 0
    while not walk.holds(score) and rung < most and walk.may_go_on(patience):
        low = rung
        rung = _next_rung(walk.loss(score), rung, most, ranked.noises)
        score = walk.measure("pin", rung, _about(rung, ranked.noises))
    if not walk.holds(score):
        lucky = walk.met_by_chance()
        if lucky is not None:
            return Tuned(walk.plan_of(lucky), True, tuple(walk.steps))
        loss = walk.loss(score)
        needed = None if loss is None else pins_for(loss, rung, ranked.noises)
        return Tuned(walk.best(), False, tuple(walk.steps), needed)
    if ranked.noises:
        rung = _fewest(walk, low, rung)
    return Tuned(_take_back(walk, rung), True, tuple(walk.steps))


def _about(rung: int, noises: Sequence[float]) -> str:
    if noises:
        return f"the {rung} that gain most" if rung > 1 else "what gains most"
    return f"the {rung} worst alone" if rung > 1 else "the worst alone"


def _next_rung(loss: float | None, rung: int, most: int, noises: Sequence[float]) -> int:
    """How many to pin next: as many as are predicted to do, or twice as many as before."""
    wanted = None if loss is None else pins_for(loss, rung, noises)
    if wanted is not None and wanted <= most:
        return max(wanted, rung + 1)
    return min(max(2 * rung, 1), most)


def _fewest(walk: Walk, low: int, high: int) -> int:
    """The fewest of the ranking that meet the target; `low` miss it and `high` do."""
    noises = walk.ranked.noises
    while high - low > 1 and not walk.is_over and len(walk.steps) < TRIED:
        losses = {k: walk.predicted(high, noises[k]) for k in range(low + 1, high)}
        middle = next((k for k, loss in losses.items() if loss <= 1 + CLOSE), high - 1)
        if losses[middle] > UNLIKELY:
            break
        if walk.holds(walk.measure("unpin", middle, f"{middle} of {high} may do")):
            high = middle
        else:
            low = middle
            walk.reject(f"{middle} are not enough")
    return high


def _take_back(walk: Walk, rung: int) -> PrecisionPlan:
    """Try each pin's removal, the one needed least first, as long as the target holds."""
    best, pins, rejected = walk.plans[rung], walk.ranked.pins[:rung], 0
    for pin in _needed_last(walk, pins, rung):
        fewer = tuple(other for other in pins if other != pin)
        told = walk.ranked.noise_of and (rejected == REJECTED or len(walk.steps) >= TRIED)
        if not fewer or walk.is_over or told:
            break  # no pin at all was tried first, and missed
        candidate, score = walk.of("unpin", fewer, f"without {pin[0]}")
        if walk.holds(score):
            best, pins = candidate, fewer
        else:
            rejected += 1
            walk.reject(f"{pin[0]} is needed")
    return best


def _needed_last(walk: Walk, pins: Sequence[tuple[str, str]], rung: int) -> list[tuple[str, str]]:
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


def move_to_float8(
    plan: PrecisionPlan,
    gains: Gains,
    evaluate: Callable[[PrecisionPlan], Score],
    *,
    start: Score,
    evaluations: int | None = None,
) -> Tuned:
    """`plan`, whose score is `start`, with the nodes in fp8 that are better there, by the task's
    own measure.

    Measured are the fewest nodes that promise `PARTS` of the whole gain, and all that can be moved,
    since the noise that gains are told by is not the measure; until the target is met beyond
    chance. The best of all is given back (`outranks`). At most `evaluations` plans are measured,
    `plan` among them.
    """
    steps = [Step("start", (), start, 0.0, "nothing pinned by the tuner")]
    best, score = plan, start
    for nodes, reason in _sets(gains):
        if (score.met and score.is_sure) or (evaluations and len(steps) >= evaluations):
            break
        changed = plan.pin(nodes, FP8, f"moved to fp8 by the tuner: {reason}", origin=TUNER)
        started = time.perf_counter()
        found = evaluate(changed)
        spent = time.perf_counter() - started
        steps.append(Step("move", (), found, spent, reason, nodes))
        log.info("%s: %.5g%s", reason, found.value, ", target met" if found.met else "")
        if outranks(found, score):
            best, score = changed, found
    return Tuned(best, score.met, tuple(steps))


def outranks(score: Score, than: Score) -> bool:
    """Whether a plan is the better one: it meets the target, or has the better value; where their
    values differ by no more than a standard error, the one with less noise at the outputs."""
    if score.met != than.met:
        return score.met
    error = max(score.error or 0.0, than.error or 0.0)
    if abs(score.value - than.value) > error:
        return score.value > than.value
    return score.rank > than.rank


def _sets(gains: Gains) -> list[tuple[tuple[str, ...], str]]:
    """The sets of nodes to measure, each once, with what they are in words."""
    order, every = gains.order, tuple(gains.moved)
    found: dict[tuple[str, ...], str] = {}
    for size in [gains.first(part) for part in PARTS] if order else []:
        chosen = set(order[:size])
        nodes = tuple(node for node in every if node in chosen)
        found.setdefault(nodes, f"the {size} that gain most in fp8")
    if every:
        found.setdefault(every, f"all {len(every)} in fp8")
    return list(found.items())


def onwards(first: Tuned, then: Tuned) -> Tuned:
    """Two walks as one: `then` began with the plan that `first` gave back, whose fp8 nodes stay.

    The start of the second was measured by the first, so it is no step of its own. Where neither
    meets the target, the better plan is kept.
    """
    moved = first.chosen.moved
    steps = tuple(
        replace(step, moved=tuple(n for n in moved if n not in set(step.pinned)))
        for step in then.steps[1:]
    )
    whole = Tuned(then.plan, then.met, (*first.steps, *steps), then.needed)
    if not then.met and outranks(first.chosen.score, whole.chosen.score):
        return replace(whole, plan=first.plan)
    return whole
