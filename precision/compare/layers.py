"""Every layer of a candidate against FP32, in the whole quantized network ("accumulated").

Inner tensors are marked as outputs, which keeps onnxruntime from fusing across them: these numbers
rank layers, while the accuracy of a model always comes from the unmarked one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    InputSpec,
    batch_size,
    fit_batch,
    take_rows,
)
from trtune.precision.runtime.api import Engine
from trtune.precision.runtime.errors import ErrorSums, NotFiniteError
from trtune.precision.runtime.session import OrtEngine, make_session

log = logging.getLogger(__name__)

MEMORY = 2 << 30
GATE = 1e-5


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Accumulated error of each compared tensor over `pictures` samples.

    `missing` are the tensors that the candidate does not have as floats (fused away, renamed or
    kept as int8 codes). `chunks` is how many passes over the data the memory limit took.
    """

    errors: Mapping[str, ErrorSums]
    missing: tuple[str, ...]
    pictures: int
    chunks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", MappingProxyType(dict(self.errors)))

    def ranked(self) -> list[tuple[str, ErrorSums]]:
        """Worst SQNR first; ties by name, so that two runs agree."""
        return sorted(self.errors.items(), key=lambda item: (item[1].sqnr_db, item[0]))


def compare_layers(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    tensors: Sequence[str],
    source: BatchSource,
    *,
    pictures: int,
    memory: int = MEMORY,
    progress: Progress = silent,
    threads: int | None = None,
    integer_kernels: bool = False,
    external_dir: Path | None = None,
) -> LayerErrors:
    """Compare `tensors`, by name, between two models on the first `pictures` samples of `source`.

    Both run batch by batch in onnxruntime with the same tensors marked, as many at a time as keep
    both models' copies of one batch within `memory` bytes; more tensors take further passes. A
    single tensor above that is compared alone. The last batch is cut to `pictures`.
    `integer_kernels` is for candidates lowered for deployment (see `make_session`). `external_dir`
    is where external weights of both models are.

    Raises ValueError for a tensor that `reference` does not have, DataError if there are no
    samples or they do not fit, ModelError (naming picture and tensor) for NaN or Inf in the
    reference.
    """
    names = list(dict.fromkeys(tensors))
    exact = _Marked(reference, threads, False, external_dir)
    tested = _Marked(candidate, threads, integer_kernels, external_dir)
    made = tested.tensors
    present = [name for name in names if name in made]
    if not present:
        return LayerErrors({}, tuple(names), 0, 0)
    chunks = chunked(_batch_bytes(exact, present, source), memory // 2)
    total = None if source.count is None else min(pictures, source.count) * len(chunks)
    errors: dict[str, ErrorSums] = {}
    done = 0
    for chunk in chunks:
        with exact.engine(chunk) as left, tested.engine(chunk) as right:
            sums = dict.fromkeys(_comparable(chunk, left.outputs, right.outputs), ErrorSums())
            for batch in limited(source, pictures):
                sums = add_batch(sums, left, right, batch)
                done += len(batch)
                progress("comparing layers", done, total)
        errors.update(sums)
    missing = tuple(name for name in names if name not in errors)
    if missing:
        log.info("%d of %d tensors are not in the candidate", len(missing), len(names))
    ordered = {name: errors[name] for name in names if name in errors}
    return LayerErrors(ordered, missing, done // len(chunks), len(chunks))


@dataclass(frozen=True, slots=True)
class _Marked:
    """A model whose inner tensors can be marked."""

    proto: onnx.ModelProto
    threads: int | None
    integer_kernels: bool
    external_dir: Path | None

    @property
    def tensors(self) -> frozenset[str]:
        """Everything that can be marked and depends on data."""
        made = {name for node in self.proto.graph.node for name in node.output}
        return frozenset(made.union(info.name for info in self.proto.graph.input))

    def engine(self, tensors: Sequence[str]) -> OrtEngine:
        return OrtEngine(
            lambda: make_session(
                self.proto,
                outputs=tensors,
                threads=self.threads,
                integer_kernels=self.integer_kernels,
                external_dir=self.external_dir,
            )
        )


def _batch_bytes(model: _Marked, tensors: Sequence[str], source: BatchSource) -> dict[str, int]:
    """Bytes of each tensor for a batch as large as the first, measured on one sample."""
    batch = next(iter(source), None)
    if batch is None:
        raise DataError("there are no samples to compare layers on")
    with model.engine(tensors) as engine:
        size = batch_size(engine.inputs, 1)
        outputs = engine.infer(fit_batch(take_rows(batch, slice(0, 1)), size).feeds)
    return {name: outputs[name].nbytes * -(-len(batch) // size) for name in tensors}


def _comparable(
    names: Iterable[str], exact: Iterable[InputSpec], tested: Iterable[InputSpec]
) -> list[str]:
    """Those of `names` that hold the same kind of number in both models."""
    kinds = [{spec.name: _is_float(spec.dtype) for spec in specs} for specs in (exact, tested)]
    return [name for name in names if kinds[0][name] == kinds[1][name]]


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def chunked(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of `sizes` in their order, in runs whose sizes sum to at most `limit`.

    A name above `limit` gets a run of its own.

    >>> chunked({"a": 4, "b": 4, "c": 9, "d": 1}, 8)
    [['a', 'b'], ['c'], ['d']]
    """
    chunks: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not chunks or size > room:
            chunks.append([])
            room = limit
        chunks[-1].append(name)
        room -= size
    return chunks


def limited(source: BatchSource, pictures: int) -> Iterator[Batch]:
    """Batches until `pictures` samples; the last is cut to fit."""
    left = pictures
    if left <= 0:
        return
    for batch in source:
        yield batch if len(batch) <= left else take_rows(batch, slice(0, left))
        left -= len(batch)
        if left <= 0:
            return


def infer(engine: Engine, batch: Batch) -> dict[str, NDArray[Any]]:
    """The engine's outputs for `batch`, which is padded, and the padding cut off again, if need be.

    For models that fix their batch size. An output without the batch as its first axis stays whole.
    """
    size = batch_size(engine.inputs, len(batch))
    outputs = engine.infer(fit_batch(batch, size).feeds)
    if size == len(batch):
        return outputs
    return {
        name: array[: len(batch)] if array.shape[:1] == (size,) else array
        for name, array in outputs.items()
    }


def add_batch(
    sums: Mapping[str, ErrorSums], reference: Engine, candidate: Engine, batch: Batch
) -> dict[str, ErrorSums]:
    """`sums` with one batch added, run through both engines; its keys are the outputs compared.

    Raises ModelError, naming picture and tensor, for NaN or Inf in the reference or if an output's
    shapes differ.
    """
    exact, tested = infer(reference, batch), infer(candidate, batch)
    added = {}
    for name, total in sums.items():
        if exact[name].shape != tested[name].shape:
            raise ModelError(
                f"tensor {name!r} has shape {list(exact[name].shape)} in the FP32 model and "
                f"{list(tested[name].shape)} in the candidate, so they cannot be compared"
            )
        try:
            added[name] = total.add(exact[name], tested[name])
        except NotFiniteError as error:
            where = culprit(batch, exact[name].shape, error.index)
            raise ModelError(
                f"{where} gives {error.value} in tensor {name!r} of the FP32 model, so nothing can "
                "be compared with it; check that picture and its preprocessing, or leave it out"
            ) from error
    return added


def culprit(batch: Batch, shape: Sequence[int], index: int) -> str:
    """Which sample of `batch` an element of a tensor of `shape` belongs to, for a message.

    Tensors without the batch as their first axis are any sample's.
    """
    if shape and shape[0] == len(batch):
        return f"picture {batch.items[index // int(np.prod(shape[1:], dtype=np.int64))]!r}"
    if len(batch) == 1:
        return f"picture {batch.items[0]!r}"
    return f"one of the pictures {batch.items[0]!r} to {batch.items[-1]!r}"


def fp32_gate(
    original: onnx.ModelProto | Path,
    normalised: onnx.ModelProto,
    source: BatchSource,
    *,
    pictures: int = 8,
    limit: float = GATE,
    threads: int | None = None,
    external_dir: Path | None = None,
) -> dict[str, ErrorSums]:
    """The errors of the normalised FP32 model's outputs against the user's own file.

    Run before anything is quantized: if these differ, no later number means anything.
    `external_dir` is where external weights of protos are.

    Raises ModelError if any output's mean relative error exceeds `limit`, or the original gives
    NaN or Inf; DataError if there are no samples.
    """
    engines = (
        OrtEngine(lambda: _original_session(original, threads, external_dir)),
        OrtEngine(lambda: make_session(normalised, threads=threads, external_dir=external_dir)),
    )
    with engines[0] as exact, engines[1] as tested:
        sums = {spec.name: ErrorSums() for spec in exact.outputs}
        seen = 0
        for batch in limited(source, pictures):
            sums = add_batch(sums, exact, tested, batch)
            seen += len(batch)
    if not seen:
        raise DataError("there are no samples to compare the FP32 models on")
    for name, total in sums.items():
        if not total.mean_relative <= limit:
            raise ModelError(
                f"output {name!r} of the prepared FP32 model differs from the original file: mean "
                f"relative error {total.mean_relative:.2g}, at most {limit:.0e} is float noise. "
                "Nothing was quantized yet; please report this with the model"
            )
        log.info("FP32 gate: %s differs by %.1e on average", name, total.mean_relative)
    return sums


def _original_session(
    model: onnx.ModelProto | Path, threads: int | None, external_dir: Path | None
) -> ort.InferenceSession:
    if isinstance(model, Path):
        external_dir = None
    try:
        return make_session(model, threads=threads, external_dir=external_dir)
    except ModelError:
        # onnxruntime refuses files with repeated node names, which mean nothing to the values.
        nameless = onnx.ModelProto()
        if isinstance(model, Path):
            nameless, external_dir = onnx.load(model, load_external_data=False), model.parent
        else:
            nameless.CopyFrom(model)
        for node in nameless.graph.node:
            node.ClearField("name")
        return make_session(nameless, threads=threads, external_dir=external_dir)
