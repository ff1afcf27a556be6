"""Tuning as a stage: plans are pinned and measured until the target holds on every judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError
from trtune.configs.schema import Target
from trtune.precision.compare.sample import by_nearest
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.plan import PrecisionPlan, is_lowered
from trtune.precision.runtime.api import Backend, Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.tune.ladder import Ranked, Score, Step, Tuned, tune
from trtune.precision.tune.leave_one_out import PathStep
from trtune.reports.accuracy import Evaluation
from trtune.reports.measures.fidelity import CLOSENESS
from trtune.reports.summary import number
from trtune.run.backends import BackendFailed, watched
from trtune.run.stage import Form, Stage, as_json
from trtune.run.stages.engines import measured_with
from trtune.run.stages.layers import alone
from trtune.run.stages.measuring import Bench, baseline, evaluation
from trtune.run.stages.pins import HeldOut
from trtune.run.work import RunWork
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

    def score(self, plan: PrecisionPlan) -> Score:
        """How `plan` does on the first backend, and whether the target holds on all of them.

        Raises BackendFailed if one cannot build or run it.
        """
        builds, met, note = 0, True, ""
        losses: list[float | None] = []
        values: dict[str, float] = {}
        first: Evaluation | None = None
        for backend in self.backends:
            with watched(backend):
                stage = evaluation(self.bench, self.candidate(plan), backend, self.fp32)
                builds += not self.workspace.holds(stage)
                found = self.workspace.get(stage)
            first = first or found
            value = self.bench.metric.value_of(found)
            met = self.is_enough(value)
            losses.append(self.loss(value))
            values |= {} if value is None else {backend.name: value}
            if not met:
                several = len(self.backends) > 1
                note = f"missed on {backend.name}: {number(value)}" if several else ""
                break
        assert first is not None
        value = self.bench.metric.value_of(first)
        sign = 1 if self.bench.metric.higher else -1  # the search takes more for better
        reached = float("-inf") if value is None else sign * value
        lost = losses[-1] if not met else max((x for x in losses if x is not None), default=None)
        return Score(reached, met, first.sqnr_db, not builds, note, builds, lost, values)

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


def pin_order(work: RunWork, score: Score) -> Ranked:
    """The order to pin in, once the plan without pins has its `score`.

    By what each gains in the quantized network, given those before it; nodes in half precision
    follow, by what they do alone. In a plan without integers that is all.
    """
    errors = work.workspace.get(alone_of(work))
    worst_first = ranked(errors)
    alone = dict(worst_first)
    if not work.untuned.quantized_nodes:
        return Ranked(tuple(worst_first))
    setup, section = work.setup, work.setup.config.calibration
    held = HeldOut(
        work.candidate(work.untuned),
        work.subject.view,
        work.model_for,
        setup.calibration,
        section.holdout,
        section.memory,
        work.device,
        setup.progress,
    )
    like = by_nearest(work.subject.view, work.untuned.quantized_nodes, errors)
    noise = {n: 10 ** (-sums.sqnr_db / 10) for n, sums in like.items()}
    enough = MARGIN / score.loss if score.loss and score.loss > 1 else 0.0
    limit = setup.config.precision.max_pins
    path = work.workspace.get(held.path(noise, limit=limit, enough=enough))
    pins = [
        (step.node, "; ".join(filter(None, (alone.get(step.node), _gained(number, step)))))
        for number, step in enumerate(path.steps)
    ]
    named = {node for node, _ in pins}
    others = [pin for pin in worst_first if pin[0] not in named]
    noises = (*path.noises, *(path.noises[-1] for _ in others))
    return Ranked((*pins, *others), noises, held.noise_of)


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
        judge = Scorer(work.workspace, bench, judges, fp32, threshold, work.candidate)
        tunable = threshold is not None and is_lowered(work.untuned)
        return tune(
            work.untuned,
            partial(pin_order, work) if tunable else [],
            judge.score,
            max_pins=section.max_pins,
            evaluations=section.max_evaluations,
            patience=PATIENCE if work.untuned.quantized_nodes else None,
            precisions=("fp32",) if section.default in HALVES else (section.fallback, "fp32"),
        )

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
    }
    return Stage("tune", needs, make, tuned_form(type(work.untuned)))


def alone_of(work: RunWork) -> Stage[dict[str, ErrorSums]]:
    """What each node of the untuned plan alone does to the output."""
    setup, section = work.setup, work.setup.config.calibration
    return alone(
        work.candidate(work.untuned),
        work.subject.view,
        setup.calibration,
        holdout=section.holdout,
        memory=section.memory,
        seconds=setup.config.compare.seconds,
        device=work.device,
        progress=setup.progress,
    )


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
    return Step(**{**value, "pinned": tuple(value["pinned"]), "score": score})
