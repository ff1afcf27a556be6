"""A run being worked on: what it is about, and what its stages give together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from trtune.calibrate.sessions import device_of
from trtune.configs.progress import Progress
from trtune.configs.schema import Config
from trtune.configs.system.cluster import Cluster
from trtune.precision.backends.rtx.support import NAME as RTX_NAME
from trtune.precision.graph.file import Model
from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.plan import PrecisionPlan, is_lowered
from trtune.precision.runtime.api import Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.tune.prepared import MoveCosts, Ready
from trtune.precision.tune.preparing import extended_plan
from trtune.precision.tune.scales import Calibrated
from trtune.reports.measures.sense import Oddity
from trtune.reports.outputs import IN_MEMORY
from trtune.run.backends import Backends, Runtimes, backends_of, check_precisions, rtx_of
from trtune.run.data import RunData, data_of, left_out
from trtune.run.stage import Stage
from trtune.run.stages.accounts import move_costs, weighed
from trtune.run.stages.calibration import calibration
from trtune.run.stages.elsewhere import OtherGpu, targets_of
from trtune.run.stages.engines import candidate_of
from trtune.run.stages.layers import alone
from trtune.run.stages.measuring import Bench, metric_of
from trtune.run.stages.preparing import is_prepared, preparation, prepared_subject
from trtune.run.subject import Subject, plan_by_ranges, plan_by_rules, subject_of
from trtune.run.workspace import Workspace


@dataclass(frozen=True)
class Setup:
    """What a config names, looked at: model, plan by the rules, data, backends. Nothing is written.

    Whatever is wrong with the input shows while this is made, as far as a look can tell.
    """

    config: Config
    subject: Subject
    planned: PrecisionPlan
    calibration: RunData
    evaluation: RunData
    validation: RunData | None
    backends: Backends
    progress: Progress
    cluster: Cluster | None = None
    """Where `runtime.ray` shares out work."""

    @cached_property
    def device(self) -> str:
        """Where networks run, as `runtime.device` says."""
        return device_of(self.config.runtime.device)

    @classmethod
    def of(
        cls,
        config: Config,
        progress: Progress,
        *,
        probe: bool = True,
        must_build: bool = True,
        only: str | None = None,
    ) -> Setup:
        """The setup of a config, with the backends called `only`, if that is given.

        Without `probe` no backend is asked whether it works here; one that `must_build` has to.
        Raises InputError for what is wrong in the config, the model or the data.
        """
        check_precisions(config)
        subjects: list[Subject] = []

        def subject() -> Subject:
            if not subjects:
                subjects.append(subject_of(config))
            return subjects[0]

        def model() -> Model:
            return subject().model

        backends = backends_of(config, model, progress, probe=probe).chosen(only)
        if must_build:
            backends.require()
        data = data_of(config, subject().model)
        planned = plan_by_rules(subject(), config.precision)
        return cls(
            config,
            subject(),
            planned,
            data["calibration"],
            data["evaluation"],
            data.get("validation"),
            backends,
            progress,
        )


def targets_in(config: Config) -> list[OtherGpu]:
    """What the backends of `config` are to build for beside this machine's GPU."""
    shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
    return targets_of(config.backends, shapes, config.data.evaluation.batch)


def wants_float8(setup: Setup) -> bool:
    """Whether scales for float8 are needed: a node is planned in it, or may be moved to it."""
    return bool(setup.planned.fp8_nodes) or FP8 in setup.config.precision.ladder


@dataclass(frozen=True)
class RunWork:
    """A setup, the workspace of its stages, and what both give together."""

    setup: Setup
    workspace: Workspace
    findings: list[Oddity] = field(default_factory=list)
    """What does not make sense in the set-up, for the report."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.workspace.folder

    @cached_property
    def runtimes(self) -> Runtimes:
        """The backends that are present, and which of them have failed."""
        return Runtimes(self.setup.backends.present, self.setup.device)

    @cached_property
    def plain(self) -> Calibrated:
        """The calibration of the model as the config names it."""
        setup = self.setup
        stage = calibration(
            setup.subject,
            setup.planned,
            setup.calibration,
            setup.config.calibration,
            lowerings=setup.backends.lowerings,
            device=self.setup.device,
            cluster=setup.cluster,
            float8=wants_float8(setup),
            progress=setup.progress,
        )
        found = self.workspace.get(stage)
        if found.pictures:
            self.left_out(setup.calibration)
        return found

    @cached_property
    def ready(self) -> Ready | None:
        """The prepared model with its plan and table; None if nothing in it was to be prepared.

        Rewrites that cost something in TensorRT-RTX are not in it.
        """
        setup = self.setup
        if not is_prepared(setup.config.calibration, setup.subject, setup.planned):
            return None
        costs = self._move_costs()
        return replace(self._prepared(costs.dropped), costs=costs)

    def _move_costs(self) -> MoveCosts:
        """What rewrites that stay as nodes cost in TensorRT-RTX, where the config has that backend
        and it builds here."""
        setup = self.setup
        backend = rtx_of(setup.backends.present)
        if backend is None:
            missing = [one.reason for one in setup.backends.absent if one.name == RTX_NAME]
            return MoveCosts(unknown="; ".join(missing))
        before = plan_by_ranges(setup.subject, setup.planned, self.plain)
        without = candidate_of(setup.subject, before, self.plain.table)

        def weigh() -> MoveCosts:
            return weighed(self._prepared, without, self._candidate_of, backend, setup.progress)

        stage = move_costs(self._preparation(()), setup.planned, backend, weigh)
        return self.workspace.get(stage)

    def _candidate_of(self, ready: Ready) -> Candidate:
        """The untuned plan of a prepared model."""
        subject = prepared_subject(self.setup.subject, ready)
        extended = extended_plan(self.setup.planned, subject.view)
        plan = plan_by_ranges(subject, extended, ready.calibrated)
        coded = replace(subject, model=ready.model_for(plan))
        return candidate_of(coded, plan, ready.calibrated.table)

    def _prepared(self, leave: Iterable[str]) -> Ready:
        return self.workspace.get(self._preparation(leave))

    def _preparation(self, leave: Iterable[str]) -> Stage[Ready]:
        setup = self.setup
        return preparation(
            setup.subject,
            setup.planned,
            self.plain,
            setup.calibration,
            setup.config.calibration,
            lowerings=setup.backends.lowerings,
            leave=leave,
            device=self.setup.device,
            float8=wants_float8(setup),
            progress=setup.progress,
        )

    @cached_property
    def subject(self) -> Subject:
        """What is quantized: the prepared model, or the one that the config names."""
        given = self.setup.subject
        return given if self.ready is None else prepared_subject(given, self.ready)

    @property
    def calibrated(self) -> Calibrated:
        """The table of what is quantized, the histograms, and what they cost."""
        return self.plain if self.ready is None else self.ready.calibrated

    def left_out(self, data: RunData) -> list[str]:
        """Samples of `data` that could not be read, also if an earlier run read them."""
        return self.workspace.get(left_out(data))

    @cached_property
    def untuned(self) -> PrecisionPlan:
        """The plan before tuning: by the rules, less what the measured ranges forbid."""
        planned = self.setup.planned
        if not is_lowered(planned):
            return planned
        if self.subject.model is not self.setup.subject.model:
            planned = extended_plan(planned, self.subject.view)
        return plan_by_ranges(self.subject, planned, self.calibrated)

    @cached_property
    def bench(self) -> Bench:
        """What is reported is measured here: on data.evaluation."""
        return self._bench(self.setup.evaluation)

    @cached_property
    def choosing(self) -> Bench:
        """Pins are chosen here: on data.validation, or where there is none on data.evaluation."""
        validation = self.setup.validation
        return self.bench if validation is None else self._bench(validation)

    def _bench(self, data: RunData) -> Bench:
        setup = self.setup
        metric = metric_of(setup.config.precision.target, setup.subject.model)
        kept = min(IN_MEMORY, setup.config.compare.memory // 4)
        return Bench(
            setup.subject.model, metric, data, setup.progress, setup.device, kept, setup.cluster
        )

    def candidate(self, plan: PrecisionPlan) -> Candidate:
        """`plan` with this run's model and table; what is all float is the model as it was."""
        given = self.setup.subject
        if not plan.quantized_nodes and plan.nodes.keys() == given.view.by_name.keys():
            return candidate_of(given, plan, None)
        if self.ready is None:
            return candidate_of(given, plan, self.calibrated.table)
        subject = replace(self.subject, model=self.ready.model_for(plan))
        return candidate_of(subject, plan, self.calibrated.table)

    def model_for(self, plan: PrecisionPlan) -> Model:
        """The model that is lowered for `plan`: prepared ones carry codes where it is int8."""
        return self.subject.model if self.ready is None else self.ready.model_for(plan)


def alone_of(work: RunWork, plan: PrecisionPlan | None = None) -> Stage[dict[str, ErrorSums]]:
    """What each node of `plan`, or of the untuned plan, alone does to the output."""
    setup, section = work.setup, work.setup.config.calibration
    plan = plan or work.untuned
    return alone(
        work.candidate(plan),
        work.subject.view,
        setup.calibration,
        holdout=section.holdout,
        memory=section.memory,
        seconds=setup.config.compare.seconds,
        device=work.setup.device,
        cluster=work.setup.cluster,
        progress=setup.progress,
        name="alone-fp8" if plan is not work.untuned else "alone",
    )
