"""Batches from a folder of pictures, decoded in threads ahead of the model."""

from __future__ import annotations

import csv
import functools
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.files import hash_file, hash_json
from trtune.datasets.batches import Batch, InputSpec, batch_size, rebatch
from trtune.datasets.feeds import AUTO, picture_feed
from trtune.datasets.prefetch import default_workers, map_ahead
from trtune.datasets.preprocess import Preprocess, prepare
from trtune.datasets.selection import Selection

log = logging.getLogger(__name__)

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# What Pillow's readers raise on files that are cut off, damaged, or no pictures at all.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_EVERYTHING = Selection()
_MOST_AHEAD = 64


class UnreadableError(DataError):
    """A picture that cannot be decoded."""


class ImageSource:
    """Batches of the pictures in a folder and its subfolders, in the order of their paths.

    `labels` is a CSV with the columns file (relative to the folder) and label (class index): then
    the files it lists are the data, and others are ignored. AUTO: if every picture lies in a
    subfolder, the top one is its class: the number, if all the folders are called by numbers, else
    its place among their sorted names. None: no labels. Hidden files and files that are no
    pictures by their suffix are ignored. Items are paths relative to the folder.

    A picture that cannot be decoded is a DataError with its name, or with `on_error="skip"` is
    left out and listed in `skipped`.

    Raises DataError if the folder, the CSV or a listed file is missing, if there are no pictures,
    if the model has several inputs; during a pass for shapes that do not fit.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[InputSpec],
        *,
        preprocess: Preprocess | None = None,
        labels: Path | str | None = AUTO,
        selection: Selection = _EVERYTHING,
        batch: int = 8,
        on_error: str = "error",
        workers: int | None = None,
    ) -> None:
        if len(inputs) != 1:
            names = ", ".join(repr(spec.name) for spec in inputs)
            raise DataError(
                f"pictures feed one input, and the model has {len(inputs)}: {names}; "
                "use `source: arrays` or `source: python`"
            )
        if on_error not in ("error", "skip"):
            raise ValueError(f"on_error must be 'error' or 'skip', found {on_error!r}")
        self._folder = folder
        self._spec = inputs[0]
        self._preprocess = preprocess or Preprocess()
        self._batch = batch_size(inputs, batch)
        self._skip_errors = on_error == "skip"
        self._workers = workers or default_workers()
        listed = list_pictures(folder, labels)
        if not listed:
            place = folder if labels in (None, AUTO) else labels
            raise DataError(f"no pictures in {place}; it needs {', '.join(SUFFIXES)}")
        rows = selection.rows(len(listed), str(folder))
        files = list(listed)
        self._files = [files[row] for row in rows]
        self._labels = [listed[file] for file in self._files]
        self._skipped: dict[str, None] = {}
        self._finished = False

    def __iter__(self) -> Iterator[Batch]:
        return rebatch(self._pictures(), self._batch)

    @property
    def count(self) -> int | None:
        """Number of pictures; with `on_error="skip"` known only after a whole pass."""
        if self._skip_errors and not self._finished:
            return None
        return len(self._files) - len(self._skipped)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The pictures that could not be decoded so far, sorted."""
        return tuple(sorted(self._skipped))

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the chosen files' names, bytes and labels, and of the preprocessing."""
        paths = [self._folder / file for file in self._files]
        with closing(map_ahead(_hash_or_reason, paths, workers=self._workers)) as hashes:
            content = list(zip(self._files, hashes, self._labels, strict=True))
        return hash_json([content, asdict(self._preprocess), self._spec.name, self._spec.dtype])

    def _pictures(self) -> Iterator[Batch]:
        depth = max(2 * self._workers, min(2 * self._batch, _MOST_AHEAD))
        decoded = map_ahead(self._decode, self._files, workers=self._workers, depth=depth)
        readable = 0
        with closing(decoded):
            for file, label, picture in zip(self._files, self._labels, decoded, strict=True):
                if isinstance(picture, UnreadableError):
                    self._leave_out(file, picture)
                    continue
                readable += 1
                known = None if label is None else np.array([label], np.int64)
                yield Batch({self._spec.name: picture}, (file,), known)
        self._finished = True
        if not readable:
            raise DataError(
                f"none of the {len(self._files)} pictures in {self._folder} is readable"
            )

    def _decode(self, file: str) -> NDArray[Any] | UnreadableError:
        try:
            picture = read_picture(self._folder / file, self._preprocess)
        except UnreadableError as error:
            return error
        except DataError as error:
            raise DataError(f"{self._folder / file}: {error}") from error
        return picture_feed(picture[np.newaxis], self._spec, where=f"{self._folder / file}")

    def _leave_out(self, file: str, error: UnreadableError) -> None:
        if not self._skip_errors:
            raise error
        if file not in self._skipped:
            log.warning("left out: %s", error)
        self._skipped[file] = None


def read_picture(path: Path, preprocess: Preprocess) -> NDArray[np.float32]:
    """The picture at `path` as `prepare` gives it.

    Raises UnreadableError naming the file if it cannot be decoded, DataError (without its name)
    if it is a picture that `preprocess` cannot take.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return prepare(image, preprocess)
    except _UNREADABLE as error:
        raise UnreadableError(
            f"{path} cannot be read as a picture: {error}; repair or remove it, "
            "or set `on_error: skip`"
        ) from error


def list_pictures(folder: Path, labels: Path | str | None = AUTO) -> dict[str, int | None]:
    """File, relative to `folder` with forward slashes, -> label, sorted by file.

    Raises DataError if the folder, the CSV or a listed file is missing, or the CSV is malformed.
    """
    if not folder.is_dir():
        raise DataError(_no_folder(folder))
    if labels is not None and labels != AUTO:
        return _from_csv(folder, Path(labels))
    files = sorted(_walk(folder))
    if labels is None or not all("/" in file for file in files):
        return dict.fromkeys(files)
    classes = _classes(folder)
    return {file: classes[file.partition("/")[0]] for file in files}


def _walk(folder: Path) -> Iterator[str]:
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        # A link may lead back up: each real folder is walked once.
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.casefold() in SUFFIXES:
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _classes(folder: Path) -> Mapping[str, int]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if all(name.isascii() and name.isdigit() for name in names):
        return {name: int(name) for name in names}
    return {name: index for index, name in enumerate(names)}


def _from_csv(folder: Path, path: Path) -> dict[str, int | None]:
    if not path.is_file():
        raise DataError(f"no such file: {path}; `labels` must be a CSV with columns file,label")
    labels: dict[str, int | None] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                file, label = _csv_row(path, reader.line_num, row)
                if file in labels:
                    raise DataError(f"{path}, line {reader.line_num}: {file!r} is listed twice")
                labels[file] = label
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV in UTF-8: {error}") from error
    missing = [file for file in labels if not (folder / file).is_file()]
    if missing:
        near = did_you_mean(missing[0], sorted(_walk(folder)))
        raise DataError(
            f"{path} lists {missing[0]!r}, which is not in {folder}{near} "
            f"({len(missing)} of {len(labels)} listed files are missing)"
        )
    return {file: labels[file] for file in sorted(labels)}


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for column in ("file", "label"):
        if column not in columns:
            raise DataError(
                f"{path} has no column {column!r}{did_you_mean(column, columns)}; "
                f"its first line is {','.join(columns)!r}, and must name file and label"
            )


def _csv_row(path: Path, line: int, row: Mapping[str, str | None]) -> tuple[str, int]:
    file, label = (row["file"] or "").strip(), (row["label"] or "").strip()
    if not file:
        raise DataError(f"{path}, line {line}: no file is named")
    try:
        return Path(file).as_posix(), int(label)
    except ValueError:
        raise DataError(
            f"{path}, line {line}: label {label!r} of {file!r} is not a class index (0, 1, 2, ...)"
        ) from None


def _no_folder(folder: Path) -> str:
    if folder.exists():
        return f"{folder} is a file; `path` of `source: images` must be a folder"
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return f"no such folder: {folder}{did_you_mean(folder.name, siblings)}"


def _hash_or_reason(path: Path) -> str:
    """The file's hash; one that cannot be read is found out by the pass, with its name."""
    try:
        return hash_file(path)
    except OSError as error:
        return f"unreadable: {type(error).__name__}"
