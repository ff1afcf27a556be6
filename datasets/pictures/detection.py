"""Pictures with boxes, as detectors are trained on: YOLO's and COCO's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from trtune.configs.errors import DataError, did_you_mean
from trtune.datasets.pictures.listing import SUFFIXES, Boxes, Listing, walk

YAMLS = (".yaml", ".yml")
SPLITS = {"val": ("valid", "validation"), "test": ("testing",)}
"""Other words for a part of a data.yaml."""
MOST_JSONS = 20
_NOTHING = np.zeros((0, 6))


def list_yolo(path: Path, split: str | None = None) -> Listing:
    """Pictures and boxes in YOLO's layout.

    `path`: a data.yaml (path, train, val, test, names; `split` says which, val by default), a
    folder with images/ and labels/ or with a data.yaml, a folder of pictures, or a list file. The
    labels of images/x.jpg are labels/x.txt: `class cx cy w h` (0 to 1), or `class x1 y1 x2 y2 ...`,
    a polygon, which counts as its bounding box. A picture without such a file has no object.

    Raises DataError for what is missing or malformed, naming file and line.
    """
    found = None if split is None and _has_pair(path) else described_by(path)
    if found is not None and found.suffix in YAMLS:
        path = found
    if path.suffix.casefold() in YAMLS:
        return _from_yaml(path, split or "val")
    return _pictures([path], ())


def described_by(folder: Path) -> Path | None:
    """The file in `folder` that describes the pictures in it: a data.yaml, or COCO's JSON.

    Of several JSON files (in annotations/ or beside the pictures) one of instances and of the
    validation part. None for a file, or where there is no such file.
    """
    if not folder.is_dir():
        return None
    yamls = sorted(p for p in folder.iterdir() if p.suffix.casefold() in YAMLS)
    yamls = [p for p in yamls if re.search(r"^(train|val|valid|validation):", _start(p), re.M)]
    inside = sorted((folder / "annotations").glob("*.json"))
    jsons = sorted(folder.glob("*.json"))[:MOST_JSONS]  # some tools write one a picture
    beside = [p for p in jsons if re.search(r'"(images|annotations|categories)"\s*:', _start(p))]
    files = inside or beside
    best = min(files, key=lambda p: ("instances" not in p.stem, "val" not in p.stem), default=None)
    return yamls[0] if yamls else best


def _start(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(1 << 16)
    except (OSError, UnicodeDecodeError):
        return ""


def _has_pair(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def _from_yaml(path: Path, split: str) -> Listing:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    keys = list(map(str, value)) if isinstance(value, dict) else []
    key = next((k for k in (split, *SPLITS.get(split, ())) if k in keys and value[k]), None)
    if key is None:
        raise DataError(
            f"{path} names no pictures for {split!r}{did_you_mean(split, keys)}; "
            "it needs the keys path, train, val and names (`split` chooses)"
        )
    root = path.parent / str(value.get("path") or "")
    given = value[key] if isinstance(value[key], list) else [value[key]]
    return _pictures([_place(str(g), root, path.parent) for g in given], _names(value.get("names")))


def _place(given: str, root: Path, beside: Path) -> Path:
    """Where a data.yaml's pictures are: below its `path`, else below its own folder.

    Exports that say ../train/images mean the folder beside the file, as Ultralytics reads them.
    """
    names = dict.fromkeys((given, given.replace("\\", "/")))
    tried = [base / name for name in names for base in (root, beside)]
    tried += [beside / name.removeprefix("../") for name in names]
    return next((place for place in tried if place.exists()), root / given)


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
        return _listed_files(place)
    if not place.is_dir():
        raise DataError(f"no such folder or list of pictures: {place}")
    root = place / "images" if _has_pair(place) else place
    return [root / file for file in sorted(walk(root))]


def _listed_files(path: Path) -> list[Path]:
    """The pictures of a list file: seen from it, or from a folder above it; \\ counts as /."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is no list of pictures (text, a path a line): {type(error).__name__}"
        ) from error
    found = []
    for line in filter(None, lines):
        names = dict.fromkeys((line, line.replace("\\", "/")))
        bases = (path.parent, *path.parent.parents[:2])
        tried = [base / name for base in bases for name in names]
        file = next((file for file in tried if file.is_file()), None)
        if file is None:
            raise DataError(f"{path} lists {path.parent / line}, which is not there")
        found.append(file)
    return found


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
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the labels {path}: {error}") from error
    for number, line in enumerate(lines, 1):
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
    whole = math.isfinite(kind) and kind == int(kind) and kind >= 0
    if not (whole and all(-0.01 <= value <= 1.01 for value in numbers)):
        raise DataError(f"{where}: {line!r} has a class that is no index or a place outside 0 to 1")
    return [kind, *corners, 0.0]


def list_coco(path: Path, images: Path | None = None, *, by_id: bool = False) -> Listing:
    """Pictures and boxes of a COCO instances file, or of the one in a folder.

    `images` is the folder of the pictures; without it, a folder beside the file, or beside the
    file's folder, that holds them: images, or the last part of the file's name
    (instances_val2017.json: val2017). Classes count from 0 in the order of the category ids; with
    `by_id` a class is its category's id. Boxes of pictures that the file does not list are left
    out, with a note.

    Raises DataError for what is missing or malformed.
    """
    path = described_by(path) or path
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        pictures = {int(p["id"]): _slashes(str(p["file_name"])) for p in value["images"]}
        kinds = sorted(value["categories"], key=lambda entry: int(entry["id"]))
        ids = [int(kind["id"]) for kind in kinds]
        index = {number: number if by_id else place for place, number in enumerate(ids)}
        rows: dict[int, list[list[float]]] = {number: [] for number in pictures}
        astray = 0
        for entry in value["annotations"]:
            x, y, w, h = map(float, entry["bbox"])
            crowd = float(entry.get("iscrowd", 0))
            kind = index[int(entry["category_id"])]
            if int(entry["image_id"]) not in rows:
                astray += 1
                continue
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
    notes = [] if len(there) == len(pictures) else [
        f"{len(there)} of the {len(pictures)} pictures of {path} are in {folder}"]  # fmt: skip
    if astray:
        notes.append(f"left out {astray} of the boxes of {path}: of pictures it does not list")
    found = {file: Boxes(_rows(rows[number])) for number, file in there.items()}
    names = {index[i]: str(kind.get("name", i)) for i, kind in zip(ids, kinds, strict=True)}
    classes = tuple(names.get(i, "") for i in range(max(names, default=-1) + 1))
    return Listing(folder, dict(sorted(found.items())), classes, tuple(notes),
                   {name: number for number, name in names.items()})  # fmt: skip


def _rows(rows: list[list[float]]) -> NDArray[np.float64]:
    return np.array(rows) if rows else _NOTHING


def _slashes(name: str) -> str:
    """A path as Windows writes it, with forward slashes."""
    return name.replace("\\", "/") if "/" not in name else name


def _coco_folder(path: Path, file: str) -> Path:
    split = path.stem.rpartition("_")[2]
    names = ("images", split, f"images/{split}", ".")
    tried = [base / name for base in (path.parent, path.parent.parent) for name in names]
    return next((folder for folder in tried if (folder / file).is_file()), tried[0])
