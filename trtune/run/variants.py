"""The variants of a run: each model on each backend, what it is worth, and how fast it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from trtune.configs.schema import Latency as LatencySection
from trtune.precision.backends.gpu.timing import GpuTiming
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.backends.trt.backend import LAYERS_FILE
from trtune.precision.backends.trt.inspector import parse_layers
from trtune.precision.backends.trt.layer_times import node_times
from trtune.precision.graph.proto import tensor_bytes
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import UNKNOWN, Backend, BuildInfo
from trtune.precision.runtime.engine_json import device_name
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.accuracy import Evaluation
from trtune.reports.latency import measure_together
from trtune.reports.record import ORIGINAL, Latency, Variant
from trtune.run.inputs import first_batch, repeat_to
from trtune.run.job import Job
from trtune.run.store import read_stage, write_stage

EMULATION_NOTE = "emulation of TensorRT's arithmetic: its CPU time says nothing about speed"
FP32, UNTUNED, TUNED = "fp32", "untuned", "tuned"


@runtime_checkable
class TimesItself(Protocol):
    """An engine that times its own work on the GPU, apart from the copies to and from it."""

    def latency(self, feeds: Mapping[str, NDArray[Any]], *, warmup: int, runs: int) -> GpuTiming:
        """The times of one inference on `feeds`."""

    def layer_times(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Milliseconds of each of the engine's layers."""


def make_variants(job: Job) -> list[Variant]:
    """fp32, untuned and tuned for every backend that runs here; what others build, with the reason.

    The FP32 model of onnxruntime is the user's own; that of another backend is built like the rest.
    """
    found: list[Variant] = []
    for backend in job.backends:
        found.extend(_on_backend(job, backend))
    return found


def _on_backend(job: Job, backend: Backend) -> list[Variant]:
    runs = not backend.obstacle()
    plans = {UNTUNED: job.untuned, TUNED: job.tuned.plan}
    if runs and not isinstance(backend, OnnxruntimeBackend):
        plans = {FP32: job.fp32_plan, **plans}
    changed = job.tuned.plan.decisions != job.untuned.decisions
    below = {FP32: "fp32", UNTUNED: "untuned" if changed else "", TUNED: ""}
    infos = {
        name: job.build(backend, plan, job.engine_folder(backend, below[name]))
        for name, plan in plans.items()
    }
    if not changed:  # what an earlier run, on other data, had to tune
        shutil.rmtree(job.engine_folder(backend, "untuned"), ignore_errors=True)
    latencies = latencies_of(job, backend, plans, infos) if runs else {}
    found = []
    if runs and FP32 not in plans:
        found.append(_users_model(job, backend, latencies))
    if job.original is not None and is_emulation(backend):
        found.append(_as_it_stands(job, backend, job.original))
    for name, plan in plans.items():
        what, folder = f"evaluate {backend.name}", job.engine_folder(backend, below[name])
        value = job.measured(backend, plan, what, built=folder)[0] if runs else None
        found.append(_variant(job, backend, name, plan, value, infos[name], latencies))
    return found


def is_emulation(backend: Backend) -> bool:
    """Whether the time that the backend's models take says nothing."""
    return isinstance(backend, OnnxruntimeBackend) and backend.lowering == "emulate"


def _users_model(job: Job, backend: Backend, latencies: Mapping[str, Latency]) -> Variant:
    value = None if job.is_fidelity else job.baseline.value
    return Variant(
        name=FP32,
        backend=backend.name,
        value=value,
        drop=None if value is None else 0.0,
        top1=top1_of(job.baseline),
        latency_ms=latencies.get(FP32),
        latency_note=EMULATION_NOTE if is_emulation(backend) else None,
        size_bytes=fp32_bytes(job),
        nodes={"int8": 0, "fp16": 0, "fp32": len(job.untuned.compute_nodes)},
        path=Path(job.config.model.path).name,
    )


def _as_it_stands(job: Job, backend: Backend, value: Evaluation) -> Variant:
    base, reached = job.baseline.value, job.value_of(value)
    return Variant(
        name=ORIGINAL,
        backend=backend.name,
        value=reached,
        drop=None if job.is_fidelity or reached is None or base is None else base - reached,
        top1=top1_of(value),
        sqnr_db=value.sqnr_db,
        agreement=value.agreement,
        latency_note=EMULATION_NOTE,
        size_bytes=Path(job.config.model.path).stat().st_size,
        nodes=job.planned.counts(),
        path=Path(job.config.model.path).name,
    )


def _variant(
    job: Job,
    backend: Backend,
    name: str,
    plan: PrecisionPlan,
    value: Evaluation | None,
    info: BuildInfo,
    latencies: Mapping[str, Latency],
) -> Variant:
    base, reached = job.baseline.value, None if value is None else job.value_of(value)
    return Variant(
        name=job.config.precision.default if name == UNTUNED else name,
        backend=backend.name,
        value=reached,
        drop=None if job.is_fidelity or reached is None or base is None else base - reached,
        top1=None if value is None else top1_of(value),
        sqnr_db=value.sqnr_db if value else None,
        agreement=value.agreement if value else None,
        latency_ms=latencies.get(name),
        latency_note=EMULATION_NOTE if is_emulation(backend) else None,
        size_bytes=info.size_bytes,
        nodes=plan.counts(),
        account={} if is_emulation(backend) else accounted(plan, info),
        pinned=list(plan.pinned),
        not_honoured=list(info.not_honoured),
        path=str(info.path.relative_to(job.folder)) if info.path else None,
        reason=info.reason or None,
        command=info.details.get("command"),
        notes=[*info.details.get("notes", ()), *own_calibration(info.details.get("calibration"))],
    )


def own_calibration(details: Mapping[str, Any] | None) -> list[str]:
    """How far TensorRT's own calibration is from the table, if it made one.

    >>> own_calibration({"calibrator": "minmax", "tensors": 3, "log2_ratios": {"a": 1.0, "b": 0}})
    ["TensorRT's own calibration (minmax) gave 3 scales; ours differ by a factor of 1.41 in the \
median and 2 at most (a)"]
    """
    ratios = (details or {}).get("log2_ratios")
    if not details or not ratios:
        return []
    apart = {tensor: abs(ratio) for tensor, ratio in ratios.items()}
    worst = max(apart, key=lambda tensor: apart[tensor])
    return [
        f"TensorRT's own calibration ({details['calibrator']}) gave {details['tensors']} scales; "
        f"ours differ by a factor of {2 ** median(apart.values()):.3g} in the median and "
        f"{2 ** apart[worst]:.3g} at most ({worst})"
    ]


def accounted(plan: PrecisionPlan, info: BuildInfo) -> dict[str, int]:
    """How many compute nodes run in each precision by the runtime's own account."""
    found = [info.precisions.get(name, UNKNOWN) for name in plan.compute_nodes]
    return {precision: found.count(precision) for precision in sorted(set(found))}


def fp32_bytes(job: Job) -> int:
    """Size of the user's model, whose weights may lie in files beside it."""
    weights = sum(tensor_bytes(tensor) for tensor in job.model.proto.graph.initializer)
    return max(Path(job.config.model.path).stat().st_size, weights)


def top1_of(found: Evaluation) -> float | None:
    """top-1 if that is what was counted."""
    return found.value if found.metric == "top1" else None


def latencies_of(
    job: Job,
    backend: Backend,
    plans: Mapping[str, PrecisionPlan],
    infos: Mapping[str, BuildInfo],
) -> dict[str, Latency]:
    """Latency of the unmarked models; none for emulation, whose speed means nothing."""
    section = job.config.report.latency
    if section is None or is_emulation(backend):
        return {}
    stage = f"latency-{backend.name.replace('/', '-')}"
    key = {
        "engines": {name: job.candidate(plan).key for name, plan in plans.items()},
        "latency": section.model_dump(mode="json"),
        "threads": getattr(backend, "threads", None),
        "settings": dict(backend.settings),
        "device": device_name(),
        **job.versions,
        **backend.versions,
    }
    kept = read_stage(job.folder, stage, key)
    if kept is None:
        found, layers = _measured_latencies(job, backend, infos, section)
        kept = {"models": {n: found[n].model_dump() for n in found}, "layers": layers}
        write_stage(job.folder, stage, key, kept)
    job.layer_times.update(kept["layers"])
    return {name: Latency(**latency) for name, latency in kept["models"].items()}


def _measured_latencies(
    job: Job, backend: Backend, infos: Mapping[str, BuildInfo], section: LatencySection
) -> tuple[dict[str, Latency], dict[str, float]]:
    """Latencies of the models, and milliseconds of the tuned one's nodes where an engine tells.

    Measured in turn, so that what else the machine does hits all alike; on a GPU by events.
    """
    size = job.fixed_batch or section.batch
    feeds = repeat_to(first_batch(job.sources[1], "data.evaluation"), size)
    proto, external = job.model.proto, job.model.external_dir
    with ExitStack() as stack:
        engines: dict[str, Any] = {}
        if isinstance(backend, OnnxruntimeBackend):
            threads = backend.threads
            engines[FP32] = stack.enter_context(
                OrtEngine(lambda: make_session(proto, threads=threads, external_dir=external))
            )
        for name, info in infos.items():
            if info.path is not None:
                engines[name] = stack.enter_context(backend.load(info.path.parent))
        if all(isinstance(engine, TimesItself) for engine in engines.values()):
            times = {
                name: engine.latency(feeds, warmup=section.warmup, runs=section.runs)
                for name, engine in engines.items()
            }
            layers = _node_times(job, infos[TUNED], engines[TUNED], feeds)
            return {name: on_gpu(each, batch=size) for name, each in times.items()}, layers
        found = measure_together(
            {name: _call(engine, feeds) for name, engine in engines.items()},
            warmup=section.warmup,
            runs=section.runs,
            batch=size,
            progress=job.progress,
        )
        return found, {}


def _node_times(
    job: Job, info: BuildInfo, engine: TimesItself, feeds: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Milliseconds of each node, if the build left an account of the engine's layers."""
    layers = None if info.path is None else info.path.with_name(LAYERS_FILE)
    if layers is None or not layers.is_file():
        return {}
    names = [node.name for node in job.view.nodes]
    account = parse_layers(layers.read_text(encoding="utf-8"), frozenset(names))
    return node_times(engine.layer_times(feeds), account, names)[0]


def on_gpu(timing: GpuTiming, *, batch: int) -> Latency:
    """The record of times on a GPU: of the computation alone, and with the copies beside it."""
    return Latency(
        median=timing.compute.median,
        p95=timing.compute.p95,
        p99=timing.compute.p99,
        runs=timing.runs,
        batch=batch,
        end_to_end=timing.end_to_end.median if timing.end_to_end else None,
        throughput=timing.throughput * batch,
        cuda_graph=timing.graph,
        note=timing.graph_reason,
    )


def _call(engine: OrtEngine, feeds: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: engine.infer(feeds)
