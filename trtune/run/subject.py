"""What a run works on: the model, and the plan for it before anything was measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trtune.configs.schema import Config
from trtune.configs.schema import Precision as PrecisionSection
from trtune.precision.graph.file import Model, load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_rules import keep_fp32, refuse_half_model
from trtune.precision.plan.imported import QAT
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.describe import refuse_quantized
from trtune.precision.quantized.importing import Imported, import_quantized
from trtune.precision.tune.scales import Calibrated, without_zero_ranges

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

    Raises ModelError if it cannot be read, or its quantization cannot be taken as it is.
    """
    section, path = config.precision, Path(config.model.path)
    if section.default != QAT:
        model = load_model(path, outputs=config.model.outputs)
        return Subject(model, GraphView.of(model))
    imported = import_quantized(
        path,
        allow_requantize=section.allow_requantize,
        fallback=section.fallback,
        pins=section.pin,
    )
    return Subject(imported.model, GraphView.of(imported.model), imported)


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
    if plan.int8_nodes or plan.halves:
        refuse_half_model(subject.view)
    elif section.default == "int8":
        log.warning("nothing is quantizable in this model with these pins: it stays fp32")
    return plan


def plan_by_ranges(
    subject: Subject, planned: PrecisionPlan, calibrated: Calibrated
) -> PrecisionPlan:
    """`planned` less what the measured ranges forbid: the plan before tuning."""
    plan = planned
    if plan.int8_nodes:
        plan = without_zero_ranges(subject.view, plan, calibrated.table)
    if plan.halves:
        plan = keep_fp32(subject.view, plan, calibrated.histograms)
    return plan


def fp32_plan(subject: Subject) -> PrecisionPlan:
    """Everything in FP32."""
    return make_plan(subject.view, default="fp32")
