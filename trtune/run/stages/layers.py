"""The errors of every layer, as stages: in the quantized network, alone, and of the runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress
from trtune.configs.schema import Compare
from trtune.configs.system.cluster import Cluster, chunks, job_key, kept
from trtune.datasets.batches import Batch
from trtune.datasets.holdout import hold_out
from trtune.precision.compare.alone import Alone, alone_errors
from trtune.precision.compare.alone_half import half_alone_errors, half_nodes
from trtune.precision.compare.batches import held_batches, in_batches
from trtune.precision.compare.by_node import accumulated_errors, engine_errors
from trtune.precision.compare.gate import gate_errors, model_gate
from trtune.precision.compare.sample import LARGEST_SAMPLE, placement_of, sampled
from trtune.precision.graph.file import Model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import Placement, place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import Backend, Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.run.data import RunData
from trtune.run.stage import Stage, as_json, device_needs, versions
from trtune.run.stages.engines import engine_needs, label

Sums = dict[str, ErrorSums]


def _dump(found: Sums) -> dict[str, Any]:
    names = [part.name for part in fields(ErrorSums)]
    return {node: {n: getattr(sums, n) for n in names} for node, sums in found.items()}


def _load(value: Any) -> Sums:
    return {node: ErrorSums(**sums) for node, sums in value.items()}


ERROR_SUMS = as_json(_dump, _load)
"""How error sums are kept."""


def gated(file: Model, data: RunData) -> Stage[bool]:
    """That the normalised model gives what the user's file gives; ModelError if not."""

    def make(folder: Path) -> bool:
        model_gate(file, data.source)
        return True

    needs = {"model": file, data.where: data.need, **versions("trtune", "onnx", "onnxruntime")}
    return Stage("gate", needs, make)


def accumulated(
    candidate: Candidate,
    view: GraphView,
    data: RunData,
    section: Compare,
    *,
    device: str = "cpu",
    progress: Progress,
) -> Stage[Sums]:
    """Error of every node's first output in the emulated network."""

    def make(folder: Path) -> Sums:
        return accumulated_errors(
            candidate,
            view,
            data.source,
            pictures=section.pictures,
            memory=section.memory,
            device=device,
            progress=progress,
        )

    needs = _measured(candidate, data, section.pictures) | device_needs(device)
    return Stage("compare", needs, make, ERROR_SUMS)


def alone(
    candidate: Candidate,
    view: GraphView,
    data: RunData,
    *,
    holdout: int,
    memory: int,
    seconds: float,
    device: str = "cpu",
    cluster: Cluster | None = None,
    progress: Progress,
    name: str = "alone",
) -> Stage[Sums]:
    """What each int8, fp8 or half node alone does to the output, on `holdout` pictures of `data`.

    In a large network of some (`sampled`), and of those that were asked after `seconds`. `name` is
    that of the stage.
    """

    def make(folder: Path) -> Sums:
        held_out = hold_out(data.source, holdout)
        return errors_alone(
            candidate,
            view,
            held_out,
            memory=memory,
            seconds=seconds,
            device=device,
            cluster=cluster,
            progress=progress,
        )

    needs = {
        **_candidate(candidate),
        data.where: data.need,
        "calibration.holdout": holdout,
        "compare.seconds": seconds,
        **device_needs(device),
    }
    return Stage(name, needs, make, ERROR_SUMS)


def engine_gated(
    candidate: Candidate, backend: Backend, folder: Path, data: RunData, section: Compare
) -> Stage[Sums]:
    """Errors of the FP32 engine in `folder` against onnxruntime, by output.

    Making it raises TrtuneError if that is another network.
    """

    def make(_: Path) -> Sums:
        return gate_errors(candidate.model, backend, folder, data.source, pictures=section.pictures)

    needs = engine_needs(candidate, backend) | _measured(candidate, data, section.pictures)
    return Stage(f"gate-{label(backend)}", needs, make, ERROR_SUMS)


def of_runtime(
    candidate: Candidate,
    view: GraphView,
    backend: Backend,
    engine: Path,
    data: RunData,
    section: Compare,
    progress: Progress,
) -> Stage[Sums]:
    """By node, the engine of `candidate` in `engine` against its Q/DQ model in onnxruntime."""

    def make(folder: Path) -> Sums:
        return engine_errors(
            candidate,
            view,
            backend,
            engine,
            data.source,
            scratch=folder / ".compare",
            pictures=section.pictures,
            memory=section.memory,
            progress=progress,
        )

    needs = engine_needs(candidate, backend) | _measured(candidate, data, section.pictures)
    return Stage(f"runtime-{label(backend)}", needs, make, ERROR_SUMS)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "model": candidate.model,
        "plan": candidate.plan,
        "scales": candidate.table,
        **versions("trtune", "onnx", "onnxruntime", "numpy"),
    }


def _measured(candidate: Candidate, data: RunData, pictures: int) -> dict[str, Any]:
    return {**_candidate(candidate), data.where: data.need, "compare.pictures": pictures}


def errors_alone(
    candidate: Candidate,
    view: GraphView,
    pictures: tuple[Batch, ...],
    *,
    memory: int,
    seconds: float,
    most: int = LARGEST_SAMPLE,
    device: str = "cpu",
    cluster: Cluster | None = None,
    progress: Progress,
) -> dict[str, ErrorSums]:
    """Error of the output on held-out `pictures` with one int8, fp8 or half node alone, by node.

    Of at most `most` nodes, `sampled`, as many as are asked in `seconds`.
    """
    until = time.monotonic() + seconds
    found: dict[str, ErrorSums] = {}
    model, plan, table = candidate.model, candidate.plan, candidate.table
    asked = sampled(view, askable(plan), most)
    quantized = [name for name in asked if plan.is_quantized(name)]
    placement = placement_of(view, plan, place(view, plan), quantized)
    if placement.activations and table is not None:
        held = held_batches(model, view, placement, pictures, memory=memory, device=device)
        if cluster is not None:
            found = alone_in_parts(
                cluster, (model, view, placement, held, plan, table, device), quantized,
                seconds=seconds, progress=progress,
            )  # fmt: skip
        else:
            alone = Alone(model, view, placement, held, device=device)
            found = alone_errors(
                alone, view, plan, table, nodes=quantized, seconds=seconds, progress=progress
            )
    halves = [name for name in asked if not plan.is_quantized(name)]
    if halves:
        left = until - time.monotonic()
        found |= half_alone_errors(
            model, view, plan, in_batches(model, pictures, device=device),
            nodes=halves, seconds=left, device=device, progress=progress,
        )  # fmt: skip
    return found


Share = tuple[Model, GraphView, Placement, Sequence[Batch], PrecisionPlan, CalibrationTable, str]
"""What the tasks of a cluster need for errors alone; the last is the device."""


def alone_in_parts(
    cluster: Cluster, share: Share, nodes: Sequence[str], *, seconds: float, progress: Progress
) -> dict[str, ErrorSums]:
    """The errors of `nodes` alone, some of them a task; those begun before `seconds` are over."""
    tasks = chunks(nodes, cluster)
    until = time.monotonic() + seconds
    begun = (task for task in tasks if time.monotonic() < until)
    found: dict[str, ErrorSums] = {}
    shared = (job_key(), seconds, *share)
    for _, part in cluster.each(alone_part, begun, shared=shared, what="rank layers"):
        found |= part
        progress("rank layers", len(found), len(nodes))
    return {name: found[name] for name in share[4].quantized_nodes if name in found}


def alone_part(
    key: str,
    seconds: float,
    model: Model,
    view: GraphView,
    placement: Placement,
    pictures: Sequence[Batch],
    plan: PrecisionPlan,
    table: CalibrationTable,
    device: str,
    nodes: Sequence[str],
) -> dict[str, ErrorSums]:
    """In a worker: the errors of `nodes` alone; what `pictures` give is computed for all tasks."""
    alone = kept(key, partial(Alone, model, view, placement, pictures, device=device))
    return alone_errors(alone, view, plan, table, nodes=nodes, seconds=seconds)


def askable(plan: PrecisionPlan) -> tuple[str, ...]:
    """The nodes whose error alone is asked for: those in int8 or fp8, then those in half."""
    return (*plan.quantized_nodes, *half_nodes(plan))


def alone_note(measured: int, nodes: int, seconds: float) -> str:
    """What the report says where only some of the `nodes` were `measured` alone, or nothing.

    >>> alone_note(53, 53, 600.0)
    ''
    >>> alone_note(256, 800, 600.0)
    'measured alone: 256 of 800 nodes, some of every kind of layer'
    >>> alone_note(20, 53, 600.0)
    'measured alone: 20 of 53 nodes, then the 600 s of compare.seconds were over'
    """
    if measured >= nodes:
        return ""
    text = f"measured alone: {measured} of {nodes} nodes"
    if measured < min(nodes, LARGEST_SAMPLE):
        return f"{text}, then the {seconds:g} s of compare.seconds were over"
    return f"{text}, some of every kind of layer"
