"""One run: what it works on, and its stages, each of which reuses what its folder already holds."""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trtune.calibrate.cache import save_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import InputError, TrtuneError
from trtune.configs.files import hash_file, hash_json, write_text
from trtune.configs.load import dump_config
from trtune.configs.progress import Progress
from trtune.configs.schema import Config
from trtune.datasets.batches import BatchSource, batch_size
from trtune.datasets.holdout import hold_out
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.compare.gate import model_gate
from trtune.precision.graph.file import Model, load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_rules import keep_fp32, refuse_half_model
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.importing import Imported, import_quantized
from trtune.precision.quantized.insert import completed
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate, Engine
from trtune.precision.runtime.engine_json import reusable
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.precision.tune.ladder import Score, Tuned, tune
from trtune.precision.tune.scales import IMPLICIT, Calibrated, without_zero_ranges
from trtune.reports.accuracy import Evaluation, evaluate
from trtune.reports.metrics import FIDELITY_METRICS, find_metric
from trtune.reports.outputs import Layout, StoredOutputs, collect_outputs
from trtune.reports.summary import number
from trtune.run.calibrating import CACHE_FILE, calibrated_in
from trtune.run.inputs import backends_of, check_data, check_precisions, open_data
from trtune.run.layers import (
    LayerErrors,
    accumulated_errors,
    engine_errors,
    errors_alone,
    gate_errors,
    kept_sums,
)
from trtune.run.store import Evaluations, read_stage, write_stage

log = logging.getLogger(__name__)

PACKAGES = ("trtune", "onnx", "onnxruntime", "numpy", "polygraphy")


def run_folder(config: Config, out: Path | str = "runs") -> Path:
    """`OUT/NAME-KEY`; KEY is the start of the hash of everything in the config but `report`."""
    return Path(out) / f"{config.name}-{run_key(config)}"


def run_key(config: Config) -> str:
    """Ten hex digits: the hash of everything in the config that decides the result."""
    value = config.model_dump(mode="json")
    value.pop("report")
    return hash_json(value)[:10]


class Job:
    """A config being worked on in its folder. Every property is computed once, when asked for."""

    def __init__(self, config: Config, out: Path | str, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.folder = run_folder(config, out)
        check_precisions(config)
        self.backends = backends_of(config, lambda: self.model, progress)
        self.evaluations = Evaluations(self.folder)
        self.builds = 0
        self.layer_times: dict[str, float] = {}
        self.reused_calibration = False
        write_text(self.folder / "config.yaml", dump_config(config))

    @cached_property
    def imported(self) -> Imported | None:
        """The user's quantized model taken apart, where the config says that it is one."""
        section = self.config.precision
        if section.default != "qat":
            return None
        return import_quantized(
            Path(self.config.model.path),
            allow_requantize=section.allow_requantize,
            fallback=section.fallback,
            pins=section.pin,
        )

    @cached_property
    def model(self) -> Model:
        """The normalised FP32 model; of a quantized one what it is without its quantization."""
        if self.imported is not None:
            return self.imported.model
        section = self.config.model
        return load_model(Path(section.path), outputs=section.outputs)

    @property
    def file(self) -> Model:
        """The user's file as it stands, normalised."""
        return self.model if self.imported is None else self.imported.original

    @cached_property
    def view(self) -> GraphView:
        """The index over the model's graph."""
        return GraphView.of(self.model)

    @cached_property
    def sources(self) -> tuple[BatchSource, BatchSource]:
        """Calibration and evaluation data, their first batches checked."""
        calibration = open_data(self.config.data.calibration, self.model)
        evaluation = open_data(self.config.data.evaluation, self.model)
        check_data(self.config, calibration, evaluation, fixed_batch=self.fixed_batch)
        return calibration, evaluation

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Pictures left out of calibration and evaluation, also by the runs reused here."""
        key = {name: self.hashes[f"{name}_data"] for name in ("calibration", "evaluation")}
        kept: dict[str, list[str]] = read_stage(self.folder, "skipped", key) or {}
        found = {
            name: sorted({*source.skipped, *kept.get(name, ())})
            for name, source in zip(key, self.sources, strict=True)
        }
        if any(found.values()) and found != kept:
            write_stage(self.folder, "skipped", key, found)
        return found

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of what results depend on."""
        return {name: version(name) for name in PACKAGES}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of model, data and config."""
        calibration, evaluation = self.sources
        return {
            "model": self.model.sha256,
            "calibration_data": calibration.identity,
            "evaluation_data": evaluation.identity,
            "config": hash_json(self.config.model_dump(mode="json")),
        }

    def gate(self) -> None:
        """Check that the normalised FP32 model gives what the user's file gives."""
        key = {"model": self.file.sha256, "data": self.hashes["calibration_data"], **self.versions}
        if read_stage(self.folder, "gate", key) is None:
            model_gate(self.file, self.sources[0])
            write_stage(self.folder, "gate", key, True)

    @cached_property
    def planned(self) -> PrecisionPlan:
        """The plan by the rules and the user's pins, before anything was measured."""
        section = self.config.precision
        if self.imported is not None:
            return self.imported.plan
        plan = make_plan(
            self.view, default=section.default, fallback=section.fallback, pins=section.pin
        )
        if plan.int8_nodes or plan.halves:
            refuse_half_model(self.view)
        elif section.default == "int8":
            log.warning("nothing is quantizable in this model with these pins: it stays fp32")
        return plan

    @cached_property
    def untuned(self) -> PrecisionPlan:
        """The plan before tuning: `planned`, less what the measured ranges forbid."""
        plan = self.planned
        if plan.int8_nodes:
            plan = without_zero_ranges(self.view, plan, self.table)
        if plan.halves:
            plan = keep_fp32(self.view, plan, self.calibrated.histograms)
        return plan

    @cached_property
    def fp32_plan(self) -> PrecisionPlan:
        """Everything in FP32."""
        return make_plan(self.view, default="fp32")

    @cached_property
    def judges(self) -> list[Backend]:
        """The backends that plans are measured on: those that run here.

        If none does, onnxruntime's emulation of their arithmetic.
        """
        running = [backend for backend in self.backends if not backend.obstacle()]
        return running or [OnnxruntimeBackend("emulate")]

    @property
    def is_lowered(self) -> bool:
        """Whether anything in the untuned plan is not FP32."""
        return bool(self.untuned.int8_nodes or self.untuned.halves)

    @property
    def engines(self) -> list[Backend]:
        """The backends that run here and are not onnxruntime."""
        return [b for b in self.judges if not isinstance(b, OnnxruntimeBackend)]

    @cached_property
    def lowerings(self) -> tuple[str, ...]:
        """The lowerings that the config's backends use, and what makes the cache complete."""
        return tuple(sorted({IMPLICIT, *(b.lowering for b in (*self.backends, *self.judges))}))

    @cached_property
    def table(self) -> CalibrationTable:
        """The calibration table: named in the config, kept from before, or made now."""
        return self.calibrated.table

    @cached_property
    def calibrated(self) -> Calibrated:
        """The table, the histograms, and what they cost."""
        imported = self.imported
        planned = self.planned
        if isinstance(planned, ImportedPlan):
            planned = planned.by_rules()
        if imported is not None and "deploy" not in self.lowerings and not planned.halves:
            save_table(self.folder / CACHE_FILE, imported.table)
            return Calibrated(imported.table, {}, 0, 0, 0.0, 0.0, 0.0)
        found, self.reused_calibration = calibrated_in(
            self.folder,
            self.config.calibration,
            self.model,
            self.view,
            self.sources[0],
            planned,
            lowerings=self.lowerings,
            made_from={
                "model": self.model.sha256,
                "data": self.hashes["calibration_data"],
                **self.versions,
            },
            progress=self.progress,
        )
        if imported is None:
            return found
        whole = completed(imported.table, found.table)
        table = replace(whole, provenance=found.table.provenance)
        save_table(self.folder / CACHE_FILE, table)  # what is used, not what completed it
        return replace(found, table=table)

    @cached_property
    def original(self) -> Evaluation | None:
        """The value of the user's quantized file as it stands, in onnxruntime."""
        if self.imported is None:
            return None
        key = {**self._measured_on, "model": self.file.sha256, "candidate": "file"}
        path = self.file
        session = partial(make_session, path.proto, external_dir=path.external_dir)

        return self._evaluation(
            key, lambda: self._evaluated(OrtEngine(session), "the file as it stands")
        )

    @cached_property
    def layers(self) -> LayerErrors:
        """Errors of every node of the untuned model; none if all of it is FP32."""
        if not self.is_lowered:
            return LayerErrors({}, {})
        section, candidate = self.config.compare, self.candidate(self.untuned)
        key = {
            **{k: self.hashes[k] for k in ("model", "calibration_data", "evaluation_data")},
            "candidate": candidate.key,
            "pictures": section.pictures,
            **self.versions,
        }

        def measure() -> dict[str, ErrorSums]:
            return accumulated_errors(
                candidate,
                self.view,
                self.sources[1],
                pictures=section.pictures,
                memory=section.memory,
                progress=self.progress,
            )

        accumulated = kept_sums(self.folder, "compare", key, measure)
        return LayerErrors(accumulated, self.alone if section.alone else {})

    @cached_property
    def alone(self) -> dict[str, ErrorSums]:
        """What each int8 or half node of the untuned plan alone does to the output."""
        section, candidate = self.config.calibration, self.candidate(self.untuned)
        key = {
            **{k: self.hashes[k] for k in ("model", "calibration_data")},
            "candidate": candidate.key,
            "holdout": section.holdout,
            "memory": section.memory,
            **self.versions,
        }

        def measure() -> dict[str, ErrorSums]:
            held_out = hold_out(self.sources[0], section.holdout)
            return errors_alone(
                candidate, self.view, held_out, memory=section.memory, progress=self.progress
            )

        return kept_sums(self.folder, "alone", key, measure)

    def gate_engine(self, backend: Backend) -> dict[str, ErrorSums]:
        """Errors of the FP32 engine against onnxruntime; TrtuneError if it is another network."""
        folder = self.engine_folder(backend, "fp32")

        def measure() -> dict[str, ErrorSums]:
            self.build(backend, self.fp32_plan, folder)
            return gate_errors(
                self.model,
                backend,
                folder,
                self.sources[1],
                pictures=self.config.compare.pictures,
            )

        key = self._compared_on(backend, self.fp32_plan)
        return kept_sums(self.folder, f"gate-{backend.name.replace('/', '-')}", key, measure)

    def runtime_errors(self, backend: Backend, plan: PrecisionPlan) -> dict[str, ErrorSums]:
        """By node, the engine for `plan` against its Q/DQ model in onnxruntime."""
        folder, section = self.engine_folder(backend), self.config.compare

        def measure() -> dict[str, ErrorSums]:
            self.build(backend, plan, folder)
            return engine_errors(
                self.candidate(plan),
                self.view,
                backend,
                folder,
                self.sources[1],
                scratch=self.folder / ".compare",
                pictures=section.pictures,
                memory=section.memory,
                progress=self.progress,
            )

        key = self._compared_on(backend, plan)
        return kept_sums(self.folder, f"runtime-{backend.name.replace('/', '-')}", key, measure)

    def _compared_on(self, backend: Backend, plan: PrecisionPlan) -> dict[str, Any]:
        return {
            **{k: self.hashes[k] for k in ("model", "evaluation_data")},
            "candidate": self.candidate(plan).key,
            "pictures": self.config.compare.pictures,
            "settings": dict(backend.settings),
            **self.versions,
            **backend.versions,
        }

    @cached_property
    def ranking(self) -> list[tuple[str, str]]:
        """int8 nodes, the one that hurts the output most first, with the reason in words."""
        errors = self.alone
        ranked = sorted(errors, key=lambda node: (errors[node].sqnr_db, node))
        return [(n, f"alone it leaves {errors[n].sqnr_db:.1f} dB at the output") for n in ranked]

    @cached_property
    def metric(self) -> Any:
        """The target's metric, or closeness to FP32 where there is no target."""
        target = self.config.precision.target
        return find_metric(target.metric) if target else "sqnr_db"

    @cached_property
    def fixed_batch(self) -> int | None:
        """The batch size that the model fixes, if it does."""
        return batch_size(self.model.inputs, 0) or None

    @property
    def layout(self) -> Layout:
        """Where samples lie in the model's outputs."""
        return Layout(tuple(self.model.inputs), tuple(self.model.outputs))

    @cached_property
    def reference(self) -> StoredOutputs:
        """The FP32 model's outputs over the evaluation data."""
        engine = OrtEngine(
            lambda: make_session(self.model.proto, external_dir=self.model.external_dir)
        )
        with engine:
            return collect_outputs(
                engine.infer,
                self.sources[1],
                fixed_batch=self.fixed_batch,
                layout=self.layout,
                progress=self.progress,
                what="fp32",
            )

    @cached_property
    def baseline(self) -> Evaluation:
        """The FP32 model's own value; top-1 where the target is closeness and there are labels."""
        key = {**self._measured_on, "candidate": "fp32"}

        def measure() -> Evaluation:
            metric = "top1" if self.is_fidelity else self.metric
            try:
                return self._replayed(metric)
            except InputError as error:
                if not self.is_fidelity:
                    raise
                log.info("top-1 is not measured beside the target: %s", error)
                return self._replayed(None)

        return self._evaluation(key, measure)

    def _replayed(self, metric: Any) -> Evaluation:
        return evaluate(self.reference, self.sources[1], metric=metric, reference=self.reference)

    def value_of(self, found: Evaluation) -> float | None:
        """The target metric's value in an evaluation."""
        if isinstance(self.metric, str) and self.metric in FIDELITY_METRICS:
            value: float | None = getattr(found, self.metric)
            return value
        return found.value

    @property
    def _counted(self) -> Any:
        """What `evaluate` is asked to count: the metric, or top-1 beside closeness to FP32."""
        return self.baseline.metric if self.is_fidelity else self.metric

    @property
    def is_fidelity(self) -> bool:
        """Whether the target is closeness to FP32, which needs no labels."""
        return isinstance(self.metric, str) and self.metric in FIDELITY_METRICS

    @property
    def _measured_on(self) -> dict[str, Any]:
        target = self.config.precision.target
        return {
            "model": self.hashes["model"],
            "data": self.hashes["evaluation_data"],
            "metric": target.metric if target else "sqnr_db",
            "metric_source": source_hash(self.metric),
            **self.versions,
        }

    @property
    def tuning_key(self) -> dict[str, Any]:
        """What a finished tuning was made from; the rest is in the key of the folder."""
        return {**self._measured_on, "untuned": self.candidate(self.untuned).key}

    def _evaluation(self, key: Mapping[str, Any], measure: Callable[[], Evaluation]) -> Evaluation:
        kept = self.evaluations.get(key)
        if kept is not None:
            log.info("evaluation of %s: reused", key.get("backend", "FP32"))
            return Evaluation(**kept)
        found = measure()
        fields = ("metric", "value", "samples", "sqnr_db", "agreement", "cosine")
        self.evaluations.put(key, {name: getattr(found, name) for name in fields})
        return found

    def engine_folder(self, backend: Backend, below: str = "") -> Path:
        """Where a backend's engine stands; `below` that the untuned one where tuning changed it."""
        return self.folder / backend.name.replace("/", "-") / below

    def built(self, backend: Backend, plan: PrecisionPlan, folder: Path) -> BuildInfo | None:
        """What stands in `folder`, if it is the engine of `backend` for `plan`."""
        return reusable(
            folder,
            self.candidate(plan),
            backend=backend.name,
            versions=backend.versions,
            settings=backend.settings,
        )

    def build(self, backend: Backend, plan: PrecisionPlan, folder: Path) -> BuildInfo:
        """The engine for `plan` in `folder`, built unless it is there already."""
        kept = self.built(backend, plan, folder)
        if kept is not None:
            return kept
        self.builds += 1
        self.progress(f"build {backend.name}", 0, 1)
        info = backend.build(self.candidate(plan), folder)
        self.progress(f"build {backend.name}", 1, 1)
        return info

    def candidate(self, plan: PrecisionPlan) -> Candidate:
        """`plan` with this model and table."""
        return Candidate(self.model, plan, self.table if plan.int8_nodes else None)

    def measured(
        self, backend: Backend, plan: PrecisionPlan, what: str, *, built: Path | None = None
    ) -> tuple[Evaluation, bool]:
        """The value of `plan` on `backend`, from the unmarked model, and whether it was known.

        `built` is the folder of its engine, if there is one already; else one is built for this.
        """
        key = {
            **self._measured_on,
            "candidate": self.candidate(plan).key,
            "backend": backend.name,
            "settings": dict(backend.settings),
        }
        known = self.evaluations.get(key) is not None

        def measure() -> Evaluation:
            if built is not None:
                return self._evaluated(backend.load(built), what)
            scratch = self.folder / ".tuning"
            try:
                self.build(backend, plan, scratch)
                return self._evaluated(backend.load(scratch), what)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

        return self._evaluation(key, measure), known

    def _evaluated(self, engine: Engine, what: str) -> Evaluation:
        """What the engine is worth on the evaluation data."""
        with engine as running:
            return evaluate(
                running.infer,
                self.sources[1],
                metric=self._counted,
                reference=self.reference,
                fixed_batch=self.fixed_batch,
                layout=self.layout,
                progress=self.progress,
                what=what,
            )

    @property
    def threshold(self) -> float | None:
        """The value that the target asks for, or None without a target."""
        target = self.config.precision.target
        if target is None:
            return None
        if target.min is not None:
            return float(target.min)
        if self.baseline.value is None or target.max_drop is None:
            raise TrtuneError("the FP32 model has no value of the target metric to measure against")
        return self.baseline.value - float(target.max_drop)

    def score(self, plan: PrecisionPlan) -> Score:
        """How `plan` does on the first backend, and whether the target holds on all of them."""
        threshold, cached, note, before = self.threshold, True, "", self.builds
        first: Evaluation | None = None
        met = True
        for backend in self.judges:
            found, known = self.measured(backend, plan, f"evaluate {backend.name}")
            first, cached = first or found, cached and known
            # The rounding of a difference of two fractions must not miss a target.
            value = self.value_of(found)
            met = value is not None and (threshold is None or value >= threshold - 1e-9)
            if not met:
                several = len(self.judges) > 1
                note = f"missed on {backend.name}: {number(value)}" if several else ""
                break
        assert first is not None
        value = self.value_of(first)
        return Score(
            float("-inf") if value is None else value,
            met,
            first.sqnr_db,
            cached,
            note,
            self.builds - before,
        )

    @cached_property
    def tuned(self) -> Tuned:
        """The tuned plan; the untuned one if it meets the target or there is none."""
        tunable = self.threshold is not None and self.is_lowered
        section = self.config.precision
        return tune(
            self.untuned,
            self.ranking if tunable else [],
            self.score,
            max_pins=section.max_pins,
            precisions=("fp32",) if section.default in HALVES else (section.fallback, "fp32"),
        )


def source_hash(metric: Any) -> str | None:
    """Hash of the file of a user's own metric, so that editing it measures again; else None."""
    file = inspect.getsourcefile(metric) if inspect.isfunction(metric) else None
    return hash_file(Path(file)) if file and Path(file).is_file() else None
