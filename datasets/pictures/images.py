"""Batches from a folder of pictures, decoded in threads ahead of the model."""

from __future__ import annotations

import copy
import functools
import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtune.configs.errors import DataError
from trtune.configs.files import hash_file, hash_json
from trtune.datasets.batches import Batch, InputSpec, Labels, batch_size, rebatch
from trtune.datasets.feeds import AUTO, picture_feed
from trtune.datasets.pictures.geometry import framed
from trtune.datasets.pictures.listing import (
    SUFFIXES,
    Boxes,
    Listing,
    Mask,
    PictureLabel,
    list_folder,
)
from trtune.datasets.pictures.prefetch import default_workers, map_ahead
from trtune.datasets.pictures.preprocess import Preprocess, geometry, prepare, upright
from trtune.datasets.selection import Selection

log = logging.getLogger(__name__)

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

    `labels` is a CSV with the columns file (relative to the folder) and label: then the files it
    lists are the data, and others are ignored; or as `list_folder` describes. `listing` gives files
    and labels instead. AUTO: if every picture lies in a subfolder, the top one is its class: the
    number, if all the folders are called by numbers, else its place among their sorted names.
    None: no labels. Hidden files and files that are no pictures by their suffix are ignored.
    Items are paths relative to the folder. Boxes become pixels of the input.

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
        classes: Sequence[str] = (),
        listing: Listing | None = None,
    ) -> None:
        if len(inputs) != 1:
            names = ", ".join(repr(spec.name) for spec in inputs)
            raise DataError(
                f"pictures feed one input, and the model has {len(inputs)}: {names}; "
                "give the others in `feed: {INPUT: values}`, or use `source: arrays` or "
                "`source: python`"
            )
        if on_error not in ("error", "skip"):
            raise ValueError(f"on_error must be 'error' or 'skip', found {on_error!r}")
        self._spec = inputs[0]
        self._preprocess = preprocess or Preprocess()
        self._batch = batch_size(inputs, batch)
        self._skip_errors = on_error == "skip"
        self._workers = workers or default_workers()
        listing = listing or list_folder(folder, labels, classes)
        listed = listing.files
        self._folder = listing.folder
        self.listing = listing
        for note in listing.notes:
            log.warning("%s", note)
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

    def part(self, start: int, stop: int) -> ImageSource:
        """The pictures `start` to `stop` of a pass, as a source."""
        found = copy.copy(self)
        found._files, found._labels = self._files[start:stop], self._labels[start:stop]
        found.listing = replace(self.listing, files={}, named={}, notes=())
        found._skipped, found._finished = {}, False
        return found

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

    @property
    def available(self) -> int:
        """The pictures that were listed, chosen or not."""
        return len(self.listing.files)

    @property
    def names(self) -> tuple[str, ...]:
        """The files that a pass reads."""
        return tuple(str(self._folder / file) for file in self._files)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know of this data: pictures without labels, classes.

        The mapping of class names to indices is there where names were given.
        """
        mapping = self.listing.mapping
        return (*self.listing.notes, *([f"classes: {mapping}"] if mapping else ()))

    @property
    def sorted_classes(self) -> int | None:
        """See `Listing.sorted_classes`."""
        return self.listing.sorted_classes

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the chosen files' names, bytes and labels, and of the preprocessing."""
        paths = [self._folder / file for file in self._files]
        with closing(map_ahead(_hash_or_reason, paths, workers=self._workers)) as hashes:
            labels = map(_plain_label, self._labels)
            content = list(zip(self._files, hashes, labels, strict=True))
        return hash_json([content, asdict(self._preprocess), self._spec.name, self._spec.dtype])

    def _pictures(self) -> Iterator[Batch]:
        depth = max(2 * self._workers, min(2 * self._batch, _MOST_AHEAD))
        rows = zip(self._files, self._labels, strict=True)
        decoded = map_ahead(self._decode, rows, workers=self._workers, depth=depth)
        readable = 0
        with closing(decoded):
            for file, found in zip(self._files, decoded, strict=True):
                if isinstance(found, UnreadableError):
                    self._leave_out(file, found)
                    continue
                readable += 1
                picture, label = found
                yield Batch({self._spec.name: picture}, (file,), _as_labels(label))
        self._finished = True
        if not readable:
            raise DataError(
                f"none of the {len(self._files)} pictures in {self._folder} is readable"
            )

    def _decode(self, row: tuple[str, PictureLabel]) -> tuple[NDArray[Any], Any] | UnreadableError:
        file, label = row
        path = self._folder / file
        try:
            picture, size = read_sized(path, self._preprocess)
            known = placed(label, size, self._preprocess)
        except UnreadableError as error:
            return error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return picture_feed(picture[np.newaxis], self._spec, where=f"{path}"), known

    def _leave_out(self, file: str, error: UnreadableError) -> None:
        if not self._skip_errors:
            raise error
        if file not in self._skipped:
            log.warning("left out: %s", error)
        self._skipped[file] = None


def _as_labels(label: Any) -> Labels | None:
    if label is None:
        return None
    if isinstance(label, int):
        return np.array([label], np.int64)
    return (label,)


def _plain_label(label: PictureLabel) -> Any:
    if isinstance(label, Boxes):
        return [label.rows.tolist(), label.relative]
    return [_hash_or_reason(label.path)] if isinstance(label, Mask) else label


def read_picture(path: Path, preprocess: Preprocess) -> NDArray[np.float32]:
    """The picture at `path` as `prepare` gives it; see `read_sized`."""
    return read_sized(path, preprocess)[0]


def read_sized(path: Path, preprocess: Preprocess) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """The picture at `path` as `prepare` gives it, and its own (height, width), upright.

    Raises UnreadableError naming the file if it cannot be decoded, DataError (without its name)
    if it is a picture that `preprocess` cannot take.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            image = upright(opened)
            return prepare(image, preprocess), (image.height, image.width)
    except _UNREADABLE as error:
        raise UnreadableError(
            f"{path} cannot be read as a picture: {error}; repair or remove it, "
            "or set `on_error: skip`"
        ) from error


def list_pictures(folder: Path, labels: Path | str | None = AUTO) -> dict[str, PictureLabel]:
    """File, relative to `folder` with forward slashes, -> label, sorted by file: `list_folder`."""
    return dict(list_folder(folder, labels).files)


def placed(label: PictureLabel, size: tuple[int, int], preprocess: Preprocess) -> Any:
    """What is known of a picture of `size` (height, width), in the pixels of the input.

    An index stays one; boxes follow the picture, and those that a crop cuts to nothing go; a mask
    is resized by the nearest pixel, and 255 where the frame is filled.
    """
    if isinstance(label, Boxes):
        rows = label.rows.copy()
        if label.relative:
            rows[:, 1:5] *= [size[1], size[0], size[1], size[0]]
        rows[:, 1:5] = geometry(size, preprocess).boxes(rows[:, 1:5])
        return rows[(rows[:, 3] > rows[:, 1]) & (rows[:, 4] > rows[:, 2])]
    if isinstance(label, Mask):
        return _placed_mask(label, size, preprocess)
    return label


def _placed_mask(mask: Mask, size: tuple[int, int], preprocess: Preprocess) -> NDArray[np.uint8]:
    with Image.open(mask.path) as image:
        if image.mode not in ("L", "P", "1"):
            raise DataError(
                f"{mask.path} has colours; a mask is grey or a palette, a class a pixel"
            )
        if (image.height, image.width) != size:
            raise DataError(
                f"{mask.path} is {image.width} x {image.height}, its picture {size[1]} x {size[0]}"
            )
        place = geometry(size, preprocess)
        small = image.resize((place.resized[1], place.resized[0]), Image.Resampling.NEAREST)
    array = np.asarray(small).astype(np.uint8)
    if preprocess.letterbox is not None:
        return framed(array[..., np.newaxis], place, (255,))[..., 0]
    top, left = -place.top, -place.left
    return array[top : top + place.size[0], left : left + place.size[1]]


def _hash_or_reason(path: Path) -> str:
    """The file's hash; one that cannot be read is found out by the pass, with its name."""
    try:
        return hash_file(path)
    except OSError as error:
        return f"unreadable: {type(error).__name__}"
