"""The command line. Every command is one call of the package, and what it shows.

Imports stand inside the commands, so that `trtune --help` is quick. The order in which commands are
added here is that in which they are used, and that of `trtune --help`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from trtune import __version__
from trtune.cli import exports, files, quantized, stages, traces
from trtune.cli.caches import cache_app
from trtune.cli.command import SETTINGS, STATUSES

START, WORK, DEVICE, OTHERS, HERE = (
    "Start",
    "From a config to engines: all of it, or a stage at a time",
    "From a run to the device",
    "Caches and quantized models",
    "This machine and the config's language",
)
ORDER = {
    START: (files.init, files.inspect),
    WORK: (stages.run, stages.calibrate, stages.build, stages.compare, stages.tune, stages.report),
    DEVICE: (exports.export_command,),
    OTHERS: (quantized.migrate, traces.explain_file),
    HERE: (files.doctor, files.schema),
}

app = typer.Typer(
    no_args_is_help=True,
    context_settings=SETTINGS,
    pretty_exceptions_enable=False,
    epilog=f"Start with: trtune init model.onnx\n\n{STATUSES}",
)
for panel, commands in ORDER.items():
    for entry in commands:
        entry.add_to(app, panel)
app.add_typer(quantized.qdq_app, name="qdq", rich_help_panel=OTHERS)
app.add_typer(cache_app, name="cache", rich_help_panel=OTHERS)


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


def main() -> None:
    """The program `trtune`."""
    app(prog_name="trtune")
