"""Whether a built plan runs here: its file, its TensorRT version and its GPU, told in words.

TensorRT itself says of all of these only that the plan cannot be deserialized.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.calibrate.calibrators import Allocate, version_of
from trtune.configs.errors import TrtuneError
from trtune.configs.files import hash_file
from trtune.precision.backends.gpu.memory import DeviceBuffer
from trtune.precision.backends.gpu.runtime import DeviceProperties, device_properties, use_device
from trtune.precision.runtime.engine_json import ENGINE_JSON

log = logging.getLogger(__name__)

REBUILD = "trtune build CONFIG --backend {backend}"
"""The command that builds for this machine."""


@dataclass(frozen=True, slots=True)
class Cuda:
    """What building and loading ask of CUDA: facts about a GPU, choosing it, memory on it."""

    properties: Callable[[int], DeviceProperties] = device_properties
    use: Callable[[int], AbstractContextManager[None]] = use_device
    allocate: Allocate = DeviceBuffer

    def find(self, device: int) -> DeviceProperties | None:
        """What GPU `device` is; None, and a line in the log, if there is none or no cuda-python."""
        try:
            return self.properties(device)
        except TrtuneError as error:
            log.info("GPU %d: %s", device, error)
            return None


def gpu_facts(gpu: DeviceProperties | None) -> dict[str, str]:
    """GPU, compute capability, driver and CUDA, for engine.json; "unknown" where not known."""
    if gpu is None:
        return dict.fromkeys(("gpu", "compute_capability", "driver", "cuda"), "unknown")
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver or "unknown",
        "cuda": gpu.runtime_cuda,
    }


def check_plan(folder: Path, *, installed: str, gpu: DeviceProperties | None, backend: str) -> Path:
    """The plan that was built into `folder`, if it can run here.

    `installed` is the TensorRT version here, `gpu` the GPU here. Raises TrtuneError that says what
    does not fit, what is needed, and how to build again.
    """
    value = _read(folder)
    name: str | None = value["file"]
    again = f"build it again: {REBUILD.format(backend=backend)}"
    path = folder / name if name else None
    if path is None or not path.is_file():
        raise TrtuneError(f"{folder} holds no engine ({value.get('reason') or 'no file'}); {again}")
    found, wanted = path.stat().st_size, value["size_bytes"]
    if found != wanted:
        what = "truncated" if found < wanted else "changed"
        raise TrtuneError(f"{path} is {what}: {found} bytes, and {wanted} were built; {again}")
    if hash_file(path) != value["file_sha256"]:
        raise TrtuneError(f"{path} was changed since it was built; {again}")
    details: Mapping[str, Any] = value.get("details", {})
    reasons = [
        _version_refusal(value["versions"].get("tensorrt", ""), installed, details),
        _gpu_refusal(details, gpu),
    ]
    refused = [reason for reason in reasons if reason]
    if refused:
        raise TrtuneError(f"{path} does not run here: {'; '.join(refused)}. Either change that, or "
                          f"{again}")  # fmt: skip
    return path


def _read(folder: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads((folder / ENGINE_JSON).read_text(encoding="utf-8"))
        value["file"], value["size_bytes"], value["file_sha256"], value["versions"].get("tensorrt")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrtuneError(
            f"{folder} holds no built engine ({type(error).__name__}: {error}); build it first"
        ) from error
    return value


def _version_refusal(built: str, installed: str, details: Mapping[str, Any]) -> str:
    """Plans run in the version that built them; version-compatible ones in later ones of its
    major."""
    if built == installed:
        return ""
    compatible = bool(details.get("settings", {}).get("version_compatible"))
    if compatible and built:
        old, new = version_of(built), version_of(installed)
        if old[0] == new[0] and old <= new:
            return ""
    return (
        f"it was built with TensorRT {built or 'of an unknown version'}, and {installed} is "
        f"installed (needed: pip install 'tensorrt=={built}')"
    )


def _gpu_refusal(details: Mapping[str, Any], gpu: DeviceProperties | None) -> str:
    built = details.get("compute_capability", "unknown")
    if gpu is None:
        return f"no usable NVIDIA GPU was found (needed: compute capability {built})"
    if built in ("unknown", gpu.compute_capability):
        name = details.get("gpu", "unknown")
        if name not in ("unknown", gpu.name):
            log.warning(
                "the engine was tuned on %s and runs on %s: slower than one built here",
                name, gpu.name,
            )  # fmt: skip
        return ""
    level = details.get("settings", {}).get("hardware_compatibility", "none")
    here = _capability(gpu.compute_capability)
    if level == "ampere_plus" and here >= (8, 0):
        return ""
    needed = "8.0 or later" if level == "ampere_plus" else built
    return (
        f"it was built for {details.get('gpu', 'a GPU')} of compute capability {built}, and GPU "
        f"{gpu.index} is {gpu.name} of {gpu.compute_capability} (needed: {needed}; "
        "`hardware_compatibility: ampere_plus` builds one for all from 8.0)"
    )


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)
