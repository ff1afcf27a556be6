"""Batches from a folder of .npy files, one a sample."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.configs.files import hash_file, hash_json
from trtune.datasets.axes import feed_axes
from trtune.datasets.batches import Batch, InputSpec, batch_size, rebatch
from trtune.datasets.feeds import is_pictures, label_array, match_inputs, to_feeds, to_labels
from trtune.datasets.pictures.preprocess import Preprocess
from trtune.datasets.selection import Selection

_EVERYTHING = Selection()


class NpyFolder:
    """Batches of the .npy files in a folder: NAME.npy for one input, else INPUT/NAME.npy.

    A file holds one sample, with the batch axis (of length 1) or without. A folder called labels
    (or as `labels` says) holds what is known of each sample, boxes or masks of any shape too. A
    file INPUT.npy beside folders is the same for all samples. Items are the files' names.

    Raises DataError for what is missing or does not fit.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[InputSpec],
        *,
        labels: str | None = "auto",
        names: Mapping[str, str] | None = None,
        preprocess: Preprocess | None = None,
        selection: Selection = _EVERYTHING,
        batch: int = 8,
    ) -> None:
        if not folder.is_dir():
            raise DataError(f"no such folder: {folder}; source npy reads a folder of .npy files")
        self._inputs, self._preprocess = tuple(inputs), preprocess
        self._batch = batch_size(inputs, batch)
        folders = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir()}
        label = label_array(folders, inputs, labels=labels, where=str(folder))
        rows = {name: place for name, place in folders.items() if name != label}
        single = {p.stem: p for p in sorted(folder.glob("*.npy"))}
        self._for_all: dict[str, Path] = {}
        if rows:
            self._for_all = {s.name: single[s.name] for s in inputs if s.name in single}
        else:
            rows = {"npy": folder}
        wanted = [spec for spec in inputs if spec.name not in self._for_all]
        matched = match_inputs(rows, wanted, names=names, where=str(folder))
        self._folders = {name: rows[place] for name, place in matched.items()}
        if not self._folders:
            raise DataError(f"{folder}: no input has a file for each sample")
        self._label = folders[label] if label is not None and labels is not None else None
        first = next(iter(self._folders.values()))
        files = sorted(path.name for path in first.glob("*.npy"))
        self._files = [files[row] for row in selection.rows(len(files), str(first))]
        for place in (*self._folders.values(), *([self._label] if self._label else [])):
            missing = next((file for file in self._files if not (place / file).is_file()), None)
            if missing is not None:
                raise DataError(f"{place} has no {missing}, which {first} has")

    def __iter__(self) -> Iterator[Batch]:
        return rebatch(map(self._sample, self._files), self._batch)

    def part(self, start: int, stop: int) -> NpyFolder:
        """The samples `start` to `stop` of a pass, as a source."""
        found = copy.copy(self)
        vars(found).pop("identity", None)
        found._files = self._files[start:stop]
        return found

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self._files)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Always empty."""
        return ()

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the chosen files and the preprocessing."""
        places = {**self._folders, **({"\0labels": self._label} if self._label else {})}
        content = {
            name: [hash_file(place / file) for file in self._files]
            for name, place in places.items()
        }
        alike = {name: hash_file(path) for name, path in self._for_all.items()}
        preprocess = None if self._preprocess is None else asdict(self._preprocess)
        return hash_json([self._files, content, alike, preprocess])

    def _sample(self, file: str) -> Batch:
        where = str(next(iter(self._folders.values())) / file)
        arrays: dict[str, NDArray[Any]] = {n: load_npy(p) for n, p in self._for_all.items()}
        axes: dict[str, int | None] = dict.fromkeys(self._for_all)
        for spec in self._inputs:
            if spec.name in self._folders:
                array = load_npy(self._folders[spec.name] / file)
                whole = len(array.shape) == len(spec.shape) and not is_pictures(array, spec)
                arrays[spec.name] = array if whole else array[np.newaxis]
        found = feed_axes(arrays, self._inputs)
        axes |= {name: found[name] or 0 for name in self._folders}
        feeds = to_feeds(
            arrays, self._inputs, preprocess=self._preprocess, items=(file,), where=where, axes=axes
        )
        labels = None
        if self._label is not None:
            labels = to_labels([load_npy(self._label / file)], where=str(self._label / file))
        return Batch(feeds, (file,), labels, {n: axis for n, axis in axes.items() if axis != 0})


def load_npy(path: Path) -> NDArray[Any]:
    """The array in an .npy file; DataError if it is none."""
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}") from error
    return array
