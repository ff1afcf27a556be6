"""Evaluation by the tasks of a cluster: each runs an engine over its part of the data.

What comes back is what the model gave, sample by sample; the metric is computed here, as for an
engine in this process, and so is its spread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trtune.configs.progress import Progress
from trtune.configs.system.cluster import Cluster, job_key, kept
from trtune.datasets.batches import BatchSource
from trtune.datasets.wrapped import in_parts
from trtune.precision.graph.file import Model
from trtune.precision.runtime.api import Backend, Engine
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.outputs import Answers, Layout, StoredOutputs, answers, gathered

PARTS = 4
"""Parts of the data for each task that runs at a time."""
LARGEST_FILE = 1 << 31
"""Engines above this are run here: they would not fit into a message."""


@dataclass(frozen=True, slots=True)
class Fp32:
    """How a worker opens the FP32 model."""

    model: Model
    device: str

    def __call__(self) -> Engine:
        """The engine, to be entered."""
        proto, where = self.model.proto, self.model.external_dir
        return OrtEngine(partial(make_session, proto, device=self.device, external_dir=where))


@dataclass(frozen=True, slots=True)
class Built:
    """How a worker opens what `backend` built: from the files of its folder."""

    backend: Backend
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, backend: Backend, folder: Path) -> Built:
        """What lies in `folder`."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return cls(backend, files)

    def __call__(self) -> Engine:
        """The engine, to be entered; its files stay as long as the worker."""
        folder = Path(tempfile.mkdtemp(prefix="trtune-engine-"))
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return self.backend.load(folder)


def outputs_in_parts(
    opens: Callable[[], Engine],
    source: BatchSource,
    cluster: Cluster,
    *,
    fixed_batch: int | None,
    layout: Layout,
    progress: Progress,
    what: str,
    memory: int,
) -> StoredOutputs | None:
    """The outputs over `source` as `collect_outputs` has them, from the tasks of `cluster`.

    None where something that the model gives belongs to no sample: a metric may want that, and it
    is not kept.
    """
    count = source.count or 0
    size = max(-(-count // (PARTS * cluster.slots)), 1)
    tasks = ((part,) for part in in_parts(source, size))
    held: dict[int, list[tuple[tuple[str, ...], Mapping[str, Any]]]] = {}
    shared = (job_key(), opens, fixed_batch, layout)
    done = 0
    for number, found in cluster.each(outputs_part, tasks, shared=shared, what=what):
        if found is None:
            return None
        held[number] = found
        done += sum(len(items) for items, _ in found)
        progress(what, done, source.count)
    return gathered((piece for number in sorted(held) for piece in held[number]), memory, what)


def outputs_part(
    key: str,
    opens: Callable[[], Engine],
    fixed_batch: int | None,
    layout: Layout,
    part: BatchSource,
) -> list[tuple[tuple[str, ...], Mapping[str, Any]]] | None:
    """In a worker: the names and outputs of each batch of `part`; see `outputs_in_parts`."""
    engine = kept(key, lambda: opens().__enter__())
    pieces = []
    for batch in part:
        found: Answers = answers(engine.infer, batch, fixed_batch=fixed_batch, layout=layout)
        if found.whole:
            return None
        pieces.append((batch.items, found.samples))
    return pieces
