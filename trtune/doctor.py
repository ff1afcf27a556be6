"""Every backend: usable on this machine or not, why, and what to do about it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from trtune.precision.backends.base import Usable

DEFAULT = "onnxruntime/emulate"
LATER = ("tensorrt_rtx", "tensorrt")
NOT_YET = "this version of trtune does not build with it yet"
MEANWHILE = (
    "take `onnxruntime` with `lowering: emulate`: the same arithmetic, and the Q/DQ model.onnx "
    "that it writes is what TensorRT's own tools build from"
)


def diagnose() -> dict[str, Usable]:
    """Backend name -> whether it works here, why not, what to do, and which version is installed.

    TensorRT is looked for, not imported: that would load its libraries.

    >>> diagnose()["onnxruntime/emulate"].usable
    True
    """
    found = {name: _onnxruntime(name) for name in ("onnxruntime/emulate", "onnxruntime/deploy")}
    gpu = find_gpu()
    return {**found, **{name: _tensorrt(name, gpu) for name in LATER}}


def find_gpu() -> str | None:
    """Name and driver of the first NVIDIA GPU, as nvidia-smi says; None if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    name, _, driver = lines[0].rpartition(",")
    return f"{name.strip()}, driver {driver.strip()}"


def installed_version(module: str) -> str | None:
    """The version of the distribution that brings `module`; '' if unknown, None if not installed.

    >>> installed_version("no_such_module_here")
    """
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in packages_distributions().get(module, [module]):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""


def _onnxruntime(name: str) -> Usable:
    try:
        from trtune.precision.backends.onnxruntime import OnnxruntimeBackend
    except ImportError as error:
        return Usable(
            False,
            f"onnxruntime cannot be imported: {error}",
            "pip install --force-reinstall onnxruntime",
            installed_version("onnxruntime") or "",
        )
    return OnnxruntimeBackend("deploy" if name.endswith("deploy") else "emulate").doctor()


def _tensorrt(name: str, gpu: str | None) -> Usable:
    installed = installed_version(name)
    reasons = [NOT_YET]
    if installed is None:
        reasons.append("it is not installed")
    if gpu is None:
        needs = "it could build here, but not run" if name == "tensorrt_rtx" else "it needs one"
        reasons.append(f"no NVIDIA GPU was found (nvidia-smi lists none): {needs}")
    else:
        reasons.append(f"the GPU is there ({gpu})")
    return Usable(False, "; ".join(reasons), MEANWHILE, installed or "")
