"""The engines of a backend at their places in a run, once it is known which one is to be deployed.

What stands in the backend's folder itself is what to deploy. Where INT8 does not pay on this
machine that is the FP32 model, and the quantized one stands in `quantized/` below.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate
from trtune.run.speed.choice import (
    FLOAT_MODEL,
    INTEGER_MODEL,
    PARTLY_MODEL,
    Deployment,
    plainly,
)
from trtune.run.speed.latency import Speed, speed
from trtune.run.speed.placing import faster_in_float, placing
from trtune.run.stage import Stage
from trtune.run.stages.engines import (
    FP32,
    TUNED,
    UNTUNED,
    engine_folder,
    engine_of,
    is_emulation,
    label,
)
from trtune.run.subject import fp32_plan
from trtune.run.work import RunWork


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of one backend by variant, where they stand, and how fast they are.

    `exact` is the FP32 model where that is the one to deploy, `choice` how that was found.
    """

    candidates: Mapping[str, Candidate]
    folders: Mapping[str, Path]
    infos: Mapping[str, BuildInfo]
    speed: Speed = field(default_factory=Speed)
    choice: Deployment = field(default_factory=Deployment)
    exact: BuildInfo | None = None

    @property
    def to_deploy(self) -> BuildInfo:
        """What stands in the backend's own folder."""
        return self.exact or self.infos[TUNED]


def engines_of(work: RunWork, backend: Backend, tuned: PrecisionPlan) -> Engines:
    """Build the engines of the untuned and the `tuned` plan, time them, and put them in place."""
    wanted = _wanted(work, backend, tuned)
    found = _chosen(work, backend, wanted) or (Speed(), Deployment())
    return _in_place(work, backend, wanted, *found)


def engine_to_deploy(work: RunWork, backend: Backend, plan: PrecisionPlan) -> BuildInfo:
    """The engine of `plan`, or of what an earlier measurement on this machine chose instead."""
    wanted = _wanted(work, backend, plan)
    found = _chosen(work, backend, wanted, kept=True)
    if found is not None:
        return _in_place(work, backend, wanted, *found).to_deploy
    return work.workspace.get(engine_of(wanted[TUNED], backend, "", work.setup.progress))


def _chosen(
    work: RunWork, backend: Backend, wanted: Mapping[str, Candidate], *, kept: bool = False
) -> tuple[Speed, Deployment] | None:
    """How fast the models are and which is to be deployed; None where that cannot be timed, or with
    `kept` was not yet."""
    ws, timed = work.workspace, _timing(work, backend, wanted)
    if timed is None or (kept and not ws.holds(timed)):
        return None
    found = ws.get(timed)
    other = _placing(work, backend, wanted, found)
    if other is None:
        return found, _as_planned(backend, wanted, found)
    return None if kept and not ws.holds(other) else (found, ws.get(other))


def _wanted(work: RunWork, backend: Backend, tuned: PrecisionPlan) -> dict[str, Candidate]:
    """What is built: on other runtimes than onnxruntime FP32 too."""
    plans = {UNTUNED: work.untuned, TUNED: tuned}
    if not backend.obstacle() and not isinstance(backend, OnnxruntimeBackend):
        plans = {FP32: fp32_plan(work.setup.subject), **plans}
    return {name: work.candidate(plan) for name, plan in plans.items()}


def _timing(
    work: RunWork, backend: Backend, candidates: Mapping[str, Candidate]
) -> Stage[Speed] | None:
    """What measures their latency; None if that is not wanted, or cannot be."""
    setup = work.setup
    section = setup.config.report.latency
    if section is None or backend.obstacle() or is_emulation(backend):
        return None
    return speed(
        setup.subject,
        backend,
        candidates,
        _as_quantized(work, backend, candidates),
        setup.evaluation,
        section,
        setup.progress,
    )


def _placing(
    work: RunWork, backend: Backend, candidates: Mapping[str, Candidate], found: Speed
) -> Stage[Deployment] | None:
    """What looks for a faster model than the tuned one; None if that is plainly faster than FP32,
    or too few turns were measured to say.

    Only on a CPU are integers ever in doubt, and the user's own model an engine.
    """
    setup, plan = work.setup, candidates[TUNED].plan
    section, over = setup.config.report.latency, found.speedups.get(TUNED)
    if not isinstance(backend, OnnxruntimeBackend) or not plan.int8_nodes:
        return None
    if section is None or over is None or over.low is None or over.low > 1:
        return None
    return placing(
        setup.subject,
        backend,
        candidates,
        work.subject.view,
        work.candidate,
        _as_quantized(work, backend, candidates),
        setup.evaluation,
        section,
        setup.progress,
    )


def _as_planned(backend: Backend, candidates: Mapping[str, Candidate], found: Speed) -> Deployment:
    """The tuned model is the one to deploy; on a CPU with what the turns say of it."""
    timed = isinstance(backend, OnnxruntimeBackend) and candidates[TUNED].plan.int8_nodes
    return plainly(found) if timed else Deployment()


def places(candidates: Mapping[str, Candidate], choice: Deployment) -> dict[str, str]:
    """Below which folder of the backend's each variant stands; empty for the folder itself."""
    changed = candidates[TUNED].plan.decisions != candidates[UNTUNED].plan.decisions
    tuned = INTEGER_MODEL if choice.model == FLOAT_MODEL else ""
    return {FP32: FP32, UNTUNED: UNTUNED if changed else tuned, TUNED: tuned}


def _as_quantized(
    work: RunWork, backend: Backend, candidates: Mapping[str, Candidate]
) -> Callable[[], dict[str, BuildInfo]]:
    """What builds the engines where they stand while nothing is decided."""
    return partial(_built, work, backend, candidates, places(candidates, Deployment()))


def _built(
    work: RunWork,
    backend: Backend,
    candidates: Mapping[str, Candidate],
    below: Mapping[str, str],
) -> dict[str, BuildInfo]:
    """The engines of `candidates` at their places; what stands at places of none is taken away."""
    for place in {UNTUNED, INTEGER_MODEL} - {below[name] for name in candidates}:
        work.workspace.drop(f"engine-{label(backend)}-{place}")  # of an earlier run, on other data
        shutil.rmtree(engine_folder(work.folder, backend, place), ignore_errors=True)
    return {
        name: work.workspace.get(engine_of(candidate, backend, below[name], work.setup.progress))
        for name, candidate in candidates.items()
    }


def _in_place(
    work: RunWork,
    backend: Backend,
    candidates: Mapping[str, Candidate],
    found: Speed,
    choice: Deployment,
) -> Engines:
    if choice.model == PARTLY_MODEL:
        partly = faster_in_float(candidates[TUNED].plan, choice.floats)
        candidates = {**candidates, TUNED: work.candidate(partly)}
    below = places(candidates, choice)
    infos = _built(work, backend, candidates, below)
    exact = None
    if choice.model == FLOAT_MODEL:
        candidate = work.candidate(fp32_plan(work.setup.subject))
        exact = work.workspace.get(engine_of(candidate, backend, "", work.setup.progress))
    folders = {name: engine_folder(work.folder, backend, below[name]) for name in candidates}
    times = replace(found, models={**found.models, **choice.latency})
    return Engines(candidates, folders, infos, times, choice, exact)
