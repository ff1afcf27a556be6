"""The table of layers, and the histograms beside it, from what the stages measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtune.calibrate.histogram import Histogram, bin_edges
from trtune.calibrate.table import CalibrationTable
from trtune.precision.compare.inner import inner_kind
from trtune.precision.graph.macs import macs, parameters
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import place, shared_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.errors import ErrorSums
from trtune.reports.record import HistogramPlot, LayerRow
from trtune.run.stages.engines import engine_folder, engine_of, is_emulation
from trtune.run.stages.layers import Sums, accumulated, of_runtime
from trtune.run.tuning import alone_of
from trtune.run.work import BackendFailed, RunWork, watched

PLOTTED = 9


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of nodes, by their names. `how` says which engine, and how it was read."""

    accumulated: Mapping[str, ErrorSums] = field(default_factory=dict)
    alone: Mapping[str, ErrorSums] = field(default_factory=dict)
    runtime: Mapping[str, ErrorSums] = field(default_factory=dict)
    how: str = ""
    account: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)


def compared(work: RunWork) -> Measured:
    """The errors of the untuned plan's nodes; none if all of it is FP32."""
    setup, section = work.setup, work.setup.config.compare
    if not work.is_lowered:
        return Measured()
    stage = accumulated(
        work.candidate(work.untuned), work.subject.view, setup.evaluation, section, setup.progress
    )
    errors = work.workspace.get(stage)
    alone = work.workspace.get(alone_of(work)) if section.alone else None
    return Measured(errors, alone or {})


def layer_rows(
    work: RunWork, plan: PrecisionPlan, times: Mapping[str, float] | None = None
) -> list[LayerRow]:
    """One row a node, in graph order: what it is, what `plan` gives it, and its errors."""
    found = compared(work)
    runtime, how = _of_runtime(work, plan)
    measured = Measured(
        found.accumulated, found.alone, runtime, how, runtime_account(work, plan), times or {}
    )
    table = work.calibrated.table if work.untuned.int8_nodes else None
    return rows_of(work.subject.view, plan, work.untuned, table, measured)


def _of_runtime(work: RunWork, plan: PrecisionPlan) -> tuple[Sums, str]:
    """Errors of the first engine that runs here against onnxruntime, and how they were read."""
    setup, candidate = work.setup, work.candidate(plan)
    for backend in work.engines:
        try:
            with watched(backend):
                work.workspace.get(engine_of(candidate, backend, "", setup.progress))
                stage = of_runtime(
                    candidate,
                    work.subject.view,
                    backend,
                    engine_folder(work.folder, backend),
                    setup.evaluation,
                    setup.config.compare,
                    setup.progress,
                )
                return work.workspace.get(stage), f"{backend.name}, {inner_kind(backend)}"
        except BackendFailed as failure:
            work.fail(failure)
    return {}, ""


def runtime_account(work: RunWork, plan: PrecisionPlan) -> dict[str, dict[str, str]]:
    """Backend -> node -> what it runs in, as the runtime that built `plan` tells it."""
    found = {}
    for backend in work.alive:
        stage = engine_of(work.candidate(plan), backend, "", work.setup.progress)
        if not is_emulation(backend) and work.workspace.holds(stage):
            found[backend.name] = dict(work.workspace.get(stage).precisions)
    return found


def rows_of(
    view: GraphView,
    plan: PrecisionPlan,
    untuned: PrecisionPlan,
    table: CalibrationTable | None,
    measured: Measured,
) -> list[LayerRow]:
    """The rows for plain values: `untuned` places the pairs that the errors were measured with."""
    reads = {
        edge: tensor for tensor, edges in place(view, untuned).activations.items() for edge in edges
    }
    rows = []
    for node in view.nodes:
        assignment = plan.nodes[node.name]
        shape = view.shapes.get(node.output[0], ())
        tensor = reads.get((node.name, 0), "")
        known = table is not None and tensor in table.scales
        runs_in = [f"{b}: {runs[node.name]}" for b, runs in measured.account.items()
                   if node.name in runs]  # fmt: skip
        rows.append(
            LayerRow(
                node=node.name,
                op=node.op_type,
                shape="x".join("?" if d is None else str(d) for d in shape),
                macs=macs(view, node.name),
                parameters=parameters(view, node.name),
                precision=assignment.precision,
                reason=assignment.reason,
                origin=assignment.origin,
                runs_in="; ".join(runs_in),
                tensor=tensor,
                amax=table.amax(tensor) if table is not None and known else None,
                method=table.method(tensor) if table is not None and known else "",
                time_ms=measured.times.get(node.name),
                **_accumulated(measured.accumulated.get(node.name)),
                **_alone(measured.alone.get(node.name)),
                **_runtime(measured.runtime.get(node.name), measured.how),
            )
        )
    return rows


def _accumulated(sums: ErrorSums | None) -> dict[str, Any]:
    if sums is None:
        return {}
    return {
        "accumulated_sqnr_db": sums.sqnr_db,
        "accumulated_cosine": sums.cosine,
        "accumulated_relative_l2": sums.relative_l2,
        "accumulated_mean_relative": sums.mean_relative,
        "accumulated_max_abs": sums.max_abs,
    }


def _alone(sums: ErrorSums | None) -> dict[str, Any]:
    if sums is None:
        return {}
    return {
        "alone_sqnr_db": sums.sqnr_db,
        "alone_cosine": sums.cosine,
        "alone_relative_l2": sums.relative_l2,
    }


def _runtime(sums: ErrorSums | None, how: str) -> dict[str, Any]:
    if sums is None:
        return {}
    return {
        "runtime": how,
        "runtime_sqnr_db": sums.sqnr_db,
        "runtime_relative_l2": sums.relative_l2,
        "runtime_max_abs": sums.max_abs,
    }


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
