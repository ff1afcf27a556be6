"""The comparison of a run, and the parts of the record that are made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinymodels
from tinyproject import work_of, write_project

from trtune.precision.tune.scales import carried_tensors
from trtune.reports.entries.histograms import (
    LEVELS,
    PLOT_BINS,
    PLOTTED,
    heights,
    histogram_plots,
    tensor_ranges,
)
from trtune.reports.record import HistogramPlot
from trtune.run.comparing import compared, layer_rows
from trtune.run.work import RunWork


def plots_of(work: RunWork) -> list[HistogramPlot]:
    """The plots of a project's untuned plan."""
    found = work.calibrated
    alone = compared(work).alone
    view = work.setup.subject.view
    carried = carried_tensors(view, work.untuned, ("emulate",))
    return histogram_plots(view, found.table, found.histograms, alone, carried)


class TestHistogramPlots:
    def test_the_inputs_of_what_hurts_most_come_first(self, tmp_path: Path) -> None:
        work = work_of(write_project(tmp_path))
        plots = plots_of(work)
        worst = min(compared(work).alone, key=lambda node: compared(work).alone[node].sqnr_db)
        assert plots[0].tensor == work.setup.subject.view.by_name[worst].input[0]
        assert [plot.amax for plot in plots] == [
            work.calibrated.table.amax(plot.tensor) for plot in plots
        ]
        assert {plot.tensor for plot in plots} == {"input", "relu1", "flat"}

    def test_no_more_than_the_report_shows(self, tmp_path: Path) -> None:
        net = tinymodels.Net()
        x = net.input("input")
        for i in range(PLOTTED + 2):
            x = net.op("Relu", net.conv(x, f"conv{i}", 3, 3), out=f"relu{i}")
        work = work_of(write_project(tmp_path, net.head(x, 3)))
        assert len(plots_of(work)) == PLOTTED


class TestLayerRows:
    def test_a_row_a_node_in_graph_order(self, tmp_path: Path) -> None:
        work = work_of(write_project(tmp_path, tinymodels.dynamic_reshape(), labels=False))
        rows = layer_rows(work, work.untuned)
        assert [row.node for row in rows] == [node.name for node in work.setup.subject.view.nodes]
        by_name = {row.node: row for row in rows}
        conv = by_name["n_conv"]
        assert (conv.op, conv.shape, conv.tensor) == ("Conv", "Nx4x4x4", "input")
        assert conv.amax == work.calibrated.table.amax("input")
        shape = by_name["n_shape"]
        assert shape.reason == "shape computation"
        assert (shape.tensor, shape.amax, shape.accumulated_sqnr_db) == ("", None, None)

    def test_errors_accumulate(self, tmp_path: Path) -> None:
        work = work_of(write_project(tmp_path))
        rows = {row.node: row for row in layer_rows(work, work.untuned)}
        first, last = rows["n_conv1"], rows["n_logits"]
        assert first.accumulated_relative_l2 is not None
        assert last.accumulated_relative_l2 is not None
        assert first.accumulated_sqnr_db == pytest.approx(
            -20 * np.log10(first.accumulated_relative_l2), abs=1e-6
        )
        assert last.alone_sqnr_db is not None
        assert last.accumulated_sqnr_db is not None
        assert last.alone_sqnr_db > last.accumulated_sqnr_db

    def test_the_precision_is_that_of_the_plan_given(self, tmp_path: Path) -> None:
        work = work_of(write_project(tmp_path))
        plan = work.untuned.pin(["n_conv2"], "fp32", "pinned by the tuner: it hurts")
        rows = {row.node: row for row in layer_rows(work, plan)}
        assert (rows["n_conv2"].precision, rows["n_conv2"].reason) == (
            "fp32",
            "pinned by the tuner: it hurts",
        )
        assert rows["n_conv2"].tensor == "relu1"
        assert rows["n_conv1"].precision == "int8"


class TestTensorRanges:
    def test_every_tensor_with_a_scale_has_its_histogram_and_picture(self, tmp_path: Path) -> None:
        work = work_of(write_project(tmp_path, tinymodels.conv_relu()))
        found, view = work.calibrated, work.setup.subject.view
        carried = carried_tensors(view, work.untuned, ("emulate",))
        ranges = tensor_ranges(view, found.table, found.histograms, carried)
        named = [entry.tensor for entry in ranges]
        assert named == [tensor for tensor in found.table.scales if tensor in named]
        assert {row.tensor for row in layer_rows(work, work.untuned) if row.tensor} <= set(named)
        for entry in ranges:
            assert len(entry.heights) == PLOT_BINS
            assert set(entry.heights) <= set("0" + LEVELS)
            assert "Z" in entry.heights
            assert entry.heights[-1] != "0"
            assert entry.amax == pytest.approx(found.table.amax(entry.tensor))
            assert entry.item
            assert entry.ratio >= 1

    def test_heights_are_by_the_logarithm(self) -> None:
        assert heights(np.array([0, 1, 10, 1000])) == "0arZ"  # no level half-way between two
        assert heights(np.zeros(3)) == "000"


def test_a_row_names_the_rows_of_its_producers(tmp_path: Path) -> None:
    work = work_of(write_project(tmp_path, tinymodels.conv_relu()))
    rows = layer_rows(work, work.untuned)
    view = work.setup.subject.view
    for row in rows:
        makers = [rows[int(word) - 1].node for word in row.producers.split()]
        assert makers == [view.producer[t] for t in view.by_name[row.node].input
                          if t in view.producer]  # fmt: skip
    assert any(row.producers for row in rows)
