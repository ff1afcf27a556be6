"""What the smaller commands do: look at a model, write a first config for it, convert a cache."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from trtune.configs.errors import CacheError, InputError, ModelError, TrtuneError
from trtune.configs.files import write_text
from trtune.configs.load import json_schema
from trtune.configs.progress import Progress, silent
from trtune.configs.template import DATA_PATH, SCHEMA_FILE, init_text
from trtune.precision.backends.trt.layer_table import EngineTable, is_layer_info, read_table
from trtune.precision.graph.branches import switches
from trtune.precision.graph.file import load_model, save_model
from trtune.precision.graph.view import GraphView
from trtune.precision.graph.widen import computing_in_half
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.against import Agreement, against_builder
from trtune.precision.quantized.describe import (
    Inspection,
    inspect_model,
    quantized_how,
    refuse_quantized,
)
from trtune.precision.quantized.findings import Finding, summary
from trtune.precision.quantized.importing import (
    import_quantized,
    insert_file,
    lint_model,
    load_quantized,
    require_scales,
    strip_file,
)
from trtune.precision.quantized.migrate import Migrated, migrate_files, to_cache
from trtune.precision.quantized.strip import Stripped
from trtune.precision.runtime.api import MODEL_FILE, BuildInfo
from trtune.precision.runtime.engine_json import ENGINE_JSON, read_engine_json
from trtune.precision.traces.explain import LogAccount, explain_log
from trtune.precision.traces.plan_file import is_plan
from trtune.run.naming import CACHE_FILE, HISTOGRAM_FILE
from trtune.trials import hints_for

if TYPE_CHECKING:
    from trtune.calibrate.outliers import DominantPicture

log = logging.getLogger(__name__)

PLAN_SUFFIXES = (".plan", ".engine", ".trt")
FALLBACKS = ("fp32", "fp16", "bf16")


def inspect(path: Path | str) -> Inspection:
    """What the ONNX file at `path` holds, and for every node what the untuned plan makes of it.

    Nodes in half precision are planned as a run has them, raised to float32. Of a model with Q/DQ
    the problems say also what TensorRT would not take of them. Raises ModelError if it cannot be
    read.
    """
    path = Path(path)
    model, notes = load_quantized(path)
    view = GraphView.of(model)
    half = not quantized_how(view) and computing_in_half(model.proto.graph)
    raised = load_model(path, fold="none", widen=True) if half else model
    plan = make_plan(GraphView.of(raised))
    planned = {name: (a.precision, a.reason) for name, a in plan.nodes.items()}
    found = replace(inspect_model(model, planned, raised=bool(raised.half)), notes=raised.notes)
    if not found.quantize_nodes and not notes:
        return found
    return replace(found, problems=(*found.problems, *summary(lint_model(path))))


def is_engine(path: Path | str) -> bool:
    """Whether `path` is called as engine plans are."""
    return Path(path).suffix in PLAN_SUFFIXES


def inspect_engine(path: Path | str) -> BuildInfo:
    """What stands beside the engine plan at `path` of how it was built and what it runs in.

    Raises ModelError if there is no plan, or no engine.json that belongs to it: a plan itself tells
    nothing without its TensorRT and its GPU.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        info = read_engine_json(path.parent)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: a plan tells nothing by itself, and there is no {ENGINE_JSON} beside it that "
            "can be read; build it with `trtune build`, or give the ONNX file"
        ) from error
    if info.path != path.parent / path.name:
        raise ModelError(f"{path.parent / ENGINE_JSON} is about {info.path}, not about {path}")
    return info


def is_bare_plan(path: Path | str) -> bool:
    """Whether `path` begins as a plan does and no engine.json beside it says how it was built."""
    path = Path(path)
    return is_plan(path) and not (path.parent / ENGINE_JSON).is_file()


def inspect_layers(
    model: Path | str, layers: Path | None = None, profile: Path | None = None
) -> EngineTable:
    """What an engine's exported `layers` say, of the nodes of `model` if that is an ONNX file.

    `model` may be the export itself, or a plan that has its layers.json beside it. Raises
    InputError for files that are none such.
    """
    model = Path(model)
    if layers is None:
        beside = model.parent / "layers.json"
        layers = beside if is_engine(model) and beside.is_file() else model
    if layers == model and not is_layer_info(model):
        raise InputError(
            f"{model} holds no layers of an engine; give them with --layers FILE, as "
            "`trtexec --exportLayerInfo=FILE` writes them"
        )
    view, planned = None, None
    if model.suffix.lower() == ".onnx":
        view = GraphView.of(load_quantized(model)[0])
    elif is_engine(model) and (model.parent / ENGINE_JSON).is_file():
        info = read_engine_json(model.parent)
        planned = {line.partition(":")[0]: "int8" for line in info.not_honoured}
    return read_table(layers, profile, view=view, planned=planned)


def write_engine_page(
    found: EngineTable, target: Path | str, *, name: str, overwrite: bool = False
) -> None:
    """Write an engine's layers as one HTML file called `name`.

    Raises InputError if the file is there already, unless `overwrite`.
    """
    from trtune.reports.page.engine import engine_html

    _may_write(Path(target), overwrite=overwrite)
    write_text(Path(target), engine_html(name, found))


def explain_build(log_file: Path | str, model: Path | str | None = None) -> LogAccount:
    """What a log of a build says; with `model` at which of its nodes.

    Raises InputError for a file that cannot be read.
    """
    path = Path(log_file)
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read the log {path}: {error.strerror}") from error
    view = None if model is None else GraphView.of(load_quantized(Path(model))[0])
    return explain_log(text, view)


def init_config(
    model: Path | str,
    config: Path | str | None = None,
    *,
    data: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    told: Callable[[Sequence[str]], None] | None = None,
) -> Path:
    """Write a commented config for the ONNX file `model` and return where it is.

    The JSON Schema by which editors check and complete it is written beside it.
    `config` is by default the model's name with .yaml in the current folder. The model's path is
    written relative to it. With `data`, its kind, number and labels are filled in, and of the
    usual preprocessings the one with which the FP32 model does best; `told` gets what was found,
    in sentences. Raises ModelError if the model cannot be read, InputError if the file is there
    already, unless `overwrite`.
    """
    model = Path(model)
    target = Path(f"{model.stem}.yaml") if config is None else Path(config)
    _may_write(target, overwrite=overwrite)
    loaded, _ = load_quantized(model)
    inputs = [(spec.name, spec.shape, spec.dtype) for spec in loaded.inputs]
    how = quantized_how(GraphView.of(loaded))
    if how == "dynamic":
        refuse_quantized(GraphView.of(loaded), "int8")
    seen = _seen_from(model, target.parent)
    hints = hints_for(loaded, None if data is None else Path(data), progress=progress)
    deciding = {s.input: next(iter(s.values), None) for s in switches(loaded.proto.graph)}
    hints = replace(hints, constants=deciding)
    default = "qat" if how else "int8"
    if told is not None:
        told(hints.sentences())
    found = hints.path or data
    place = DATA_PATH if found is None else str(_seen_from(Path(found), target.parent))
    text = init_text(seen, inputs, data_path=place, default=default, hints=hints)
    write_text(target, text)
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    write_text(target.parent / SCHEMA_FILE, schema + "\n")
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
    if wanted[0] >= 11:
        log.warning(
            "TensorRT %s has no calibrators: it reads no calibration cache, this one neither. "
            "`trtune migrate` writes these scales into the model as Q/DQ, which it does read",
            version,
        )
    table = load_table(source, allow_unkeyed=True)
    if table.provenance == {"source": "unkeyed"}:
        write_text(target, dump_cache(converted))
        if target != source:  # a key file left there belongs to what was overwritten
            sidecar_of(target).unlink(missing_ok=True)
    else:
        save_table(target, table, converted.header)
    return converted


def lint_against_builder(
    model: Path | str, found: Sequence[Finding], compute_capability: str = "8.9"
) -> Agreement:
    """What TensorRT-RTX makes of the quantized `model` as it stands, beside `found`, the linter's
    findings of it.

    Raises TrtuneError if TensorRT-RTX is not installed, ModelError if the file cannot be read.
    """
    from trtune.precision.backends.rtx.as_it_is import build_as_it_is
    from trtune.precision.backends.rtx.support import (
        COMPUTE_CAPABILITIES,
        REMEDY,
        rtx_version,
        unsupported,
    )

    if compute_capability not in COMPUTE_CAPABILITIES:
        raise InputError(f"--compute-capability: {unsupported(compute_capability)}")
    if rtx_version() is None:
        raise TrtuneError(f"--build needs TensorRT-RTX, which is not installed: {REMEDY}")
    original, _ = load_quantized(Path(model))
    with tempfile.TemporaryDirectory(prefix="trtune-") as folder:
        seen = build_as_it_is(original, Path(folder), compute_capability=compute_capability)
    precisions = {node: account.precision for node, account in seen.accounts.items()}
    return against_builder(original, found, refused=seen.refused, precisions=precisions)


def strip_qdq(
    model: Path | str,
    target: Path | str,
    cache: Path | str,
    *,
    requantize: bool = False,
    overwrite: bool = False,
) -> Stripped:
    """Write the FP32 model in the quantized `model` to `target` and its scales to `cache`.

    Raises ModelError if its quantization cannot be taken as it is, InputError if a file is there
    already, unless `overwrite`.
    """
    target, cache = Path(target), Path(cache)
    for path in (target, cache):
        _may_write(path, overwrite=overwrite)
    return strip_file(Path(model), target, cache, allow_requantize=requantize)


def insert_qdq(
    model: Path | str, cache: Path | str, target: Path | str, *, overwrite: bool = False
) -> None:
    """Write the FP32 `model` with the scales of `cache` as Q/DQ to `target`.

    Raises ModelError or CacheError if they cannot be read or do not belong together.
    """
    _may_write(Path(target), overwrite=overwrite)
    insert_file(Path(model), Path(cache), Path(target))


def cache_from_qdq(
    model: Path | str,
    version: str,
    target: Path | str,
    *,
    requantize: bool = False,
    overwrite: bool = False,
) -> tuple[Cache, tuple[str, ...]]:
    """Write the scales in the Q/DQ of `model` as a cache of a TensorRT version.

    Also gives the weighted nodes that TensorRT leaves in float with it.
    """
    wanted, target = parse_version(version), Path(target)
    _may_write(target, overwrite=overwrite)
    found = import_quantized(Path(model), allow_requantize=requantize)
    require_scales(found)
    cache, left = to_cache(GraphView.of(found.model), found.table, wanted)
    write_text(target, dump_cache(cache))
    sidecar_of(target).unlink(missing_ok=True)
    return cache, left


def migrate(
    model: Path | str,
    cache: Path | str,
    folder: Path | str,
    *,
    pins: Path | str | None = None,
    fallback: str = "fp32",
    overwrite: bool = False,
    foreign: bool = False,
    allow_missing: bool = False,
    command: int | None = None,
) -> Migrated:
    """Write what `cache` and `pins` mean with explicit quantization into `folder`.

    A cache that does not belong to the model is refused unless `foreign`, a pin that holds for
    nothing unless `allow_missing`; of several commands in `pins` `command` (from 1) is meant.

    model.onnx holds the Q/DQ, plan.json the precisions with their reasons, calibration.cache the
    scales that are used, report.md what was matched and what changes.
    Raises InputError for files that cannot be read or do not fit.
    """
    model, cache, folder = Path(model), Path(cache), Path(folder)
    if fallback not in FALLBACKS:
        known = ", ".join(FALLBACKS)
        raise InputError(f"--fallback {fallback!r} is none of {known}")
    for name in (MODEL_FILE, "plan.json", "report.md", CACHE_FILE):
        _may_write(folder / name, overwrite=overwrite)
    loaded, found = migrate_files(
        model,
        cache,
        Path(pins) if pins else None,
        fallback=fallback,
        force=foreign,
        allow_missing=allow_missing,
        command=command,
    )
    save_model(
        lower_emulate(loaded, found.plan, found.table), folder / MODEL_FILE, loaded.external_dir
    )
    write_text(folder / "plan.json", found.plan.to_json())
    save_table(folder / CACHE_FILE, found.table)
    lines = [f"# {Path(model).name} with the scales of {Path(cache).name}", ""]
    write_text(folder / "report.md", "\n".join([*lines, *(f"- {x}" for x in found.lines()), ""]))
    return found


def dominant_pictures(run: Path) -> list[DominantPicture]:
    """The pictures that set the range of many tensors far above the median, in a run's folder.

    Empty if the folder holds no histograms.
    """
    from trtune.calibrate.histogram import load_histograms
    from trtune.calibrate.outliers import dominant, outliers

    try:
        return dominant(outliers(load_histograms(run / HISTOGRAM_FILE)))
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
