"""The pipeline: every command is one call here, and each stage reuses what is already there.

config = load_config("mobilenet.yaml")
record = run(config)                  # all stages; RunRecord, and runs/NAME-KEY/ with the report
table = calibrate(config)             # or stage by stage
rows = compare(config)
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from trtune.calibrate.cache import load_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ConfigError, DataError
from trtune.configs.files import write_text
from trtune.configs.load import dump_config
from trtune.configs.progress import Progress, announce, enter, silent
from trtune.configs.schema import Config
from trtune.configs.system.cluster import connected
from trtune.configs.system.journal import working_in
from trtune.precision.runtime.api import BuildInfo
from trtune.reports.accuracy import Evaluation
from trtune.reports.html import several_html
from trtune.reports.markdown import several_markdown
from trtune.reports.measures.recognise import task_of
from trtune.reports.measures.sense import (
    Oddity,
    near_chance,
    odd_inputs,
    same_pictures,
    threshold_below_zero,
    unlike_classes,
    unlike_range,
)
from trtune.reports.record import LayerRow, RunRecord
from trtune.reports.tables import read_layers, write_layers
from trtune.reports.writer import differences_of, runs_among, write_report
from trtune.run.comparing import compared, layer_rows
from trtune.run.data import RunData
from trtune.run.naming import run_folder
from trtune.run.record import Started, run_record
from trtune.run.speed.shipping import engine_to_deploy
from trtune.run.stages.elsewhere import check_targets
from trtune.run.stages.engines import TUNED, is_emulation
from trtune.run.stages.layers import gated
from trtune.run.stages.measuring import baseline
from trtune.run.tuning import threshold_of, tuned, tuning
from trtune.run.variants import (
    engines_elsewhere,
    finished,
    gate_engines,
    keep_outputs,
    make_variants,
)
from trtune.run.work import RunWork, Setup, targets_in
from trtune.run.workspace import Workspace

__all__ = ["build", "calibrate", "compare", "report", "run", "run_folder", "tune"]

log = logging.getLogger(__name__)

CHECK, BASELINE, CALIBRATE, COMPARE, TUNE, MEASURE, REPORT = STAGES = (
    *("check", "baseline", "calibrate", "compare", "tune", "measure", "report"),
)
"""What a run tells its `Progress` that it goes through, in order."""

SENSED = 4
"""Batches of calibration data whose values are looked at before anything takes long."""


def run(
    config: Config,
    *,
    out: Path | str = "runs",
    progress: Progress = silent,
    command: str = "",
    force: bool = False,
) -> RunRecord:
    """All stages: gate, calibrate, build, compare, tune, measure, report.

    Writes `run_folder(config, out)`. `command` is what reproduces the run, for the report. `force`
    goes on where the set-up makes no sense (FP32 near chance, say).
    The record's `status` says whether the target is met; the best model is written either way. A
    backend that this machine has not, or that fails, is in the record with its reason.

    Raises InputError for wrong input (nothing is left on the disk then, unless a run was there
    before), TrtuneError for what else the user can act on.

    >>> record = run(load_config("examples/digits/digits.yaml"))    # doctest: +SKIP
    >>> record.status, record.variants[-1].pinned                   # doctest: +SKIP
    """
    formats = tuple(dict.fromkeys([*config.report.formats, "json"]))
    return _whole(config, out, progress, command, formats, force)


def tune(
    config: Config,
    *,
    out: Path | str = "runs",
    progress: Progress = silent,
    command: str = "",
    force: bool = False,
) -> RunRecord:
    """Everything up to the tuned engines, and the record; `report` renders it.

    >>> tune(load_config("mobilenet.yaml")).tuning[-1].pinned     # doctest: +SKIP
    """
    if config.precision.target is None:
        raise ConfigError(
            "precision.target: nothing to tune for; say what must hold, such as "
            "{metric: sqnr_db, min: 20} or {metric: top1, max_drop: 0.005}"
        )
    return _whole(config, out, progress, command, ("json", "csv"), force)


def check_sense(work: RunWork, fp32: Evaluation, *, force: bool = False) -> None:
    """Look whether model, data, labels and target belong together, before anything takes long.

    What is found is in the report. Raises DataError where it makes the run worth nothing, unless
    `force`.
    """
    setup, model = work.setup, work.setup.subject.model
    target = setup.config.precision.target
    task = task_of(model.inputs, model.outputs)
    classes = None if task is None else task.classes
    metric = work.bench.metric
    found = near_chance(fp32.metric, fp32.value, classes, fp32.samples) if target else []
    if target is not None and not metric.is_fidelity:
        threshold = threshold_of(target, fp32, higher=metric.higher)
        found += threshold_below_zero(metric.name, threshold)
    if not metric.is_fidelity and task is not None and task.kind == "classification":
        counted = getattr(setup.evaluation.source, "sorted_classes", None)
        found += unlike_classes(counted, classes)
    found += _shared(setup)
    first = list(islice(setup.calibration.source, SENSED))
    found += odd_inputs(first) + unlike_range(first, known_ranges(setup))
    work.findings[:] = found
    for finding in found:
        log.warning("%s", finding.text)
    stops = [finding for finding in found if finding.stops]
    if stops and not force:
        raise DataError("; ".join(finding.text for finding in stops))


def _shared(setup: Setup) -> list[Oddity]:
    """Findings about pictures in more than one section of the data."""
    calibration, evaluation = setup.calibration, setup.evaluation
    pairs = [(calibration, evaluation)]
    if setup.validation is not None:
        pairs += [(calibration, setup.validation), (setup.validation, evaluation)]
    return [
        finding
        for first, second in pairs
        if first.section != second.section or setup.validation in (first, second)
        for finding in same_pictures(
            _names(first), _names(second), first=first.where, second=second.where
        )
    ]


def known_ranges(setup: Setup) -> dict[str, float]:
    """Input -> amax, where a quantized model or a cache that the config names has one."""
    named, imported = setup.config.calibration.cache, setup.subject.imported
    if imported is not None:
        table = imported.table
    elif named is not None:
        table = load_table(Path(named), allow_unkeyed=True)
    else:
        return {}
    inputs = [spec.name for spec in setup.subject.model.inputs]
    return {name: table.amax(name) for name in inputs if name in table.scales}


def _names(data: RunData) -> list[str]:
    """What `data` reads, by place and name, where its source can tell without reading."""
    names = getattr(data.source, "names", ())
    return [f"{data.section.path}\0{name}" for name in names]


def _whole(
    config: Config,
    out: Path | str,
    progress: Progress,
    command: str,
    formats: tuple[str, ...],
    force: bool = False,
) -> RunRecord:
    """Every stage, in the order that shows what is wrong soonest."""
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    told = Started(command, started, time.perf_counter())
    announce(progress, STAGES)
    enter(progress, CHECK)
    with _working(config, out, progress) as work:
        enter(progress, BASELINE)
        fp32 = work.workspace.get(baseline(work.bench))  # what labels do not fit shows here
        check_sense(work, fp32, force=force)
        gate_engines(work)
        enter(progress, CALIBRATE)
        _ = work.untuned  # which needs the ranges
        enter(progress, COMPARE)
        compared(work)
        enter(progress, TUNE)
        best = tuned(work)
        write_text(work.folder / "plan.json", best.plan.to_json())
        enter(progress, MEASURE)
        done = finished(work, best.plan)
        times = {node: ms for one in done for node, ms in one.speed.nodes.items()}
        accounts = {
            one.backend.name: dict(one.infos[TUNED].precisions)
            for one in done
            if not is_emulation(one.backend)
        }
        rows = layer_rows(work, best.plan, times, accounts)
        engines = engines_elsewhere(work, best.plan)
        variants, lines = make_variants(work, done, engines), keep_outputs(work, done)
        record = run_record(work, best, variants, told, polygraphy=lines)
        enter(progress, REPORT)
        write_report(work.folder, record, rows, formats=formats)
        return record


def calibrate(
    config: Config, *, out: Path | str = "runs", progress: Progress = silent
) -> CalibrationTable:
    """The calibration stage: `calibration.cache` and its key in the run's folder.

    >>> calibrate(load_config("mobilenet.yaml")).scale("input")     # doctest: +SKIP
    """
    with _working(config, out, progress, probe=False, must_build=False) as work:
        return work.plain.table


def build(
    config: Config,
    *,
    out: Path | str = "runs",
    backend: str | None = None,
    progress: Progress = silent,
) -> list[BuildInfo]:
    """Build the engine of every backend, or of those called `backend` (name or label).

    The tuned plan if tuning was done for exactly this model, table and pins, else the untuned one;
    on a CPU FP32, if a run found on this machine that INT8 is slower.
    Those that this machine has not are left out, which the log says.

    >>> [info.path for info in build(load_config("mobilenet.yaml"))]     # doctest: +SKIP
    """
    with _working(config, out, progress, only=backend) as work:
        stage = tuning(work)
        held = work.setup.config.precision.target is not None and work.workspace.holds(stage)
        plan = work.workspace.get(stage).plan if held else work.untuned
        write_text(work.folder / "plan.json", plan.to_json())
        if backend is None:
            engines_elsewhere(work, plan)
        return [engine_to_deploy(work, b, plan) for b in work.runtimes.alive]


def compare(
    config: Config, *, out: Path | str = "runs", progress: Progress = silent
) -> list[LayerRow]:
    """Compare every layer of the untuned model with FP32; writes `layers.csv`.

    >>> min(compare(config), key=lambda row: row.alone_sqnr_db or 99).node     # doctest: +SKIP
    """
    with _working(config, out, progress, must_build=False) as work:
        rows = layer_rows(work, work.untuned)
        write_layers(work.folder / "layers.csv", rows)
        return rows


@contextmanager
def _working(
    config: Config,
    out: Path | str,
    progress: Progress,
    *,
    probe: bool = True,
    must_build: bool = True,
    only: str | None = None,
) -> Iterator[RunWork]:
    """The work on a config in its folder, which is made once the input is known to be right."""
    with working_in(run_folder(config, out)) as place:
        setup = Setup.of(config, progress, probe=probe, must_build=must_build, only=only)
        folder = place.open()
        write_text(folder / "config.yaml", dump_config(config))
        workspace = Workspace(folder, _others(folder, config.name))
        workspace.get(gated(setup.subject.file, setup.calibration))
        with ExitStack() as stack:
            cluster = None
            if config.runtime.ray is not None:
                gpu = setup.device != "cpu"
                cluster = stack.enter_context(connected(config.runtime.ray, gpu=gpu))
            check_targets(targets_in(config), cluster)
            yield RunWork(replace(setup, cluster=cluster), workspace)


def _others(folder: Path, name: str) -> list[Path]:
    """The folders of other runs of this name, the newest first."""
    beside = [
        path
        for path in folder.parent.glob(f"{name}-*")
        if path != folder and path.name[len(name) + 1 :].isalnum() and path.is_dir()
    ]
    return sorted(beside, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def report(
    runs: Sequence[Path | str],
    *,
    formats: Sequence[str] = ("md", "html"),
    together: Path | str | None = None,
) -> list[RunRecord]:
    """Render the reports of finished runs again, from `run.json` and `layers.csv` alone.

    `runs` are run folders or their run.json; what is none is left out, with a
    note in the log; DataError if none is one. `together` is a file for all of them side by side,
    Markdown if it ends in .md, else HTML.

    >>> report(["runs/mobilenet-0123456789"])[0].status     # doctest: +SKIP
    """
    found = runs_among(runs)
    for folder, record in found:
        layers = folder / "layers.csv"
        rows = read_layers(layers) if layers.is_file() else []
        write_report(folder, record, rows, formats=tuple(formats))
    records = [record for _, record in found]
    if together is not None:
        if Path(together).suffix == ".md":
            text = several_markdown(records)
        else:
            text = several_html(records, differences_of(found))
        write_text(Path(together), text)
    return records
