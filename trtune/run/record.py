"""The run record, put together from what the stages of a run gave."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trtune.precision.graph.macs import macs
from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.plan import is_lowered
from trtune.precision.prepare.codes import readers_of
from trtune.precision.prepare.values import ROUND_CODES, sentences
from trtune.precision.quantized.describe import nothing_in_int8
from trtune.precision.quantized.findings import summary
from trtune.precision.tune.prepared import MoveCosts
from trtune.precision.tune.scales import AUTO_METHOD, better_ranges, carried_tensors
from trtune.precision.tune.walk import Tuned
from trtune.reports.accuracy import Evaluation
from trtune.reports.entries.calibration import calibration_record
from trtune.reports.entries.histograms import histogram_plots, tensor_ranges
from trtune.reports.entries.notes import float_notes, flushed, missed_notes
from trtune.reports.entries.tuning import front_points, tuning_steps
from trtune.reports.measures.fidelity import CLOSENESS
from trtune.reports.record import (
    ORIGINAL,
    Baseline,
    CalibrationRecord,
    Chosen,
    HistogramPlot,
    RunRecord,
    TensorRange,
    Used,
    Variant,
)
from trtune.run.backends import no_float8
from trtune.run.comparing import compared
from trtune.run.naming import CACHE_FILE, PREPARED_CACHE, PREPARED_MODEL, config_hash, run_key
from trtune.run.stage import versions
from trtune.run.stages.layers import alone_note, askable
from trtune.run.stages.measuring import baseline
from trtune.run.stages.pictures import thumbnails_of
from trtune.run.tuning import threshold_of
from trtune.run.work import RunWork, Setup

PACKAGES = ("trtune", "onnx", "onnxruntime", "numpy", "numba", "pillow", "polygraphy")


@dataclass(frozen=True, slots=True)
class Started:
    """What a run tells of itself: what reproduces it, when it began, and on which clock."""

    command: str
    started: str
    began: float


def run_record(
    work: RunWork,
    tuned: Tuned,
    variants: list[Variant],
    told: Started,
    *,
    polygraphy: Sequence[str] = (),
) -> RunRecord:
    """The record of a run that ends here."""
    setup, subject, ws = work.setup, work.setup.subject, work.workspace
    target, metric, fp32 = setup.config.precision.target, work.bench.metric, ws.get(
        baseline(work.bench)
    )  # fmt: skip
    left_out = [work.left_out(data) for data in (setup.calibration, setup.evaluation)]
    chosen = setup.validation
    calibration = _calibration(work, left_out[0]) if is_lowered(work.untuned) else None
    shown = _ranges(work, calibration)
    return RunRecord(
        schema=1,
        name=setup.config.name,
        key=run_key(setup.config),
        status=_status(work, tuned, variants),
        model=_model_facts(setup),
        target=None if target is None else target.model_dump(exclude_none=True),
        baseline=Baseline(
            metric=target.metric if target else CLOSENESS,
            value=None if metric.is_fidelity else fp32.value,
            samples=fp32.samples,
            output=fp32.output,
        ),
        data=used_of(work),
        variants=variants,
        tuning=tuning_steps(tuned.steps, sign=1 if metric.higher else -1) if target else [],
        front=front_points(tuned, sign=1 if metric.higher else -1) if target else [],
        pins_needed=tuned.needed,
        validation=chosen_by(work, tuned),
        calibration=calibration,
        histograms=shown.histograms,
        ranges=shown.ranges,
        thumbnails=shown.thumbnails,
        prepared=prepared_moves(work),
        notes=[*_notes(work, left_out[1]), *_missed(work, tuned, fp32)],
        command=told.command,
        polygraphy=list(polygraphy),
        started=told.started,
        seconds=round(time.perf_counter() - told.began, 3),
        versions={
            **versions(*PACKAGES),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        hashes={
            "model": subject.model.sha256,
            "calibration_data": setup.calibration.source.identity,
            "evaluation_data": setup.evaluation.source.identity,
            **({} if chosen is None else {"validation_data": chosen.source.identity}),
            "config": config_hash(setup.config),
        },
    )


def _model_facts(setup: Setup) -> dict[str, Any]:
    model, view = setup.subject.model, setup.subject.view
    return {
        "path": Path(setup.config.model.path).name,
        "opset": model.opset,
        "inputs": [[s.name, list(s.shape), s.dtype] for s in model.inputs],
        "nodes": len(view.nodes),
        "macs": sum(macs(view, node.name) for node in view.nodes),
    }


@dataclass(frozen=True, slots=True)
class ShownRanges:
    """What a report shows of ranges: the worst histograms, all small, and the pictures behind."""

    histograms: list[HistogramPlot] = field(default_factory=list)
    ranges: list[TensorRange] = field(default_factory=list)
    thumbnails: dict[str, str] = field(default_factory=dict)


def _ranges(work: RunWork, calibration: CalibrationRecord | None) -> ShownRanges:
    """Histograms of what is quantized, and the pictures that stretch them most."""
    if not is_lowered(work.untuned) or calibration is None:
        return ShownRanges()
    view, found = work.subject.view, work.calibrated
    carried = carried_tensors(view, work.untuned, work.setup.backends.lowerings)
    plots = histogram_plots(view, found.table, found.histograms, compared(work).alone, carried)
    items = [
        *(picture.item for picture in calibration.dominant[:4]),
        *(plot.item for plot in plots),
        *(outlier.item for outlier in calibration.outliers),
    ]
    wanted = [item for item in items if item]
    shown = "html" in work.setup.config.report.formats and wanted
    pictures = work.workspace.get(thumbnails_of(work.setup.calibration, wanted)) if shown else {}
    return ShownRanges(plots, tensor_ranges(view, found.table, found.histograms, carried), pictures)


def _status(
    work: RunWork, tuned: Tuned, variants: Sequence[Variant]
) -> Literal["met", "missed", "failed"]:
    """Whether the target holds: on the pictures that the result is reported on, and if no engine
    runs here, or there are no others, on those that pins were chosen on."""
    if work.runtimes.failed:
        return "failed"
    nothing = nothing_in_int8(work.subject.view, tuned.plan)
    reported = {v.backend: v.verdict for v in variants if v.verdict and v.name != ORIGINAL}
    if work.setup.validation is not None and reported:
        return "met" if set(reported.values()) == {"met"} else "missed"
    return "met" if tuned.met and not nothing else "missed"


def used_of(work: RunWork) -> dict[str, Used]:
    """How many samples of each section of the data were used, of how many."""
    setup = work.setup
    counts = [(setup.evaluation, work.workspace.get(baseline(work.bench)).samples)]
    if is_lowered(work.untuned) and work.plain.pictures:
        counts.insert(0, (setup.calibration, work.plain.pictures))
    if setup.validation is not None:
        counts.append((setup.validation, work.workspace.get(baseline(work.choosing)).samples))
    return {
        data.where.rpartition(".")[2]: Used(used=count, of=getattr(data.source, "available", None))
        for data, count in counts
    }


def chosen_by(work: RunWork, tuned: Tuned) -> Chosen | None:
    """What the pins were chosen by, if data.validation was there for that."""
    target, bench = work.setup.config.precision.target, work.choosing
    if work.setup.validation is None or target is None:
        return None
    fp32 = work.workspace.get(baseline(bench))
    return Chosen(
        samples=fp32.samples,
        baseline=None if bench.metric.is_fidelity else fp32.value,
        threshold=threshold_of(target, fp32, higher=bench.metric.higher),
        value=tuned.chosen.score.value * (1 if bench.metric.higher else -1),
        met=tuned.met,
    )


def _calibration(work: RunWork, left_out: list[str]) -> CalibrationRecord:
    return calibration_record(
        work.plain,
        _method(work),
        reused=work.plain.pictures > 0 and not work.workspace.made("calibrate"),
        left_out=left_out,
    )


def _method(work: RunWork) -> str:
    """Where the scales come from, in words."""
    if work.setup.subject.imported is not None:
        return "Q/DQ in the model"
    section = work.setup.config.calibration
    return section.method if section.cache is None else f"cache {Path(section.cache).name}"


def _notes(work: RunWork, left_out: list[str]) -> list[str]:
    setup, untuned = work.setup, work.untuned
    data = setup.config.data
    notes = list(setup.subject.model.notes)
    if setup.subject.imported is not None:
        notes += summary(setup.subject.imported.findings)
    notes += [finding.text for finding in work.findings]
    for section in filter(None, (setup.calibration, setup.evaluation, setup.validation)):
        notes += [f"{section.where}: {note}" for note in getattr(section.source, "notes", ())]
    notes += flushed(work.subject.view, untuned)
    if FP8 in setup.config.precision.ladder[1:]:
        reasons = {backend.label: no_float8(backend) for backend in setup.config.backends}
        notes += [f"precision.ladder: fp8 is left out: {b}: {r}" for b, r in reasons.items() if r]
    notes += method_notes(work)
    notes += prepared_notes(work)
    notes += alone_notes(work)
    if data.evaluation == data.calibration:
        notes.append("accuracy was measured on the calibration pictures: name data.evaluation")
    notes += float_notes(untuned)
    if left_out and data.evaluation != data.calibration:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        notes.append(f"left out of data.evaluation, unreadable: {len(left_out)} ({shown})")
    return notes


def _missed(work: RunWork, tuned: Tuned, fp32: Evaluation) -> list[str]:
    section = work.setup.config.precision
    return missed_notes(
        section.target,
        tuned,
        nothing_in_int8(work.subject.view, tuned.plan),
        quantized=bool(work.untuned.quantized_nodes),
        limit=section.max_pins,
        fp32=None if work.bench.metric.is_fidelity else fp32.value,
        compared=not work.bench.metric.is_fidelity or _was_compared(tuned),
    )


def _was_compared(tuned: Tuned) -> bool:
    return not tuned.steps or tuned.chosen.score.sqnr_db is not None


def prepared_moves(work: RunWork) -> dict[str, list[str]]:
    """Tensor or node -> the moves it was prepared with."""
    if not is_lowered(work.untuned) or work.ready is None:
        return {}
    return work.ready.prepared.summary(readers_of(work.subject.view, work.ready.plan))


def method_notes(work: RunWork) -> list[str]:
    """Where one method for all ranges lost much against another."""
    section = work.setup.config.calibration
    measured = section.cache is None and work.setup.subject.imported is None
    if not measured or section.method == AUTO_METHOD or not work.untuned.int8_nodes:
        return []
    return [f"calibration.method {section.method}: {line}" for line in better_ranges(work.plain)]


def prepared_notes(work: RunWork) -> list[str]:
    """What was done to which tensor, and which file belongs to which cache."""
    if not is_lowered(work.untuned) or work.ready is None:
        return []
    found, rows = work.ready.prepared, prepared_moves(work)
    stays = any(not entry.folded for entry in found.moved)
    costs = cost_notes(work.ready.costs) if stays or work.ready.costs.dropped else []
    if not rows:
        nothing = "nothing was prepared: no rewrite helped beyond its noise"
        return [nothing, *costs] if work.ready.tried else costs
    moved = {entry.tensor: entry for entry in found.moved}
    lines = [
        f"prepared: {sum(ROUND_CODES in moves for moves in rows.values())} weights rounded on the "
        f"data, {len(moved)} tensors rewritten; {found.gain_db:+.1f} dB on held-out pictures. "
        f"{PREPARED_MODEL} and {PREPARED_CACHE} belong together, "
        f"{CACHE_FILE} to the model as it was"
    ]
    lines += sentences(moved, [name for name in moved if ROUND_CODES in rows[name]])
    return lines + costs


def cost_notes(costs: MoveCosts) -> list[str]:
    """What TensorRT-RTX makes of rewrites that stay as nodes, and which were dropped for it."""
    lines = [
        f"{tensor}: not rewritten, for what it costs in TensorRT-RTX: {what}"
        for tensor, what in costs.dropped.items()
    ]
    before, after = costs.kernels
    if costs.unknown:
        lines.append(f"what rewrites cost in TensorRT-RTX is not known: {costs.unknown}")
    elif before:
        lines.append(
            f"TensorRT-RTX has {after} kernels with the rewrites that stay as nodes, {before} "
            "without, and no planned node less in INT8"
        )
    return lines


def alone_notes(work: RunWork) -> list[str]:
    """That only some nodes were measured alone, if so."""
    section = work.setup.config.compare
    measured = compared(work).alone if section.alone else {}
    note = (
        alone_note(len(measured), len(askable(work.untuned)), section.seconds) if measured else ""
    )
    return [note] if note else []
