"""The report as one HTML file that needs nothing beside it and asks nothing of the network."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

from trtune.precision.backends.trt.lints import lint_groups
from trtune.reports import plots
from trtune.reports.differences import Difference
from trtune.reports.page.data import page_data
from trtune.reports.page.facts import costs_shown, facts_of
from trtune.reports.page.layers import bars_of, columns_of
from trtune.reports.page.template import template_of
from trtune.reports.record import LayerRow, RunRecord
from trtune.reports.summary import (
    PRECISIONS,
    STATUS,
    headline,
    nodes_and_layers,
    outlier_sentences,
    samples_text,
    verdict,
)
from trtune.reports.tables import compare_table, outputs_table, pinned_nodes, result_table

WORST_HISTOGRAMS = 9
SHORT_TABLE = 12
OPEN_LAYERS = 120
"""Up to so many nodes their table is open from the start."""
WINDOWED_FROM = 300
"""Of a table of more nodes, a browser holds only the rows in sight."""
OPEN_PREPARED = 24
MOST_LINTS = 40


def report_html(record: RunRecord, layers: Sequence[LayerRow] = ()) -> str:
    """The whole report of one run. Parts for which nothing was measured are left out."""
    pinned = pinned_nodes(record, layers)
    shown, columns = record.histograms[:WORST_HISTOGRAMS], columns_of(layers)
    return template_of("report.html.jinja").render(
        record=record,
        badge=STATUS[record.status] if record.target or record.status == "failed" else "done",
        headline=headline(record),
        verdict=verdict(record),
        samples=samples_text(record),
        facts=facts_of(record),
        results=result_table(record),
        outputs=outputs_table(record),
        metric=record.baseline.metric,
        pins=costs_shown(record),
        tuning_plot=Markup(plots.tuning_svg(record)),
        alone=bars_of(layers, "alone_sqnr_db", pinned),
        accumulated=bars_of(layers, "accumulated_sqnr_db", pinned),
        profile_plot=Markup(linked(plots.profile_svg(layers, pinned))),
        histograms=[
            (plot, Markup(plots.histogram_svg(plot, f"hist{index}")))
            for index, plot in enumerate(shown)
        ],
        outlier_sentences=outlier_sentences(record),
        layers=layers,
        layer_columns=columns,
        data=Markup(page_data(record, layers, columns)),
        counted=nodes_and_layers(record, len(layers)),
        pinned=pinned,
        precisions=[p for p in PRECISIONS if any(row.precision == p for row in layers)],
        short=SHORT_TABLE,
        open_layers=OPEN_LAYERS,
        windowed_from=WINDOWED_FROM,
        open_prepared=OPEN_PREPARED,
        most_lints=MOST_LINTS,
        groups_of=lint_groups,
        engines=[v for v in record.variants if v.lints or v.explained],
        plots_of={p.tensor: k for k, p in enumerate(shown, start=1)},
        pictures={item: k for k, item in enumerate(record.thumbnails, start=1)},
        rows_of={r.tensor: k for k, r in reversed(list(enumerate(layers, start=1)))},
    )


def linked(svg: str) -> str:
    """`svg` whose dots lead to the rows of the layers that they stand for.

    >>> linked('<a data-layer="3">')
    '<a href="#r3" data-layer="3">'
    """
    return re.sub(r'<a data-layer="(\d+)"', r'<a href="#r\1" data-layer="\1"', svg)


def several_html(records: Sequence[RunRecord], differences: Sequence[Difference] = ()) -> str:
    """Several runs side by side, each with its headline; of two, what `differences` they have."""
    return template_of("several.html.jinja").render(
        records=records,
        table=compare_table(records),
        headlines=[(record, headline(record), verdict(record)) for record in records],
        differences=differences,
        status=STATUS,
    )
