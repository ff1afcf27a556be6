"""The pipeline: every command is one call here, and each stage reuses what is already there.

config = load_config("mobilenet.yaml")
record = run(config)                  # all stages; RunRecord, and runs/NAME-KEY/ with the report
table = calibrate(config)             # or stage by stage
rows = compare(config)
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ConfigError, did_you_mean
from trtune.configs.files import write_text
from trtune.configs.progress import Progress, announce, enter, silent
from trtune.configs.schema import Config
from trtune.precision.runtime.api import BuildInfo
from trtune.reports.html import several_html
from trtune.reports.markdown import several_markdown
from trtune.reports.record import LayerRow, RunRecord
from trtune.reports.tables import read_layers, write_layers
from trtune.reports.writer import read_record, write_report
from trtune.run.assemble import layer_rows, run_record
from trtune.run.inputs import require_usable
from trtune.run.job import Job, run_folder
from trtune.run.store import logged_to, read_stage, write_stage

CHECK, BASELINE, CALIBRATE, COMPARE, TUNE, MEASURE, REPORT = STAGES = (
    *("check", "baseline", "calibrate", "compare", "tune", "measure", "report"),
)
"""What a run tells its `Progress` that it goes through, in order."""

__all__ = ["build", "calibrate", "compare", "report", "run", "run_folder", "tune"]


def run(
    config: Config,
    *,
    out: Path | str = "runs",
    progress: Progress = silent,
    command: str = "",
) -> RunRecord:
    """All stages: gate, calibrate, build, compare, tune, measure, report.

    Writes `run_folder(config, out)`. `command` is what reproduces the run, for the report.
    The record's `status` says whether the target is met; the best model is written either way.

    Raises InputError for wrong input, TrtuneError for what else the user can act on.

    >>> record = run(load_config("examples/digits/digits.yaml"))    # doctest: +SKIP
    >>> record.status, record.variants[-1].pinned                   # doctest: +SKIP
    """
    with logged_to(run_folder(config, out)):
        began = time.perf_counter()
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        job = _prepared(config, out, progress, builds=True)
        record = run_record_of(job, command, started, began)
        enter(progress, REPORT)
        rows = layer_rows(job, job.tuned.plan)
        formats = dict.fromkeys([*config.report.formats, "json"])
        write_report(job.folder, record, rows, formats=tuple(formats))
        return record


def run_record_of(job: Job, command: str, started: str, began: float) -> RunRecord:
    """Do the stages in the order that shows what is wrong soonest, and keep the plan."""
    enter(job.progress, BASELINE)
    _ = job.baseline  # labels that do not fit show here, before calibration
    for backend in job.engines:
        job.gate_engine(backend)
    enter(job.progress, CALIBRATE)
    _ = job.untuned  # which needs the ranges
    enter(job.progress, COMPARE)
    _ = job.layers
    enter(job.progress, TUNE)
    _ = job.tuned
    write_text(job.folder / "plan.json", job.tuned.plan.to_json())
    write_stage(job.folder, "tune", job.tuning_key, {"done": True})
    enter(job.progress, MEASURE)
    return run_record(job, command=command, started=started, began=began)


def _prepared(config: Config, out: Path | str, progress: Progress, *, builds: bool = False) -> Job:
    if builds:
        announce(progress, STAGES)
        enter(progress, CHECK)
    job = Job(config, out, progress)
    if builds:
        require_usable(job.backends)
    _ = job.sources  # model and data are looked at before anything takes time
    job.gate()
    return job


def calibrate(
    config: Config, *, out: Path | str = "runs", progress: Progress = silent
) -> CalibrationTable:
    """The calibration stage: `calibration.cache` and its key in the run's folder.

    >>> calibrate(load_config("mobilenet.yaml")).scale("input")     # doctest: +SKIP
    """
    with logged_to(run_folder(config, out)):
        return _prepared(config, out, progress).table


def build(
    config: Config,
    *,
    out: Path | str = "runs",
    backend: str | None = None,
    progress: Progress = silent,
) -> list[BuildInfo]:
    """Build the engine of every backend, or of those called `backend` (name or label).

    The tuned plan if tuning was done for exactly this model, table and pins, else the untuned one.

    >>> [info.path for info in build(load_config("mobilenet.yaml"))]     # doctest: +SKIP
    """
    with logged_to(run_folder(config, out)):
        job = _prepared(config, out, progress)
        chosen = [b for b in job.backends if backend in (None, b.name, b.name.split("/")[0])]
        if not chosen:
            labels = [b.name for b in job.backends]
            raise ConfigError(
                f"--backend {backend!r} is none of the config's backends "
                f"({', '.join(labels)}){did_you_mean(str(backend), labels)}"
            )
        require_usable(chosen)
        plan = job.tuned.plan if read_stage(job.folder, "tune", job.tuning_key) else job.untuned
        write_text(job.folder / "plan.json", plan.to_json())
        return [job.build(b, plan, job.engine_folder(b)) for b in chosen]


def compare(
    config: Config, *, out: Path | str = "runs", progress: Progress = silent
) -> list[LayerRow]:
    """Compare every layer of the untuned model with FP32; writes `layers.csv`.

    >>> min(compare(config), key=lambda row: row.alone_sqnr_db or 99).node     # doctest: +SKIP
    """
    with logged_to(run_folder(config, out)):
        job = _prepared(config, out, progress)
        rows = layer_rows(job, job.untuned)
        write_layers(job.folder / "layers.csv", rows)
        return rows


def tune(
    config: Config,
    *,
    out: Path | str = "runs",
    progress: Progress = silent,
    command: str = "",
) -> RunRecord:
    """Everything up to the tuned engines, and the record; `report` renders it.

    >>> tune(load_config("mobilenet.yaml")).tuning[-1].pinned     # doctest: +SKIP
    """
    if config.precision.target is None:
        raise ConfigError(
            "precision.target: nothing to tune for; say what must hold, such as "
            "{metric: sqnr_db, min: 20} or {metric: top1, max_drop: 0.005}"
        )
    with logged_to(run_folder(config, out)):
        began = time.perf_counter()
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        job = _prepared(config, out, progress, builds=True)
        record = run_record_of(job, command, started, began)
        rows = layer_rows(job, job.tuned.plan)
        write_report(job.folder, record, rows, formats=("json", "csv"))
        return record


def report(
    runs: Sequence[Path | str],
    *,
    formats: Sequence[str] = ("md", "html"),
    together: Path | str | None = None,
) -> list[RunRecord]:
    """Render the reports of finished runs again, from `run.json` and `layers.csv` alone.

    `runs` are run folders or their run.json. `together` is a file for all of them side by side,
    Markdown if it ends in .md, else HTML. Raises DataError for a run that is none.

    >>> report(["runs/mobilenet-0123456789"])[0].status     # doctest: +SKIP
    """
    records = []
    for place in map(Path, runs):
        record = read_record(place)
        folder = place if place.is_dir() else place.parent
        layers = folder / "layers.csv"
        rows = read_layers(layers) if layers.is_file() else []
        write_report(folder, record, rows, formats=tuple(formats))
        records.append(record)
    if together is not None:
        draw = several_markdown if Path(together).suffix == ".md" else several_html
        write_text(Path(together), draw(records))
    return records
