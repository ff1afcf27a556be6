"""How an export is written: models with metadata, scripts, and the README that says what next."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from trtune.calibrate.cache import dump_cache
from trtune.configs.files import write_text
from trtune.precision.graph.cut import whole
from trtune.precision.graph.file import save_model
from trtune.precision.graph.proto import without_weights

if TYPE_CHECKING:
    from trtune.export.bundle import Bundle


FP32_FILE, QDQ_FILE, CACHE_NAME = "model_fp32.onnx", "model_qdq.onnx", "calibration.cache"


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """One thing to do on the device: what it gives, and the command, as a shell takes it."""

    title: str
    command: str


@dataclass(frozen=True, slots=True)
class Export:
    """What was written for one tool: files (relative to `folder`), what to do next, and notes."""

    target: str
    folder: Path
    files: tuple[str, ...]
    steps: tuple[DeviceStep, ...]
    notes: tuple[str, ...] = ()


def write_fp32(bundle: Bundle, path: Path, *, to_end: bool = True) -> None:
    """Write the FP32 model; `to_end` with the operators behind the cut, which onnxruntime lacks."""
    _write(bundle, bundle.fp32, path, bundle.model.external_dir, to_end=to_end)


def write_qdq(bundle: Bundle, path: Path, *, to_end: bool = True) -> None:
    """Write the model whose scales stand in it as Q/DQ."""
    proto, folder = bundle.qdq
    _write(bundle, proto, path, folder, to_end=to_end)


def write_cache(bundle: Bundle, path: Path) -> bool:
    """Write the calibration cache for TensorRT 10, if anything is int8; whether it was."""
    if bundle.cache is None:
        path.unlink(missing_ok=True)
        return False
    write_text(path, dump_cache(bundle.cache))
    return True


def write_script(path: Path, command: str, comment: str) -> None:
    """Write a shell script that runs `command` in its own folder."""
    lines = ("#!/bin/sh", f"# {comment}", "set -e", 'cd "$(dirname "$0")"', command)
    write_text(path, "\n".join(lines) + "\n")
    os.chmod(path, 0o755)


def cache_notes(bundle: Bundle) -> list[str]:
    """What does not become int8 with the calibration cache, though it is planned so."""
    left = bundle.left_in_float
    fp8, notes = bundle.plan.fp8_nodes, list[str]()
    if fp8:
        notes.append(
            f"{len(fp8)} layers are planned in FP8, which only the Q/DQ model can say: built from "
            f"cache and flags they are float: {', '.join(fp8)}"
        )
    if not left:
        return notes
    return [
        *notes,
        f"With the calibration cache TensorRT 10 leaves {len(left)} layers in float for want of "
        f"scales, which the Q/DQ model runs in INT8: {', '.join(left)}. A run whose config lists "
        "the backend `tensorrt` measures those scales too.",
    ]


def readme(bundle: Bundle, export: Export) -> str:
    """The README of an export: where it comes from, the next commands, the files, the notes."""
    lines = [f"# {bundle.record.name} for {export.target}", ""]
    lines += [f"- {key.removeprefix('trtune.')}: {text}" for key, text in bundle.metadata.items()]
    lines += ["", "## Next, on the device, in this folder", ""]
    for step in export.steps:
        lines += [f"{step.title}:", "", f"    {step.command}", ""]
    lines += ["## Files", "", *(f"- `{name}`" for name in export.files)]
    if export.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in export.notes)]
    return "\n".join(lines) + "\n"


def with_metadata(proto: onnx.ModelProto, values: Mapping[str, str]) -> onnx.ModelProto:
    """A copy of `proto` that carries `values`; its other metadata stays."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    others = [entry for entry in proto.metadata_props if entry.key not in values]
    del found.metadata_props[:]
    found.metadata_props.extend(others)
    for key, value in values.items():
        found.metadata_props.add(key=key, value=value)
    return found


def shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """Input -> shape as trtexec and onnxruntime's providers write it.

    >>> shapes_text({"x": (1, 3), "y": (2,)})
    'x:1x3,y:2'
    """
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _write(
    bundle: Bundle, proto: onnx.ModelProto, path: Path, folder: Path | None, *, to_end: bool
) -> None:
    if to_end and bundle.model.tail is not None:
        proto = whole(proto, bundle.model.tail)
    else:
        onnx.checker.check_model(without_weights(proto))
    save_model(with_metadata(proto, bundle.metadata), path, folder)
