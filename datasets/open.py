"""One door to every kind of data: plain values in, a `BatchSource` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.configs.errors import did_you_mean
from trtune.datasets.arrays import ArraySource, load_arrays
from trtune.datasets.batches import BatchSource, InputSpec
from trtune.datasets.feeds import AUTO
from trtune.datasets.idx import read_idx
from trtune.datasets.images import ImageSource
from trtune.datasets.prefetch import prefetched
from trtune.datasets.preprocess import Preprocess
from trtune.datasets.python import PythonSource
from trtune.datasets.selection import Selection


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
) -> BatchSource:
    """Data for a model with these `inputs`, in batches of `batch` or of what the model fixes.

    source: images (a folder), arrays (.npz, .npy), idx (idx, idx.gz) or python
        (`module:function`); `path` and a label file are relative to `base_dir`.
    labels: a CSV (images), the name of an array (arrays, python), a file (idx); "auto" finds
        folder names, or an array labels, label or y; None leaves labels out.
    skip, take, sample, seed: see `Selection`. batch: samples; the last batch may be short.
    input_names: model input -> array. args: keyword arguments of the function.
    axes: model input -> the axis that samples lie along, where the shapes do not tell.
    on_error: "error" or "skip", for pictures that cannot be decoded.

    Pictures are decoded, and a function runs, in threads ahead of the consumer.

    Raises DataError for data that is missing or does not fit; ValueError for an unknown `source`.
    """
    if source not in OPENERS:
        raise ValueError(f"unknown source {source!r}{did_you_mean(source, OPENERS)}")
    return OPENERS[source](
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
            base_dir=(base_dir or Path()).resolve(),
            axes=axes or {},
        )
    )


def _open_images(request: _Request) -> BatchSource:
    return ImageSource(
        request.place,
        request.inputs,
        preprocess=request.preprocess,
        labels=request.label_file,
        selection=request.selection,
        batch=request.batch,
        on_error=request.on_error,
    )


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
    "arrays": _open_arrays,
    "idx": _open_idx,
    "python": _open_python,
}
