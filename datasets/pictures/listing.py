"""Which pictures there are and what is known of each: folders, CSVs, list files, classes."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

AUTO_LABELS = "auto"
CLASS_FILE = "classes.txt"
"""Beside class folders: their names in the model's order, one a line."""
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True, slots=True)
class Boxes:
    """The objects in a picture: K x 6, class, left, top, right, bottom, and 1 for a crowd.

    In pixels of the picture, or `relative` to its width and height (0 to 1).
    """

    rows: NDArray[np.float64]
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Mask:
    """A picture of a class a pixel, in a file; 255 is no class."""

    path: Path


PictureLabel: TypeAlias = int | Boxes | Mask | None


@dataclass(frozen=True, slots=True)
class Listing:
    """Pictures in `folder`: file (relative to it, forward slashes) -> what is known, sorted.

    `classes` are the names of the classes by index, where they are known; `notes` say what a
    reader of the result should know. `sorted_classes` is how many names (of folders, in a CSV)
    were counted in their sorted order, which is right only if the model has exactly these; None
    where the indices were given.
    """

    folder: Path
    files: Mapping[str, PictureLabel]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    named: Mapping[str, int] = field(default_factory=dict)
    sorted_classes: int | None = None

    @property
    def mapping(self) -> str:
        """Folder or name -> class index, for people: the first ones, and how many."""
        pairs = [f"{name} = {index}" for name, index in self.named.items()]
        rest = f", ... ({len(pairs)} classes)" if len(pairs) > 6 else ""
        return ", ".join(pairs[:6]) + rest


def list_folder(
    folder: Path, labels: Path | str | None = AUTO_LABELS, classes: Sequence[str] = ()
) -> Listing:
    """The pictures in `folder` and its subfolders, or that a list file names.

    `labels`: AUTO_LABELS takes subfolders as classes if every picture lies in one; a CSV with the
    columns file and label; a folder of masks, PNG files of the same names; None for no labels.
    `classes` names the classes in order, one line each, a synset before its words, say.

    Raises DataError for what is missing or malformed, and for names that are no class.
    """
    if folder.is_file() and folder.suffix.casefold() not in SUFFIXES:
        return list_file(folder, labels, classes)
    if folder.is_file():
        raise DataError(
            f"{folder} is a file; `path` of `source: images` must be a folder or a list"
        )
    if not folder.is_dir():
        raise DataError(_no_folder(folder))
    if labels is not None and labels != AUTO_LABELS:
        place = Path(labels)
        return _masked(folder, place) if place.is_dir() else _from_csv(folder, place, classes)
    files = sorted(walk(folder))
    if labels is None or not files or not all("/" in file for file in files):
        return Listing(folder, dict.fromkeys(files), tuple(classes))
    named = class_folders(folder, classes)
    found = {file: named[file.partition("/")[0]] for file in files}
    by_order = not classes and not (folder / CLASS_FILE).is_file() and not _are_numbers(named)
    return Listing(
        folder,
        found,
        tuple(classes),
        named=named,
        sorted_classes=len(named) if by_order else None,
    )


def walk(folder: Path) -> Iterator[str]:
    """Pictures below `folder`, by suffix, without hidden files; links are followed once."""
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


def class_folders(folder: Path, classes: Sequence[str] = ()) -> dict[str, int]:
    """Folder name -> class index.

    By `classes` if there are any; by the number, if all folders are called by numbers; else their
    places among the sorted names, or those of a classes.txt beside them.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    beside = folder / CLASS_FILE
    if not classes and beside.is_file():
        classes = read_classes(beside)
    if classes:
        return {name: class_index(name, classes, f"folder {folder / name}") for name in names}
    if _are_numbers(names):
        return {name: int(name) for name in names}
    return {name: index for index, name in enumerate(names)}


def _are_numbers(names: Iterable[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def class_index(name: str, classes: Sequence[str], what: str) -> int:
    """The place of `name` among `classes`: the whole line, or its first word (a synset).

    Raises DataError with the nearest if it is none.
    """
    for index, line in enumerate(classes):
        if name == line or name == line.split(maxsplit=1)[0].rstrip(",:"):
            return index
    raise DataError(f"{what}: {name!r} is none of the {len(classes)} classes"
                    f"{did_you_mean(name, classes)}")  # fmt: skip


def read_classes(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line; empty lines at the end do not count."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of classes: {error}") from error
    if not lines or any(not line.strip() for line in lines):
        raise DataError(f"{path}: a class name is expected on every line")
    return tuple(line.strip() for line in lines)


def list_file(path: Path, labels: Path | str | None, classes: Sequence[str] = ()) -> Listing:
    """The pictures that a text file names, one a line, with a label behind it or none.

    Names are relative to the file's folder. `labels` None ignores the labels there.
    """
    files: dict[str, PictureLabel] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of pictures: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        file, label = _listed(line.strip(), classes, f"{path}, line {number}")
        if not (path.parent / file).is_file() and "\\" in file:  # written on Windows
            file = file.replace("\\", "/")
        if not (path.parent / file).is_file():
            raise DataError(f"{path}, line {number}: no such file: {path.parent / file}")
        files[Path(file).as_posix()] = None if labels is None else label
    known = [file for file, label in files.items() if label is not None]
    if known and len(known) < len(files):
        raise DataError(f"{path} gives a label to {len(known)} of {len(files)} pictures only")
    return Listing(path.parent, dict(sorted(files.items())), tuple(classes))


def _listed(line: str, classes: Sequence[str], where: str) -> tuple[str, int | None]:
    """A line's file and label; a file's name may hold blanks."""
    if Path(line).suffix.casefold() in SUFFIXES:
        return line, None
    file, _, label = line.replace("\t", " ").rpartition(" ")
    if not file or Path(file.strip()).suffix.casefold() not in SUFFIXES:
        raise DataError(f"{where}: {line!r} is not FILE or FILE LABEL")
    return file.strip(), _label(label, file.strip(), classes, where)


def _label(text: str, file: str, classes: Sequence[str], where: str) -> int:
    try:
        return int(text)
    except ValueError:
        if classes:
            return class_index(text, classes, where)
    raise DataError(
        f"{where}: label {text!r} of {file!r} is not a class index (0, 1, 2, ...); "
        "name the classes in order with `classes`"
    )


def _masked(folder: Path, masks: Path) -> Listing:
    files = sorted(walk(folder))
    found: dict[str, PictureLabel] = {}
    for file in files:
        mask = (masks / file).with_suffix(".png")
        if mask.is_file():
            found[file] = Mask(mask)
    if not found:
        raise DataError(
            f"no mask in {masks} has the name of a picture in {folder} and ends in .png"
        )
    return Listing(folder, found, notes=_partly(len(found), len(files), folder, masks))


def _partly(found: int, there: int, folder: Path, labels: Path) -> tuple[str, ...]:
    if found >= there:
        return ()
    return (
        f"{found} of {there} pictures: {labels} has no label for the others in {folder} "
        "(`labels: null` takes all, for calibration)",
    )


def _from_csv(folder: Path, path: Path, classes: Sequence[str]) -> Listing:
    if not path.is_file():
        raise DataError(f"no such file: {path}; `labels` must be a CSV with columns file,label")
    texts: dict[str, tuple[str, str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                file, label = (row["file"] or "").strip(), (row["label"] or "").strip()
                if not file:
                    raise DataError(f"{where}: no file is named")
                if (posix := Path(file).as_posix()) in texts:
                    raise DataError(f"{where}: {file!r} is listed twice")
                texts[posix] = label, where
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV in UTF-8: {error}") from error
    labels, named = _labels_of(texts, classes)
    missing = [file for file in labels if not (folder / file).is_file()]
    there = sorted(walk(folder))
    if missing:
        raise DataError(
            f"{path} lists {missing[0]!r}, which is not in {folder}"
            f"{did_you_mean(missing[0], there)} "
            f"({len(missing)} of {len(labels)} listed files are missing)"
        )
    notes = _partly(len(labels), len(there), folder, path)
    ordered = {file: labels[file] for file in sorted(labels)}
    by_order = len(named) if named and not classes else None
    return Listing(folder, ordered, tuple(classes) or tuple(named), notes, named, by_order)


def _labels_of(
    texts: Mapping[str, tuple[str, str]], classes: Sequence[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """File -> class index, and name -> class index if the labels are names.

    Names without `classes` are counted in sorted order, if no label is a number.
    """
    names = sorted({label for label, _ in texts.values()})
    if names and all(names) and not classes and not any(map(_is_number, names)):
        named = {name: index for index, name in enumerate(names)}
        return {file: named[label] for file, (label, _) in texts.items()}, named
    found = {f: _label(label, f, classes, where) for f, (label, where) in texts.items()}
    used = {label: found[file] for file, (label, _) in texts.items() if classes}
    return found, dict(sorted(used.items(), key=lambda entry: entry[1]))


def _is_number(text: str) -> bool:
    return text.lstrip("+-").isdigit()


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for column in ("file", "label"):
        if column not in columns:
            raise DataError(
                f"{path} has no column {column!r}{did_you_mean(column, columns)}; "
                f"its first line is {','.join(columns)!r}, and must name file and label"
            )


def _no_folder(folder: Path) -> str:
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return f"no such folder: {folder}{did_you_mean(folder.name, siblings)}"
