"""What of a finished run an export is made from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from trtune.calibrate.cache import Cache, load_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import InputError
from trtune.configs.load import load_config
from trtune.configs.schema import Config
from trtune.precision.backends.gpu.profiles import Profile, model_profiles
from trtune.precision.backends.trt.build import Settings
from trtune.precision.backends.trt.weak import constrained_nodes
from trtune.precision.graph.file import Model, load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import FILE, PrecisionPlan
from trtune.precision.quantized.migrate import to_cache
from trtune.reports.record import RunRecord
from trtune.reports.writer import read_record
from trtune.run.backends import tensorrt_settings
from trtune.run.naming import CACHE_FILE, PREPARED_CACHE, PREPARED_MODEL
from trtune.run.subject import subject_of

QDQ_FOLDERS = ("onnxruntime-emulate", "tensorrt_rtx")
"""Folders of a run whose model.onnx is the Q/DQ model as TensorRT wants it."""
RESERVED = re.compile(r"[:,;*]")
"""Characters that trtexec's and DeepStream's lists of layers take for their own."""


def implicit_plan(plan: PrecisionPlan) -> PrecisionPlan:
    """`plan` as calibration cache and flags can say it: what is FP8 is float there."""
    return plan.pin(plan.fp8_nodes, plan.around, "a calibration cache has no FP8", origin=FILE)


@dataclass(frozen=True)
class Bundle:
    """A run, read back: its record, config, FP32 model, plan and table.

    `model` is the FP32 network that the scales were measured on, normalised. Nodes that must be
    named in a list of layers are renamed in it where their names hold `RESERVED` characters;
    `constrained` maps those names to their precisions. `table` is None if nothing is int8.
    """

    run: Path
    record: RunRecord
    config: Config
    model: Model
    plan: PrecisionPlan
    table: CalibrationTable | None
    profiles: Mapping[str, Profile]

    @classmethod
    def of(cls, run: Path) -> Bundle:
        """Read the run in folder `run`.

        Raises InputError if it is no finished run, or if its model is not there any more or is
        another one by now.
        """
        run = run if run.is_dir() else run.parent
        record = read_record(run)
        plan = _plan(run / "plan.json")
        config = load_config(run / "config.yaml", check=False)
        prepared = bool(record.prepared)
        model = _model(run, config, record, prepared=prepared)
        cache = run / (PREPARED_CACHE if prepared else CACHE_FILE)
        table = load_table(cache, allow_unkeyed=True) if plan.quantized_nodes else None
        shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
        profiles = model_profiles(model, shapes, batch=config.data.evaluation.batch)
        return cls(run, record, config, model, plan, table, profiles)

    @cached_property
    def settings(self) -> Settings:
        """How TensorRT is to build, as the config says it, or its defaults."""
        found = (tensorrt_settings(b) for b in self.config.backends if b.name == "tensorrt")
        return replace(next(found, Settings()), timing_cache=None)

    @cached_property
    def _renamed(self) -> Mapping[str, str]:
        taken = {node.name for node in self.model.proto.graph.node}
        return unreserved(constrained_nodes(implicit_plan(self.plan)), taken)

    @cached_property
    def constrained(self) -> dict[str, str]:
        """Layer -> the precision that TensorRT 10 must be held to, as `fp32` names the layers."""
        pins = constrained_nodes(implicit_plan(self.plan))
        return {self._renamed.get(name, name): precision for name, precision in pins.items()}

    @cached_property
    def fp32(self) -> onnx.ModelProto:
        """The FP32 model, with layer names that lists can hold."""
        proto = self.model.proto
        if not self._renamed:
            return proto
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        for node in proto.graph.node:
            node.name = self._renamed.get(node.name, node.name)
        return proto

    @cached_property
    def qdq(self) -> tuple[onnx.ModelProto, Path | None]:
        """The model with the scales in it as Q/DQ, and where its external weights are."""
        for name in QDQ_FOLDERS:
            file = self.run / name / "model.onnx"
            if file.is_file():
                return onnx.load(file, load_external_data=False), file.parent
        table = self.table or CalibrationTable({})
        return lower_emulate(self.model, self.plan, table), self.model.external_dir

    @cached_property
    def _completed(self) -> tuple[Cache, tuple[str, ...]] | None:
        if self.table is None or not implicit_plan(self.plan).int8_nodes:
            return None
        return to_cache(GraphView.of(self.model), self.table, plan=implicit_plan(self.plan))

    @property
    def cache(self) -> Cache | None:
        """The scales with those that TensorRT 10 wants beside; None if nothing is int8."""
        return self._completed[0] if self._completed else None

    @property
    def left_in_float(self) -> tuple[str, ...]:
        """Nodes planned in int8 that TensorRT 10 leaves in float with `cache`."""
        left = self._completed[1] if self._completed else ()
        return tuple(name for name in left if name in implicit_plan(self.plan).int8_nodes)

    @property
    def metadata(self) -> dict[str, str]:
        """What an exported model says of where it comes from."""
        record = self.record
        target = record.target or {}
        versions = (f"{name} {version}" for name, version in record.versions.items())
        return {
            "trtune.name": record.name,
            "trtune.key": record.key,
            "trtune.target": ", ".join(f"{k}: {v}" for k, v in target.items()) or "none",
            "trtune.method": record.calibration.method if record.calibration else "none",
            "trtune.versions": ", ".join(versions),
        }


def unreserved(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """For each of `names` that holds a reserved character, one that does not and is not `taken`.

    >>> unreserved(["a", "b:0", "b,0"], ["b_0"])
    {'b:0': 'b_0_', 'b,0': 'b_0__'}
    """
    used, found = set(taken), {}
    for name in names:
        if RESERVED.search(name):
            other = RESERVED.sub("_", name)
            while other in used:
                other += "_"
            used.add(other)
            found[name] = other
    return found


def _plan(path: Path) -> PrecisionPlan:
    try:
        return PrecisionPlan.from_json(path.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no plan that can be read ({error}); only a finished run can be exported: "
            "trtune run CONFIG"
        ) from error


def _model(run: Path, config: Config, record: RunRecord, *, prepared: bool) -> Model:
    if prepared:
        return load_model(run / PREPARED_MODEL, fold="none")
    subject = subject_of(config)
    expected = record.hashes.get("model")
    if expected and subject.file.sha256 != expected:
        raise InputError(
            f"{config.model.path} is not the model of this run any more (it was changed, or "
            "another file took its place); run it again: trtune run CONFIG"
        )
    return subject.model
