"""Batches from a user's own function: `module:function` or `file.py:function`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.configs.files import hash_json
from trtune.datasets.axes import feed_axes, sample_count
from trtune.datasets.batches import (
    Batch,
    InputSpec,
    Labels,
    batch_size,
    rebatch,
    sample_shapes,
)
from trtune.datasets.code import importable, load_function
from trtune.datasets.feeds import (
    AUTO,
    is_pictures,
    label_array,
    match_inputs,
    to_feeds,
    to_labels,
)
from trtune.datasets.pictures.preprocess import Preprocess
from trtune.datasets.selection import Selection

_EVERYTHING = Selection()
_END = object()


class PythonSource:
    """Batches that a user's function yields: dicts of arrays with the rows first.

    The function is called anew with `args` for each pass, and must yield the same again; its
    arrays go to the inputs by the rules of `ArraySource`, the key `labels` (or what `labels` names)
    holds class indices. Its batches may be of any size: they are cut to `batch`. Items are row
    numbers.

    What the function raises becomes a DataError that says in which batch, with the user's
    exception as its cause. Raises DataError too for what does not fit the model, and for no rows.
    """

    def __init__(
        self,
        reference: str,
        inputs: Sequence[InputSpec],
        *,
        args: Mapping[str, Any] | None = None,
        base_dir: Path | None = None,
        labels: str | None = AUTO,
        names: Mapping[str, str] | None = None,
        preprocess: Preprocess | None = None,
        selection: Selection = _EVERYTHING,
        batch: int = 8,
        axes: Mapping[str, int] | None = None,
    ) -> None:
        self._given_axes = dict(axes or {})
        self._reference = reference
        self._function = load_function(reference, base_dir)
        self._inputs = tuple(inputs)
        self._args = dict(args or {})
        self._base_dir = base_dir
        self._label_key = labels
        self._names = names
        self._preprocess = preprocess
        self._selection = selection
        self._batch = batch_size(inputs, batch)

    def __iter__(self) -> Iterator[Batch]:
        return rebatch(self._pieces(), self._batch)

    @property
    def count(self) -> int | None:
        """Always None: only a pass can tell."""
        return None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Always empty: what cannot be read is the function's own business."""
        return ()

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the feeds and labels of one whole pass, made when it is first asked for."""
        digests = {spec.name: hashlib.sha256() for spec in self._inputs}
        labels, heads = hashlib.sha256(), {}
        for batch in self._pieces():
            for name, shape in sample_shapes(batch).items():
                array, axis = batch.feeds[name], batch.axis(name)
                if axis is None and name in heads:
                    continue
                heads[name] = [str(array.dtype), *shape]
                rows = array if not axis else np.moveaxis(array, axis, 0)
                digests[name].update(np.ascontiguousarray(rows).data)
            for row in batch.labels if batch.labels is not None else ():
                labels.update(np.ascontiguousarray(row).data)
        content = {name: digest.hexdigest() for name, digest in digests.items()}
        preprocess = None if self._preprocess is None else asdict(self._preprocess)
        return hash_json([content, heads, labels.hexdigest(), preprocess])

    @functools.cached_property
    def _chosen(self) -> NDArray[np.intp] | None:
        """Row numbers of a sample, which needs a pass that counts; None without `sample`."""
        if self._selection.sample is None:
            return None
        count = sum(given.count for given in self._yielded())
        return np.asarray(self._selection.rows(count, self._reference), np.intp)

    def _pieces(self) -> Iterator[Batch]:
        start, given = 0, False
        for yielded in self._yielded():
            rows = self._rows_within(start, start + yielded.count)
            if rows.size:
                given = True
                yield self._piece(yielded, rows - start, rows)
            start += yielded.count
            if self._is_past(start):
                break
        if not given:
            self._selection.rows(start, self._reference)

    def _rows_within(self, start: int, stop: int) -> NDArray[np.intp]:
        chosen = self._chosen
        if chosen is not None:
            low, high = np.searchsorted(chosen, [start, stop])
            return chosen[low:high]
        end = self._selection.end
        return np.arange(max(start, self._selection.skip), stop if end is None else min(stop, end))

    def _is_past(self, row: int) -> bool:
        end = self._selection.end if self._chosen is None else int(self._chosen[-1]) + 1
        return end is not None and row >= end

    def _piece(self, given: _Given, rows: NDArray[np.intp], numbers: NDArray[np.intp]) -> Batch:
        items = tuple(map(str, numbers))
        picked = {
            name: array if axis is None else np.take(array, rows, axis)
            for (name, array), axis in zip(given.arrays.items(), given.axes.values(), strict=True)
        }
        feeds = to_feeds(
            picked,
            self._inputs,
            preprocess=self._preprocess,
            items=items,
            where=given.where,
            axes=given.axes,
        )
        labels = given.labels
        if isinstance(labels, tuple):
            labels = tuple(labels[row] for row in rows)
        elif labels is not None:
            labels = labels[rows]
        return Batch(feeds, items, labels, {n: axis for n, axis in given.axes.items() if axis != 0})

    def _yielded(self) -> Iterator[_Given]:
        """Each batch of the user's function that has rows."""
        number = 0
        try:
            with importable(self._base_dir):
                batches = iter(self._function(**self._args))
            while True:
                with importable(self._base_dir):
                    given = next(batches, _END)
                if given is _END:
                    return
                found = self._given(given, f"batch {number} of {self._reference}")
                if found.count:
                    yield found
                number += 1
        except DataError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise DataError(
                f"{self._reference} failed in batch {number}: {type(error).__name__}: {error}"
            ) from error

    def _given(self, given: Any, where: str) -> _Given:
        """What the function yielded, matched to the inputs, with its samples counted."""
        if not isinstance(given, Mapping) or not given:
            raise DataError(
                f"{where} is a {type(given).__name__}, not a dict of arrays; "
                "yield {'input name': array, ...}"
            )
        given = {str(name): value for name, value in given.items()}
        label = label_array(given, self._inputs, labels=self._label_key, where=where)
        data = {n: _as_array(value, n, where) for n, value in given.items() if n != label}
        matched = match_inputs(data, self._inputs, names=self._names, where=where)
        arrays = {spec.name: data[matched[spec.name]] for spec in self._inputs}
        pictures = [s.name for s in self._inputs
                    if self._preprocess and is_pictures(arrays[s.name], s)]  # fmt: skip
        axes = feed_axes(arrays, self._inputs, given=self._given_axes, pictures=pictures)
        labels = None
        counted = dict(arrays)
        if label is not None and self._label_key is not None:
            labels = to_labels(given[label], where=where)
            counted["\0labels"] = np.empty((len(labels), 0))
        shown = {**matched, "\0labels": label or ""}
        return _Given(
            arrays, axes, labels, sample_count(counted, axes, where=where, names=shown), where
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """One batch of the user's function: arrays by input, the axes of the samples, labels."""

    arrays: Mapping[str, NDArray[Any]]
    axes: Mapping[str, int | None]
    labels: Labels | None
    count: int
    where: str


def _as_array(value: Any, name: str, where: str) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: {name!r} is {array.dtype}, not an array of numbers")
    return array
