"""The tables of a report, and `layers.csv`.

`result_frame` and `layers_frame` hold plain values for further work; `result_table` and
`compare_table` hold the same as text, which the terminal, Markdown and HTML all show.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trtune.configs.errors import DataError
from trtune.configs.files import write_text
from trtune.reports.record import LayerRow, RunRecord, Variant
from trtune.reports.summary import (
    DASH,
    PRECISIONS,
    TIMES,
    backends,
    change_text,
    decibels,
    find_variant,
    interval_text,
    is_emulated,
    main_variant,
    metric_label,
    metric_text,
    plus_minus,
    seconds_text,
    size_text,
    speedup,
    three,
    untuned,
    verdict_text,
)

if TYPE_CHECKING:
    import pandas as pd

EMULATED = "emulation of TensorRT arithmetic: its CPU time says nothing about speed"
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True, slots=True)
class Table:
    """Text ready to show: one row a tuple as long as `columns`.

    The first `text_columns` columns hold text, the others numbers. `footnotes` are in the order
    of the marks (¹, ², ...) in the cells.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footnotes: tuple[str, ...] = ()
    text_columns: int = 2

    @property
    def marks(self) -> tuple[str, ...]:
        """The mark of each footnote."""
        return tuple(map(_mark, range(len(self.footnotes))))


def _mark(index: int) -> str:
    return MARKS[index] if index < len(MARKS) else f"({index + 1})"


def result_frame(record: RunRecord) -> pd.DataFrame:
    """One row a variant, in the record's order, with plain values (None where unknown).

    `latency_ms_*` and `speedup` are empty for emulating backends, whose time means nothing.
    """
    import pandas as pd

    return pd.DataFrame(
        [_variant_values(record, variant) for variant in record.variants],
        columns=list(_variant_values(record, Variant(name="", backend="", value=None))),
    )


def _variant_values(record: RunRecord, variant: Variant) -> dict[str, Any]:
    latency = None if is_emulated(variant) else variant.latency_ms
    return {
        "variant": variant.name,
        "backend": variant.backend,
        "metric": record.baseline.metric,
        "value": variant.value,
        "drop": variant.drop,
        "top1": variant.top1,
        "sqnr_db": variant.sqnr_db,
        "agreement": variant.agreement,
        "latency_ms_median": latency and latency.median,
        "latency_ms_p95": latency and latency.p95,
        "latency_batch": latency and latency.batch,
        "speedup": speedup(record, variant),
        "size_bytes": variant.size_bytes,
        **{f"nodes_{p}": variant.nodes.get(p, 0) for p in PRECISIONS},
        "verdict": variant.verdict,
        "interval_low": variant.interval and variant.interval[0],
        "interval_high": variant.interval and variant.interval[1],
        "samples": variant.samples,
        "pins": len(variant.pinned),
        "not_honoured": len(variant.not_honoured),
        "reason": variant.reason,
    }


class _Footnotes:
    """Numbers footnotes in the order they are first asked for."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return _mark(self.texts.index(text))


def result_table(record: RunRecord) -> Table:
    """The result table: one row a variant; columns nobody has a value for are left out."""
    metric, notes = record.baseline.metric, _Footnotes()
    columns: dict[str, Callable[[Variant], str]] = {
        "variant": lambda v: v.name,
        "backend": lambda v: v.backend,
        metric_label(metric): lambda v: _value_cell(metric, v, notes),
    }
    others: dict[str, Callable[[Variant], str]] = {
        "95 %": lambda v: interval_text(metric, v) or DASH,
        "target": verdict_text,
        "vs FP32": lambda v: DASH if v.name == "fp32" else change_text(metric, v.drop),
        "top-1": lambda v: metric_text("top1", v.top1),
        "SQNR": lambda v: decibels(v.sqnr_db) + plus_minus("sqnr_db", v.sqnr_error),
        "agreement": lambda v: (
            metric_text("agreement", v.agreement) + plus_minus("agreement", v.agreement_error)
        ),
        "latency (p95)": lambda v: _latency_cell(v, notes),
        "speed-up": lambda v: _times(speedup(record, v)),
        "size": lambda v: size_text(v.size_bytes),
        "layers": lambda v: _precisions(v.nodes),
        "runtime's own account": lambda v: _precisions(v.account),
        "pins": lambda v: str(len(v.pinned)) if v.name != "fp32" else DASH,
        "not honoured": lambda v: str(len(v.not_honoured)) if v.not_honoured else DASH,
    }
    columns |= {title: cell for title, cell in others.items() if title not in columns}
    rows = [tuple(cell(v) for cell in columns.values()) for v in record.variants]
    return _without_empty(tuple(columns), rows, notes.texts, keep=3)


def _without_empty(
    columns: tuple[str, ...], rows: list[tuple[str, ...]], notes: list[str], *, keep: int
) -> Table:
    """The table without the columns that hold only dashes (or 0), but for the first `keep`."""
    empty = (DASH, "0", "")
    kept = [i for i in range(len(columns)) if i < keep or any(row[i] not in empty for row in rows)]
    return Table(
        tuple(columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        tuple(notes),
    )


def _value_cell(metric: str, variant: Variant, notes: _Footnotes) -> str:
    text = metric_text(metric, variant.value) + plus_minus(metric, variant.error)
    return text + notes.mark(variant.reason) if variant.reason else text


def _latency_cell(variant: Variant, notes: _Footnotes) -> str:
    if is_emulated(variant):
        return DASH + notes.mark(EMULATED)
    latency = variant.latency_ms
    note = notes.mark(variant.latency_note) if variant.latency_note else ""
    if latency is None:
        return DASH + note
    text = f"{three(latency.median)} ms ({three(latency.p95)})"
    return text + (note or notes.mark(f"median of {latency.runs} runs, batch {latency.batch}"))


def _precisions(counts: Mapping[str, int]) -> str:
    shown = [*PRECISIONS, *sorted(set(counts) - set(PRECISIONS))]
    parts = [f"{counts[p]} {p.upper()}" for p in shown if counts.get(p)]
    return " + ".join(parts) or DASH


def _times(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}{TIMES}"


def compare_table(records: Sequence[RunRecord]) -> Table:
    """Several runs side by side: one row a run and backend, with its untuned and tuned variant."""
    notes = _Footnotes()
    columns = (
        *("run", "backend", "metric", "FP32", "untuned", "tuned", "vs FP32", "SQNR", "agreement"),
        *("pins", "target", "latency (p95)", "speed-up", "size", "calibration"),
    )
    rows = [
        _compare_row(record, backend, notes) for record in records for backend in backends(record)
    ]
    return replace(_without_empty(columns, rows, notes.texts, keep=6), text_columns=3)


def _compare_row(record: RunRecord, backend: str, notes: _Footnotes) -> tuple[str, ...]:
    metric = record.baseline.metric
    plain, tuned = untuned(record, backend), find_variant(record, "tuned", backend)
    best = tuned if tuned is not None and tuned.value is not None else plain
    shown = best or tuned or find_variant(record, "int8", backend)
    failed = best is None and shown is not None and shown.reason
    return (
        record.name,
        backend,
        metric_label(metric),
        metric_text(metric, record.baseline.value),
        metric_text(metric, plain.value if plain else None),
        metric_text(metric, tuned.value if tuned else None)
        + (notes.mark(str(shown.reason)) if failed and shown else ""),
        change_text(metric, best.drop if best else None),
        decibels(best.sqnr_db if best else None),
        metric_text("agreement", best.agreement if best else None),
        str(len(shown.pinned)) if shown else DASH,
        _verdict_cell(record, best),
        _latency_cell(best, notes) if best else DASH,
        _times(speedup(record, best) if best else None),
        size_text(shown.size_bytes if shown else None),
        seconds_text(record.calibration.seconds) if record.calibration else DASH,
    )


def _verdict_cell(record: RunRecord, best: Variant | None) -> str:
    """The verdict of a backend; of records that have none the run's."""
    if best is None or not record.target:
        return DASH
    return verdict_text(best) if best.verdict else record.status


def outputs_table(record: RunRecord) -> Table | None:
    """How close each output is on every variant, and each part that is judged apart.

    None where there is no more than one.
    """
    names = list(dict.fromkeys(name for v in record.variants for name in v.outputs))
    if len(names) < 2:
        return None
    rows = [
        (
            name,
            v.name,
            v.backend,
            decibels(v.outputs[name].sqnr_db),
            f"{v.outputs[name].cosine:.5f}",
        )
        for name in names
        for v in record.variants
        if name in v.outputs
    ]
    return Table(("output", "variant", "backend", "SQNR", "cosine"), tuple(rows), (), 3)


def layers_frame(rows: Iterable[LayerRow]) -> pd.DataFrame:
    """One row a layer, one column a field of `LayerRow`; None where not measured."""
    import pandas as pd

    return pd.DataFrame(
        [row.model_dump() for row in rows], columns=list(LayerRow.model_fields), dtype=object
    )


def dump_layers(rows: Iterable[LayerRow]) -> str:
    """The text of `layers.csv`; `load_layers` reads it back to equal rows.

    Names may hold commas, quotes and line feeds, but no carriage returns.

    >>> row = LayerRow(node="c, 1", op="Conv", shape="1x8", macs=9, parameters=4,
    ...                precision="int8", reason="default", alone_sqnr_db=float("inf"))
    >>> load_layers(dump_layers([row])) == [row]
    True
    """
    return layers_frame(rows).to_csv(index=False, lineterminator="\n")


def load_layers(text: str, *, where: str = "layers.csv") -> list[LayerRow]:
    """Read what `dump_layers` wrote; an empty cell of a number is None.

    Raises DataError with the row and column if it is something else.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, na_filter=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{where}: not a table of layers: {error}") from error
    optional = {n for n, f in LayerRow.model_fields.items() if f.default is None}
    rows = []
    for number_, values in enumerate(frame.to_dict("records"), start=2):
        cells = {str(k): v for k, v in values.items() if v != "" or k not in optional}
        try:
            rows.append(LayerRow.model_validate(cells))
        except ValidationError as error:
            first = error.errors()[0]
            column = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{where}, row {number_}, column {column!r}: {first['msg']} "
                f"(found {cells.get(column)!r}); write it again with `trtune compare`"
            ) from error
    return rows


def write_layers(path: Path, rows: Iterable[LayerRow]) -> None:
    """Write `layers.csv` in one step."""
    write_text(path, dump_layers(rows))


def read_layers(path: Path) -> list[LayerRow]:
    """Read `layers.csv`; raises DataError if there is none or it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `trtune compare` writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return load_layers(text, where=str(path))


def worst_layers(rows: Iterable[LayerRow], *, by: str, count: int | None = None) -> list[LayerRow]:
    """The rows that have the decibel value `by`, lowest first, ties by node; `count` of them.

    `by` is `alone_sqnr_db` or `accumulated_sqnr_db`. Layers without any error (inf) come last.
    """
    measured = [row for row in rows if getattr(row, by) is not None]
    return sorted(measured, key=lambda row: (getattr(row, by), row.node))[:count]


def pinned_nodes(record: RunRecord, rows: Iterable[LayerRow]) -> frozenset[str]:
    """Nodes that a user or the tuner pinned: of the main variant, and by the layers' origins."""
    variant = main_variant(record)
    named = set(variant.pinned if variant else ())
    return frozenset(named | {row.node for row in rows if row.origin in ("user", "tuner")})
