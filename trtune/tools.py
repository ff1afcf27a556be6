"""What the smaller commands do: look at a model, write a first config for it, convert a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trtune.calibrate.cache import (
    Cache,
    Version,
    convert,
    dump_cache,
    header_for,
    load_table,
    read_cache,
    save_table,
    sidecar_of,
)
from trtune.configs.errors import CacheError, InputError, ModelError
from trtune.configs.files import write_text
from trtune.configs.template import init_text
from trtune.precision.graph import GraphView
from trtune.precision.inspect import Inspection, inspect_model
from trtune.precision.model import load_model
from trtune.precision.plan import make_plan

if TYPE_CHECKING:
    from trtune.calibrate.outliers import DominantPicture

PLAN_SUFFIXES = (".plan", ".engine", ".trt")


def inspect(path: Path | str) -> Inspection:
    """What the ONNX file at `path` holds, and for every node what the untuned plan makes of it.

    Raises ModelError if it cannot be read, or is an engine plan.

    >>> inspect("resnet.engine")
    Traceback (most recent call last):
        ...
    trtune.configs.errors.ModelError: resnet.engine: inspecting an engine plan needs the \
TensorRT backends, which this version of trtune does not have; give the ONNX file
    """
    path = Path(path)
    if path.suffix in PLAN_SUFFIXES:
        raise ModelError(
            f"{path}: inspecting an engine plan needs the TensorRT backends, which this version of "
            "trtune does not have; give the ONNX file"
        )
    model = load_model(path)
    plan = make_plan(GraphView.of(model))
    return inspect_model(model, {name: (a.precision, a.reason) for name, a in plan.nodes.items()})


def init_config(
    model: Path | str, config: Path | str | None = None, *, overwrite: bool = False
) -> Path:
    """Write a commented config for the ONNX file `model` and return where it is.

    `config` is by default the model's name with .yaml in the current folder. The model's path is
    written relative to it. Raises ModelError if the model cannot be read, InputError if the file
    is there already, unless `overwrite`.
    """
    model = Path(model)
    target = Path(f"{model.stem}.yaml") if config is None else Path(config)
    _may_write(target, overwrite=overwrite)
    inputs = [(spec.name, spec.shape, spec.dtype) for spec in load_model(model).inputs]
    write_text(target, init_text(_seen_from(model, target.parent), inputs))
    return target


def convert_cache(
    source: Path | str, version: str, target: Path | str, *, overwrite: bool = False
) -> Cache:
    """Write the TensorRT calibration cache `source` to `target` under another version's header.

    The key file beside `source`, if it belongs to it, is written anew beside `target`.
    Raises CacheError for a cache that cannot be read or converted, InputError for a `version` that
    is none, or if `target` is there already, unless `overwrite`.
    """
    source, target = Path(source), Path(target)
    wanted = parse_version(version)
    _may_write(target, overwrite=overwrite)
    try:
        converted = convert(read_cache(source), wanted)
    except CacheError as error:
        raise CacheError(_with_path(source, str(error))) from error
    table = load_table(source, allow_unkeyed=True)
    if table.provenance == {"source": "unkeyed"}:
        write_text(target, dump_cache(converted))
        if target != source:  # a key file left there belongs to what was overwritten
            sidecar_of(target).unlink(missing_ok=True)
    else:
        save_table(target, table, converted.header)
    return converted


def dominant_pictures(run: Path) -> list[DominantPicture]:
    """The pictures that set the range of many tensors far above the median, in a run's folder.

    Empty if the folder holds no histograms.
    """
    from trtune.calibrate.histogram_file import load_histograms
    from trtune.calibrate.outliers import dominant, outliers

    try:
        return dominant(outliers(load_histograms(run / "histograms.npz")))
    except FileNotFoundError:
        return []


def parse_version(text: str) -> Version:
    """A TensorRT version; what is left out is 0, a fourth number (the build) is dropped.

    >>> parse_version("10.14.1"), parse_version("8.6.1.6"), parse_version("9.2")
    ((10, 14, 1), (8, 6, 1), (9, 2, 0))

    Raises InputError if it is none, or no cache header can hold it.
    """
    parts = text.removeprefix("v").split(".")
    if len(parts) in (2, 3, 4) and all(part.isascii() and part.isdigit() for part in parts):
        major, minor, patch = (*map(int, parts[:3]), 0)[:3]
        version = (major, minor, patch)
        try:
            header_for(version)
        except ValueError as error:
            raise InputError(f"{text!r} is not a TensorRT version: {error}") from error
        return version
    raise InputError(f"{text!r} is not a TensorRT version; write it as 10.14.1 or 8.6.1")


def _with_path(path: Path, message: str) -> str:
    return message if str(path) in message else f"{path}: {message}"


def _may_write(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already; --force overwrites it, -o names another file")


def _seen_from(model: Path, folder: Path) -> Path:
    try:
        return Path(os.path.relpath(model, folder))
    except ValueError:  # another drive of Windows
        return model.resolve()
