"""Sources around a source: other labels, the same values for further inputs, or parts of it.

A part can be read by itself: it is what a worker of many is given. Pictures and files of samples
are named, and read by the worker; rows of arrays travel. What can only be read from its beginning
(a generator) is read here, and its batches travel.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.files import hash_json
from trtune.datasets.batches import Batch, BatchSource, InputSpec, Labels, batch_axes, is_free
from trtune.datasets.feeds import cast, check_finite, check_shape, show_shape
from trtune.datasets.holdout import Without
from trtune.datasets.pictures.prefetch import Prefetched


class _Around:
    """What a wrapper passes on of its `source`."""

    source: BatchSource

    @property
    def count(self) -> int | None:
        """Samples a pass yields, as far as the source knows."""
        return self.source.count

    @property
    def skipped(self) -> tuple[str, ...]:
        """What the source skipped."""
        return self.source.skipped

    @property
    def names(self) -> tuple[str, ...]:
        """What the source reads, where it can tell without reading."""
        return tuple(getattr(self.source, "names", ()))

    @property
    def available(self) -> int | None:
        """Samples that there are, chosen or not, where the source can tell."""
        found: int | None = getattr(self.source, "available", None)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know of the source."""
        return tuple(getattr(self.source, "notes", ()))

    @property
    def sorted_classes(self) -> int | None:
        """See `Listing.sorted_classes`."""
        found: int | None = getattr(self.source, "sorted_classes", None)
        return found


@dataclass(frozen=True)
class Shifted(_Around):
    """`source` with `offset` added to every label; of boxes, to their class. A `BatchSource`."""

    source: BatchSource
    offset: int

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            yield replace(batch, labels=_shifted(batch.labels, self.offset))

    @property
    def identity(self) -> str:
        """The source's identity with the offset."""
        return hash_json([self.source.identity, self.offset])

    @property
    def sorted_classes(self) -> int | None:
        """None: who gives an offset knows how the classes are counted."""
        return None


@dataclass(frozen=True)
class WithValues(_Around):
    """`source` with further inputs fed the same for every sample: `values`. A `BatchSource`.

    `values` maps input name -> (array, axis): one sample's slice along the axis of the samples,
    repeated; or with None the whole input. See `same_for_all`.
    """

    source: BatchSource
    values: Mapping[str, tuple[NDArray[Any], int | None]]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            feeds, axes = dict(batch.feeds), dict(batch.axes)
            for name, (array, axis) in self.values.items():
                feeds[name] = array if axis is None else np.repeat(array, len(batch), axis)
                if axis != 0:
                    axes[name] = axis
            yield replace(batch, feeds=feeds, axes=axes)

    @functools.cached_property
    def identity(self) -> str:
        """The source's identity with the values."""
        told = {
            name: [array.tolist(), str(array.dtype), axis]
            for name, (array, axis) in sorted(self.values.items())
        }
        return hash_json([self.source.identity, told])


def same_for_all(
    given: Mapping[str, Any],
    inputs: Sequence[InputSpec],
    axes: Mapping[str, int] | None = None,
) -> dict[str, tuple[NDArray[Any], int | None]]:
    """The values that a config gives for inputs, as `WithValues` takes them.

    A number fills the input; a list without the axis of the samples is one sample's; one with it
    is one sample's if it has one row there, else the input as it is. `axes` as in `open_source`.

    >>> spec = InputSpec("im_shape", ("N", 2), "float32")
    >>> array, axis = same_for_all({"im_shape": [640, 480]}, [spec])["im_shape"]
    >>> array, axis
    (array([[640., 480.]], dtype=float32), 0)

    Raises DataError for what is no input of the model, and for values that do not fit it.
    """
    specs = {spec.name: spec for spec in inputs}
    along = batch_axes(inputs, axes)
    found: dict[str, tuple[NDArray[Any], int | None]] = {}
    for name, value in given.items():
        if name not in specs:
            raise DataError(
                f"`feed` names {name!r}, which is no input of the model"
                f"{did_you_mean(name, specs)}; its inputs are {', '.join(map(repr, specs))}"
            )
        array, axis = _one_sample(value, specs[name], along[name])
        check_shape(array.shape, specs[name], where="`feed`", axis=axis)
        check_finite(array, specs[name], items=["given"], where="`feed`", axis=axis)
        found[name] = array, axis
    return found


def _one_sample(value: Any, spec: InputSpec, axis: int | None) -> tuple[NDArray[Any], int | None]:
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "fiub" or not array.size:
        raise DataError(f"`feed` gives {value!r} for input {spec.name!r}: numbers are expected")
    if array.dtype.kind in "iu" and np.dtype(spec.dtype).kind == "f":
        array = array.astype(np.float64)
    array = cast(array, spec, where="`feed`")
    if not array.ndim and spec.shape:
        array = np.full(_sample_shape(spec, axis), array)
    if axis is not None and array.ndim == len(spec.shape) - 1:
        return np.expand_dims(array, axis), axis
    if axis is not None and array.ndim == len(spec.shape) and array.shape[axis] == 1:
        return array, axis
    return array, None


def _sample_shape(spec: InputSpec, axis: int | None) -> tuple[int, ...]:
    """The shape of one sample's slice. Raises DataError if it is not fixed."""
    shape = [1 if place == axis else dim for place, dim in enumerate(spec.shape)]
    if any(is_free(dim) for dim in shape):
        raise DataError(
            f"`feed` gives one number for input {spec.name!r}, which takes "
            f"{show_shape(spec.shape)}: give a list of the shape that one sample has"
        )
    return tuple(int(dim or 0) for dim in shape)


def _shifted(labels: Labels | None, offset: int) -> Labels | None:
    if labels is None:
        return None
    if isinstance(labels, tuple):
        return tuple(row + np.eye(1, row.shape[1]) * offset for row in labels)
    return labels + offset


@runtime_checkable
class Divisible(Protocol):
    """A source of which any run of samples can be read without those before it."""

    def part(self, start: int, stop: int) -> BatchSource:
        """The samples `start` to `stop` of a pass."""


@dataclass(frozen=True, slots=True)
class HeldBatches:
    """Batches that are held. A `BatchSource`."""

    batches: tuple[Batch, ...]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def count(self) -> int | None:
        """Samples in all."""
        return sum(map(len, self.batches))

    @property
    def identity(self) -> str:
        """Hash of the names alone: what is held here is no source of a key."""
        names = "\n".join(item for batch in self.batches for item in batch.items)
        return hashlib.sha256(names.encode()).hexdigest()

    @property
    def skipped(self) -> tuple[str, ...]:
        """Nothing."""
        return ()


def part_of(source: BatchSource, start: int, stop: int) -> BatchSource | None:
    """Samples `start` to `stop` of `source`, in its batches; None if it has to be read for that.

    Of a source without some items those are left out here too: its parts are counted before.
    """
    if isinstance(source, Divisible):
        return source.part(start, stop)
    if isinstance(source, (Without, Prefetched, Shifted, WithValues)):
        within = part_of(source.source, start, stop)
        return None if within is None else replace(source, source=within)
    return None


def divisible_rows(source: BatchSource) -> int | None:
    """How many samples the parts of `source` are counted by; None if only a pass can tell."""
    if isinstance(source, Divisible):
        return source.count
    if isinstance(source, (Without, Prefetched, Shifted, WithValues)):
        return divisible_rows(source.source)
    return None


def in_parts(source: BatchSource, size: int, *, whole: bool = False) -> Iterator[BatchSource]:
    """`source` in parts of about `size` samples (a multiple of its batches), in order.

    With `whole` the batches stay as the source puts them together.
    """
    rows = None if whole else divisible_rows(source)
    if rows is None or part_of(source, 0, 1) is None:
        yield from _read(source, size)
        return
    for start in range(0, rows, size):
        found = part_of(source, start, min(start + size, rows))
        assert found is not None
        yield found


def _read(source: Iterable[Batch], size: int) -> Iterator[BatchSource]:
    held: list[Batch] = []
    for batch in source:
        held.append(batch)
        if sum(map(len, held)) >= size:
            yield HeldBatches(tuple(held))
            held = []
    if held:
        yield HeldBatches(tuple(held))
