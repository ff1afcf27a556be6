"""One door to every kind of data: plain values in, a `BatchSource` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.sources import DataSet
from trtune.datasets.arrays import ArraySource, load_arrays
from trtune.datasets.batches import BatchSource, InputSpec
from trtune.datasets.feeds import AUTO
from trtune.datasets.idx import read_idx
from trtune.datasets.pictures.detection import YAMLS, described_by, list_coco, list_yolo
from trtune.datasets.pictures.images import ImageSource
from trtune.datasets.pictures.listing import Listing, list_folder, read_classes
from trtune.datasets.pictures.prefetch import prefetched
from trtune.datasets.pictures.preprocess import Preprocess, preprocess_of
from trtune.datasets.python import PythonSource
from trtune.datasets.samples import NpyFolder
from trtune.datasets.selection import Selection
from trtune.datasets.wrapped import Shifted, WithValues, same_for_all


@dataclass(frozen=True, slots=True)
class _Request:
    path: str
    inputs: Sequence[InputSpec]
    preprocess: Preprocess | None
    labels: str | None
    selection: Selection
    batch: int
    on_error: str
    input_names: Mapping[str, str]
    args: Mapping[str, Any]
    base_dir: Path
    axes: Mapping[str, int]
    split: str | None
    classes: Sequence[str]
    images: str | None
    categories: str

    @property
    def place(self) -> Path:
        return self.base_dir / self.path

    @property
    def label_file(self) -> Path | str | None:
        return self.labels if self.labels in (None, AUTO) else self.base_dir / str(self.labels)


def open_source(
    source: str,
    path: str | Path,
    *,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None = None,
    labels: str | Path | None = AUTO,
    take: int | None = None,
    skip: int = 0,
    sample: int | None = None,
    seed: int = 0,
    batch: int = 8,
    on_error: str = "error",
    input_names: Mapping[str, str] | None = None,
    args: Mapping[str, Any] | None = None,
    base_dir: Path | None = None,
    axes: Mapping[str, int] | None = None,
    split: str | None = None,
    classes: Sequence[str] | str = (),
    images: str | None = None,
    categories: str = "order",
) -> BatchSource:
    """Data for a model with these `inputs`, in batches of `batch` or of what the model fixes.

    source: images (a folder or a list file), yolo (data.yaml or a folder), coco (instances.json),
        npy (a folder of samples), arrays (.npz, .npy), idx (idx, idx.gz) or python
        (`module:function`), or auto, which looks; `path` and a label file are relative to
        `base_dir`.
    split: which part of a data.yaml. classes: their names, or a file with one a line. images: the
        folder of a coco file's pictures. categories: order, or ids (a class is its category's
        id).
    labels: a CSV or a folder of masks (images), the name of an array (arrays, python), a file
        (idx); "auto" finds folder names, or an array labels, label or y; None leaves them out.
    skip, take, sample, seed: see `Selection`. batch: samples; the last batch may be short.
    input_names: model input -> array. args: keyword arguments of the function.
    axes: model input -> the axis that samples lie along, where the shapes do not tell.
    on_error: "error" or "skip", for pictures that cannot be decoded.

    Pictures are decoded, and a function runs, in threads ahead of the consumer.

    Raises DataError for data that is missing or does not fit; ValueError for an unknown `source`.
    """
    base = (base_dir or Path()).resolve()
    return _opener(source, base / path)(
        _Request(
            path=str(path),
            inputs=inputs,
            preprocess=preprocess,
            labels=None if labels is None else str(labels),
            selection=Selection(skip=skip, take=take, sample=sample, seed=seed),
            batch=batch,
            on_error=on_error,
            input_names=input_names or {},
            args=args or {},
            base_dir=base,
            axes=axes or {},
            split=split,
            classes=read_classes(base / classes) if isinstance(classes, str) else classes,
            images=images,
            categories=categories,
        )
    )


def _opener(source: str, path: Path) -> Callable[[_Request], BatchSource]:
    """What opens a `source`; ValueError for a word that is none."""
    if source == "auto":
        source = source_on_disk(path) if ":" not in path.name else "python"
    if source not in OPENERS:
        raise ValueError(f"unknown source {source!r}{did_you_mean(source, OPENERS)}")
    return OPENERS[source]


def open_section(data: DataSet, inputs: Sequence[InputSpec]) -> BatchSource:
    """The batches that a `data` section of a config describes; see `open_source`."""
    section = data.preprocess
    values = same_for_all(data.feed, inputs, data.axis)
    source = open_source(
        data.source,
        data.path,
        inputs=[spec for spec in inputs if spec.name not in values],
        preprocess=None if section is None else preprocess_of(section.model_dump()),
        labels=data.labels,
        take=data.take,
        skip=data.skip,
        sample=data.sample,
        seed=data.seed,
        batch=data.batch,
        on_error=data.on_error,
        input_names=data.inputs,
        args=data.args,
        axes={name: axis for name, axis in data.axis.items() if name not in values},
        split=data.split,
        classes=data.classes,
        images=data.images,
        categories=data.categories,
    )
    if values:
        source = WithValues(source, values)
    return Shifted(source, data.label_offset) if data.label_offset else source


def source_on_disk(path: Path) -> str:
    """Which source reads what lies at `path`, by suffix, or by what a folder holds.

    Raises DataError if there is nothing, or nothing that says it.
    """
    suffixes = {".npz": "arrays", ".npy": "arrays", ".json": "coco", ".txt": "images",
                ".yaml": "yolo", ".yml": "yolo"}  # fmt: skip
    if path.is_file():
        found = suffixes.get(path.suffix.casefold()) or ("idx" if "idx" in path.name else None)
        if found is None:
            raise DataError(f"{path}: the name does not say what it is; give `source`")
        return found
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    if (path / "images").is_dir() and (path / "labels").is_dir():
        masks = any((path / "labels").rglob("*.png"))
        return "images" if masks else "yolo"
    described = described_by(path)
    if described is not None:
        return "yolo" if described.suffix.casefold() in YAMLS else "coco"
    if any((part.parent / "labels").is_dir() for part in path.glob("*/images")):
        return "yolo"
    if any(path.glob("*.npy")) or any(path.glob("*/*.npy")):
        return "npy"
    return "images"


def _open_images(request: _Request) -> BatchSource:
    listing = list_folder(request.place, request.label_file, request.classes)
    return _pictures(request, listing)


def _open_yolo(request: _Request) -> BatchSource:
    return _pictures(request, list_yolo(request.place, request.split))


def _open_coco(request: _Request) -> BatchSource:
    images = None if request.images is None else request.base_dir / request.images
    return _pictures(request, list_coco(request.place, images, by_id=request.categories == "ids"))


def _pictures(request: _Request, listing: Listing) -> BatchSource:
    if request.labels is None:
        files = dict.fromkeys(listing.files)
        listing = replace(listing, files=files, notes=(), named={}, sorted_classes=None)
    return ImageSource(
        request.place,
        request.inputs,
        preprocess=request.preprocess,
        labels=request.label_file,
        selection=request.selection,
        batch=request.batch,
        on_error=request.on_error,
        listing=listing,
    )


def _open_npy(request: _Request) -> BatchSource:
    source = NpyFolder(
        request.place,
        request.inputs,
        labels=request.labels,
        names=request.input_names,
        preprocess=request.preprocess,
        selection=request.selection,
        batch=request.batch,
    )
    return prefetched(source)


def _open_arrays(request: _Request) -> BatchSource:
    source = ArraySource(
        load_arrays(request.place),
        request.inputs,
        where=str(request.place),
        labels=request.labels,
        names=request.input_names,
        preprocess=request.preprocess,
        selection=request.selection,
        batch=request.batch,
        axes=request.axes,
    )
    return _ahead_if_slow(source, request.preprocess)


def _open_idx(request: _Request) -> BatchSource:
    arrays = {"idx": read_idx(request.place)}
    file = request.label_file
    if isinstance(file, Path):
        arrays["labels"] = read_idx(file)
    source = ArraySource(
        arrays,
        request.inputs,
        where=str(request.place),
        labels="labels" if "labels" in arrays else None,
        names={spec.name: "idx" for spec in request.inputs},
        preprocess=request.preprocess,
        selection=request.selection,
        batch=request.batch,
    )
    return _ahead_if_slow(source, request.preprocess)


def _open_python(request: _Request) -> BatchSource:
    source = PythonSource(
        request.path,
        request.inputs,
        args=request.args,
        base_dir=request.base_dir,
        labels=request.labels,
        names=request.input_names,
        preprocess=request.preprocess,
        selection=request.selection,
        batch=request.batch,
        axes=request.axes,
    )
    return prefetched(source)


def _ahead_if_slow(source: ArraySource, preprocess: Preprocess | None) -> BatchSource:
    return prefetched(source) if preprocess is not None and preprocess.resize else source


OPENERS: Mapping[str, Callable[[_Request], BatchSource]] = {
    "images": _open_images,
    "yolo": _open_yolo,
    "coco": _open_coco,
    "npy": _open_npy,
    "arrays": _open_arrays,
    "idx": _open_idx,
    "python": _open_python,
}
