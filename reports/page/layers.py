"""The lists of the worst layers, and the columns of the table of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trtune.reports.record import LayerRow
from trtune.reports.summary import count, decibels, number
from trtune.reports.tables import worst_layers

WORST_LAYERS = 16


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


def bars_of(layers: Sequence[LayerRow], by: str, pinned: frozenset[str]) -> list[Bar]:
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


def columns_of(layers: Sequence[LayerRow]) -> list[LayerColumn]:
    """The columns that at least one layer has something in."""
    return [
        c for c in LAYER_COLUMNS if any(getattr(row, c.field) not in (None, "") for row in layers)
    ]


def _noise_ratio(sqnr_db: float) -> float:
    """sqrt(noise / signal) of a signal-to-noise ratio in decibels."""
    return math.inf if sqnr_db == -math.inf else 10.0 ** (-sqnr_db / 20.0)
