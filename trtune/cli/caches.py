"""The commands on TensorRT's calibration caches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from trtune.cli.command import SETTINGS, Force, command
from trtune.cli.console import Terminal

cache_app = typer.Typer(
    no_args_is_help=True,
    context_settings=SETTINGS,
    help="Read, convert and compare TensorRT calibration caches.",
)


@command(epilog="Example: trtune cache show calibration.cache")
def show(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The calibration cache.")],
) -> None:
    """Show the scale and amax of every tensor, and what the header means."""
    from trtune.calibrate.cache import read_cache
    from trtune.cli.show import cache_table

    cache = read_cache(file)
    value = {
        "header": cache.header,
        "version": list(cache.version),
        "algorithm": cache.algorithm,
        "scales": cache.scales,
        **({"no_range": list(cache.no_range)} if cache.no_range else {}),
        **({"origin": cache.origin} if cache.origin else {}),
    }
    terminal.result(value, *cache_table(file, cache))


@command(epilog="Example: trtune cache convert old.cache --to 10.14.1 -o new.cache")
def convert(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The calibration cache.")],
    to: Annotated[
        str, typer.Option("--to", metavar="VERSION", help="TensorRT version, such as 10.14.1.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.")],
    force: Force = False,
) -> None:
    """Write the same scales under the header of another TensorRT version."""
    from trtune import tools
    from trtune.cli.show import near

    cache = tools.convert_cache(file, to, output, overwrite=force)
    value = {"cache": str(output), "header": cache.header, "tensors": len(cache.scales)}
    terminal.result(value, f"wrote {near(output)} with the header {cache.header}")


@command(
    epilog="Exit status, as of diff(1): 0 the scales are equal, 1 they differ, 2 a file is wrong."
)
def diff(
    terminal: Terminal,
    first: Annotated[Path, typer.Argument(metavar="A", help="A calibration cache.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Show the tensors whose scales differ, the missing ones first; headers do not count."""
    from trtune.calibrate import cache as caches
    from trtune.cli.show import difference_table

    a, b = caches.read_cache(first), caches.read_cache(second)
    rows = caches.diff(a, b)
    value = {
        "headers": [a.header, b.header],
        "differences": [dataclasses.asdict(row) for row in rows],
    }
    terminal.result(value, *difference_table((first, second), (a, b), rows))
    raise typer.Exit(1 if rows else 0)


for entry in (show, convert, diff):
    entry.add_to(cache_app)
