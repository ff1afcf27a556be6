"""What a candidate is worth, as stages: FP32, the user's file as it stands, every plan tried."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from trtune.configs.errors import InputError
from trtune.configs.progress import Progress
from trtune.configs.schema import Target
from trtune.configs.system.cluster import Cluster
from trtune.datasets.code import code_hash
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.file import Model
from trtune.precision.graph.macs import widest_step
from trtune.precision.graph.view import GraphView
from trtune.precision.runtime.api import Backend, Candidate, Engine
from trtune.precision.runtime.session import (
    OrtEngine,
    make_session,
    runs_at_once,
    threads_each,
)
from trtune.reports.accuracy import Evaluation, Needed, OutputCloseness, evaluate
from trtune.reports.measures.base import PythonMetric
from trtune.reports.measures.fidelity import CLOSENESS, FIDELITY_METRICS
from trtune.reports.measures.find import METRICS, TOP1, Asked, find_metric, higher_is_better
from trtune.reports.measures.recognise import task_of
from trtune.reports.outputs import IN_MEMORY, Layout, StoredOutputs, collect_outputs
from trtune.run.data import RunData, fixed_batch
from trtune.run.stage import Need, Stage, as_json, device_needs, flat, versions
from trtune.run.stages.engines import make_engine, measured_with
from trtune.run.stages.shared_out import LARGEST_FILE, Built, Fp32, outputs_in_parts

log = logging.getLogger(__name__)

HELD_STEPS, FLOAT_BYTES = 2, 4
"""Of what a node reads and makes at most, an inference holds about twice the bytes."""


def _load(value: dict[str, Any]) -> Evaluation:
    outputs = {name: OutputCloseness(**found) for name, found in value["outputs"].items()}
    return Evaluation(**{**value, "outputs": outputs})


EVALUATION = as_json(asdict, _load)


@dataclass(frozen=True, slots=True)
class TargetMetric:
    """The target's metric: its name, what computes it, and the hash of a user's own code."""

    name: str
    function: str | PythonMetric
    code: str | None = None
    asked: Asked = field(default_factory=Asked)

    @property
    def higher(self) -> bool:
        """Whether more of it is better."""
        return higher_is_better(self.function)

    @property
    def is_fidelity(self) -> bool:
        """Whether it is closeness to FP32, which needs no labels."""
        return self.name in FIDELITY_METRICS and self.function == self.name

    @property
    def need(self) -> Need:
        """What decides a value of it, for keys."""
        asked = asdict(self.asked)
        told = {"metric": self.name, **asked}
        return Need([self.name, self.code, asked], flat(told, "precision.target"))

    def value_of(self, found: Evaluation) -> float | None:
        """Its value in an evaluation."""
        value: float | None = getattr(found, self.name) if self.is_fidelity else found.value
        return value


def metric_of(target: Target | None, model: Model) -> TargetMetric:
    """The metric that is to be reached, or closeness to FP32 where there is no target.

    `agreement` is that of the model's task: of classes, detections, pixels or tokens.
    """
    if target is None:
        return TargetMetric(CLOSENESS, CLOSENESS)
    task = task_of(model.inputs, model.outputs) if target.metric == "agreement" else None
    if task is not None and task.kind != "classification":
        return TargetMetric(target.metric, task.agreement, None, Asked.of(target))
    code = None if target.metric in METRICS else code_hash(target.metric)
    return TargetMetric(target.metric, find_metric(target.metric), code, Asked.of(target))


@dataclass(frozen=True)
class Bench:
    """What candidates are measured on: the metric, the data, and the FP32 model's outputs.

    Of those at most `memory` bytes are held, the others lie on disk.
    """

    model: Model
    metric: TargetMetric
    data: RunData
    progress: Progress
    device: str = "cpu"
    memory: int = IN_MEMORY
    cluster: Cluster | None = None

    @property
    def layout(self) -> Layout:
        """Where samples lie in the model's outputs."""
        return Layout(tuple(self.model.inputs), tuple(self.model.outputs))

    @cached_property
    def at_once(self) -> int:
        """Runs of the model, by as many samples as go in at a time, that are made side by side."""
        values = widest_step(GraphView.of(self.model))
        samples = fixed_batch(self.model) or self.data.section.batch
        held = None if values is None else HELD_STEPS * FLOAT_BYTES * values * samples
        return runs_at_once(self.device, held)

    @cached_property
    def reference(self) -> StoredOutputs:
        """The FP32 model's outputs over the data; a pass, when they are first asked for."""
        if self.cluster is not None:
            found = self._in_parts(Fp32(self.model, self.device), "fp32")
            if found is not None:
                return found
        with self.as_given(self.model) as engine:
            return collect_outputs(
                engine.infer,
                self.data.source,
                fixed_batch=fixed_batch(self.model),
                layout=self.layout,
                progress=self.progress,
                what="fp32",
                memory=self.memory,
                at_once=self.at_once,
            )

    def as_given(self, model: Model) -> OrtEngine:
        """`model` as it is, for `at_once` runs."""
        threads = None if self.at_once == 1 else threads_each(self.device, self.at_once)
        return OrtEngine(session_of(model, threads=threads, device=self.device))

    def _in_parts(self, opens: Callable[[], Engine], what: str) -> StoredOutputs | None:
        assert self.cluster is not None
        return outputs_in_parts(
            opens,
            self.data.source,
            self.cluster,
            fixed_batch=fixed_batch(self.model),
            layout=self.layout,
            progress=self.progress,
            what=what,
            memory=self.memory,
        )

    def kept(self, backend: Backend, folder: Path, what: str) -> StoredOutputs | None:
        """What the engine that `backend` built in `folder` gives, from the tasks of the cluster.

        None where there is no cluster, or the engine cannot run there.
        """
        if self.cluster is None or not isinstance(backend, OnnxruntimeBackend):
            return None
        if sum(path.stat().st_size for path in folder.iterdir()) > LARGEST_FILE:
            return None
        return self._in_parts(Built.of(backend, folder), what)

    def needs(self) -> dict[str, Any]:
        """What decides every value that is measured here."""
        return {
            "model": self.model,
            self.data.where: self.data.need,
            "metric": self.metric.need,
            **versions("trtune", "onnx", "onnxruntime", "numpy"),
            **device_needs(self.device),
        }

    def measure(
        self,
        engine: Engine,
        counted: str | PythonMetric | None,
        what: str,
        needed: Needed | None = None,
        given: StoredOutputs | None = None,
        at_once: int = 1,
    ) -> Evaluation:
        """What an engine is worth: `counted` on the data, and its closeness to FP32.

        `given` are its outputs, where it was run elsewhere; `at_once` of its runs are made side by
        side.
        """
        with nullcontext(engine) if given is not None else engine as running:
            return evaluate(
                running.infer if given is None else given,
                self.data.source,
                metric=counted,
                asked=self.metric.asked,
                outputs=self.model.counted,
                reference=self.reference,
                fixed_batch=fixed_batch(self.model),
                layout=self.layout,
                at_once=at_once,
                needed=needed,
                progress=self.progress,
                what=what,
            )

    def measure_built(
        self,
        backend: Backend,
        folder: Path,
        counted: str | PythonMetric | None,
        what: str,
        needed: Needed | None = None,
    ) -> Evaluation:
        """`measure` of the engine that `backend` built in `folder`.

        Where the user says how many threads an operator takes, its runs are made one by one.
        """
        given, runs = self.kept(backend, folder, what), 1
        if isinstance(backend, OnnxruntimeBackend) and backend.threads is None and self.at_once > 1:
            runs = self.at_once
            each = threads_each(self.device, runs)
            backend = OnnxruntimeBackend(backend.lowering, threads=each, device=backend.device)
        return self.measure(backend.load(folder), counted, what, needed, given, runs)


def session_of(
    model: Model, *, threads: int | None = None, device: str = "cpu"
) -> Callable[[], Any]:
    """Gives onnxruntime's session for a model."""
    return partial(
        make_session,
        model.proto,
        threads=threads,
        device=device,
        external_dir=model.external_dir,
    )


def baseline(bench: Bench) -> Stage[Evaluation]:
    """The FP32 model's own value; top-1 where the target is closeness and there are labels."""

    def make(folder: Path) -> Evaluation:
        if not bench.metric.is_fidelity:
            return _replayed(bench, bench.metric.function)
        try:
            return _replayed(bench, TOP1)
        except InputError as error:
            log.info("top-1 is not measured beside the target: %s", error)
            return _replayed(bench, None)

    part = bench.data.where.rpartition(".")[2]
    name = "baseline" if part == "evaluation" else f"baseline-{part}"
    return Stage(name, bench.needs(), make, EVALUATION)


def counted(bench: Bench, fp32: Evaluation) -> str | PythonMetric | None:
    """What is counted of a candidate: the metric, or what FP32 has beside closeness."""
    return fp32.metric if bench.metric.is_fidelity else bench.metric.function


def as_it_stands(bench: Bench, file: Model, fp32: Evaluation) -> Stage[Evaluation]:
    """The value of the user's quantized file in onnxruntime."""

    def make(folder: Path) -> Evaluation:
        asked, what = counted(bench, fp32), "the file as it stands"
        return bench.measure(bench.as_given(file), asked, what, at_once=bench.at_once)

    return Stage("original", {**bench.needs(), "file": file}, make, EVALUATION)


def evaluation(
    bench: Bench,
    candidate: Candidate,
    backend: Backend,
    fp32: Evaluation,
    *,
    built: Path | None = None,
    needed: float | None = None,
) -> Stage[Evaluation]:
    """The value of `candidate` on `backend`, from the unmarked model.

    `built` is the folder of its engine, if there is one already; else one is built for this. With
    `needed`, the value of the metric that the target asks for, it is measured until it is certain
    to miss that, or on everything.
    """
    asked = counted(bench, fp32)
    closeness = bench.metric.name if bench.metric.is_fidelity else None
    until = None if needed is None else Needed(needed, fp32.value, closeness)
    what = f"evaluate {backend.name}"

    def make(folder: Path) -> Evaluation:
        if built is not None:
            return bench.measure_built(backend, built, asked, what, until)
        scratch = folder / ".tuning"
        try:
            make_engine(candidate, backend, scratch, bench.progress)
            return bench.measure_built(backend, scratch, asked, what, until)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    needs = {**measured_with(candidate, backend), **bench.needs(), "counted": fp32.metric}
    if needed is None:
        return Stage("evaluation", needs, make, EVALUATION, many=True)
    return Stage("until", {**needs, "needed": needed}, make, EVALUATION, many=True)


def _replayed(bench: Bench, metric: str | PythonMetric | None) -> Evaluation:
    stored = bench.reference
    return evaluate(
        stored,
        bench.data.source,
        metric=metric,
        asked=bench.metric.asked,
        outputs=bench.model.counted,
        reference=stored,
    )
