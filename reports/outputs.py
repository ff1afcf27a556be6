"""What a model gives for a batch, sample by sample, and the FP32 model's answers kept to compare.

An output belongs to samples along one of its axes, or is one sample's if one goes in at a time;
anything else (anchors, a picked number of rows) is kept whole.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    InputSpec,
    batch_size,
    batch_symbol,
    fit_batch,
    is_free,
    take_rows,
)
from trtune.datasets.pictures.prefetch import map_ahead
from trtune.precision.runtime.output_groups import OutputGroup, output_groups

Run: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
IN_MEMORY = 256 << 20
"""Bytes of kept outputs above which they go to a file."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the model's own shapes say about where samples lie in its outputs."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]

    def axis(self, name: str, shape: Sequence[int], step: int) -> int | None:
        """The axis of an output of `shape`, for `step` samples, that they lie along, or None."""
        spec = next((spec for spec in self.outputs if spec.name == name), None)
        if spec is None or len(spec.shape) != len(shape):
            return _leading(shape, step)
        symbol = batch_symbol(self.inputs)
        if symbol and symbol in spec.shape:
            return spec.shape.index(symbol)
        fixed = batch_size(self.inputs, 0)
        if fixed:
            same = [axis for axis, dim in enumerate(spec.shape) if dim == fixed]
            return same[0] if same else _leading(shape, step) if step > 1 else None
        return _leading(shape, step) if not spec.shape or is_free(spec.shape[0]) else None


def _leading(shape: Sequence[int], step: int) -> int | None:
    return 0 if shape and shape[0] == step else None


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's outputs for one batch.

    `samples` maps an output to an array with a row a sample, or to a tuple with an array for each
    where their shapes differ; `whole` holds what cannot be told apart by sample, as the model gave
    it (a tuple where it was asked several times).
    """

    samples: Mapping[str, Any]
    whole: Mapping[str, Any] = field(default_factory=dict)

    @property
    def everything(self) -> dict[str, Any]:
        """All outputs, for a metric that takes what it wants."""
        return {**self.whole, **self.samples}


def answers(
    run: Run, batch: Batch, *, fixed_batch: int | None = None, layout: Layout | None = None
) -> Answers:
    """The outputs of `run` for one batch, by sample.

    With `fixed_batch` the samples go in by as many as the model takes; the last portion is filled
    up with its own last sample and the surplus outputs are dropped. `layout` says where samples
    lie; without it the first axis is tried.
    """
    portions = [run(feeds) for feeds in _portions(batch, fixed_batch)]
    return _by_samples(portions, batch, fixed_batch, layout)


def each_answers(
    run: Run,
    source: BatchSource,
    *,
    fixed_batch: int | None = None,
    layout: Layout | None = None,
    at_once: int = 1,
) -> Generator[tuple[Batch, Answers], None, None]:
    """Every batch of `source` with its `answers`, in order.

    `at_once` portions are run side by side, which `run` has to allow: on a CPU two runs of one
    thread each take less time than one after the other whose threads wait for each other in every
    node, above all where a model takes one sample at a time.
    """
    if at_once == 1:
        for batch in source:
            yield batch, answers(run, batch, fixed_batch=fixed_batch, layout=layout)
        return
    portions = ((b, feeds) for b in source for feeds in _portions(b, fixed_batch))
    made = map_ahead(
        lambda one: (one[0], run(one[1])), portions, workers=at_once, depth=at_once + 1
    )
    with closing(made):
        parts: list[Mapping[str, NDArray[Any]]] = []
        for batch, part in made:
            parts.append(part)
            if len(parts) * (fixed_batch or len(batch)) >= len(batch):
                yield batch, _by_samples(parts, batch, fixed_batch, layout)
                parts = []


def _portions(batch: Batch, fixed_batch: int | None) -> Iterator[Mapping[str, NDArray[Any]]]:
    """What goes in at a time."""
    step = fixed_batch or len(batch)
    for start in range(0, len(batch), step):
        yield fit_batch(take_rows(batch, slice(start, start + step)), step).feeds


def _by_samples(
    portions: Sequence[Mapping[str, NDArray[Any]]],
    batch: Batch,
    fixed_batch: int | None,
    layout: Layout | None,
) -> Answers:
    step = fixed_batch or len(batch)
    samples: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for name in portions[0]:
        parts = [portion[name] for portion in portions]
        rows = _by_sample(name, parts, step, layout)
        if rows is None:
            whole[name] = parts[0] if len(parts) == 1 else tuple(parts)
        else:
            samples[name] = rows[: len(batch)]
    return Answers(samples, whole)


def _by_sample(name: str, parts: Sequence[Any], step: int, layout: Layout | None) -> Any | None:
    if any(isinstance(part, tuple) for part in parts):
        return joined(parts)  # kept answers given again
    if any(part.dtype.kind not in "fiub" for part in parts):
        return None
    find = layout.axis if layout else lambda _, shape, step: _leading(shape, step)
    axes = {find(name, part.shape, step) for part in parts}
    axis = axes.pop()
    if axes or (axis is not None and any(part.shape[axis] != step for part in parts)):
        axis = None
    if axis is None:
        if step != 1:
            return None
        rows = [part[np.newaxis] for part in parts]
    else:
        rows = [np.moveaxis(part, axis, 0) if axis else part for part in parts]
    return joined(rows)


def joined(rows: Sequence[Any]) -> Any:
    """Rows of several batches as one array, or as a tuple of an array for each sample."""
    arrays = [row for row in rows if not isinstance(row, tuple)]
    if len(arrays) == len(rows) and len({array.shape[1:] for array in arrays}) == 1:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return tuple(sample for row in rows for sample in row)


@dataclass(frozen=True)
class StoredOutputs:
    """A model's outputs for every sample of a source, kept to compare candidates with.

    `pieces` are what successive batches gave (`Answers.samples`), `starts` the number of the first
    sample of each; `items` names the samples. Large ones are mapped from a file that goes with
    this value.
    """

    pieces: tuple[Mapping[str, Any], ...]
    starts: tuple[int, ...]
    items: tuple[str, ...]
    nbytes: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.folder is not None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @classmethod
    def of(cls, outputs: Mapping[str, NDArray[Any]], items: tuple[str, ...]) -> StoredOutputs:
        """Outputs with a row a sample."""
        return cls((outputs,), (0,), items, sum(array.nbytes for array in outputs.values()))

    @cached_property
    def outputs(self) -> dict[str, Any]:
        """All samples of each output that every piece has."""
        names = [n for n in self.pieces[0] if all(n in piece for piece in self.pieces)]
        return {name: joined([piece[name] for piece in self.pieces]) for name in names}

    @cached_property
    def groups(self) -> tuple[OutputGroup, ...]:
        """The parts of the outputs that are judged apart; samples lie along the first axis."""
        names = dict.fromkeys(name for piece in self.pieces for name in piece)
        held = {name: [p[name] for p in self.pieces if name in p] for name in names}
        return output_groups(
            {
                n: [] if any(isinstance(a, tuple) for a in arrays) else arrays
                for n, arrays in held.items()
            }
        )

    @cached_property
    def energies(self) -> dict[str, float]:
        """Sum of squares of each part that is judged apart, over all samples."""
        found: dict[str, float] = {}
        for piece in self.pieces:
            for group in self.groups:
                rows = piece.get(group.output, ())
                for row in rows if isinstance(rows, tuple) else (rows,):
                    values = np.nan_to_num(group.of(row), posinf=0.0, neginf=0.0)
                    energy = float(np.square(values, dtype=np.float64).sum())
                    found[group.label] = found.get(group.label, 0.0) + energy
        return found

    def rows(self, start: int, stop: int) -> dict[str, Any]:
        """The samples from `start` to `stop`, by output."""
        parts: dict[str, list[Any]] = {}
        for first, piece in zip(self.starts, self.pieces, strict=True):
            for name, rows in piece.items():
                taken = rows[max(start - first, 0) : max(stop - first, 0)]
                if len(taken):
                    parts.setdefault(name, []).append(taken)
        return {name: joined(found) for name, found in parts.items()}


def collect_outputs(
    run: Run,
    source: BatchSource,
    *,
    fixed_batch: int | None = None,
    layout: Layout | None = None,
    progress: Progress = silent,
    what: str = "reference",
    memory: int = IN_MEMORY,
    at_once: int = 1,
) -> StoredOutputs:
    """Every output of `run` over `source` that has a row a sample, as `reference` of `evaluate`.

    `at_once` is as `each_answers` has it. Above `memory` bytes they lie in a temporary file. Raises
    DataError for an empty source.
    """
    store = _Store(memory)
    items: list[str] = []
    for batch, found in each_answers(
        run, source, fixed_batch=fixed_batch, layout=layout, at_once=at_once
    ):
        store.add(len(items), found.samples)
        items.extend(batch.items)
        progress(what, len(items), source.count)
    if not items:
        raise DataError(f"{what}: the data is empty; there is nothing to evaluate")
    return StoredOutputs(
        tuple(store.pieces), tuple(store.starts), tuple(items), store.nbytes, store.folder
    )


def gathered(
    pieces: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]], memory: int, what: str
) -> StoredOutputs:
    """Kept outputs of batches in order: the names of their samples, and `Answers.samples`.

    As `collect_outputs` gives them. Raises DataError if there are none.
    """
    store = _Store(memory)
    items: list[str] = []
    for names, samples in pieces:
        store.add(len(items), samples)
        items.extend(names)
    if not items:
        raise DataError(f"{what}: the data is empty; there is nothing to evaluate")
    return StoredOutputs(
        tuple(store.pieces), tuple(store.starts), tuple(items), store.nbytes, store.folder
    )


class _Store:
    """Pieces in memory up to a bound, then in files mapped read-only."""

    def __init__(self, memory: int) -> None:
        self.pieces: list[dict[str, Any]] = []
        self.starts: list[int] = []
        self.nbytes = 0
        self.folder: Path | None = None
        self._memory = memory

    def add(self, start: int, samples: Mapping[str, Any]) -> None:
        self.starts.append(start)
        self.pieces.append({name: self._kept(rows) for name, rows in samples.items()})

    def _kept(self, rows: Any) -> Any:
        if isinstance(rows, tuple):
            return tuple(self._kept(row) for row in rows)
        self.nbytes += rows.nbytes
        if self.nbytes <= self._memory or not rows.size:
            return rows
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="trtune-outputs-"))
        path = self.folder / f"{len(self.pieces)}-{self.nbytes}.npy"
        np.save(path, rows)
        return np.load(path, mmap_mode="r")
