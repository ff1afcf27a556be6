"""The report as one HTML file that needs nothing beside it and asks nothing of the network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from trtune.reports import plots
from trtune.reports.differences import Difference
from trtune.reports.record import LayerRow, PinCost, RunRecord, Variant
from trtune.reports.summary import (
    DASH,
    FRACTIONS,
    PRECISIONS,
    STATUS,
    TIMES,
    change_text,
    count,
    decibels,
    find_variant,
    headline,
    main_variant,
    metric_label,
    metric_text,
    number,
    outlier_sentences,
    plural,
    ratio_text,
    samples_text,
    seconds_text,
    size_text,
    speedup,
    tail,
    verdict,
)
from trtune.reports.tables import (
    compare_table,
    outputs_table,
    pinned_nodes,
    result_table,
    worst_layers,
)

WORST_LAYERS = 16
WORST_HISTOGRAMS = 9
SHORT_TABLE = 12
OPEN_LAYERS = 120
"""Up to so many layers their table is open from the start."""
WINDOWED_FROM = 300
"""Of a table of more layers, a browser holds only the rows in sight."""
OPEN_PREPARED = 24
MOST_LINTS = 40
MOVE_TEXTS = {
    "scale": "channels scaled to a common range",
    "shift": "shifted to the middle of its range",
    "round": "integer codes of the weights chosen on the data",
    "bias": "bias corrected for the error of the weights",
}
"""What `run.json` calls a move of preparation, in words."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One large number at the top of the page, what it is, and what to hold it against."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer in a bar list: `width` is per cent of the longest bar, `error` per cent.

    `row` is the layer's row in the table of all, counted from 1.
    """

    node: str
    op: str
    sqnr: str
    error: str
    width: float
    pinned: bool
    row: int = 0


@dataclass(frozen=True, slots=True)
class LayerColumn:
    """A column of the table of layers: the field it shows, and how a number becomes text."""

    title: str
    field: str
    text: Callable[[Any], str] | None = None


LAYER_COLUMNS = (
    LayerColumn("node", "node"),
    LayerColumn("op", "op"),
    LayerColumn("precision", "precision"),
    LayerColumn("runs in", "runs_in"),
    LayerColumn("reason", "reason"),
    LayerColumn("shape", "shape"),
    LayerColumn("MACs", "macs", count),
    LayerColumn("params", "parameters", count),
    LayerColumn("amax", "amax", number),
    LayerColumn("method", "method"),
    LayerColumn("alone", "alone_sqnr_db", decibels),
    LayerColumn("accumulated", "accumulated_sqnr_db", decibels),
    LayerColumn("runtime", "runtime_sqnr_db", decibels),
    LayerColumn("ms", "time_ms", number),
)


def report_html(record: RunRecord, layers: Sequence[LayerRow] = ()) -> str:
    """The whole report of one run. Parts for which nothing was measured are left out."""
    pinned = pinned_nodes(record, layers)
    shown = record.histograms[:WORST_HISTOGRAMS]
    return _template("report.html.jinja").render(
        record=record,
        badge=STATUS[record.status] if record.target or record.status == "failed" else "done",
        headline=headline(record),
        verdict=verdict(record),
        samples=samples_text(record),
        facts=_facts(record),
        results=result_table(record),
        outputs=outputs_table(record),
        metric=record.baseline.metric,
        pins=_pins(record),
        tuning_plot=Markup(plots.tuning_svg(record)),
        alone=_bars(layers, "alone_sqnr_db", pinned),
        accumulated=_bars(layers, "accumulated_sqnr_db", pinned),
        profile_plot=Markup(plots.profile_svg(layers, pinned)),
        histograms=[
            (plot, Markup(plots.histogram_svg(plot, f"hist{index}")))
            for index, plot in enumerate(shown)
        ],
        outlier_sentences=outlier_sentences(record),
        layers=layers,
        layer_columns=_layer_columns(layers),
        pinned=pinned,
        precisions=[p for p in PRECISIONS if any(row.precision == p for row in layers)],
        short=SHORT_TABLE,
        open_layers=OPEN_LAYERS,
        windowed_from=WINDOWED_FROM,
        open_prepared=OPEN_PREPARED,
        most_lints=MOST_LINTS,
        engines=[v for v in record.variants if v.lints or v.explained],
        plots_of={p.tensor: k for k, p in enumerate(shown, start=1)},
        rows_of={r.tensor: k for k, r in reversed(list(enumerate(layers, start=1)))},
    )


def several_html(records: Sequence[RunRecord], differences: Sequence[Difference] = ()) -> str:
    """Several runs side by side, each with its headline; of two, what `differences` they have."""
    return _template("several.html.jinja").render(
        records=records,
        table=compare_table(records),
        headlines=[(record, headline(record), verdict(record)) for record in records],
        differences=differences,
        status=STATUS,
    )


def _template(name: str) -> Template:
    folder = resources.files("trtune.reports")
    loader = FunctionLoader(lambda part: folder.joinpath(part).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": _breakable,
        "metric_label": metric_label,
        "move_text": lambda move: MOVE_TEXTS.get(move, move),
        "metric_text": lambda value, metric: metric_text(metric, value),
        "number": number,
        "ratio": ratio_text,
        "plural": plural,
        "seconds": seconds_text,
        "size": size_text,
        "tail": tail,
        "tidy": _tidy,
    }
    environment.globals["DASH"] = DASH
    return environment.get_template(name)


def _tidy(text: str) -> str:
    """`text` whose numbers stay on one line with their units, and top-1 with its 1."""
    text = re.sub(r"(?<=\d) (?=(%|dB)(\W|$))", "\N{NO-BREAK SPACE}", text)
    return re.sub(r"\btop-(?=[15]\b)", "top\N{NON-BREAKING HYPHEN}", text)


def _facts(record: RunRecord) -> list[Fact]:
    variant, metric = main_variant(record), record.baseline.metric
    if variant is None:
        return []
    facts = [_accuracy_fact(record, variant)]
    if metric != "sqnr_db" and variant.sqnr_db is not None:
        facts.append(Fact("SQNR of the outputs", decibels(variant.sqnr_db), "against FP32"))
    if variant.agreement is not None:
        text = metric_text("agreement", variant.agreement)
        facts.append(Fact("same answer as FP32", text, plural(record.baseline.samples, "sample")))
    total = sum(variant.nodes.values())
    low = next((p for p in PRECISIONS[:4] if variant.nodes.get(p)), None)
    if total and low:
        share = f"{100 * variant.nodes[low] / total:.0f} % of the layers"
        facts.append(Fact(f"layers in {low.upper()}", f"{variant.nodes[low]} / {total}", share))
    facts.append(Fact("pins", str(len(variant.pinned)), _pins_note(variant)))
    facts += _speed_fact(record, variant.name)
    return [*facts, *_size_fact(record, variant), *_calibration_fact(record)]


def _pins(record: RunRecord) -> list[PinCost]:
    """The pins of the main variant, those that cost speed first."""
    variant = main_variant(record)
    found = variant.pins if variant is not None else []
    return sorted(found, key=lambda pin: pin.precision == "fp8")


def _accuracy_fact(record: RunRecord, variant: Variant) -> Fact:
    metric = record.baseline.metric
    note = ""
    if record.baseline.value is not None:
        note = f"FP32 {metric_text(metric, record.baseline.value)}"
    if variant.drop is not None:
        unit = " points" if metric in FRACTIONS else ""
        note += f" ({change_text(metric, variant.drop)}{unit})"
    return Fact(metric_label(metric), metric_text(metric, variant.value), note.strip())


def _pins_note(variant: Variant) -> str:
    if variant.not_honoured:
        return f"{len(variant.not_honoured)} not honoured"
    return "every layer as planned" if not variant.pinned else "layers kept out of INT8"


def _speed_fact(record: RunRecord, name: str) -> list[Fact]:
    """The speed-up of the first variant called `name` whose speed means something."""
    for variant in record.variants:
        faster = speedup(record, variant) if variant.name == name else None
        if faster is not None and variant.latency_ms is not None:
            note = f"{variant.backend}, batch {variant.latency_ms.batch}"
            return [Fact("as fast as FP32", f"{faster:.2f}{TIMES}", note)]
    return []


def _size_fact(record: RunRecord, variant: Variant) -> list[Fact]:
    if variant.size_bytes is None:
        return []
    fp32 = find_variant(record, "fp32", variant.backend)
    known = fp32 is not None and fp32.size_bytes
    note = f"FP32 {size_text(fp32.size_bytes)}" if fp32 is not None and known else ""
    return [Fact("size of the model", size_text(variant.size_bytes), note)]


def _calibration_fact(record: RunRecord) -> list[Fact]:
    calibration = record.calibration
    if calibration is None:
        return []
    if not calibration.pictures:
        return [Fact("scales", str(calibration.tensors), f"from {calibration.method}")]
    note = f"{plural(calibration.pictures, 'picture')}, {calibration.method}"
    value = "reused" if calibration.reused else seconds_text(calibration.seconds)
    return [Fact("calibration", value, note)]


def _bars(layers: Sequence[LayerRow], by: str, pinned: frozenset[str]) -> list[Bar]:
    """The worst layers by the decibel value `by`; the bar shows noise / signal, in per cent."""
    worst = worst_layers(layers, by=by, count=WORST_LAYERS)
    ratios = [_noise_ratio(float(getattr(row, by))) for row in worst]
    places = {row.node: place for place, row in enumerate(layers, start=1)}
    longest = max((r for r in ratios if math.isfinite(r)), default=0.0) or 1.0
    return [
        Bar(
            node=row.node,
            op=row.op,
            sqnr=decibels(getattr(row, by)),
            error=f"{100 * ratio:.1f} %" if math.isfinite(ratio) else "NaN",
            width=round(100 * min(ratio / longest, 1.0), 2),
            pinned=row.node in pinned,
            row=places[row.node],
        )
        for row, ratio in zip(worst, ratios, strict=True)
    ]


def _layer_columns(layers: Sequence[LayerRow]) -> list[LayerColumn]:
    """The columns that at least one layer has something in."""
    return [
        c for c in LAYER_COLUMNS if any(getattr(row, c.field) not in (None, "") for row in layers)
    ]


def _breakable(name: str) -> Markup:
    """`name` that may go on in the next line after each slash."""
    return Markup("/<wbr>").join(name.split("/"))


def _noise_ratio(sqnr_db: float) -> float:
    """sqrt(noise / signal) of a signal-to-noise ratio in decibels."""
    return math.inf if sqnr_db == -math.inf else 10.0 ** (-sqnr_db / 20.0)
