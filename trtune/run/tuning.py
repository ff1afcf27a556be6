"""Tuning as a stage: plans are pinned and measured until the target holds on every judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError
from trtune.configs.schema import Precision as PrecisionSection
from trtune.configs.schema import Target
from trtune.precision.compare.sample import by_nearest
from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.plan import QUANTIZED, PrecisionPlan, is_lowered
from trtune.precision.runtime.api import Backend, Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.tune.ladder import move_to_float8, onwards, tune
from trtune.precision.tune.leave_one_out import Gains, PathStep
from trtune.precision.tune.walk import Ranked, Score, Step, Tuned
from trtune.reports.accuracy import Evaluation
from trtune.reports.measures.fidelity import CLOSENESS
from trtune.reports.summary import number
from trtune.run.backends import BackendFailed, no_float8, watched
from trtune.run.stage import Form, Stage, as_json
from trtune.run.stages.engines import measured_with
from trtune.run.stages.measuring import Bench, TargetMetric, baseline, evaluation
from trtune.run.stages.pins import HeldOut
from trtune.run.work import RunWork, alone_of
from trtune.run.workspace import Workspace

ROUNDING = 1e-9
"""The rounding of a difference of two fractions must not miss a target."""
PATIENCE = 2
"""After so many steps in a row that gain nothing the tuner gives up."""
MARGIN = 0.5
"""Pins are ranked on held-out pictures down to this part of the noise that the target allows."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Who says whether a plan is good enough: the bench, the backends, and the threshold."""

    workspace: Workspace
    bench: Bench
    backends: tuple[Backend, ...]
    fp32: Evaluation
    threshold: float | None
    candidate: Callable[[PrecisionPlan], Candidate]
    relative: bool = False
    """Whether the target is a difference to FP32 on the same pictures."""

    def score(self, plan: PrecisionPlan, *, whole: bool = False) -> Score:
        """How `plan` does on the first backend, and whether the target holds on all of them.

        Unless it is to be `whole`, measuring ends where the rest of the pictures cannot meet the
        target. Raises BackendFailed if one cannot build or run it.
        """
        builds, met, notes = 0, True, list[str]()
        found: dict[str, Evaluation] = {}
        for backend in self.backends:
            with watched(backend):
                found[backend.name], built = self._evaluation(plan, backend, whole=whole)
            builds += built
            value = self.bench.metric.value_of(found[backend.name])
            met = self.is_enough(value)
            if not met:
                several = len(self.backends) > 1
                notes += [f"missed on {backend.name}: {number(value)}"] if several else []
                break
        first, last = next(iter(found.values())), found[backend.name]
        values = {name: self.bench.metric.value_of(one) for name, one in found.items()}
        value = values[self.backends[0].name]
        sign = 1 if self.bench.metric.higher else -1  # the search takes more for better
        losses = [self.loss(v) for v in values.values()]
        if not last.whole:
            notes += [f"missed for certain after {last.samples} of {self.fp32.samples} pictures"]
        return Score(
            value=float("-inf") if value is None else sign * value,
            met=met,
            sqnr_db=first.sqnr_db,
            cached=not builds,
            note="; ".join(notes),
            builds=builds,
            loss=losses[-1] if not met else max((x for x in losses if x is not None), default=None),
            values={name: v for name, v in values.items() if v is not None},
            noise=None if first.sqnr_db is None else noise_of(first.sqnr_db),
            loss_error=self._loss_error(last),
            error=error_of(self.bench.metric, first, relative=self.relative),
            samples=first.samples,
            whole=all(one.whole for one in found.values()),
        )

    def whole(self, plan: PrecisionPlan) -> Score:
        """The same on all pictures."""
        return self.score(plan, whole=True)

    def _evaluation(
        self, plan: PrecisionPlan, backend: Backend, *, whole: bool
    ) -> tuple[Evaluation, bool]:
        """What `plan` is worth on `backend`, and whether an engine was built for that."""
        candidate, ws = self.candidate(plan), self.workspace
        stage = evaluation(self.bench, candidate, backend, self.fp32)
        higher = self.bench.metric.higher
        if ws.holds(stage) or whole or self.threshold is None or not higher:
            built = not ws.holds(stage)
            return ws.get(stage), built
        until = evaluation(self.bench, candidate, backend, self.fp32, needed=self.threshold)
        built = not ws.holds(until)
        found = ws.get(until)
        if found.whole:  # the same as without an end: what reports read
            ws.get(replace(stage, make=lambda folder: found))
        return found, built

    def _loss_error(self, found: Evaluation) -> float | None:
        """The standard error of what is lost, as a part of what may be; None for closeness, whose
        noise is compared as it is."""
        error = error_of(self.bench.metric, found, relative=self.relative)
        best = 1.0 if self.bench.metric.is_fidelity else self.fp32.value
        if self.bench.metric.name == CLOSENESS or error is None:
            return None
        if best is None or self.threshold is None or best == self.threshold:
            return None
        return error / abs(best - self.threshold)

    def loss(self, value: float | None) -> float | None:
        """What is lost against FP32 as a part of what may be lost; None if that cannot be said.

        Of a signal-to-noise ratio it is noise energy by the noise that is allowed.
        """
        if value is None or self.threshold is None or not math.isfinite(value):
            return None
        if self.bench.metric.name == CLOSENESS:
            return float(10 ** ((self.threshold - value) / 10))
        sign = 1 if self.bench.metric.higher else -1
        best = 1.0 if self.bench.metric.is_fidelity else self.fp32.value
        if best is None or (best - self.threshold) * sign <= 0:
            return None
        return (best - value) / (best - self.threshold)

    def is_enough(self, value: float | None) -> bool:
        """Whether a value meets the target."""
        return is_enough(value, self.threshold, higher=self.bench.metric.higher)


def error_of(metric: TargetMetric, found: Evaluation, *, relative: bool) -> float | None:
    """The standard error of the target metric's value over pictures, or None.

    `relative`: of the difference to FP32 on the same pictures, where that is known.
    """
    if not metric.is_fidelity:
        paired = found.difference_error if relative else None
        return found.error if paired is None else paired
    if metric.name == CLOSENESS:
        return found.sqnr_error
    return found.agreement_error if metric.name == "agreement" else None


def noise_of(sqnr_db: float) -> float:
    """Noise by signal energy.

    >>> noise_of(20.0), noise_of(-math.inf)
    (0.01, inf)
    """
    return math.inf if sqnr_db == -math.inf else float(10 ** (-sqnr_db / 10))


def is_enough(value: float | None, threshold: float | None, *, higher: bool = True) -> bool:
    """Whether a value meets the target.

    >>> is_enough(0.84, 0.85), is_enough(0.84, None), is_enough(9.0, 9.5, higher=False)
    (False, True, True)
    """
    if value is None or threshold is None:
        return value is not None
    return (value - threshold) * (1 if higher else -1) >= -ROUNDING


def threshold_of(target: Target | None, fp32: Evaluation, *, higher: bool = True) -> float | None:
    """The value that the target asks for, or None without a target.

    Where less is better (not `higher`) it is the most that may be reached.
    """
    if target is None:
        return None
    if target.min is not None or target.max is not None:
        return float(target.min if target.min is not None else target.max or 0.0)
    if fp32.value is None or target.max_drop is None:
        raise TrtuneError("the FP32 model has no value of the target metric to measure against")
    return fp32.value - float(target.max_drop) * (1 if higher else -1)


def ranked(errors: Mapping[str, ErrorSums]) -> list[tuple[str, str]]:
    """Nodes, the one that hurts the output most first, with the reason in words."""
    order = sorted(errors, key=lambda node: (errors[node].sqnr_db, node))
    return [(n, f"alone it leaves {errors[n].sqnr_db:.1f} dB at the output") for n in order]


def pin_order(work: RunWork, plan: PrecisionPlan, score: Score) -> Ranked:
    """The order to pin in, once `plan`, which nothing is pinned in yet, has its `score`.

    By what each gains in the quantized network, given those before it; nodes in half precision
    follow, by what they do alone. In a plan without integers that is all.
    """
    errors = work.workspace.get(alone_of(work, plan))
    worst_first = ranked(errors)
    alone = dict(worst_first)
    if not plan.quantized_nodes:
        return Ranked(tuple(worst_first))
    held = held_out(work, plan)
    like = by_nearest(work.subject.view, plan.quantized_nodes, errors)
    noise = {n: 10 ** (-sums.sqnr_db / 10) for n, sums in like.items()}
    enough = MARGIN / score.loss if score.loss and score.loss > 1 else 0.0
    limit = work.setup.config.precision.max_pins
    path = work.workspace.get(held.path(noise, limit=limit, enough=enough))
    pins = [
        (step.node, "; ".join(filter(None, (alone.get(step.node), _gained(number, step)))))
        for number, step in enumerate(path.steps)
    ]
    named = {node for node, _ in pins}
    others = [pin for pin in worst_first if pin[0] not in named]
    noises = (*path.noises, *(path.noises[-1] for _ in others))
    return Ranked((*pins, *others), noises, held.noise_of)


def held_out(work: RunWork, plan: PrecisionPlan) -> HeldOut:
    """`plan` on the pictures that its pins are ranked on."""
    setup, section = work.setup, work.setup.config.calibration
    return HeldOut(
        work.candidate(plan),
        work.subject.view,
        work.model_for,
        setup.calibration,
        section.holdout,
        section.memory,
        work.setup.device,
        work.setup.cluster,
        setup.progress,
    )


def _gained(number: int, step: PathStep) -> str:
    others = ["", " and the one before"][number] if number < 2 else f" and the {number} before"
    how = "is there" if step.measured else "is expected there"
    return f"with it{others} in float {step.sqnr_db:.1f} dB {how}"


def tuned(work: RunWork) -> Tuned:
    """The tuned plan; the untuned one if it meets the target or there is none.

    A judge that fails is left out, and the walk goes on with the others, over what they measured.
    """
    while True:
        try:
            return work.workspace.get(tuning(work))
        except BackendFailed as failure:
            work.runtimes.fail(failure)


def tuning(work: RunWork) -> Stage[Tuned]:
    """The walk from the untuned plan to the tuned one."""
    judges = tuple(work.runtimes.judges)
    section, candidate = work.setup.config.precision, work.candidate(work.untuned)

    def make(folder: Path) -> Tuned:
        bench = work.choosing
        fp32 = work.workspace.get(baseline(bench))
        threshold = threshold_of(section.target, fp32, higher=bench.metric.higher)
        relative = section.target is not None and section.target.max_drop is not None
        judge = Scorer(work.workspace, bench, judges, fp32, threshold, work.candidate, relative)
        tunable = threshold is not None and is_lowered(work.untuned)
        first = _moved_to_float8(work, judge) if tunable and float8_rung(work) else None
        if first is not None and first.met:
            return first
        plan = work.untuned if first is None else first.plan
        most, spent = section.max_evaluations, 0 if first is None else len(first.steps) - 1
        found = tune(
            plan,
            partial(pin_order, work, plan) if tunable else [],
            judge.score,
            max_pins=section.max_pins,
            evaluations=None if most is None else max(most - spent, 1),
            patience=PATIENCE if plan.quantized_nodes else None,
            whole=judge.whole
            if first is None
            else with_known(judge.whole, plan, first.chosen.score),
            precisions=rungs(section),
        )
        return found if first is None else onwards(first, found)

    needs: dict[str, Any] = {}
    for judge in judges:
        known = {"model", "plan", "scales"}
        own = {k: v for k, v in measured_with(candidate, judge).items() if k not in known}
        needs[f"judge {judge.name}"] = own
    setup = work.setup
    needs |= {
        **work.choosing.needs(),
        "plan": candidate.plan,
        "scales": candidate.table,
        setup.calibration.where: setup.calibration.need,
        "calibration.holdout": setup.config.calibration.holdout,
        "precision.target": section.target,
        "precision.max_pins": section.max_pins,
        "precision.max_evaluations": section.max_evaluations,
        **(
            {"precision.ladder": section.ladder, "fp8": float8_rung(work)} if section.ladder else {}
        ),
    }
    return Stage("tune", needs, make, tuned_form(type(work.untuned)))


def rungs(section: PrecisionSection) -> tuple[str, ...]:
    """What a node is pinned to where it may, the first first: above int8 and fp8."""
    if section.ladder:
        return tuple(rung for rung in section.ladder[1:] if rung not in QUANTIZED)
    return ("fp32",) if section.default in HALVES else (section.fallback, "fp32")


def float8_rung(work: RunWork) -> bool:
    """Whether the tuner may move nodes to fp8: the ladder says so, and every backend takes it."""
    config = work.setup.config
    return FP8 in config.precision.ladder[1:] and not any(map(no_float8, config.backends))


def _moved_to_float8(work: RunWork, judge: Scorer) -> Tuned:
    """The untuned plan with the nodes in fp8 that are better there; itself if it meets the
    target."""
    plan, limit = work.untuned, work.setup.config.precision.max_evaluations
    start = judge.whole(plan)
    if start.met:
        return move_to_float8(plan, Gains(0.0, {}), judge.whole, start=start)
    gains = work.workspace.get(held_out(work, plan).gains())
    return move_to_float8(plan, gains, judge.whole, start=start, evaluations=limit)


def with_known(
    evaluate: Callable[[PrecisionPlan], Score], plan: PrecisionPlan, score: Score
) -> Callable[[PrecisionPlan], Score]:
    """`evaluate`, which is not asked about `plan`: that has `score`."""
    return lambda asked: score if asked == plan else evaluate(asked)


def tuned_form(kind: type[PrecisionPlan]) -> Form[Tuned]:
    """A tuned plan of `kind` with its steps; what is read was known, and built nothing."""

    def dump(found: Tuned) -> Any:
        return {
            "plan": found.plan.to_json(),
            "met": found.met,
            "needed": found.needed,
            "steps": [asdict(step) for step in found.steps],
        }

    def load(value: Any) -> Tuned:
        steps = tuple(map(_step, value["steps"]))
        return Tuned(kind.from_json(value["plan"]), value["met"], steps, value["needed"])

    return as_json(dump, load)


def _step(value: Any) -> Step:
    score = replace(Score(**value["score"]), cached=True, builds=0)
    nodes = {name: tuple(value[name]) for name in ("pinned", "moved")}
    return Step(**{**value, **nodes, "score": score})
