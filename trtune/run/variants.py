"""The variants of a run: each model on each backend, what it is worth, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.quantized.describe import nothing_in_int8
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate
from trtune.reports.accuracy import Evaluation
from trtune.reports.entries.pins import pin_costs
from trtune.reports.entries.variants import (
    accounted,
    fp32_bytes,
    interval_of,
    own_calibration,
    top1_of,
)
from trtune.reports.record import ORIGINAL, Closeness, Shipped, Variant
from trtune.run.backends import BackendFailed, watched
from trtune.run.speed.latency import Speed
from trtune.run.speed.shipping import Engines, engines_of
from trtune.run.stages.elsewhere import build_engines, by_backend
from trtune.run.stages.engines import (
    FP32,
    TUNED,
    UNTUNED,
    engine_folder,
    engine_of,
    is_emulation,
)
from trtune.run.stages.layers import engine_gated
from trtune.run.stages.measuring import as_it_stands, baseline, evaluation
from trtune.run.stages.outputs import Final, kept_outputs, polygraphy_lines
from trtune.run.subject import fp32_plan
from trtune.run.tuning import error_of, is_enough, threshold_of
from trtune.run.work import RunWork, targets_in

EMULATION_NOTE = "emulation of TensorRT's arithmetic: its CPU time says nothing about speed"


@dataclass(frozen=True, slots=True)
class OnBackend:
    """What came of one backend: its engines by variant, and what they are worth."""

    backend: Backend
    engines: Engines
    values: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether it ran here, or was only built."""
        return bool(self.values)

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """What was built, by variant."""
        return self.engines.candidates

    @property
    def infos(self) -> Mapping[str, BuildInfo]:
        """What building it gave, by variant."""
        return self.engines.infos

    @property
    def speed(self) -> Speed:
        """How fast it is."""
        return self.engines.speed


def gate_engines(work: RunWork) -> None:
    """Compare the FP32 engine of every runtime that runs here with onnxruntime.

    One that is another network, or cannot be built, fails here and is left out.
    """
    setup = work.setup
    candidate = work.candidate(fp32_plan(setup.subject))
    for backend in work.runtimes.engines:
        try:
            with watched(backend):
                work.workspace.get(engine_of(candidate, backend, FP32, setup.progress))
                folder = engine_folder(work.folder, backend, FP32)
                section = setup.config.compare
                stage = engine_gated(candidate, backend, folder, setup.evaluation, section)
                work.workspace.get(stage)
        except BackendFailed as failure:
            work.runtimes.fail(failure)


def finished(work: RunWork, tuned: PrecisionPlan) -> list[OnBackend]:
    """Every backend with its engines built, measured and timed; those that fail are left out."""
    found = []
    for backend in work.runtimes.alive:
        try:
            with watched(backend):
                found.append(_finish(work, backend, tuned))
        except BackendFailed as failure:
            work.runtimes.fail(failure)
    return found


def _finish(work: RunWork, backend: Backend, tuned: PrecisionPlan) -> OnBackend:
    engines = engines_of(work, backend, tuned)
    if backend.obstacle():
        return OnBackend(backend, engines)
    ws = work.workspace
    fp32 = ws.get(baseline(work.bench))
    values = {
        name: ws.get(evaluation(work.bench, candidate, backend, fp32, built=engines.folders[name]))
        for name, candidate in engines.candidates.items()
    }
    return OnBackend(backend, engines, values)


def keep_outputs(work: RunWork, done: Sequence[OnBackend]) -> list[str]:
    """Keep what the final models give for a few pictures; lines for Polygraphy that use them."""
    finals = {
        one.backend.name: Final(one.backend, one.candidates[TUNED], one.infos[TUNED])
        for one in done
        if one.runs and one.infos[TUNED].path is not None
    }
    setup = work.setup
    work.workspace.get(kept_outputs(setup.subject.model, finals, setup.evaluation))
    return polygraphy_lines(work.folder, finals)


def engines_elsewhere(work: RunWork, tuned: PrecisionPlan) -> dict[str, dict[str, str]]:
    """The engines for other GPUs: by the backend's label and the GPU, the file in the run.

    A backend that fails at it has failed, and the others go on.
    """
    setup, found = work.setup, dict[str, dict[str, str]]()
    for label_, targets in by_backend(targets_in(setup.config)).items():
        try:
            infos = build_engines(
                work.workspace, work.candidate(tuned), targets, setup.cluster, setup.progress
            )
        except BackendFailed as failure:
            work.runtimes.fail(failure)
            continue
        found[label_] = {
            name: info.path.relative_to(work.folder).as_posix()
            for name, info in infos.items()
            if info.path is not None
        }
    return found


def make_variants(
    work: RunWork,
    done: list[OnBackend],
    engines: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[Variant]:
    """fp32, untuned and tuned for every backend that runs here; of the others why they do not.

    The FP32 model of onnxruntime is the user's own; that of another backend is built like the rest.
    `engines` are those of `engines_elsewhere`. In the order of the config.
    """
    found = {one.backend.name: _of_backend(work, one) for one in done}
    for name, error in work.runtimes.failed.items():
        found[name] = [_without(work, name, "failed", str(error))]
    for absent in work.setup.backends.absent:
        reason = f"{absent.reason}; {absent.remedy}" if absent.remedy else absent.reason
        found[absent.name] = [_without(work, absent.name, "absent", reason)]
    listed = [section.label for section in work.setup.config.backends]
    order = sorted(found, key=lambda name: listed.index(name) if name in listed else len(listed))
    return [
        variant.model_copy(update={"engines": dict(engines[name])})
        if name in engines and variant is found[name][-1]
        else variant
        for name in order
        for variant in found[name]
    ]


def _without(work: RunWork, backend: str, status: Any, reason: str) -> Variant:
    name = work.setup.config.precision.default
    return Variant(name=name, backend=backend, value=None, status=status, reason=reason)


def _of_backend(work: RunWork, one: OnBackend) -> list[Variant]:
    subject, fp32 = work.setup.subject, work.workspace.get(baseline(work.bench))
    found = []
    if one.runs and FP32 not in one.candidates:
        found.append(_users_model(work, one, fp32))
    if subject.imported is not None and is_emulation(one.backend):
        value = work.workspace.get(as_it_stands(work.bench, subject.file, fp32))
        found.append(_as_it_stands(work, one, fp32, value))
    return found + [_variant(work, one, fp32, name) for name in one.candidates]


def _users_model(work: RunWork, one: OnBackend, fp32: Evaluation) -> Variant:
    value = None if work.bench.metric.is_fidelity else fp32.value
    path, exact = Path(work.setup.config.model.path), one.engines.exact
    return Variant(
        name=FP32,
        backend=one.backend.name,
        value=value,
        drop=None if value is None else 0.0,
        top1=top1_of(fp32),
        latency_ms=one.speed.models.get(FP32),
        latency_note=EMULATION_NOTE if is_emulation(one.backend) else None,
        size_bytes=fp32_bytes(work.setup.subject.model, path),
        nodes={"int8": 0, "fp16": 0, "fp32": len(work.untuned.compute_nodes)},
        path=path.name if exact is None else place_in(work, exact),
    )


def _as_it_stands(work: RunWork, one: OnBackend, fp32: Evaluation, value: Evaluation) -> Variant:
    path = Path(work.setup.config.model.path)
    return Variant(
        name=ORIGINAL,
        backend=one.backend.name,
        **_worth(work, fp32, value, quantized=True),
        latency_note=EMULATION_NOTE,
        size_bytes=path.stat().st_size,
        nodes=work.setup.planned.counts(),
        path=path.name,
    )


def _variant(work: RunWork, one: OnBackend, fp32: Evaluation, name: str) -> Variant:
    plan, info = one.candidates[name].plan, one.infos[name]
    emulated = is_emulation(one.backend)
    return Variant(
        name=work.setup.config.precision.default if name == UNTUNED else name,
        backend=one.backend.name,
        **_worth(
            work,
            fp32,
            one.values.get(name),
            quantized=_is_quantized(work, plan),
            judged=name != FP32,
        ),
        latency_ms=one.speed.models.get(name),
        latency_note=EMULATION_NOTE if emulated else None,
        size_bytes=info.size_bytes,
        nodes=plan.counts(),
        account={} if emulated else accounted(plan, info),
        pinned=[node for node in plan.pinned if plan.precision(node) != FP8],
        moved=[node for node in plan.pinned if plan.precision(node) == FP8],
        pins=pin_costs(work.subject.view, plan),
        not_honoured=list(info.not_honoured),
        path=place_in(work, info),
        reason=info.reason or None,
        command=info.details.get("command"),
        lints=info.details.get("lints", []),
        explained=info.details.get("explained", []),
        notes=[*info.details.get("notes", ()), *own_calibration(info.details.get("calibration"))],
        shipped=_shipped(work, one.engines) if name == TUNED else None,
    )


def place_in(work: RunWork, info: BuildInfo) -> str | None:
    """The engine's file, seen from the run's folder."""
    return info.path.relative_to(work.folder).as_posix() if info.path else None


def _shipped(work: RunWork, engines: Engines) -> Shipped | None:
    """Which model is the one to deploy, if that was decided by time."""
    choice, path = engines.choice, place_in(work, engines.to_deploy)
    if not choice.speedups or path is None:
        return None
    return Shipped(
        model=choice.model, path=path, floats=list(choice.floats), speedups=dict(choice.speedups)
    )


def _worth(
    work: RunWork,
    fp32: Evaluation,
    value: Evaluation | None,
    *,
    quantized: bool,
    judged: bool = True,
) -> dict[str, Any]:
    """What a variant is worth, what it lost against FP32, and whether it meets the target.

    One that should be quantized and is not (`quantized`) never does; FP32 itself is not `judged`.
    """
    if value is None:
        return {"value": None}
    metric = work.bench.metric
    reached = metric.value_of(value)
    sign = 1 if metric.higher else -1
    lost = metric.is_fidelity or reached is None or fp32.value is None
    target = work.setup.config.precision.target
    threshold = threshold_of(target, fp32, higher=metric.higher)
    met = is_enough(reached, threshold, higher=metric.higher) and quantized
    relative = target is not None and target.max_drop is not None
    error = error_of(metric, value, relative=relative)
    interval = interval_of(reached, error)
    return {
        "value": reached,
        "drop": None if lost else sign * ((fp32.value or 0.0) - (reached or 0.0)),
        "error": error,
        "interval": interval,
        "verdict": None if threshold is None or not judged else "met" if met else "missed",
        "within_noise": judged
        and threshold is not None
        and interval is not None
        and interval[0] < threshold < interval[1],
        "samples": value.samples,
        "outputs": {name: Closeness(**asdict(found)) for name, found in value.outputs.items()},
        "top1": top1_of(value),
        "sqnr_db": value.sqnr_db,
        "sqnr_error": value.sqnr_error,
        "agreement": value.agreement,
        "agreement_error": value.agreement_error,
    }


def _is_quantized(work: RunWork, plan: PrecisionPlan) -> bool:
    return not nothing_in_int8(work.subject.view, plan)
