"""What flows from data to model: batches, and the protocol that whoever makes them follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One model input: name, shape (a str or None is a free dimension), numpy dtype name."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first dimension if the model fixes it."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples: `feeds` maps input name to an array with the batch axis first.

    `items` names each sample for messages and reports (a file name, or the row number);
    `labels` are class indices, one a sample, or None. The arrays may be views of the source's own
    (of a file mapped read-only, say): copy before changing them.
    """

    feeds: Mapping[str, NDArray[Any]]
    items: tuple[str, ...]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.items)


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


def batch_size(inputs: Sequence[InputSpec], wanted: int) -> int:
    """Samples to feed at a time: what the model fixes, else `wanted`.

    Raises DataError if the inputs fix different sizes.

    >>> batch_size([InputSpec("x", (1, 3, 32, 32), "float32")], 8)
    1
    """
    fixed = {spec.name: size for spec in inputs if (size := spec.fixed_batch) is not None}
    if len(set(fixed.values())) > 1:
        shown = ", ".join(f"{name!r} {size}" for name, size in fixed.items())
        raise DataError(f"the model's inputs fix different batch sizes: {shown}")
    return next(iter(fixed.values()), wanted)


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
    return Batch(
        {name: array[index] for name, array in batch.feeds.items()},
        tuple(batch.items[number] for number in numbers),
        None if batch.labels is None else batch.labels[index],
    )


def rebatch(pieces: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same samples in the same order, `size` at a time; the last batch may be short.

    Raises DataError if neighbouring pieces differ in shape, or only some have labels.
    """
    held: list[Batch] = []
    count = 0
    for piece in pieces:
        if len(piece):
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


def require_labels(source: BatchSource, metric: str) -> None:
    """Raises DataError unless the source's first batch has labels, which `metric` needs."""
    for batch in source:
        labels_of(batch, metric)
        return


def labels_of(batch: Batch, metric: str) -> NDArray[np.int64]:
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
    items = tuple(item for piece in pieces for item in piece.items)
    feeds = {}
    for name, first in pieces[0].feeds.items():
        for piece in pieces:
            if piece.feeds[name].shape[1:] != first.shape[1:]:
                raise DataError(
                    f"{piece.items[0]} is {_shape(piece.feeds[name])} for input {name!r}, and "
                    f"{pieces[0].items[0]} is {_shape(first)}; a batch needs one shape: "
                    "set `preprocess.resize` and `crop`, or `batch: 1`"
                )
        feeds[name] = np.concatenate([piece.feeds[name] for piece in pieces])
    known = [piece.labels for piece in pieces if piece.labels is not None]
    if known and len(known) < len(pieces):
        raise DataError(f"only some of the samples {items[0]} to {items[-1]} have labels")
    return Batch(feeds, items, np.concatenate(known) if known else None)


def _shape(rows: NDArray[Any]) -> str:
    return " x ".join(map(str, rows.shape[1:]))
