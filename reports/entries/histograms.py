"""Histograms to be drawn, of the tensors that the nodes read which hurt most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from trtune.calibrate.histogram import Histogram, bin_edges
from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import shared_ranges
from trtune.precision.runtime.errors import ErrorSums
from trtune.reports.record import HistogramPlot

PLOTTED = 9


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


def histogram_plot(tensor: str, histogram: Histogram, amax: float, method: str) -> HistogramPlot:
    """A histogram in 80 logarithmic bins over the four decades below its maximum."""
    edges = np.geomspace(histogram.maximum / 1e4, histogram.maximum * (1 + 1e-6), 81)
    filled = np.flatnonzero(histogram.counts[1:]) + 1
    middles = (bin_edges()[filled] + bin_edges()[filled + 1]) / 2
    middles = np.minimum(middles, histogram.maximum)
    counts, _ = np.histogram(middles, edges, weights=histogram.counts[filled])
    return HistogramPlot(
        tensor=tensor,
        edges=edges.tolist(),
        counts=counts.tolist(),
        amax=amax,
        max=histogram.maximum,
        method=method,
    )
