"""The run record and the layer table, put together from what a job measured."""

from __future__ import annotations

import platform
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trtune.calibrate.histogram import Histogram, bin_edges
from trtune.calibrate.outliers import dominant, outliers
from trtune.configs.errors import TrtuneError
from trtune.configs.system.machine import peak_rss
from trtune.precision.compare.inner import inner_kind
from trtune.precision.graph.macs import macs, parameters
from trtune.precision.plan.half_rules import flushed_weights
from trtune.precision.plan.placement import place, shared_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.quantized.findings import summary
from trtune.precision.runtime.engine_json import ENGINE_JSON
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.tune.scales import carried_tensors
from trtune.reports.record import (
    Baseline,
    CalibrationRecord,
    DominantPicture,
    HistogramPlot,
    LayerRow,
    Outlier,
    RunRecord,
    TuningStep,
)
from trtune.reports.summary import metric_label, metric_text
from trtune.run.job import Job, run_key
from trtune.run.variants import is_emulation, make_variants

PLOTTED = 9
SHOWN_OUTLIERS = 60


def layer_rows(job: Job, plan: PrecisionPlan) -> list[LayerRow]:
    """One row a node, in graph order: what it is, what `plan` gives it, and its errors."""
    view, table, errors = job.view, job.table if job.untuned.int8_nodes else None, job.layers
    reads = {
        edge: tensor
        for tensor, edges in place(view, job.untuned).activations.items()
        for edge in edges
    }
    account = runtime_account(job, plan)
    engine = next(iter(job.engines), None)
    runtime = job.runtime_errors(engine, plan) if engine else {}
    how = f"{engine.name}, {inner_kind(engine)}" if engine else ""
    rows = []
    for node in view.nodes:
        assignment = plan.nodes[node.name]
        shape = view.shapes.get(node.output[0], ())
        tensor = reads.get((node.name, 0), "")
        known = table is not None and tensor in table.scales
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
                runs_in="; ".join(
                    f"{b}: {runs[node.name]}" for b, runs in account.items() if node.name in runs
                ),
                tensor=tensor,
                amax=table.amax(tensor) if table is not None and known else None,
                method=table.method(tensor) if table is not None and known else "",
                time_ms=job.layer_times.get(node.name),
                **_accumulated(errors.accumulated.get(node.name)),
                **_alone(errors.alone.get(node.name)),
                **_runtime(runtime.get(node.name), how),
            )
        )
    return rows


def runtime_account(job: Job, plan: PrecisionPlan) -> dict[str, dict[str, str]]:
    """Backend -> node -> what it runs in, as the runtime that built `plan` tells it."""
    found = {}
    for backend in job.backends:
        folder = job.engine_folder(backend)
        if is_emulation(backend) or not (folder / ENGINE_JSON).is_file():
            continue
        with suppress(TrtuneError):  # without its runtime nobody can say that it is current
            info = job.built(backend, plan, folder)
            if info is not None:
                found[backend.name] = dict(info.precisions)
    return found


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


def calibration_record(job: Job) -> CalibrationRecord:
    """What calibration did, and which pictures set its ranges."""
    found = job.calibrated
    ranked = outliers(found.histograms)
    return CalibrationRecord(
        method=_method(job),
        pictures=found.pictures,
        seconds=found.seconds,
        inference_seconds=found.inference_seconds,
        peak_rss_bytes=peak_rss(),
        tensors=len(found.table.scales),
        passes=found.passes,
        reused=job.reused_calibration,
        search_seconds=found.search_seconds,
        skipped=job.skipped["calibration"],
        dominant=[DominantPicture(**asdict(d)) for d in dominant(ranked)],
        outliers=[Outlier(**asdict(o)) for o in ranked[:SHOWN_OUTLIERS]],
        methods=dict(Counter(found.table.methods.values())),
    )


def _method(job: Job) -> str:
    """Where the scales come from, in words."""
    if job.imported is not None:
        return "Q/DQ in the model"
    section = job.config.calibration
    return section.method if section.cache is None else f"cache {Path(section.cache).name}"


def histogram_plots(job: Job) -> list[HistogramPlot]:
    """Histograms of the inputs of the nodes that hurt most alone, worst first."""
    histograms, table = job.calibrated.histograms, job.table
    carried = carried_tensors(job.view, job.untuned, job.lowerings)
    roots = shared_ranges(job.view, dict.fromkeys(carried))
    plots: dict[str, HistogramPlot] = {}
    for node in sorted(job.layers.alone, key=lambda n: (job.layers.alone[n].sqnr_db, n)):
        tensor = job.view.by_name[node].input[0]
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


def tuning_steps(job: Job) -> list[TuningStep]:
    """Every evaluated set of pins, in order."""
    return [
        TuningStep(
            step=number,
            action=step.action,
            pinned=list(step.pinned),
            value=step.score.value,
            builds=step.score.builds,
            seconds=round(step.seconds, 3),
            sqnr_db=step.score.sqnr_db,
            met=step.score.met,
            cached=step.score.cached,
            reason="; ".join(filter(None, (step.reason, step.score.note))),
        )
        for number, step in enumerate(job.tuned.steps)
    ]


def run_record(job: Job, *, command: str, started: str, began: float) -> RunRecord:
    """The record of a run that began at `began` (of `time.perf_counter`) and ends here."""
    variants = make_variants(job)
    target = job.config.precision.target
    quantized = job.is_lowered
    return RunRecord(
        schema=1,
        name=job.config.name,
        key=run_key(job.config),
        status="met" if job.tuned.met else "missed",
        model={
            "path": Path(job.config.model.path).name,
            "opset": job.model.opset,
            "inputs": [[s.name, list(s.shape), s.dtype] for s in job.model.inputs],
            "nodes": len(job.view.nodes),
            "macs": sum(macs(job.view, node.name) for node in job.view.nodes),
        },
        target=None if target is None else target.model_dump(exclude_none=True),
        baseline=Baseline(
            metric=target.metric if target else "sqnr_db",
            value=None if job.is_fidelity else job.baseline.value,
            samples=job.baseline.samples,
        ),
        variants=variants,
        tuning=tuning_steps(job) if target else [],
        calibration=calibration_record(job) if quantized else None,
        histograms=histogram_plots(job) if quantized else [],
        notes=_notes(job),
        command=command,
        started=started,
        seconds=round(time.perf_counter() - began, 3),
        versions={
            **job.versions,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        hashes=job.hashes,
    )


def _notes(job: Job) -> list[str]:
    notes = list(job.model.notes)
    if job.imported is not None:
        notes += summary(job.imported.findings)
    notes += _flushed(job)
    if job.config.data.evaluation == job.config.data.calibration:
        notes.append("accuracy was measured on the calibration pictures: name data.evaluation")
    for name in job.untuned.compute_nodes:
        assignment = job.untuned.nodes[name]
        unplanned = assignment.precision != "int8" and not assignment.is_pinned
        if job.untuned.default == "int8" and unplanned:
            notes.append(f"{name} stays {assignment.precision}: {assignment.reason}")
    left_out = job.skipped["evaluation"]
    if left_out and job.config.data.evaluation != job.config.data.calibration:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        notes.append(f"left out of data.evaluation, unreadable: {len(left_out)} ({shown})")
    return [*notes, *_target_notes(job)]


def _flushed(job: Job) -> list[str]:
    """What becomes of small weights in half precision."""
    found = flushed_weights(job.view, job.untuned) if job.untuned.halves else {}
    zeroed = sum(flushed.zeroed for flushed in found.values())
    total = sum(flushed.total for flushed in found.values())
    if not zeroed:
        return []
    worst = max(found, key=lambda name: found[name].zeroed)
    return [
        f"{zeroed} of {total} weights are too small for half precision and become 0, most of them "
        f"in {worst}"
    ]


def _target_notes(job: Job) -> list[str]:
    """Why a missed target could not be met."""
    target, fp32 = job.config.precision.target, job.baseline.value
    if target is None or job.tuned.met:
        return []
    notes = []
    if not job.untuned.int8_nodes:
        notes.append("the target cannot be met by tuning: no node is quantized")
    if target.min is not None and not job.is_fidelity and fp32 is not None and fp32 < target.min:
        label, least = metric_label(target.metric), metric_text(target.metric, target.min)
        notes.append(
            f"the FP32 model itself misses the target: its {label} is "
            f"{metric_text(target.metric, fp32)}, and {least} is asked for"
        )
    return notes
