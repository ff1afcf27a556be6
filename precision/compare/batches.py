"""Models run on the same batches: how many pictures, which tensors at once, whose fault."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.calibrate.extents import Extent, measure
from trtune.calibrate.sessions import SharedWeights
from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch, BatchSource, batch_size, fit_batch, is_free, take_rows
from trtune.datasets.holdout import join
from trtune.precision.compare.alone import held_tensors
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.placement import Placement
from trtune.precision.runtime.api import Engine
from trtune.precision.runtime.errors import ErrorSums, NotFiniteError
from trtune.precision.runtime.session import ahead, kept_values, make_session, threads_each

log = logging.getLogger(__name__)

MEMORY = 2 << 30
"""Bytes that both models' copies of the tensors compared at once may take."""

PICTURES_AT_ONCE = 4
"""Held-out pictures a batch: small, so that several tensors are tried at a time."""

MOST_AT_ONCE = 8
"""... and at most, where batches of one size are wanted."""

Opens = Callable[[Sequence[str]], AbstractContextManager[Engine]]
"""Gives an engine whose `infer` has the tensors that are named, as far as it can show them."""


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


def batch_bytes(source: BatchSource, tensors: Sequence[str], opens: Opens) -> dict[str, int]:
    """Bytes of each of `tensors` for a batch as large as the first, measured on one sample.

    `opens` gives the engine that has them. Raises DataError if there is no sample.
    """
    batch = next(iter(source), None)
    if batch is None:
        raise no_samples()
    with opens(tensors) as engine:
        size = batch_size(engine.inputs, 1, batch.axes)
        outputs = engine.infer(fit_batch(take_rows(batch, slice(0, 1)), size).feeds)
    return {name: outputs[name].nbytes * -(-len(batch) // size) for name in tensors}


def no_samples() -> DataError:
    """The error where a data source gives nothing to compare on."""
    return DataError("there are no samples to compare on")


def infer(engine: Engine, batch: Batch) -> dict[str, NDArray[Any]]:
    """The engine's outputs for `batch`, which is padded, and the padding cut off again, if need be.

    For models that fix their batch size. An output without the batch as its first axis stays whole.
    """
    size = batch_size(engine.inputs, len(batch), batch.axes)
    outputs = engine.infer(fit_batch(batch, size).feeds)
    if size == len(batch):
        return outputs
    return {
        name: array[: len(batch)] if array.shape[:1] == (size,) else array
        for name, array in outputs.items()
    }


def add_batch(
    sums: Mapping[str, ErrorSums],
    reference: Engine,
    candidate: Engine,
    batch: Batch,
    *,
    alike: bool = True,
) -> dict[str, ErrorSums]:
    """`sums` with one batch added, run through both engines; its keys are the outputs compared.

    Where shapes need not be `alike`, a tensor whose shapes differ along free dimensions, because
    they follow the data, gets nothing added. Raises ModelError, naming picture and tensor, for NaN
    or Inf in the reference, or if shapes differ that must not.
    """
    exact, tested = infer(reference, batch), infer(candidate, batch)
    known = {spec.name: spec.shape for spec in reference.outputs}
    added = {}
    for name, total in sums.items():
        if exact[name].shape != tested[name].shape:
            if not alike and _differ_where_free(known[name], exact[name].shape, tested[name].shape):
                added[name] = total
                continue
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


def _differ_where_free(
    shape: Sequence[int | str | None], exact: Sequence[int], tested: Sequence[int]
) -> bool:
    """Whether two shapes of a tensor declared as `shape` differ in free dimensions alone."""
    if len(exact) != len(tested) or len(shape) not in (0, len(exact)):
        return False
    dims = zip(shape or [None] * len(exact), exact, tested, strict=True)
    return all(a == b or is_free(dim) for dim, a, b in dims)


def culprit(batch: Batch, shape: Sequence[int], index: int) -> str:
    """Which sample of `batch` an element of a tensor of `shape` belongs to, for a message.

    Tensors without the batch as their first axis are any sample's.
    """
    if shape and shape[0] == len(batch):
        return f"picture {batch.items[index // int(np.prod(shape[1:], dtype=np.int64))]!r}"
    if len(batch) == 1:
        return f"picture {batch.items[0]!r}"
    return f"one of the pictures {batch.items[0]!r} to {batch.items[-1]!r}"


def held_batches(
    model: Model,
    view: GraphView,
    placement: Placement,
    pictures: tuple[Batch, ...],
    *,
    memory: int,
    also: Sequence[str] = (),
    extents: Mapping[str, Extent] | None = None,
    device: str = "cpu",
) -> list[Batch]:
    """`pictures` in batches, as many as an `Alone` can hold within `memory` bytes, with `also`.

    At least one batch, of one picture if need be; in a model of fixed batch size the last picture
    fills the last batch. For a GPU `device` all are of one size (`alike_batches`). `extents` are
    how large these tensors are, if that is known.
    """
    pictures, wanted = _taken(pictures, device)
    size = batch_size(model.inputs, wanted)
    tensors = list(dict.fromkeys([*held_tensors(view, placement), *also]))
    if not extents:
        first = fit_batch(pictures[0], batch_size(model.inputs, len(pictures[0])))
        extents = measure(model.proto, tensors, first, external_dir=model.external_dir)
    each = max(sum(extents[tensor].bytes for tensor in tensors), 1)
    size = batch_size(model.inputs, max(1, min(size, memory // each)))
    batches = _joined(model, pictures, size)
    count = max(1, min(len(batches), memory // (each * len(batches[0]))))
    if count < len(batches):
        log.info("%d of %d held-out batches, to stay within %d bytes", count, len(batches), memory)
    return batches[:count]


def in_batches(
    model: Model, pictures: Sequence[Batch], *, device: str = "cpu", like: int = 0
) -> list[Batch]:
    """`pictures` in batches that the model takes; the last picture fills the last one.

    For a GPU `device` all are of one size (`alike_batches`), of `like` pictures if that may be.
    """
    if not pictures:
        return []
    taken, wanted = _taken(tuple(pictures), device, like)
    return _joined(model, taken, batch_size(model.inputs, wanted))


def alike_batches(count: int, like: int = 0) -> tuple[int, int]:
    """How many of `count` pictures to take and how many a batch, so that all batches are alike.

    On a GPU onnxruntime plans every convolution anew whenever the shape of a batch changes: for
    ResNet-50 on an H100 a run after one of 4 pictures takes 170 ms for another picture and 9 ms for
    4 others. Batches hold `PICTURES_AT_ONCE` to `MOST_AT_ONCE` pictures, and as few as possible are
    left out; but `like`, if not 0, where the same sessions have run batches of that size before.

    >>> [alike_batches(count) for count in (3, 5, 24, 11, 23)]
    [(3, 3), (5, 5), (24, 4), (10, 5), (21, 7)]
    >>> alike_batches(48, like=5), alike_batches(3, like=5)
    ((45, 5), (3, 3))
    """
    if 0 < like <= min(count, MOST_AT_ONCE):
        return count - count % like, like
    if count <= MOST_AT_ONCE:
        return count, count
    size = min(range(PICTURES_AT_ONCE, MOST_AT_ONCE + 1), key=lambda size: (count % size, size))
    return count - count % size, size


def _taken(
    pictures: tuple[Batch, ...], device: str, like: int = 0
) -> tuple[tuple[Batch, ...], int]:
    """The pictures, of a picture a batch, that are used on `device`, and how many at a time."""
    if device == "cpu" or any(len(picture) != 1 for picture in pictures):
        return pictures, PICTURES_AT_ONCE
    count, size = alike_batches(len(pictures), like)
    return pictures[:count], size


def _joined(model: Model, pictures: tuple[Batch, ...], size: int) -> list[Batch]:
    batches = join(pictures, size)
    batches[-1] = fit_batch(batches[-1], batch_size(model.inputs, len(batches[-1])))
    return batches


def exact_outputs(
    model: Model,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    most: float = math.inf,
    session: ort.InferenceSession | None = None,
) -> list[list[Any]]:
    """The FP32 outputs of each batch, in the model's order; of the first batches only, once they
    take `most` bytes. `session` is one of the FP32 model that is there already."""
    weights = SharedWeights(() if session else model.proto.graph.initializer)
    if session is None:
        session = make_session(
            weights.without(model.proto),
            threads=threads_each(device),
            external_dir=model.external_dir,
            device=device,
            weights=weights,
        )
    names = [output.name for output in model.outputs]
    found: list[list[Any]] = []
    held = 0

    def run(batch: Batch) -> list[Any]:
        return [*kept_values(session, names, batch.feeds).values()]

    for _, arrays in ahead(run, batches, device=device):
        if held >= most:
            break
        found.append(arrays)
        held += sum(array.nbytes for array in arrays)
    return found
