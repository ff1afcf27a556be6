"""What the commands show on a terminal: tables of text, and a sentence or two beside them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from trtune.calibrate.cache import Cache, CacheDifference
from trtune.calibrate.table import CalibrationTable
from trtune.datasets.batches import InputSpec
from trtune.precision.quantized.against import Agreement
from trtune.precision.quantized.describe import Inspection, NodeRow
from trtune.precision.quantized.findings import Finding, outcome, summary
from trtune.precision.runtime.api import BuildInfo, Usable
from trtune.reports.record import LayerRow
from trtune.reports.summary import (
    DASH,
    count,
    decibels,
    number,
    plural,
    ratio_text,
    seconds_text,
    size_text,
)
from trtune.reports.tables import Table, worst_layers
from trtune.reports.terminal import render_table

if TYPE_CHECKING:
    from trtune.calibrate.outliers import DominantPicture

WORST_SHOWN = 10
SHOWN_NAMES = 5


def near(path: Path | str) -> str:
    """`path` as short as it can be written: from the current folder if it is inside.

    >>> near(Path.cwd() / "runs" / "a")
    'runs/a'
    """
    try:
        inside = Path(os.path.abspath(path)).relative_to(Path.cwd())
    except ValueError:
        return str(path)
    return str(inside)


def table_of(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int
) -> RenderableType:
    """A table whose first `text_columns` columns are text, the others numbers."""
    return render_table(Table(tuple(columns), tuple(map(tuple, rows)), text_columns=text_columns))


def titled(title: str, *parts: RenderableType) -> RenderableType:
    """A heading with something below it."""
    return Group(Text(title, style="bold"), *parts)


def cache_table(path: Path, cache: Cache) -> Iterator[RenderableType]:
    """What a calibration cache's header means, and its scales."""
    major, minor, patch = cache.version
    zero = sum(scale == 0 for scale in cache.scales.values())
    written = f"{cache.algorithm} of TensorRT {major}.{minor}.{patch} ({cache.header})"
    kind = f"a calibration table of {cache.origin}, no TensorRT cache" if cache.origin else written
    yield f"{near(path)}: {kind}, {plural(len(cache.names), 'tensor')}"
    rows = [_cache_row(name, cache.scales.get(name)) for name in cache.names]
    yield table_of(("tensor", "scale", "amax"), rows, text_columns=1)
    if cache.no_range:
        yield (
            f"{plural(len(cache.no_range), 'tensor')} without a range (infinity or NaN was seen): "
            "TensorRT treats that as no scale"
        )
    if zero:
        yield f"{plural(zero, 'tensor')} with scale 0: only zeros, or nothing, was ever seen in it"


def _cache_row(name: str, scale: float | None) -> tuple[str, str, str]:
    if scale is None:
        return name, "no range", DASH
    return name, f"{scale:.9g}", f"{127 * scale:.6g}"


def difference_table(
    paths: tuple[Path, Path], caches: tuple[Cache, Cache], rows: Sequence[CacheDifference]
) -> Iterator[RenderableType]:
    """How the second cache differs from the first."""
    a, b = caches
    if a.header != b.header:
        yield f"headers: {a.header} and {b.header}"
    tensors = len({*a.names, *b.names})
    if not rows:
        yield f"the scales are equal: {plural(tensors, 'tensor')}"
        return
    yield f"{len(rows)} of {plural(tensors, 'tensor')} differ; ratio = second / first"
    yield table_of(
        ("tensor", near(paths[0]), near(paths[1]), "ratio"),
        [(row.tensor, _scale(row.a), _scale(row.b), _ratio(row.ratio)) for row in rows],
        text_columns=1,
    )


def _scale(value: float | None) -> str:
    if value is not None and math.isinf(value):
        return "no range"
    return "missing" if value is None else f"{value:.9g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return DASH
    return "∞" if math.isinf(value) else f"{value:.6g}"


def inspection(found: Inspection, *, every_node: bool = False) -> Iterator[RenderableType]:
    """A model's inputs, costs, operators, weighted nodes (or every node) and problems."""
    made_by = f", made by {found.producer}" if found.producer else ""
    yield Text.assemble((near(found.path), "bold"), f"  opset {found.opset}{made_by}")
    yield (
        f"{count(found.macs)} MACs a sample, {count(found.parameters)} parameters, weights of "
        f"{size_text(found.weight_bytes)}, sha256 {found.sha256[:16]}"
    )
    rows = [_spec_row("input", spec) for spec in found.inputs]
    rows += [_spec_row("output", spec) for spec in found.outputs]
    yield table_of(("", "name", "dtype", "shape"), rows, text_columns=4)
    ops = ", ".join(f"{op} ({amount})" for op, amount in found.ops.items())
    yield f"{plural(len(found.nodes), 'node')}: {ops}"
    weighted = [node for node in found.nodes if node.macs]
    shown = found.nodes if every_node else weighted
    int8 = [node for node in weighted if node.precision == "int8"]
    title = f"\n{len(int8)} of {plural(len(weighted), 'weighted node')} can run in INT8"
    if found.quantize_nodes:
        title += f"; {plural(found.quantize_nodes, 'Q/DQ node')} already in the graph"
    columns = ("node", "op", "precision", "reason", "shape", "MACs", "parameters")
    table = table_of(columns, list(map(_node_row, shown)), text_columns=5)
    yield titled(title, *([table] if shown else []))
    yield from _bullets("Notes", found.notes)
    yield from _bullets("Problems", found.problems, style="yellow")


def _spec_row(role: str, spec: InputSpec) -> tuple[str, str, str, str]:
    return role, spec.name, spec.dtype, _shape(spec.shape)


def _shape(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "?"
    return " x ".join("?" if dim is None else str(dim) for dim in shape) or "scalar"


def _node_row(node: NodeRow) -> tuple[str, ...]:
    macs, parameters = (count(value) if value else DASH for value in (node.macs, node.parameters))
    precision = node.precision or DASH
    return node.name, node.op, precision, node.reason, _shape(node.shape), macs, parameters


def _bullets(title: str, lines: Sequence[str], style: str = "") -> Iterator[RenderableType]:
    if lines:
        yield titled(title, *(Text(f"• {line}", style=style) for line in lines))


def engine(info: BuildInfo, *, every_node: bool = False) -> Iterator[RenderableType]:
    """How an engine was built, where it runs, and what its nodes run in."""
    where = near(info.path) if info.path else ""
    yield Text.assemble((where, "bold"), f"  {info.backend}, {size_text(info.size_bytes)}")
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    yield f"built in {seconds_text(info.seconds)} with {versions}"
    known = {k: v for k, v in info.details.items() if isinstance(v, (str, int, float, list)) and v}
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in known.items()}
    yield table_of(("", ""), list(shown.items()), text_columns=2)
    amounts = Counter(info.precisions.values())
    yield "runs in " + (", ".join(f"{p.upper()} ({n})" for p, n in amounts.items()) or DASH)
    if every_node:
        yield table_of(("node", "runs in"), list(info.precisions.items()), text_columns=2)
    yield from _bullets("Not as planned", info.not_honoured, "yellow")
    if info.reason:
        yield f"It cannot run here: {info.reason}"


def findings(
    path: Path, found: Sequence[Finding], *, every: bool = False
) -> Iterator[RenderableType]:
    """What the linter says of a quantized model: a line a kind, or with `every` a row a node."""
    blocking = sum(finding.blocks for finding in found)
    repaired = sum(finding.repaired for finding in found)
    total = plural(len(found), "finding")
    yield f"{near(path)}: {total}, {repaired} repaired, {blocking} in the way"
    if every:
        columns = ("node", "kind", "severity", "found", "TensorRT", "", "remedy")
        rows = [
            (f.node, f.kind, f.severity, f.found, f.tensorrt, _outcome(f), f.remedy) for f in found
        ]
        yield table_of(columns, rows, text_columns=7)
    else:
        yield from _bullets("Findings", summary(found))


def built_as_it_is(seen: Agreement, compute_capability: str) -> Iterator[RenderableType]:
    """What TensorRT-RTX made of the file as it stands, a row a product, and where the linter
    expected something else."""
    title = f"TensorRT-RTX {compute_capability} on the file as it stands"
    if seen.refused:
        yield f"{title} gives no engine: {seen.refused}"
    else:
        rows = [(p.node, p.expected or DASH, p.found) for p in seen.products]
        yield title
        yield table_of(("product", "linter expects", "runs in"), rows, text_columns=3)
    if seen.disagreements:
        yield from _bullets("Linter and compiler disagree", seen.disagreements, "yellow")
    else:
        yield "linter and compiler agree"


def _outcome(row: Finding) -> str:
    return f"{outcome(row)}, {row.repair}" if row.repair else outcome(row)


def backend_table(found: Mapping[str, Usable]) -> RenderableType:
    """Every backend with the reason why it does not work here, and the remedy."""
    rows = []
    for name, state in found.items():
        why = state.reason + (f". {_capital(state.remedy)}" if state.remedy else "")
        usable = "usable" if state.usable else "not usable"
        rows.append((name, usable, state.version or DASH, _capital(why)))
    return table_of(("backend", "", "version", "why, and what to do"), rows, text_columns=4)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def build_table(infos: Sequence[BuildInfo]) -> Iterator[RenderableType]:
    """What was built: one row a backend."""
    rows = []
    for info in infos:
        int8 = sum(precision == "int8" for precision in info.precisions.values())
        where = near(info.path) if info.path else info.reason or "nothing was built"
        ignored = str(len(info.not_honoured)) if info.not_honoured else DASH
        rows.append((info.backend, where, str(int8), ignored, size_text(info.size_bytes)))
    yield table_of(
        ("backend", "engine", "INT8 nodes", "not as planned", "size"), rows, text_columns=2
    )
    for info in infos:
        yield from _bullets(f"{info.backend}: not as planned", info.not_honoured, "yellow")
        if info.path and info.reason:
            yield f"{info.backend}: {info.reason}"


def layer_tables(rows: Sequence[LayerRow], *, worst: int = WORST_SHOWN) -> Iterator[RenderableType]:
    """The layers with the largest errors: each quantized alone, and accumulated."""
    for by, title in (
        ("alone_sqnr_db", "Alone: only this node quantized; error of the network's output"),
        ("accumulated_sqnr_db", "Accumulated: whole network quantized; error of this output"),
    ):
        found = worst_layers(rows, by=by, count=worst)
        cells = [
            (r.node, r.op, r.precision, decibels(getattr(r, by)), number(r.amax)) for r in found
        ]
        if cells:
            columns = ("node", "op", "precision", "SQNR", "amax")
            yield titled(title, table_of(columns, cells, text_columns=3))
    if not any(r.alone_sqnr_db is not None or r.accumulated_sqnr_db is not None for r in rows):
        yield f"no error was measured in any of {plural(len(rows), 'layer')}"


def calibration_summary(
    table: CalibrationTable, pictures: Sequence[DominantPicture] = ()
) -> Iterator[RenderableType]:
    """How many tensors have a scale, by which methods, and which pictures stretch their ranges."""
    amounts = Counter(table.methods.values())
    ranked = sorted(amounts.items(), key=lambda item: (-item[1], item[0]))
    by = ", ".join(f"{method} ({amount})" for method, amount in ranked)
    yield f"{plural(len(table.scales), 'tensor')} with a scale{'; method: ' if by else ''}{by}"
    zero = [name for name, scale in table.scales.items() if scale == 0]
    if zero:
        names = ", ".join(zero[:SHOWN_NAMES]) + (", ..." if len(zero) > SHOWN_NAMES else "")
        yield f"{plural(len(zero), 'tensor')} with scale 0 (only zeros were seen): {names}"
    for picture in pictures:
        yield (
            f"• picture {picture.item} sets the range of {plural(picture.tensors, 'tensor')}, up "
            f"to {ratio_text(picture.worst_ratio)} times the median ({picture.worst_tensor})"
        )
