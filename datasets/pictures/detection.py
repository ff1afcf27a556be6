"""Pictures with boxes, as detectors are trained on: YOLO's and COCO's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from trtune.configs.errors import DataError, did_you_mean
from trtune.datasets.pictures.listing import SUFFIXES, Boxes, Listing, walk

_NOTHING = np.zeros((0, 6))


def list_yolo(path: Path, split: str | None = None) -> Listing:
    """Pictures and boxes in YOLO's layout.

    `path`: a data.yaml (path, train, val, test, names; `split` says which, val by default), a
    folder with images/ and labels/, a folder of pictures, or a list file. The labels of
    images/x.jpg are labels/x.txt: `class cx cy w h` (0 to 1), or `class x1 y1 x2 y2 ...`, a
    polygon, which counts as its bounding box. A picture without such a file has no object.

    Raises DataError for what is missing or malformed, naming file and line.
    """
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, split or "val")
    return _pictures([path], ())


def _from_yaml(path: Path, split: str) -> Listing:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(value, dict) or not value.get(split):
        keys = list(value) if isinstance(value, dict) else []
        raise DataError(
            f"{path} names no pictures for {split!r}{did_you_mean(split, list(map(str, keys)))}; "
            "it needs the keys path, train, val and names (`split` chooses)"
        )
    root = path.parent / str(value.get("path") or "")
    given = value[split] if isinstance(value[split], list) else [value[split]]
    places = [next((p for p in (root / g, path.parent / g) if p.exists()), root / g)
              for g in map(str, given)]  # fmt: skip
    return _pictures(places, _names(value.get("names")))


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(str(value[key]) for key in sorted(value))
    return tuple(map(str, value or ()))


def _pictures(places: Sequence[Path], names: tuple[str, ...]) -> Listing:
    files = [file for place in places for file in _files(place)]
    if not files:
        raise DataError(f"no pictures in {places[0]}; it needs {', '.join(SUFFIXES[:8])}, ...")
    folder = _common(files)
    found = {file.relative_to(folder).as_posix(): _yolo_boxes(file) for file in sorted(files)}
    if all(boxes is None for boxes in found.values()):
        return Listing(folder, dict.fromkeys(found), names)
    empty = Boxes(_NOTHING, relative=True)
    filled = {file: boxes or empty for file, boxes in found.items()}
    return Listing(folder, filled, names, named={n: i for i, n in enumerate(names)})


def _files(place: Path) -> list[Path]:
    if place.is_file():
        lines = place.read_text(encoding="utf-8-sig").split("\n")
        files = [place.parent / line.strip() for line in lines if line.strip()]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise DataError(f"{place} lists {missing}, which is not there")
        return files
    if not place.is_dir():
        raise DataError(f"no such folder or list of pictures: {place}")
    inside = place / "images"
    root = inside if inside.is_dir() and (place / "labels").is_dir() else place
    return [root / file for file in sorted(walk(root))]


def _common(files: Sequence[Path]) -> Path:
    parents = [file.parent for file in files]
    folder = parents[0]
    while not all(parent.is_relative_to(folder) for parent in parents):
        folder = folder.parent
    return folder


def _yolo_boxes(picture: Path) -> Boxes | None:
    """The boxes in the picture's label file; None if there is no such file."""
    parts = list(picture.parts)
    for number in range(len(parts) - 2, -1, -1):
        if parts[number] == "images":
            parts[number] = "labels"
            break
    path = Path(*parts).with_suffix(".txt")
    if not path.is_file():
        return None
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            rows.append(_yolo_row(line, f"{path}, line {number}"))
    return Boxes(np.array(rows) if rows else _NOTHING, relative=True)


def _yolo_row(line: str, where: str) -> list[float]:
    try:
        kind, *numbers = map(float, line.split())
    except ValueError:
        raise DataError(f"{where}: {line!r} is not `class cx cy w h`") from None
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        xs, ys = numbers[::2], numbers[1::2]
        corners = [min(xs), min(ys), max(xs), max(ys)]
    else:
        raise DataError(f"{where}: {len(numbers)} numbers behind the class; 4 make a box, "
                        "6 or more (an even number) a polygon")  # fmt: skip
    if kind != int(kind) or kind < 0 or min(corners) < -0.01 or max(corners) > 1.01:
        raise DataError(f"{where}: {line!r} has a class that is no index or a place outside 0 to 1")
    return [kind, *corners, 0.0]


def list_coco(path: Path, images: Path | None = None) -> Listing:
    """Pictures and boxes of a COCO instances file.

    `images` is the folder of the pictures; without it, a folder beside the file, or beside the
    file's folder, that holds them: images, or the last part of the file's name
    (instances_val2017.json: val2017). Classes count from 0 in the order of the category ids.

    Raises DataError for what is missing or malformed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        pictures = {int(p["id"]): str(p["file_name"]) for p in value["images"]}
        kinds = sorted(value["categories"], key=lambda entry: int(entry["id"]))
        index = {int(kind["id"]): number for number, kind in enumerate(kinds)}
        rows: dict[int, list[list[float]]] = {number: [] for number in pictures}
        for entry in value["annotations"]:
            x, y, w, h = map(float, entry["bbox"])
            crowd = float(entry.get("iscrowd", 0))
            kind = index[int(entry["category_id"])]
            rows[int(entry["image_id"])].append([kind, x, y, x + w, y + h, crowd])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO instances file (images, annotations, categories): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not pictures:
        raise DataError(f"{path} lists no images")
    folder = images or _coco_folder(path, next(iter(pictures.values())))
    there = {number: file for number, file in pictures.items() if (folder / file).is_file()}
    if not there:
        raise DataError(f"none of the {len(pictures)} images of {path} is in {folder}; "
                        "say where they are with `images`")  # fmt: skip
    notes = () if len(there) == len(pictures) else (
        f"{len(there)} of the {len(pictures)} pictures of {path} are in {folder}",)  # fmt: skip
    found = {file: Boxes(_rows(rows[number])) for number, file in there.items()}
    names = tuple(str(kind.get("name", kind["id"])) for kind in kinds)
    return Listing(folder, dict(sorted(found.items())), names, notes,
                   {name: number for number, name in enumerate(names)})  # fmt: skip


def _rows(rows: list[list[float]]) -> NDArray[np.float64]:
    return np.array(rows) if rows else _NOTHING


def _coco_folder(path: Path, file: str) -> Path:
    split = path.stem.rpartition("_")[2]
    names = ("images", split, f"images/{split}", ".")
    tried = [base / name for base in (path.parent, path.parent.parent) for name in names]
    return next((folder for folder in tried if (folder / file).is_file()), tried[0])
