"""Histograms to be drawn: of what the nodes read that hurt most, and small of every tensor."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.histogram import Histogram, bin_edges
from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import shared_ranges
from trtune.precision.runtime.errors import ErrorSums
from trtune.reports.record import HistogramPlot, TensorRange

PLOTTED = 9
PLOT_BINS = 80
MOST_RANGES = 4000
"""Tensors whose ranges are kept for the report."""
LEVELS = string.ascii_letters
"""What `TensorRange.heights` is written with, the least first."""


def histogram_plots(
    view: GraphView,
    table: CalibrationTable,
    histograms: Mapping[str, Histogram],
    alone: Mapping[str, ErrorSums],
    carried: Iterable[str],
) -> list[HistogramPlot]:
    """Histograms of the inputs of the nodes that hurt most alone, worst first.

    `carried` are the tensors that have pairs: those that moving operators connect share a range.
    """
    roots = shared_ranges(view, dict.fromkeys(carried))
    plots: dict[str, HistogramPlot] = {}
    for node in sorted(alone, key=lambda n: (alone[n].sqnr_db, n)):
        tensor = view.by_name[node].input[0]
        if tensor not in table.scales:  # a node in half precision
            continue
        histogram = histograms.get(roots.get(tensor, tensor))
        if histogram is not None and histogram.maximum > 0 and tensor not in plots:
            plots[tensor] = histogram_plot(
                tensor, histogram, table.amax(tensor), table.method(tensor)
            )
        if len(plots) == PLOTTED:
            break
    return list(plots.values())


def tensor_ranges(
    view: GraphView,
    table: CalibrationTable,
    histograms: Mapping[str, Histogram],
    carried: Iterable[str],
) -> list[TensorRange]:
    """Range and histogram of every tensor with a scale, in the table's order."""
    roots = shared_ranges(view, dict.fromkeys(carried))
    found = []
    for tensor in list(table.scales)[:MOST_RANGES]:
        histogram = histograms.get(roots.get(tensor, tensor))
        if histogram is None or not histogram.maximum > 0:
            continue
        pictures = histogram.pictures
        median = min(pictures.median, histogram.maximum)
        found.append(
            TensorRange(
                tensor=tensor,
                amax=table.amax(tensor),
                max=histogram.maximum,
                method=table.method(tensor),
                heights=heights(_counts(histogram)[1]),
                item=pictures.item,
                ratio=histogram.maximum / median if median else math.inf,
            )
        )
    return found


def heights(counts: NDArray[Any]) -> str:
    """Counts as `TensorRange` keeps them: a character each, by the logarithm.

    >>> heights(np.array([0, 1, 100, 10**6]))
    '0arZ'
    """
    top = math.log(max(float(counts.max(initial=0)), 2.0))
    levels = np.log(np.maximum(counts, 1)) / top * (len(LEVELS) - 1)
    return "".join(
        LEVELS[round(float(level))] if count > 0 else "0"
        for count, level in zip(counts, levels, strict=True)
    )


def histogram_plot(tensor: str, histogram: Histogram, amax: float, method: str) -> HistogramPlot:
    """A histogram in 80 logarithmic bins over the four decades below its maximum."""
    edges, counts = _counts(histogram)
    return HistogramPlot(
        tensor=tensor,
        edges=edges.tolist(),
        counts=counts.tolist(),
        amax=amax,
        max=histogram.maximum,
        method=method,
        item=histogram.pictures.item,
    )


def _counts(histogram: Histogram) -> tuple[NDArray[Any], NDArray[Any]]:
    """Edges of logarithmic bins over the four decades below the maximum, and their counts."""
    edges = np.geomspace(histogram.maximum / 1e4, histogram.maximum * (1 + 1e-6), PLOT_BINS + 1)
    filled = np.flatnonzero(histogram.counts[1:]) + 1
    middles = (bin_edges()[filled] + bin_edges()[filled + 1]) / 2
    middles = np.minimum(middles, histogram.maximum)
    counts, _ = np.histogram(middles, edges, weights=histogram.counts[filled])
    return edges, counts
