"""The command that hands a run on to where engines go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtune.cli.command import command
from trtune.cli.console import Terminal


@command(name="export", epilog="Example: trtune export runs/NAME-KEY --to trtexec")
def export_command(
    terminal: Terminal,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="TOOL", help="trtexec, deepstream, triton, ort, polygraphy."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where to; default: export-TOOL in RUN."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that holds files.")
    ] = False,
) -> None:
    """Write a run as the files that a tool on the device reads, with the next command there."""
    from trtune.cli import show
    from trtune.export.targets import export_run

    done = export_run(run, to, output, overwrite=force)
    value = {
        "target": done.target,
        "folder": str(done.folder),
        "files": list(done.files),
        "steps": [{"title": step.title, "command": step.command} for step in done.steps],
        "notes": list(done.notes),
    }
    lines = [f"wrote {show.near(done.folder)}: {', '.join(done.files)}"]
    for step in done.steps:
        lines += [f"{step.title}:", f"  {step.command}"]
    terminal.result(value, *lines, *(f"note: {note}" for note in done.notes))
