"""The command line. Every command is one call of the package, and what it shows.

Imports stand inside the commands, so that `trtune --help` is quick.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtune import __version__
from trtune.cli.console import session
from trtune.cli.options import SETTINGS, ConfigFile, Force, Json, ModelFile, Out, Overrides, Verbose
from trtune.cli.quantized import migrate, qdq_app

if TYPE_CHECKING:
    from trtune.configs.schema import Config
    from trtune.reports.record import RunRecord

EXIT_STATUS = {"met": 0, "missed": 3, "failed": 1}
STATUSES = (
    "Exit status: 0 done and target met, 3 done but target missed, 2 the input is wrong, "
    "1 anything else, 130 interrupted."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings=SETTINGS,
    pretty_exceptions_enable=False,
    epilog=f"Start with: trtune init model.onnx\n\n{STATUSES}",
)
cache_app = typer.Typer(
    no_args_is_help=True,
    context_settings=SETTINGS,
    help="Read, convert and compare TensorRT calibration caches.",
)
app.add_typer(cache_app, name="cache")
app.add_typer(qdq_app, name="qdq")
app.command(epilog="Example: trtune migrate --cache old.cache --model m.onnx --pins layers.txt")(
    migrate
)

RUNS = Path("runs")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trtune {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Calibrate, tune and prove INT8 models for NVIDIA TensorRT, on any CPU."""


@app.command(epilog=f"Example: trtune run model.yaml --set calibration.method=auto\n\n{STATUSES}")
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Do everything: calibrate, build, compare, tune and report; then show the result."""
    _whole("run", config, overrides, out, verbose=verbose, as_json=as_json)


@app.command(epilog=f"Example: trtune tune model.yaml --set precision.max_pins=8\n\n{STATUSES}")
def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Pin the nodes that hurt most until the target is met; what is already there is reused."""
    _whole("tune", config, overrides, out, verbose=verbose, as_json=as_json)


@app.command(epilog="Example: trtune calibrate model.yaml --set calibration.method=percentile")
def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Turn the calibration data into scales, kept as a TensorRT calibration cache."""
    with session(verbose=verbose, as_json=as_json, resumes=True) as terminal:
        loaded = _load(config, overrides)
        from trtune import tools
        from trtune.cli import show
        from trtune.run import pipeline

        table = pipeline.calibrate(loaded, out=out, progress=terminal.progress)
        folder = pipeline.run_folder(loaded, out)
        pictures = tools.dominant_pictures(folder) if loaded.calibration.cache is None else []
        value = {
            "cache": str(folder / "calibration.cache"),
            "scales": table.scales,
            "methods": table.methods,
            "provenance": table.provenance,
            "dominant": [dataclasses.asdict(picture) for picture in pictures],
        }
        where = f"cache: {show.near(folder / 'calibration.cache')}"
        terminal.result(value, *show.calibration_summary(table, pictures), where)


@app.command(epilog="Example: trtune build model.yaml --backend onnxruntime/deploy")
def build(
    config: ConfigFile,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only this backend: tensorrt_rtx, onnxruntime, onnxruntime/deploy, ...",
        ),
    ] = None,
    overrides: Overrides = None,
    out: Out = RUNS,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write the engine of each backend: with the tuned plan if there is one, else the untuned."""
    with session(verbose=verbose, as_json=as_json, resumes=True) as terminal:
        loaded = _load(config, overrides)
        from trtune.cli import show
        from trtune.run import pipeline

        infos = pipeline.build(loaded, out=out, backend=backend, progress=terminal.progress)
        value = [{f.name: getattr(i, f.name) for f in dataclasses.fields(i)} for i in infos]
        terminal.result(value, *show.build_table(infos))


@app.command(epilog="Example: trtune compare model.yaml --set compare.pictures=64")
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compare every layer with FP32 and show the worst; all of them go to layers.csv."""
    with session(verbose=verbose, as_json=as_json, resumes=True) as terminal:
        loaded = _load(config, overrides)
        from trtune.cli import show
        from trtune.run import pipeline

        rows = pipeline.compare(loaded, out=out, progress=terminal.progress)
        layers = pipeline.run_folder(loaded, out) / "layers.csv"
        where = f"all {len(rows)} layers: {show.near(layers)}"
        terminal.result([row.model_dump() for row in rows], *show.layer_tables(rows), where)


@app.command(epilog="Example: trtune report runs/a-1f2e3d runs/b-4c5b6a -o both.html")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their run.json.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="All side by side in one .html or .md file."
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write the reports of finished runs again from run.json; several are put side by side."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune.cli import show
        from trtune.reports.terminal import render_result, render_several
        from trtune.run import pipeline

        folders = [path if path.is_dir() else path.parent for path in map(_existing, runs)]
        records = pipeline.report(folders, together=output)
        shown: list[Any] = []
        for folder, record in zip(folders, records, strict=True):
            shown += [render_result(record), _where_report_is(folder), ""]
        if len(records) > 1:
            shown.append(render_several(records))
        if output is not None:
            shown.append(f"side by side: {show.near(output)}")
        terminal.result(
            [record.model_dump(mode="json", by_alias=True) for record in records], *shown
        )


@app.command(epilog="Example: trtune inspect model.onnx -v")
def inspect(model: ModelFile, verbose: Verbose = False, as_json: Json = False) -> None:
    """Show what an ONNX model holds, which nodes can be quantized and why the others cannot; of an
    engine plan, how it was built and what it runs in."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune import tools
        from trtune.cli import show

        if tools.is_engine(model):
            info = tools.inspect_engine(model)
            value = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
            terminal.result(value, *show.engine(info, every_node=verbose))
            return
        found = tools.inspect(model)
        terminal.result(found.to_dict(), *show.inspection(found, every_node=verbose))


@app.command(epilog="Example: trtune init model.onnx -o configs/model.yaml")
def init(
    model: ModelFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: MODEL's name with .yaml."),
    ] = None,
    force: Force = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write a commented config for a model, with its inputs, shapes and dtypes filled in."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune import tools
        from trtune.cli import show

        written = tools.init_config(model, output, overwrite=force)
        path = show.near(written)
        advice = "fill in data.calibration.path, then: trtune run " + shlex.quote(path)
        terminal.result({"config": str(written)}, f"wrote {path}; {advice}")


@app.command()
def doctor(verbose: Verbose = False, as_json: Json = False) -> None:
    """Say of every backend whether it works on this machine, and if not, why and what to do."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune.cli import show
        from trtune.doctor import DEFAULT, diagnose

        found = diagnose()
        value = {name: dataclasses.asdict(state) for name, state in found.items()}
        terminal.result(value, show.backend_table(found))
        raise typer.Exit(0 if found[DEFAULT].usable else 1)


@app.command(epilog="Example: trtune schema > trtune.schema.json")
def schema(verbose: Verbose = False, as_json: Json = True) -> None:
    """Print the JSON Schema of the config, for editors (it is JSON with or without --json)."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune.configs.load import json_schema

        terminal.result(json_schema())


@cache_app.command("show", epilog="Example: trtune cache show calibration.cache")
def cache_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The calibration cache.")],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show the scale and amax of every tensor, and what the header means."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune.calibrate.cache import read_cache
        from trtune.cli import show

        cache = read_cache(file)
        value = {
            "header": cache.header,
            "version": list(cache.version),
            "algorithm": cache.algorithm,
            "scales": cache.scales,
            **({"no_range": list(cache.no_range)} if cache.no_range else {}),
            **({"origin": cache.origin} if cache.origin else {}),
        }
        terminal.result(value, *show.cache_table(file, cache))


@cache_app.command(
    "convert", epilog="Example: trtune cache convert old.cache --to 10.14.1 -o new.cache"
)
def cache_convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The calibration cache.")],
    to: Annotated[
        str, typer.Option("--to", metavar="VERSION", help="TensorRT version, such as 10.14.1.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.")],
    force: Force = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write the same scales under the header of another TensorRT version."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune import tools
        from trtune.cli import show

        cache = tools.convert_cache(file, to, output, overwrite=force)
        value = {"cache": str(output), "header": cache.header, "tensors": len(cache.scales)}
        terminal.result(value, f"wrote {show.near(output)} with the header {cache.header}")


@cache_app.command(
    "diff",
    epilog="Exit status, as of diff(1): 0 the scales are equal, 1 they differ, 2 a file is wrong.",
)
def cache_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A calibration cache.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show the tensors whose scales differ, the missing ones first; headers do not count."""
    with session(verbose=verbose, as_json=as_json) as terminal:
        from trtune.calibrate.cache import diff, read_cache
        from trtune.cli import show

        a, b = read_cache(first), read_cache(second)
        rows = diff(a, b)
        value = {
            "headers": [a.header, b.header],
            "differences": [dataclasses.asdict(row) for row in rows],
        }
        terminal.result(value, *show.difference_table((first, second), (a, b), rows))
        raise typer.Exit(1 if rows else 0)


def _load(path: Path, overrides: list[str] | None) -> Config:
    from trtune.configs.load import load_config

    return load_config(path, overrides=overrides or ())


def _whole(
    stage: str,
    path: Path,
    overrides: list[str] | None,
    out: Path,
    *,
    verbose: bool,
    as_json: bool,
) -> None:
    with session(verbose=verbose, as_json=as_json, resumes=True) as terminal:
        config = _load(path, overrides)
        from trtune.reports.terminal import render_result
        from trtune.run import pipeline

        command = _command(stage, path, overrides, out)
        stages = {"run": pipeline.run, "tune": pipeline.tune}
        record: RunRecord = stages[stage](
            config, out=out, progress=terminal.progress, command=command
        )
        where = _where_report_is(pipeline.run_folder(config, out))
        terminal.result(record.to_json(), render_result(record), where)
        raise typer.Exit(EXIT_STATUS[record.status])


def _command(stage: str, path: Path, overrides: list[str] | None, out: Path) -> str:
    """What to type to get the same again."""
    words = ["trtune", stage, str(path)]
    for override in overrides or ():
        words += ["--set", override]
    return shlex.join(words if out == RUNS else [*words, "--out", str(out)])


def _where_report_is(folder: Path) -> str:
    from trtune.cli import show

    for name in ("report.html", "report.md"):
        if (folder / name).is_file():
            return f"report: {show.near(folder / name)}"
    path = show.near(folder)
    return f"record: {path}/run.json; `trtune report {shlex.quote(path)}` draws the report"


def _existing(path: Path) -> Path:
    from trtune.configs.errors import DataError, did_you_mean

    if path.exists():
        return path
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    runs = [str(child) for child in beside if (child / "run.json").is_file()]
    raise DataError(f"{path}: no such run{did_you_mean(str(path), runs)}")


def main() -> None:
    """The program `trtune`."""
    app(prog_name="trtune")
