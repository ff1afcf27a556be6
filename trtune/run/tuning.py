"""Tuning as a stage: plans are pinned and measured until the target holds on every judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError
from trtune.configs.schema import Target
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import Backend, Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.tune.ladder import Score, Step, Tuned, tune
from trtune.reports.accuracy import Evaluation
from trtune.reports.summary import number
from trtune.run.stage import Form, Stage, as_json
from trtune.run.stages.engines import measured_with
from trtune.run.stages.layers import alone
from trtune.run.stages.measuring import Bench, baseline, evaluation
from trtune.run.work import BackendFailed, RunWork, watched
from trtune.run.workspace import Workspace

ROUNDING = 1e-9
"""The rounding of a difference of two fractions must not miss a target."""


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
        first: Evaluation | None = None
        for backend in self.backends:
            with watched(backend):
                stage = evaluation(self.bench, self.candidate(plan), backend, self.fp32)
                builds += not self.workspace.holds(stage)
                found = self.workspace.get(stage)
            first = first or found
            value = self.bench.metric.value_of(found)
            met = self.is_enough(value)
            if not met:
                several = len(self.backends) > 1
                note = f"missed on {backend.name}: {number(value)}" if several else ""
                break
        assert first is not None
        value = self.bench.metric.value_of(first)
        sign = 1 if self.bench.metric.higher else -1  # the search takes more for better
        reached = float("-inf") if value is None else sign * value
        return Score(reached, met, first.sqnr_db, not builds, note, builds)

    def is_enough(self, value: float | None) -> bool:
        """Whether a value meets the target."""
        if value is None:
            return False
        if self.threshold is None:
            return True
        sign = 1 if self.bench.metric.higher else -1
        return sign * (value - self.threshold) >= -ROUNDING


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


def ranked(errors: dict[str, ErrorSums]) -> list[tuple[str, str]]:
    """Nodes, the one that hurts the output most first, with the reason in words."""
    order = sorted(errors, key=lambda node: (errors[node].sqnr_db, node))
    return [(n, f"alone it leaves {errors[n].sqnr_db:.1f} dB at the output") for n in order]


def tuned(work: RunWork) -> Tuned:
    """The tuned plan; the untuned one if it meets the target or there is none.

    A judge that fails is left out, and the walk goes on with the others, over what they measured.
    """
    while True:
        try:
            return work.workspace.get(tuning(work))
        except BackendFailed as failure:
            work.fail(failure)


def tuning(work: RunWork) -> Stage[Tuned]:
    """The walk from the untuned plan to the tuned one."""
    judges = tuple(work.judges)
    section, candidate = work.setup.config.precision, work.candidate(work.untuned)

    def make(folder: Path) -> Tuned:
        fp32 = work.workspace.get(baseline(work.bench))
        threshold = threshold_of(section.target, fp32, higher=work.bench.metric.higher)
        judge = Scorer(work.workspace, work.bench, judges, fp32, threshold, work.candidate)
        tunable = threshold is not None and work.is_lowered
        return tune(
            work.untuned,
            ranked(work.workspace.get(alone_of(work))) if tunable else [],
            judge.score,
            max_pins=section.max_pins,
            precisions=("fp32",) if section.default in HALVES else (section.fallback, "fp32"),
        )

    needs: dict[str, Any] = {}
    for judge in judges:
        known = {"model", "plan", "scales"}
        own = {k: v for k, v in measured_with(candidate, judge).items() if k not in known}
        needs[f"judge {judge.name}"] = own
    setup = work.setup
    needs |= {
        **work.bench.needs(),
        "plan": candidate.plan,
        "scales": candidate.table,
        setup.calibration.where: setup.calibration.need,
        "calibration.holdout": setup.config.calibration.holdout,
        "precision.target": section.target,
        "precision.max_pins": section.max_pins,
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
        progress=setup.progress,
    )


def tuned_form(kind: type[PrecisionPlan]) -> Form[Tuned]:
    """A tuned plan of `kind` with its steps; what is read was known, and built nothing."""

    def dump(found: Tuned) -> Any:
        return {
            "plan": found.plan.to_json(),
            "met": found.met,
            "steps": [asdict(step) for step in found.steps],
        }

    def load(value: Any) -> Tuned:
        return Tuned(kind.from_json(value["plan"]), value["met"], tuple(map(_step, value["steps"])))

    return as_json(dump, load)


def _step(value: Any) -> Step:
    score = replace(Score(**value["score"]), cached=True, builds=0)
    return Step(**{**value, "pinned": tuple(value["pinned"]), "score": score})
