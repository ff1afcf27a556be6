"""What a run works on: the model, and the plan for it before anything was measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from trtune.configs.errors import ConfigError, did_you_mean
from trtune.configs.schema import Config
from trtune.configs.schema import Precision as PrecisionSection
from trtune.precision.graph.file import Model, load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_rules import keep_fp32, refuse_half_model
from trtune.precision.plan.imported import QAT
from trtune.precision.plan.placement import without_zero_ranges
from trtune.precision.plan.plan import QUANTIZED, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.describe import refuse_quantized
from trtune.precision.quantized.importing import Imported, import_quantized
from trtune.precision.tune.scales import Calibrated

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """The normalised FP32 model and its graph; `imported` where it comes from a quantized one."""

    model: Model
    view: GraphView
    imported: Imported | None = None

    @property
    def file(self) -> Model:
        """The user's file as it stands, normalised."""
        return self.model if self.imported is None else self.imported.original


def subject_of(config: Config) -> Subject:
    """The subject that the config names; of a quantized model what it is without quantization.

    A file that computes in half precision is raised to float32, unless everything is to be left in
    the types of the file (`precision.default: fp32`).

    Raises ModelError if it cannot be read, or its quantization cannot be taken as it is,
    ConfigError if it lacks an output that is to be judged.
    """
    section, path = config.precision, Path(config.model.path)
    if section.default != QAT:
        loaded = load_model(
            path,
            outputs=config.model.outputs,
            constants=config.model.constants,
            widen={section.default, *section.pin.values()} != {"fp32"},
        )
        model = judged_by(loaded, config)
        return Subject(model, GraphView.of(model))
    if config.model.constants:
        raise ConfigError(
            "model.constants: a quantized model (precision.default: qat) is taken as it stands; "
            "give its inputs their values in data.calibration.feed"
        )
    imported = import_quantized(
        path,
        outputs=config.model.outputs,
        allow_requantize=section.allow_requantize,
        fallback=section.fallback,
        pins=section.pin,
    )
    model = judged_by(imported.model, config)
    return Subject(model, GraphView.of(model), imported)


def judged_by(model: Model, config: Config) -> Model:
    """`model` with the outputs that the config counts: `outputs`, or the target's `output`.

    And with the axes of `data.*.axis`, along which samples lie in its inputs.

    Raises ConfigError for one that the model has not.
    """
    target = config.precision.target
    one = (target.output,) if target is not None and target.output else ()
    key, names = ("outputs", config.outputs) if config.outputs else ("precision.target.output", one)
    known = [spec.name for spec in model.outputs]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{key}: the model has no output {name!r}{did_you_mean(name, known)} "
                f"(outputs: {', '.join(map(repr, known))})"
            )
    axes = {**config.data.evaluation.axis, **config.data.calibration.axis}
    inputs = tuple(replace(spec, axis=axes.get(spec.name)) for spec in model.inputs)
    return replace(model, counted=tuple(names), inputs=inputs)


def plan_by_rules(subject: Subject, section: PrecisionSection) -> PrecisionPlan:
    """The plan by the rules and the user's pins.

    Raises ConfigError for a pin of nothing, ModelError for a quantized model that is not imported.
    """
    if subject.imported is not None:
        return subject.imported.plan
    refuse_quantized(subject.view, section.default)
    plan = make_plan(
        subject.view, default=section.default, fallback=section.fallback, pins=section.pin
    )
    if plan.quantized_nodes or plan.halves:
        refuse_half_model(subject.view)
    elif section.default in QUANTIZED:
        log.warning("nothing is quantizable in this model with these pins: it stays fp32")
    return plan


def plan_by_ranges(
    subject: Subject, planned: PrecisionPlan, calibrated: Calibrated
) -> PrecisionPlan:
    """`planned` less what the measured ranges forbid: the plan before tuning."""
    plan = planned
    if plan.quantized_nodes:
        plan = without_zero_ranges(subject.view, plan, calibrated.table)
    if plan.halves:
        plan = keep_fp32(subject.view, plan, calibrated.histograms)
    return plan


def fp32_plan(subject: Subject) -> PrecisionPlan:
    """Everything in FP32."""
    return make_plan(subject.view, default="fp32")
