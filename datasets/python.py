"""Batches from a user's own function: `module:function` or `file.py:function`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.files import hash_json
from trtune.datasets.batches import Batch, InputSpec, batch_size, rebatch
from trtune.datasets.feeds import (
    AUTO,
    equal_lengths,
    label_array,
    match_inputs,
    to_feeds,
    to_labels,
)
from trtune.datasets.preprocess import Preprocess
from trtune.datasets.selection import Selection

_EVERYTHING = Selection()
_END = object()


@contextmanager
def importable(folder: Path | None) -> Iterator[None]:
    """`folder` first on `sys.path` inside the block."""
    if folder is None:
        yield
        return
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def load_function(reference: str, base_dir: Path | None = None) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names, seen from `base_dir`.

    A module beside the config wins over one of that name that was imported from elsewhere.

    Raises DataError if the reference, the module or the function is wrong, with the user's own
    exception as its cause if importing raised one.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise DataError(f"{reference!r} must be 'module:function' or 'file.py:function'")
    folder, module_name = base_dir, place
    if place.endswith(".py"):
        file = (base_dir or Path()) / place
        if not file.is_file():
            raise DataError(f"no such file: {file} (from {reference!r})")
        folder, module_name = file.resolve().parent, file.stem
    with importable(folder):
        _forget_namesake(module_name, folder)
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # a user's module may raise anything
            raise DataError(
                f"cannot import {module_name!r} (from {reference!r}, looked in "
                f"{folder or 'sys.path'} first): {type(error).__name__}: {error}"
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise DataError(f"{module_name!r} has no function {name!r}{did_you_mean(name, names)}")
    checked: Callable[..., Any] = function
    return checked


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
    ) -> None:
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
            for name, array in batch.feeds.items():
                heads[name] = [str(array.dtype), *array.shape[1:]]
                digests[name].update(np.ascontiguousarray(array).data)
            if batch.labels is not None:
                labels.update(np.ascontiguousarray(batch.labels).data)
        content = {name: digest.hexdigest() for name, digest in digests.items()}
        preprocess = None if self._preprocess is None else asdict(self._preprocess)
        return hash_json([content, heads, labels.hexdigest(), preprocess])

    @functools.cached_property
    def _chosen(self) -> NDArray[np.intp] | None:
        """Row numbers of a sample, which needs a pass that counts; None without `sample`."""
        if self._selection.sample is None:
            return None
        count = sum(len(next(iter(arrays.values()), ())) for _, arrays in self._yielded())
        return np.asarray(self._selection.rows(count, self._reference), np.intp)

    def _pieces(self) -> Iterator[Batch]:
        start, given = 0, False
        for number, arrays in self._yielded():
            where = f"batch {number} of {self._reference}"
            count = equal_lengths(arrays, where=where)
            rows = self._rows_within(start, start + count)
            if rows.size:
                given = True
                yield self._piece(arrays, rows - start, rows, where)
            start += count
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

    def _piece(
        self,
        arrays: Mapping[str, NDArray[Any]],
        rows: NDArray[np.intp],
        numbers: NDArray[np.intp],
        where: str,
    ) -> Batch:
        label = label_array(arrays, self._inputs, labels=self._label_key, where=where)
        data = {name: array for name, array in arrays.items() if name != label}
        matched = match_inputs(data, self._inputs, names=self._names, where=where)
        items = tuple(map(str, numbers))
        feeds = to_feeds(
            {spec.name: data[matched[spec.name]][rows] for spec in self._inputs},
            self._inputs,
            preprocess=self._preprocess,
            items=items,
            where=where,
        )
        if label is None or self._label_key is None:
            return Batch(feeds, items)
        return Batch(feeds, items, to_labels(arrays[label][rows], where=where))

    def _yielded(self) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """(number, arrays) of each batch of the user's function that has rows."""
        number = 0
        try:
            with importable(self._base_dir):
                batches = iter(self._function(**self._args))
            while True:
                with importable(self._base_dir):
                    given = next(batches, _END)
                if given is _END:
                    return
                arrays = _as_arrays(given, f"batch {number} of {self._reference}")
                if equal_lengths(arrays, where=f"batch {number} of {self._reference}"):
                    yield number, arrays
                number += 1
        except DataError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise DataError(
                f"{self._reference} failed in batch {number}: {type(error).__name__}: {error}"
            ) from error


def _as_arrays(given: Any, where: str) -> dict[str, NDArray[Any]]:
    if not isinstance(given, Mapping) or not given:
        raise DataError(
            f"{where} is a {type(given).__name__}, not a dict of arrays; "
            "yield {'input name': array, ...}"
        )
    arrays = {str(name): np.asarray(array) for name, array in given.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: {name!r} is {array.dtype}, not an array of numbers")
    return arrays


def _forget_namesake(module: str, folder: Path | None) -> None:
    """Drop an imported module of this name if `folder` has another: two configs, two folders."""
    if folder is None:
        return
    top = module.partition(".")[0]
    loaded, spec = sys.modules.get(top), PathFinder.find_spec(top, [str(folder)])
    if loaded is None or spec is None or spec.origin is None:
        return
    if getattr(loaded, "__file__", None) != spec.origin:
        importlib.invalidate_caches()
        for name in [n for n in sys.modules if n == top or n.startswith(top + ".")]:
            del sys.modules[name]
