"""What flows from data to model: batches, and the protocol that whoever makes them follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError

Labels: TypeAlias = NDArray[Any] | tuple[NDArray[Any], ...]
"""What is known of each sample: an array with a row a sample, or an array each (boxes, say)."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One model input: name, shape (a str or None is a free dimension), numpy dtype name.

    `axis` is the one that samples lie along, where a user says it.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str
    axis: int | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first dimension if the model fixes it."""
        first = self.shape[0] if self.shape else None
        return None if is_free(first) else int(first or 0)


def is_free(dim: int | str | None) -> bool:
    """Whether a dimension may have any size: a name, nothing, or below 1 as some exporters write.

    >>> is_free("N"), is_free(None), is_free(-1), is_free(3)
    (True, True, True, False)
    """
    return not isinstance(dim, int) or dim < 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples: `feeds` maps input name to an array, `items` names the samples.

    `labels` are what is known of each sample: class indices, masks of a class a pixel, tokens (an
    array with a row a sample), or an array for each (boxes: class, left, top, right, bottom in
    pixels of the input). `axes` names the axis that the samples lie along for every feed where it
    is not the first; None: the array is the same for all samples. The arrays may be views of the
    source's own (of a file mapped read-only, say): copy before changing them.
    """

    feeds: Mapping[str, NDArray[Any]]
    items: tuple[str, ...]
    labels: Labels | None = None
    axes: Mapping[str, int | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def axis(self, name: str) -> int | None:
        """The axis of the feed `name` that the samples lie along, or None."""
        return self.axes.get(name, 0)


class BatchSource(Protocol):
    """Batches that can be read any number of times, each time the same."""

    def __iter__(self) -> Iterator[Batch]: ...

    @property
    def count(self) -> int | None:
        """Number of samples a pass yields, or None if only a pass can tell."""

    @property
    def identity(self) -> str:
        """Hash of everything that decides the content of the batches, but not their size."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Items left out because they could not be read (`on_error: skip`)."""


def batch_symbol(inputs: Sequence[InputSpec]) -> str | None:
    """The name of the free dimension that counts samples, or None if no input has one.

    The name that most inputs have, the first of the earliest if several do. Of inputs whose free
    dimensions have no names it is the first one, "".

    >>> x = InputSpec("x", ("time", "n", 8), "float32")
    >>> batch_symbol([x, InputSpec("state", (2, "n", 16), "float32")])
    'n'
    """
    places: dict[str, list[int]] = {}
    for spec in inputs:
        mine: dict[str, int] = {}
        for axis, dim in enumerate(spec.shape):
            if is_free(dim) and (_symbol(dim) or axis == 0):
                mine.setdefault(_symbol(dim), axis)
        for name, axis in mine.items():
            places.setdefault(name, []).append(axis)
    leading = {spec.fixed_batch for spec in inputs if spec.shape}
    if None not in leading and len(leading) < 2:
        return None  # all begin with the same number: that is the batch
    shared = [name for name, axes in places.items() if 0 in axes or (len(axes) > 1 and name)]
    found = max(shared, key=lambda name: (len(places[name]), -min(places[name])), default=None)
    main = _main(inputs)
    if found is None or main is None or main.fixed_batch is None:
        return found
    return found if found in map(_symbol, main.shape[1:]) or len(main.shape) < 3 else None


def _main(inputs: Sequence[InputSpec]) -> InputSpec | None:
    """The input of the highest rank, the first of several: pictures beside what goes with them."""
    return max((spec for spec in inputs if spec.shape), key=lambda s: len(s.shape), default=None)


def _fixed_size(inputs: Sequence[InputSpec]) -> int | None:
    """The batch of the main input; 1 if it is a state with layers first, and another begins so."""
    main = _main(inputs)
    if main is None:
        return None
    single = any(spec.fixed_batch == 1 for spec in inputs if spec.shape)
    return 1 if single and len(main.shape) == 3 and main.shape[1] == 1 else main.fixed_batch


def _symbol(dim: int | str | None) -> str:
    return dim if isinstance(dim, str) else ""


def batch_axes(
    inputs: Sequence[InputSpec], given: Mapping[str, int] | None = None
) -> dict[str, int | None]:
    """By input, the axis that samples lie along, as far as the shapes tell; None: it has none.

    `given`, or the input itself, says it for some. Else the axis with the name of `batch_symbol`;
    where no input has a free dimension, or the input of the highest rank fixes its batch, the first
    axis of those as long as its first (of a recurrent state, layers x 1 x hidden, beside rows of 1:
    as long as 1).

    >>> shapes = {"image": ("n", 3, 16, 16), "camera": (16, 16), "index": ("n",), "gain": ()}
    >>> batch_axes([InputSpec(name, shape, "float32") for name, shape in shapes.items()])
    {'image': 0, 'camera': None, 'index': 0, 'gain': None}
    """
    said = {spec.name: spec.axis for spec in inputs if spec.axis is not None} | dict(given or {})
    symbol = batch_symbol(inputs)
    size = _fixed_size(inputs)
    axes: dict[str, int | None] = {}
    for spec in inputs:
        if spec.name in said:
            axes[spec.name] = said[spec.name]
        elif symbol is not None:
            axes[spec.name] = _axis_of(symbol, spec.shape)
        else:
            axes[spec.name] = 0 if spec.shape and spec.fixed_batch in (size, None) else None
    return axes


def _axis_of(symbol: str, shape: Sequence[int | str | None]) -> int | None:
    if symbol:
        named = [axis for axis, dim in enumerate(shape) if dim == symbol]
        # Exporters that name every free dimension anew say nothing about the first.
        return named[0] if named else 0 if shape and is_free(shape[0]) else None
    return 0 if shape and is_free(shape[0]) else None


def batch_size(
    inputs: Sequence[InputSpec], wanted: int, axes: Mapping[str, int | None] | None = None
) -> int:
    """Samples to feed at a time: what the model fixes, else `wanted`.

    `axes` are those of a batch that is to be fed; by default what the shapes tell.

    >>> batch_size([InputSpec("x", (1, 3, 32, 32), "float32")], 8)
    1
    >>> batch_size([InputSpec("x", ("n", 3), "float32"), InputSpec("m", (16, 16), "float32")], 8)
    8
    >>> batch_size([InputSpec("x", (16, 1, 32), "float32")], 8, {"x": 1})
    1
    """
    found = {**batch_axes(inputs), **(axes or {})}
    for spec in inputs:
        axis = found[spec.name]
        if axis is not None and axis < len(spec.shape):
            dim = spec.shape[axis]
            return wanted if is_free(dim) else int(dim or 0)
    return wanted


def fit_batch(batch: Batch, size: int) -> Batch:
    """`batch` with exactly `size` samples, the last one repeated as often as needed.

    For models that fix their batch: only the first `len(batch)` rows of the outputs count.

    Raises ValueError if the batch is empty or larger than `size`.
    """
    missing = size - len(batch)
    if missing < 0 or not len(batch):
        raise ValueError(f"a batch of {len(batch)} cannot be padded to {size}")
    if not missing:
        return batch
    rows = [*range(len(batch)), *[len(batch) - 1] * missing]
    return take_rows(batch, rows)


def take_rows(batch: Batch, rows: slice | Sequence[int]) -> Batch:
    """The samples at `rows`; a slice gives views, anything else copies."""
    numbers = range(len(batch))[rows] if isinstance(rows, slice) else rows
    index = rows if isinstance(rows, slice) else np.asarray(rows, np.intp)
    labels = batch.labels
    if isinstance(labels, tuple):
        labels = tuple(labels[number] for number in numbers)
    elif labels is not None:
        labels = labels[index]
    feeds = {name: _taken(array, index, batch.axis(name)) for name, array in batch.feeds.items()}
    return Batch(feeds, tuple(batch.items[number] for number in numbers), labels, batch.axes)


def _taken(array: NDArray[Any], index: slice | NDArray[np.intp], axis: int | None) -> NDArray[Any]:
    if axis is None:
        return array
    return np.ascontiguousarray(array[(slice(None),) * axis + (index,)]) if axis else array[index]


def rebatch(pieces: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same samples in the same order, `size` at a time; the last batch may be short.

    So may one before a sample of another shape (pictures or sequences of different sizes), or
    with other values in an input that is the same for all samples.

    Raises DataError if only some of the samples have labels.
    """
    held: list[Batch] = []
    count = 0
    for piece in pieces:
        if not len(piece):
            continue
        if held and not _fits(held[-1], piece):
            yield _joined(held)
            held, count = [], 0
        held.append(piece)
        count += len(piece)
        if count < size:
            continue
        joined = _joined(held)
        whole = count - count % size
        for start in range(0, whole, size):
            yield take_rows(joined, slice(start, start + size))
        count -= whole
        held = [take_rows(joined, slice(whole, None))] if count else []
    if count:
        yield _joined(held)


def first_batch(source: BatchSource, where: str) -> Batch:
    """The first batch; DataError if there is none."""
    batch = next(iter(source), None)
    if batch is None or not len(batch):
        raise DataError(f"{where}: the data is empty; check path, take and skip")
    return batch


def repeat_to(batch: Batch, size: int) -> dict[str, Any]:
    """Feeds of exactly `size` samples, those of `batch` again and again."""
    rows = (np.arange(size) % len(batch)).tolist()
    feeds = take_rows(batch, rows).feeds
    return {name: np.ascontiguousarray(array) for name, array in feeds.items()}


def sample_shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    """The shape of one sample of each feed: the array's without the axis of the samples."""
    shapes = {}
    for name, array in batch.feeds.items():
        axis = batch.axis(name)
        shape = array.shape
        shapes[name] = shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
    return shapes


def _fits(held: Batch, piece: Batch) -> bool:
    if sample_shapes(held) != sample_shapes(piece):
        return False
    return all(
        held.feeds[name] is array or np.array_equal(held.feeds[name], array)
        for name, array in piece.feeds.items()
        if piece.axis(name) is None
    )


def require_labels(source: BatchSource, metric: str) -> None:
    """Raises DataError unless the source's first batch has labels, which `metric` needs."""
    for batch in source:
        labels_of(batch, metric)
        return


def labels_of(batch: Batch, metric: str) -> Labels:
    """The labels of `batch`; raises DataError if it has none."""
    if batch.labels is None:
        raise DataError(
            f"metric {metric!r} needs labels, and the data has none (first item: "
            f"{batch.items[0]}); set `labels` (a CSV with the columns file,label, folders named "
            "after classes, or an array 'labels'), or use the metric sqnr_db or cosine"
        )
    return batch.labels


def check_labels(
    labels: NDArray[np.int64], classes: int, items: Sequence[str] | None = None
) -> None:
    """Raises DataError, naming the first offender, unless every label is in 0..classes-1."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if not bad.size:
        return
    first = int(bad[0])
    item = str(first) if items is None else items[first]
    hint = ""
    if labels.min() >= 1 and labels.max() == classes:
        hint = "; they seem to count from 1: subtract 1"
    raise DataError(
        f"label {labels[first]} of {item} is out of range: the model has {classes} classes, "
        f"0 to {classes - 1} ({bad.size} of {labels.size} labels are out of range){hint}"
    )


def _joined(pieces: Sequence[Batch]) -> Batch:
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    items = tuple(item for piece in pieces for item in piece.items)
    feeds = {}
    for name, array in first.feeds.items():
        axis = first.axis(name)
        feeds[name] = (
            array if axis is None else np.concatenate([p.feeds[name] for p in pieces], axis=axis)
        )
    known = [piece.labels for piece in pieces if piece.labels is not None]
    if known and len(known) < len(pieces):
        raise DataError(f"only some of the samples {items[0]} to {items[-1]} have labels")
    return Batch(feeds, items, _joined_labels(known) if known else None, first.axes)


def _joined_labels(parts: Sequence[Labels]) -> Labels:
    """Arrays of one shape a sample stay an array; anything else is an array for each sample."""
    arrays = [part for part in parts if not isinstance(part, tuple)]
    if len(arrays) == len(parts) and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return tuple(sample for part in parts for sample in part)
