"""The commands on a config, in the order of their use, and on the runs that they leave."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtune.cli.command import STATUSES, Given, command
from trtune.cli.console import Terminal

if TYPE_CHECKING:
    from trtune.reports.record import RunRecord

GoOn = Annotated[
    bool, typer.Option("--force", help="Go on where FP32 is near chance or the data looks wrong.")
]
EXIT_STATUS = {"met": 0, "missed": 3, "failed": 1}


@command(epilog=f"Example: trtune run model.yaml --set calibration.method=auto\n\n{STATUSES}")
def run(terminal: Terminal, given: Given, force: GoOn = False) -> None:
    """Do everything: calibrate, build, compare, tune and report; then show the result."""
    config = given.load()
    from trtune.run import pipeline

    record = pipeline.run(
        config, out=given.out, progress=terminal.progress, command=given.words(), force=force
    )
    _finish(terminal, record, pipeline.run_folder(config, given.out))


@command(epilog="Example: trtune calibrate model.yaml --set calibration.method=percentile")
def calibrate(terminal: Terminal, given: Given) -> None:
    """Turn the calibration data into scales, kept as a TensorRT calibration cache."""
    config = given.load()
    from trtune import tools
    from trtune.cli import show
    from trtune.run import pipeline

    table = pipeline.calibrate(config, out=given.out, progress=terminal.progress)
    folder = pipeline.run_folder(config, given.out)
    pictures = tools.dominant_pictures(folder) if config.calibration.cache is None else []
    value = {
        "cache": str(folder / "calibration.cache"),
        "scales": table.scales,
        "methods": table.methods,
        "provenance": table.provenance,
        "dominant": [dataclasses.asdict(picture) for picture in pictures],
    }
    where = f"cache: {show.near(folder / 'calibration.cache')}"
    terminal.result(value, *show.calibration_summary(table, pictures), where)


@command(epilog="Example: trtune build model.yaml --backend onnxruntime/deploy")
def build(
    terminal: Terminal,
    given: Given,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only this backend: tensorrt_rtx, onnxruntime, onnxruntime/deploy, ...",
        ),
    ] = None,
) -> None:
    """Write the engine of each backend: with the tuned plan if there is one, else the untuned."""
    config = given.load()
    from trtune.cli import show
    from trtune.run import pipeline

    infos = pipeline.build(config, out=given.out, backend=backend, progress=terminal.progress)
    value = [{f.name: getattr(i, f.name) for f in dataclasses.fields(i)} for i in infos]
    terminal.result(value, *show.build_table(infos))


@command(epilog="Example: trtune compare model.yaml --set compare.pictures=64")
def compare(terminal: Terminal, given: Given) -> None:
    """Compare every layer with FP32 and show the worst; all of them go to layers.csv."""
    config = given.load()
    from trtune.cli import show
    from trtune.run import pipeline

    rows = pipeline.compare(config, out=given.out, progress=terminal.progress)
    layers = pipeline.run_folder(config, given.out) / "layers.csv"
    where = f"all {len(rows)} layers: {show.near(layers)}"
    terminal.result([row.model_dump() for row in rows], *show.layer_tables(rows), where)


@command(epilog=f"Example: trtune tune model.yaml --set precision.max_pins=8\n\n{STATUSES}")
def tune(terminal: Terminal, given: Given, force: GoOn = False) -> None:
    """Pin the nodes that hurt most until the target is met; what is already there is reused."""
    config = given.load()
    from trtune.run import pipeline

    record = pipeline.tune(
        config, out=given.out, progress=terminal.progress, command=given.words(), force=force
    )
    _finish(terminal, record, pipeline.run_folder(config, given.out))


@command(epilog="Example: trtune report runs/* -o all.html")
def report(
    terminal: Terminal,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their run.json.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="All side by side in one .html or .md file."
        ),
    ] = None,
) -> None:
    """Write the reports of finished runs again from run.json; several are put side by side. Of
    several, what is no run is left out with a note."""
    from trtune.cli import show
    from trtune.reports.terminal import render_result, render_several
    from trtune.run import pipeline

    places = _runs_among(terminal, runs)
    folders = [path if path.is_dir() else path.parent for path in places]
    records = pipeline.report(places, together=output)
    shown: list[Any] = []
    for folder, record in zip(folders, records, strict=True):
        shown += [render_result(record), _where_report_is(folder), ""]
    if len(records) > 1:
        shown.append(render_several(records))
    if output is not None:
        shown.append(f"side by side: {show.near(output)}")
    terminal.result([record.model_dump(mode="json", by_alias=True) for record in records], *shown)


def _finish(terminal: Terminal, record: RunRecord, folder: Path) -> None:
    from trtune.cli import github
    from trtune.reports.terminal import render_result

    terminal.result(record.to_json(), render_result(record), _where_report_is(folder))
    github.summarize(terminal.err.file, record)
    raise typer.Exit(EXIT_STATUS[record.status])


def _where_report_is(folder: Path) -> str:
    from trtune.cli import show

    for name in ("report.html", "report.md"):
        if (folder / name).is_file():
            return f"report: {show.near(folder / name)}"
    path = show.near(folder)
    return f"record: {path}/run.json; `trtune report {shlex.quote(path)}` draws the report"


def _runs_among(terminal: Terminal, paths: Iterable[Path]) -> list[Path]:
    """The paths that are finished runs; the others are named in a note.

    Raises DataError for a path that is not there, or if none is a run.
    """
    from trtune.configs.errors import DataError
    from trtune.reports.writer import read_record

    found, problems = [], []
    for path in map(_existing, paths):
        try:
            read_record(path)
        except DataError as error:
            problems.append(error)
        else:
            found.append(path)
    if problems and not found:
        raise DataError("\n".join(map(str, problems)))
    for problem in problems:
        terminal.note(f"left out: {problem}")
    return found


def _existing(path: Path) -> Path:
    from trtune.configs.errors import DataError, did_you_mean

    if path.exists():
        return path
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    runs = [str(child) for child in beside if (child / "run.json").is_file()]
    raise DataError(f"{path}: no such run{did_you_mean(str(path), runs)}")
