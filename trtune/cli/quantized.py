"""The commands for what is quantized already: Q/DQ models, and caches of earlier TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from trtune.cli.command import SETTINGS, Force, ModelFile, command
from trtune.cli.console import Terminal

qdq_app = typer.Typer(
    no_args_is_help=True,
    context_settings=SETTINGS,
    help="Take the Q/DQ of a quantized ONNX model out, look at it, and put it in.",
)

Requantize = Annotated[
    bool,
    typer.Option(
        "--allow-requantize",
        help="Make symmetric what is not (uint8, zero points); that changes the numbers.",
    ),
]


@command(epilog="Example: trtune qdq lint model_qat.onnx -v")
def lint(
    terminal: Terminal,
    model: ModelFile,
    allow_requantize: Requantize = False,
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Build the file as it stands with TensorRT-RTX, and show what it says."
        ),
    ] = False,
    compute_capability: Annotated[
        str, typer.Option(metavar="CC", help="The GPU that --build builds for.")
    ] = "8.9",
) -> None:
    """Show what TensorRT would not take of a model's Q/DQ, and what is repaired. Exit status 1 if
    something is left that stands in the way."""
    from trtune import tools
    from trtune.cli import show
    from trtune.precision.quantized.importing import lint_model

    found = lint_model(model, allow_requantize=allow_requantize)
    value: Any = [finding.to_dict() for finding in found]
    lines = [*show.findings(model, found, every=terminal.verbose)]
    if build:
        seen = tools.lint_against_builder(model, found, compute_capability)
        value = {"findings": value, "build": dataclasses.asdict(seen)}
        value["build"]["disagreements"] = list(seen.disagreements)
        lines += show.built_as_it_is(seen, compute_capability)
    terminal.result(value, *lines)
    raise typer.Exit(1 if any(finding.blocks for finding in found) else 0)


@command(epilog="Example: trtune qdq strip qat.onnx -o fp32.onnx --cache q.cache")
def strip(
    terminal: Terminal,
    model: ModelFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The FP32 ONNX model.")
    ],
    cache: Annotated[
        Path, typer.Option("--cache", metavar="FILE", help="The scales, as a calibration cache.")
    ],
    allow_requantize: Requantize = False,
    force: Force = False,
) -> None:
    """Write the FP32 model in a quantized one, and its scales as a cache for TensorRT 10."""
    from trtune import tools
    from trtune.cli import show

    found = tools.strip_qdq(model, output, cache, requantize=allow_requantize, overwrite=force)
    value = {"model": str(output), "cache": str(cache), "tensors": len(found.table.scales)}
    where = f"wrote {show.near(output)} and {show.near(cache)}"
    terminal.result(value, f"{where} ({len(found.table.scales)} scales)")


@command(epilog="Example: trtune qdq insert fp32.onnx q.cache -o qdq.onnx")
def insert(
    terminal: Terminal,
    model: ModelFile,
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="The calibration cache.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The model with Q/DQ.")
    ],
    force: Force = False,
) -> None:
    """Write an FP32 model with the scales of a cache as Q/DQ: what `strip` took out, if the key
    file is beside the cache, else where the rules of this package put them."""
    from trtune import tools
    from trtune.cli import show

    tools.insert_qdq(model, cache, output, overwrite=force)
    terminal.result({"model": str(output)}, f"wrote {show.near(output)}")


@command(name="cache", epilog="Example: trtune qdq cache qat.onnx --to 10.14.1 -o new.cache")
def cache_of(
    terminal: Terminal,
    model: ModelFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.")],
    to: Annotated[
        str, typer.Option("--to", metavar="VERSION", help="TensorRT version, such as 10.14.1.")
    ] = "10.14.1",
    allow_requantize: Requantize = False,
    force: Force = False,
) -> None:
    """Write the scales in a model's Q/DQ as a calibration cache for TensorRT 10."""
    from trtune import tools
    from trtune.cli import show

    cache, left = tools.cache_from_qdq(
        model, to, output, requantize=allow_requantize, overwrite=force
    )
    value = {"cache": str(output), "tensors": len(cache.scales), "float": list(left)}
    lines = [f"in float there, for want of a scale: {', '.join(left)}"] if left else []
    terminal.result(value, f"wrote {show.near(output)} with the header {cache.header}", *lines)


@command(epilog="Example: trtune migrate --cache old.cache --model m.onnx --pins layers.txt")
def migrate(
    terminal: Terminal,
    model: Annotated[
        Path, typer.Option("--model", metavar="MODEL", help="The ONNX file the cache belongs to.")
    ],
    cache: Annotated[
        Path, typer.Option("--cache", metavar="FILE", help="TensorRT's calibration cache.")
    ],
    pins: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Layers kept out of INT8: plan.json, or trtexec's or Polygraphy's options.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")
    ] = Path("migrated"),
    fallback: Annotated[
        str, typer.Option(metavar="PRECISION", help="What is not INT8: fp32, fp16 or bf16.")
    ] = "fp32",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without pins that hold for nothing.")
    ] = False,
    command: Annotated[
        int | None,
        typer.Option(metavar="N", help="Which command of the pins' file is meant, from 1."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Take a cache of another model too; overwrite files."),
    ] = False,
) -> None:
    """Carry a calibration cache of TensorRT 8 or 10, and its pins, over to explicit Q/DQ."""
    from trtune import tools
    from trtune.cli import show

    found = tools.migrate(
        model,
        cache,
        output,
        pins=pins,
        fallback=fallback,
        overwrite=force,
        foreign=force,
        allow_missing=allow_missing,
        command=command,
    )
    value = {
        "model": str(output / "model.onnx"),
        "plan": str(output / "plan.json"),
        "report": str(output / "report.md"),
        "matched": list(found.matched),
        "unmatched": [dataclasses.asdict(entry) for entry in found.unmatched],
        "missing": [dataclasses.asdict(entry) for entry in found.missing],
        "pins": [dataclasses.asdict(pin) for pin in found.pins],
        "changes": [dataclasses.asdict(change) for change in found.changes],
        "belongs": found.fit is None or found.fit.belongs,
        "against": [] if found.fit is None else list(found.fit.against),
    }
    terminal.result(value, *found.lines(), f"wrote {show.near(output)}/model.onnx")


for entry in (lint, strip, insert, cache_of):
    entry.add_to(qdq_app)
