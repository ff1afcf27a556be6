"""The errors of every layer: measured once for a plan and a table, and kept in the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress
from trtune.datasets.batches import Batch, BatchSource, batch_size, fit_batch
from trtune.datasets.holdout import join
from trtune.precision.compare.alone import alone_errors
from trtune.precision.compare.alone_half import half_alone_errors, half_nodes
from trtune.precision.compare.gate import engine_gate, gate_limits
from trtune.precision.compare.inner import opens_inner
from trtune.precision.compare.layers import compare_layers
from trtune.precision.compare.runtime_errors import runtime_errors
from trtune.precision.graph.file import Model
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.placement import place
from trtune.precision.runtime.api import Backend, Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.precision.tune.scales import PICTURES_AT_ONCE, alone_on
from trtune.run.store import read_stage, write_stage


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Errors by node: of its output in the quantized network, and of quantizing it alone."""

    accumulated: Mapping[str, ErrorSums]
    alone: Mapping[str, ErrorSums]


def kept_sums(
    folder: Path, stage: str, key: Mapping[str, Any], measure: Callable[[], dict[str, ErrorSums]]
) -> dict[str, ErrorSums]:
    """What `stage` left in `folder` for exactly `key`, else what `measure` gives, kept."""
    kept = read_stage(folder, stage, key)
    if kept is not None:
        return {name: ErrorSums(**sums) for name, sums in kept.items()}
    found = measure()
    write_stage(folder, stage, key, {name: sums_dict(s) for name, s in found.items()})
    return found


def sums_dict(sums: ErrorSums) -> dict[str, Any]:
    """An `ErrorSums` as plain numbers; `ErrorSums(**...)` reads it back."""
    return {name: getattr(sums, name) for name in sums.__slots__}


def compared_tensors(view: GraphView) -> dict[str, str]:
    """The first output of every node that does not compute shapes, and the node's name."""
    nodes = [node for node in view.nodes if node.name not in view.shape_nodes]
    return {node.output[0]: node.name for node in nodes if node.output and node.output[0]}


def accumulated_errors(
    candidate: Candidate,
    view: GraphView,
    source: BatchSource,
    *,
    pictures: int,
    memory: int,
    progress: Progress,
) -> dict[str, ErrorSums]:
    """Error of every node's first output in the emulated network, over the first `pictures`."""
    tensors = compared_tensors(view)
    table = candidate.table or CalibrationTable({})
    errors = compare_layers(
        candidate.model.proto,
        in_float32(lower_emulate(candidate.model, candidate.plan, table)),
        list(tensors),
        source,
        pictures=pictures,
        memory=memory,
        external_dir=candidate.model.external_dir,
        progress=progress,
    )
    return {tensors[t]: sums for t, sums in errors.errors.items()}


def gate_errors(
    model: Model, backend: Backend, folder: Path, source: BatchSource, *, pictures: int
) -> dict[str, ErrorSums]:
    """Errors of the FP32 engine that `backend` built in `folder` against onnxruntime, by output.

    Raises TrtuneError if it is not the FP32 model.
    """
    limit, noise = gate_limits(backend.settings)
    reference = OrtEngine(lambda: make_session(model.proto, external_dir=model.external_dir))
    with reference as exact, backend.load(folder) as engine:
        return engine_gate(
            exact,
            engine,
            source,
            pictures=pictures,
            backend=backend.name,
            limit=limit,
            noise=noise,
        )


def engine_errors(
    candidate: Candidate,
    view: GraphView,
    backend: Backend,
    folder: Path,
    source: BatchSource,
    *,
    scratch: Path,
    pictures: int,
    memory: int,
    progress: Progress,
) -> dict[str, ErrorSums]:
    """Error of every node's first output in the engine against the emulated network.

    `folder` holds the engine of `candidate`; those that show inner tensors are built in `scratch`,
    which is removed. Nodes whose output is inside a fused layer of the engine are left out.
    """
    table = candidate.table or CalibrationTable({})
    proto = in_float32(lower_emulate(candidate.model, candidate.plan, table))
    made = {name for node in proto.graph.node for name in node.output}
    tensors = {t: node for t, node in compared_tensors(view).items() if t in made}

    def reference(marked: Sequence[str]) -> OrtEngine:
        where = candidate.model.external_dir
        return OrtEngine(lambda: make_session(proto, outputs=marked, external_dir=where))

    try:
        found = runtime_errors(
            reference,
            backend.load(folder),
            opens_inner(backend, candidate, scratch),
            list(tensors),
            source,
            pictures=pictures,
            memory=memory,
            progress=progress,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {tensors[name]: sums for name, sums in found.errors.items() if name in tensors}


def errors_alone(
    candidate: Candidate,
    view: GraphView,
    pictures: tuple[Batch, ...],
    *,
    memory: int,
    progress: Progress,
) -> dict[str, ErrorSums]:
    """Error of the output on held-out `pictures` with one int8 or half node alone, by node."""
    found: dict[str, ErrorSums] = {}
    placement = place(view, candidate.plan)
    if placement.activations and candidate.table is not None:
        alone = alone_on(candidate.model, view, placement, pictures, memory=memory)
        found = alone_errors(alone, view, candidate.plan, candidate.table, progress=progress)
    if half_nodes(candidate.plan):
        size = batch_size(candidate.model.inputs, PICTURES_AT_ONCE)
        batches = [
            fit_batch(batch, batch_size(candidate.model.inputs, len(batch)))
            for batch in join(pictures, size)
        ]
        found |= half_alone_errors(
            candidate.model, view, candidate.plan, batches, progress=progress
        )
    return found
