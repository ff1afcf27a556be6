"""How fast the unmarked models are, as a stage; on a GPU also what each layer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from trtune.configs.progress import Progress
from trtune.configs.schema import Latency as Section
from trtune.datasets.batches import first_batch, repeat_to
from trtune.precision.backends.gpu.timing import GpuTiming
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.backends.trt.backend import LAYERS_FILE
from trtune.precision.backends.trt.inspector import parse_layers
from trtune.precision.backends.trt.layer_times import node_times
from trtune.precision.graph.view import GraphView
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate
from trtune.precision.runtime.engine_json import device_name
from trtune.precision.runtime.session import OrtEngine
from trtune.reports.latency import Turns, in_all, measure_turns, speedup_of
from trtune.reports.record import Latency, Speedup
from trtune.run.data import RunData, fixed_batch
from trtune.run.stage import Stage, as_json
from trtune.run.stages.engines import FP32, TUNED, cpu_model, engine_needs, label
from trtune.run.stages.measuring import session_of

if TYPE_CHECKING:
    from trtune.run.subject import Subject


@runtime_checkable
class TimesItself(Protocol):
    """An engine that times its own work on the GPU, apart from the copies to and from it."""

    def latency(self, feeds: Mapping[str, NDArray[Any]], *, warmup: int, runs: int) -> GpuTiming:
        """The times of one inference on `feeds`."""

    def layer_times(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Milliseconds of each of the engine's layers."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Latency of each model, and milliseconds of the tuned one's nodes where an engine tells.

    `speedups` compares models with FP32 turn by turn, where they took turns.
    """

    models: Mapping[str, Latency] = field(default_factory=dict)
    nodes: Mapping[str, float] = field(default_factory=dict)
    speedups: Mapping[str, Speedup] = field(default_factory=dict)

    @classmethod
    def of_turns(cls, turns: Turns, *, batch: int) -> Speed:
        """The speed of what took `turns`, FP32 among them."""
        models = {name: in_all(found, batch=batch) for name, found in turns.items()}
        over = {n: speedup_of(t, turns[FP32]) for n, t in turns.items() if FP32 in turns}
        return cls(models, {}, {n: found for n, found in over.items() if found and n != FP32})


SPEED = as_json(
    lambda speed: {
        "models": {name: found.model_dump() for name, found in speed.models.items()},
        "nodes": dict(speed.nodes),
        "speedups": {name: found.model_dump() for name, found in speed.speedups.items()},
    },
    lambda value: Speed(
        {n: Latency(**v) for n, v in value["models"].items()},
        value["nodes"],
        {n: Speedup(**v) for n, v in value["speedups"].items()},
    ),
)


def speed(
    subject: Subject,
    backend: Backend,
    candidates: Mapping[str, Candidate],
    infos: Callable[[], Mapping[str, BuildInfo]],
    data: RunData,
    section: Section,
    progress: Progress,
) -> Stage[Speed]:
    """Latency of the engines of `candidates`, which `infos` tell of; of onnxruntime FP32 too."""

    def make(folder: Path) -> Speed:
        return _measured(subject, backend, infos(), data, section, progress)

    needs = timing_needs(backend, section)
    for name, candidate in candidates.items():
        needs[f"engine {name}"] = engine_needs(candidate, backend)
    return Stage(f"latency-{label(backend)}", needs, make, SPEED)


def timing_needs(backend: Backend, section: Section) -> dict[str, Any]:
    """What decides times beside the engine: how they are measured, and on which processor."""
    return {
        "report.latency": section,
        "threads": getattr(backend, "threads", None),
        "device": [device_name(), cpu_model()],
    }


def timed_batch(
    subject: Subject, data: RunData, section: Section
) -> tuple[int, Mapping[str, NDArray[Any]]]:
    """How many samples an inference has that is timed, and these samples."""
    size = fixed_batch(subject.model) or section.batch
    return size, repeat_to(first_batch(data.source, data.where), size)


def take_turns(
    engines: Mapping[str, OrtEngine],
    feeds: Mapping[str, NDArray[Any]],
    section: Section,
    progress: Progress,
) -> Turns:
    """The seconds that each of `engines` takes for `feeds`, one beside the other."""
    calls = {name: _call(engine, feeds) for name, engine in engines.items()}
    return measure_turns(calls, warmup=section.warmup, runs=section.runs, progress=progress)


def _measured(
    subject: Subject,
    backend: Backend,
    infos: Mapping[str, BuildInfo],
    data: RunData,
    section: Section,
    progress: Progress,
) -> Speed:
    """Measured in turn, so that what else the machine does hits all alike; on a GPU by events."""
    size, feeds = timed_batch(subject, data, section)
    with ExitStack() as stack:
        engines: dict[str, Any] = {}
        if isinstance(backend, OnnxruntimeBackend):
            session = session_of(subject.model, threads=backend.threads)
            engines[FP32] = stack.enter_context(OrtEngine(session))
        for name, info in infos.items():
            if info.path is not None:
                engines[name] = stack.enter_context(backend.load(info.path.parent))
        if all(isinstance(engine, TimesItself) for engine in engines.values()):
            times = {
                name: engine.latency(feeds, warmup=section.warmup, runs=section.runs)
                for name, engine in engines.items()
            }
            models = {name: on_gpu(each, batch=size) for name, each in times.items()}
            return Speed(models, _node_times(subject.view, infos[TUNED], engines[TUNED], feeds))
        turns = take_turns(engines, feeds, section, progress)
        return Speed.of_turns(turns, batch=size)


def _node_times(
    view: GraphView, info: BuildInfo, engine: TimesItself, feeds: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Milliseconds of each node, if the build left an account of the engine's layers."""
    layers = None if info.path is None else info.path.with_name(LAYERS_FILE)
    if layers is None or not layers.is_file():
        return {}
    names = [node.name for node in view.nodes]
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
