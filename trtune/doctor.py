"""Every backend and device: usable on this machine or not, why, and what to do about it."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.trt.backend import TensorRTBackend
from trtune.precision.runtime.api import Usable

DEFAULT_BACKEND = "onnxruntime/emulate"
DEVICE = "device cuda"
"""What the first GPU as the device of all onnxruntime sessions is called here."""


def diagnose() -> dict[str, Usable]:
    """Backend name -> whether it works here, why not, what to do, and which version is installed.

    Behind the backends stands `DEVICE`: whether networks can run on a GPU.

    TensorRT-RTX is imported in a process of its own: that loads its libraries.

    >>> diagnose()["onnxruntime/emulate"].usable
    True
    """
    found = {name: _onnxruntime(name) for name in ("onnxruntime/emulate", "onnxruntime/deploy")}
    return {
        **found,
        "tensorrt_rtx": RtxBackend().doctor(),
        "tensorrt": TensorRTBackend().doctor(),
        DEVICE: _cuda(),
    }


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


def _cuda() -> Usable:
    try:
        from trtune.calibrate.sessions import gpu_name, gpu_obstacle
    except ImportError as error:
        return Usable(False, f"onnxruntime cannot be imported: {error}")
    obstacle = gpu_obstacle(0)
    version = installed_version("onnxruntime") or ""
    if obstacle is not None:
        return Usable(False, obstacle.reason, obstacle.remedy, version)
    return Usable(True, gpu_name("cuda:0"), version=version)


def _onnxruntime(name: str) -> Usable:
    try:
        from trtune.precision.backends.ort.backend import OnnxruntimeBackend
    except ImportError as error:
        return Usable(
            False,
            f"onnxruntime cannot be imported: {error}",
            "pip install --force-reinstall onnxruntime",
            installed_version("onnxruntime") or "",
        )
    return OnnxruntimeBackend("deploy" if name.endswith("deploy") else "emulate").doctor()
