"""Batches from arrays: .npz and .npy files, or arrays in memory."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.configs.files import hash_json
from trtune.datasets.axes import feed_axes, sample_count
from trtune.datasets.batches import Batch, InputSpec, batch_size
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

_HASH_BYTES = 1 << 24
_EVERYTHING = Selection()


class ArraySource:
    """Batches of rows of arrays; what does not fit the model is an error at construction.

    `arrays` maps a name to rows along the batch axis of the input (`axes` says it for some), or
    to what is the same for all samples, if it has exactly the input's shape: see `feed_axes`. The
    one called `labels` (or `label`, `y`, or what `labels` names) holds a row a sample, ignored if
    `labels` is None; the others go to the model's inputs by name, a single one to a single input
    whatever its name, or as `names` (input -> array) says. With `preprocess`, uint8 pictures
    N x H x W x C or N x H x W go through it. Items are row numbers.

    Raises DataError for names, lengths, shapes or dtypes that do not fit, and for no rows; during
    a pass, for NaN or Inf, naming the row.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        inputs: Sequence[InputSpec],
        *,
        where: str = "arrays",
        labels: str | None = AUTO,
        names: Mapping[str, str] | None = None,
        preprocess: Preprocess | None = None,
        selection: Selection = _EVERYTHING,
        batch: int = 8,
        axes: Mapping[str, int] | None = None,
    ) -> None:
        label_name = label_array(arrays, inputs, labels=labels, where=where)
        data = {name: array for name, array in arrays.items() if name != label_name}
        matched = match_inputs(data, inputs, names=names, where=where)
        used = {spec.name: data[matched[spec.name]] for spec in inputs}
        self._inputs = tuple(inputs)
        self._where = where
        self._preprocess = preprocess
        self._arrays = used
        pictures = [s.name for s in inputs if preprocess and is_pictures(used[s.name], s)]
        self._axes = feed_axes(used, inputs, given=axes, pictures=pictures)
        self._batch = batch_size(inputs, batch, self._axes)
        self._labels: NDArray[Any] | None = None
        counted = dict(used)
        if label_name is not None and labels is not None:
            self._labels = arrays[label_name]
            counted["\0labels"] = self._labels
        shown = {**matched, "\0labels": label_name or ""}
        count = sample_count(counted, self._axes, where=where, names=shown)
        self.available = count
        self._rows = self._places = selection.rows(count, where)
        self._make(0, 1, check_values=False)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._rows), self._batch):
            yield self._make(start, start + self._batch)

    def part(self, start: int, stop: int) -> ArraySource:
        """The rows `start` to `stop` of a pass, as a source that holds no others."""
        found = copy.copy(self)
        vars(found).pop("identity", None)
        places = self._places[start:stop]
        found._arrays = {
            name: np.array(_pick(array, places, self._axes.get(name, 0)))
            for name, array in self._arrays.items()
        }
        found._labels = None if self._labels is None else np.array(_pick(self._labels, places, 0))
        found._rows, found._places = self._rows[start:stop], range(len(places))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The rows that a pass reads."""
        return tuple(map(str, self._rows))

    @property
    def count(self) -> int:
        """Number of chosen rows."""
        return len(self._rows)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Always empty: rows cannot be unreadable."""
        return ()

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the chosen rows, what they are fed to, and the preprocessing."""
        digest = hashlib.sha256()
        arrays = {**self._arrays, "\0labels": self._labels}
        for name, array in arrays.items():
            if array is None:
                continue
            axis = self._axes.get(name, 0)
            if axis is None:
                digest.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
                digest.update(np.ascontiguousarray(array).data)
                continue
            shape = [*array.shape[:axis], *array.shape[axis + 1 :]]
            head = [name, array.dtype.str, shape, len(self._rows), *([axis] if axis else [])]
            digest.update(json.dumps(head).encode())
            step = max(1, _HASH_BYTES * array.shape[axis] // max(1, array.nbytes))
            for start in range(0, len(self._rows), step):
                rows = _pick(array, self._places[start : start + step], axis)
                digest.update(np.ascontiguousarray(rows).data)
        preprocess = None if self._preprocess is None else asdict(self._preprocess)
        return hash_json([digest.hexdigest(), preprocess, [_spec(s) for s in self._inputs]])

    def _make(self, start: int, stop: int, *, check_values: bool = True) -> Batch:
        items, rows = tuple(map(str, self._rows[start:stop])), self._places[start:stop]
        picked = {
            name: _pick(array, rows, self._axes[name]) for name, array in self._arrays.items()
        }
        feeds = to_feeds(
            picked,
            self._inputs,
            preprocess=self._preprocess,
            items=items,
            where=self._where,
            check_values=check_values,
            axes=self._axes,
        )
        labels = self._labels
        return Batch(
            feeds,
            items,
            None if labels is None else to_labels(_pick(labels, rows, 0), where=self._where),
            {name: axis for name, axis in self._axes.items() if axis != 0},
        )


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz, or the single one of an .npy under the name of the file.

    Mapped from disk where the file allows it (.npy, and .npz written without compression), so
    that memory does not grow with the file. Raises DataError if the file is missing or broken.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}; `path` must be an .npz or .npy file")
    try:
        if zipfile.is_zipfile(path):
            return _load_npz(path)
        array = npy.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise DataError(
            f"{path} cannot be read as .npz or .npy: {error}; "
            "save numeric arrays with numpy.savez or numpy.save"
        ) from error
    return {path.stem: array}


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as member:
                stored = info.compress_type == zipfile.ZIP_STORED
                array = _map_member(path, info, member) if stored else None
            if array is None:
                with archive.open(info) as member:
                    array = npy.read_array(member, allow_pickle=False)
            arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def _map_member(path: Path, info: zipfile.ZipInfo, member: IO[bytes]) -> NDArray[Any] | None:
    """An uncompressed member mapped where it lies in the archive; None if it cannot be."""
    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        return None
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype.hasobject or 0 in shape:
        return None
    with path.open("rb") as archive:
        archive.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", archive.read(4))
    offset = info.header_offset + 30 + name_length + extra_length + member.tell()
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _pick(array: NDArray[Any], rows: range | list[int], axis: int | None) -> NDArray[Any]:
    if axis is None:
        return np.asarray(array)
    index = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
    return np.asarray(array[(slice(None),) * axis + (index,)])


def _spec(spec: InputSpec) -> list[Any]:
    return [spec.name, spec.dtype]
