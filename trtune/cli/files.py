"""The commands on a model, on this machine, and on the config's own language."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from trtune.cli.command import Force, ModelFile, command
from trtune.cli.console import Terminal
from trtune.configs.errors import InputError


@command(epilog="Example: trtune init model.onnx -o configs/model.yaml")
def init(
    terminal: Terminal,
    model: ModelFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: MODEL's name with .yaml."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Fill in this data, and of the usual preprocessings the best on FP32.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a commented config for a model, with its inputs, shapes and dtypes filled in."""
    from trtune import tools
    from trtune.cli import show

    found: list[str] = []
    written = tools.init_config(
        model, output, data=data, overwrite=force, progress=terminal.progress, told=found.extend
    )
    path = show.near(written)
    first = "fill in data.calibration.path, then: " if data is None else "next: "
    advice = f"{first}trtune run {shlex.quote(path)}"
    value = {"config": str(written)} if data is None else {"config": str(written), "found": found}
    said = [] if data is None else found
    terminal.result(value, *said, f"wrote {path}; {advice}")


@command(epilog="Example: trtune inspect model.onnx -v")
def inspect(
    terminal: Terminal,
    model: ModelFile,
    layers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `trtexec --exportLayerInfo` wrote."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `trtexec --exportProfile` wrote.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the layers of an engine as a page, too."),
    ] = None,
    force: Force = False,
) -> None:
    """Show what an ONNX model holds, which nodes can be quantized and why the others cannot; of an
    engine plan, how it was built and what it runs in, or what the file itself says; of layers that
    trtexec exported, what runs in which precision, for how long, and what is wrong with it."""
    from trtune import tools
    from trtune.cli import show, traces
    from trtune.precision.backends.trt.layer_table import is_layer_info

    if layers is not None or profile is not None or is_layer_info(model):
        traces.show_layers(terminal, model, layers, profile, html, force=force)
        return
    if html is not None:
        raise InputError(
            f"--html: {model} holds no layers of an engine; give them with --layers FILE, as "
            "`trtexec --exportLayerInfo=FILE` writes them"
        )
    if tools.is_bare_plan(model):
        traces.show_plan(terminal, model)
        return
    if tools.is_engine(model):
        info = tools.inspect_engine(model)
        value = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
        terminal.result(value, *show.engine(info, every_node=terminal.verbose))
        return
    found = tools.inspect(model)
    terminal.result(found.to_dict(), *show.inspection(found, every_node=terminal.verbose))


@command()
def doctor(terminal: Terminal) -> None:
    """Say of every backend whether it works on this machine, and if not, why and what to do."""
    from trtune.cli import show
    from trtune.doctor import DEFAULT_BACKEND, diagnose

    found = diagnose()
    value = {name: dataclasses.asdict(state) for name, state in found.items()}
    terminal.result(value, show.backend_table(found))
    raise typer.Exit(0 if found[DEFAULT_BACKEND].usable else 1)


@command(epilog="Example: trtune schema > trtune.schema.json")
def schema(terminal: Terminal) -> None:
    """Print the JSON Schema of the config, for editors (it is JSON with or without --json)."""
    from trtune.configs.load import json_schema

    terminal.write_json(json_schema())
