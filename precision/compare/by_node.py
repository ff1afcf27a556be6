"""The errors of a candidate, node by node: of its emulation, and of an engine beside that."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress
from trtune.datasets.batches import BatchSource
from trtune.precision.compare.inner import opens_inner
from trtune.precision.compare.layers import compare_layers
from trtune.precision.compare.runtime_errors import runtime_errors
from trtune.precision.graph.view import COLLECTIONS, GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.runtime.api import Backend, Candidate
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import OrtEngine, make_session

NO_NUMBERS = frozenset({*COLLECTIONS.values(), "object"})


def compared_tensors(view: GraphView) -> dict[str, str]:
    """The first output of every node that does not compute shapes, and the node's name.

    Sequences and other collections are no tensors, texts no numbers: they are left out.
    """
    nodes = [node for node in view.nodes if node.name not in view.shape_nodes]
    firsts = {node.output[0]: node.name for node in nodes if node.output and node.output[0]}
    return {t: name for t, name in firsts.items() if view.dtypes.get(t) not in NO_NUMBERS}


def accumulated_errors(
    candidate: Candidate,
    view: GraphView,
    source: BatchSource,
    *,
    pictures: int,
    memory: int,
    device: str = "cpu",
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
        device=device,
        progress=progress,
    )
    return {tensors[t]: sums for t, sums in errors.errors.items()}


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
