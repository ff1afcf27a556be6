"""Histograms as they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtune.calibrate.cpu.counter import Counter
from trtune.calibrate.histogram import Histogram
from trtune.reports.entries.histograms import histogram_plot


def histogram_of(values: list[float]) -> Histogram:
    counter = Counter()
    counter.add(("a",), np.array([values], np.float32))
    return counter.histogram()


class TestHistogramPlot:
    def test_four_decades_in_eighty_bins(self) -> None:
        plot = histogram_plot("x", histogram_of([0.0, 0.5, -1.0, 1.0]), 0.75, "entropy")
        assert (len(plot.edges), len(plot.counts)) == (81, 80)
        assert plot.edges[0] == pytest.approx(1e-4)
        assert plot.edges[-1] == pytest.approx(1.0, rel=1e-5)
        assert np.ptp(np.diff(np.log(plot.edges))) < 1e-9
        assert (plot.tensor, plot.amax, plot.max, plot.method) == ("x", 0.75, 1.0, "entropy")
        assert plot.counts[-1] == 2
        (half,) = np.flatnonzero(plot.counts[:-1])
        assert plot.edges[half] < 0.5 * (1 + 1 / 64)
        assert plot.edges[half + 1] > 0.5 * (1 - 1 / 64)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(2.0**-3, 2.0**3, width=32), min_size=1, max_size=50))
    def test_no_value_within_them_is_lost(self, values: list[float]) -> None:
        plot = histogram_plot("x", histogram_of(values), 1.0, "max")
        assert sum(plot.counts) == len(values)
        assert plot.edges == sorted(plot.edges)
        assert plot.max == max(values)
