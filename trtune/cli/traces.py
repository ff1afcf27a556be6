"""What TensorRT left behind: plans, layers and times that trtexec exported, build logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtune.cli.command import command
from trtune.cli.console import Terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trtune.precision.backends.trt.inspector import EngineLayer
    from trtune.precision.backends.trt.layer_table import EngineTable
    from trtune.precision.traces.explain import LogAccount

MOST = 20
PLACES = 3


def show_layers(
    terminal: Terminal,
    model: Path,
    layers: Path | None,
    profile: Path | None,
    html: Path | None = None,
    *,
    force: bool = False,
) -> None:
    """Show an engine's layers, of the ONNX nodes where `model` is an ONNX file or QDQ model; as a
    page in `html` too."""
    from trtune import tools
    from trtune.cli.show import near

    found = tools.inspect_layers(model, layers, profile)
    wrote = []
    if html is not None:
        tools.write_engine_page(found, html, name=(layers or model).name, overwrite=force)
        wrote = [f"wrote {near(html)}"]
    terminal.result(found.to_dict(), *layer_table(found, every=terminal.verbose), *wrote)


def show_plan(terminal: Terminal, path: Path) -> None:
    """Show what a plan says without TensorRT and without an engine.json beside it."""
    from trtune.precision.traces.plan_file import read_plan

    found = read_plan(path)
    terminal.result(found.to_dict(), *found.lines())


@command(name="explain", epilog="Example: trtune explain build.log --model model.onnx")
def explain_file(
    terminal: Terminal,
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A log of trtexec or of a build.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The ONNX file it was about, to name its nodes."),
    ] = None,
) -> None:
    """Say what a build log of TensorRT means: what happened, at which node, and what to do."""
    from trtune import tools

    found = tools.explain_build(log, model)
    value = {
        "version": found.version,
        "lines": found.lines,
        "events": [event.to_dict() for event in found.events],
        "notes": found.notes(),
        "weighted_layers": found.precisions(),
    }
    terminal.result(value, *log_account(log, found, every=terminal.verbose))


def layer_table(found: EngineTable, *, every: bool = False) -> Iterator[RenderableType]:
    """Counts, the layers that take longest (or all), and the findings by kind."""
    from trtune.cli.show import table_of, titled
    from trtune.reports.summary import DASH, plural

    yield from found.summary()
    shown = _shown_layers(found, every=every)
    rows = [
        (
            layer.name,
            layer.kind,
            f"{layer.precision} > {layer.output}",
            f"{found.times[layer.name]:.4g}" if layer.name in found.times else DASH,
        )
        for layer in shown
    ]
    yield table_of(("layer", "type", "precision", "ms"), rows, text_columns=3)
    if len(shown) < len(found.layers):
        yield f"{plural(len(found.layers) - len(shown), 'more layer')}: trtune inspect -v"
    if found.lints:
        yield titled(plural(len(found.lints), "finding"), *_findings(found, every=every))


def _shown_layers(found: EngineTable, *, every: bool) -> list[EngineLayer]:
    """All layers, or those that take longest, or without times the first ones that compute."""
    if every:
        return list(found.layers)
    if found.times:
        timed = [layer for layer in found.layers if found.times.get(layer.name, 0.0) > 0]
        return sorted(timed, key=lambda layer: -found.times[layer.name])[:MOST]
    return [x for x in found.layers if x.kind not in ("Constant", "NoOp")][:MOST]


def _findings(found: EngineTable, *, every: bool) -> Iterator[RenderableType]:
    """A row a kind with its remedy, or (`every`) a row a finding below each."""
    from trtune.cli.show import table_of
    from trtune.precision.backends.trt.lints import lint_groups, lint_place
    from trtune.reports.summary import DASH

    groups = lint_groups(found.lints)
    rows = [
        (
            g.kind,
            g.places(PLACES),
            g.remedy,
            str(len(g.lints)),
            DASH if g.milliseconds is None else f"{g.milliseconds:.4g}",
        )
        for g in groups
    ]
    yield table_of(("finding", "where", "what to do", "times", "ms"), rows, text_columns=3)
    if every:
        lints = [(x.kind, lint_place(x), x.found) for g in groups for x in g.lints]
        yield table_of(("finding", "where", "found"), lints, text_columns=3)


def log_account(path: Path, found: LogAccount, *, every: bool = False) -> Iterator[RenderableType]:
    """The problems in a log, and how many notes of each kind (or all of them)."""
    from trtune.cli.show import near, table_of, titled

    version = f"TensorRT {found.version}" if found.version else "a TensorRT that it does not name"
    yield f"{near(path)}: {version}, {found.lines} lines, {len(found.problems)} problems"
    shown = found.events if every else found.problems
    if shown:
        rows = [
            (str(e.line), str(e.count), e.what, ", ".join(e.nodes[:3]), e.remedy) for e in shown
        ]
        columns = ("line", "times", "what", "nodes", "what to do")
        yield titled("What happened", table_of(columns, rows, text_columns=5))
    if not found.events and not found.version:
        yield "no line of it is known: is it what trtexec --verbose, or a build with -v, printed?"
    if found.notes():
        yield "notes: " + ", ".join(f"{n} x {key}" for key, n in found.notes().items())
    if found.precisions():
        kinds = ", ".join(f"{kind} {n}" for kind, n in found.precisions().items())
        yield f"layers with weights run in: {kinds}"
