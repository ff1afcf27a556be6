"""Every backend: usable on this machine or not, why, and what to do about it."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from trtune.precision.backends.base import Usable
from trtune.precision.backends.rtx import RtxBackend
from trtune.precision.backends.tensorrt import TensorRTBackend

DEFAULT = "onnxruntime/emulate"


def diagnose() -> dict[str, Usable]:
    """Backend name -> whether it works here, why not, what to do, and which version is installed.

    TensorRT-RTX is imported in a process of its own: that loads its libraries.

    >>> diagnose()["onnxruntime/emulate"].usable
    True
    """
    found = {name: _onnxruntime(name) for name in ("onnxruntime/emulate", "onnxruntime/deploy")}
    return {
        **found,
        "tensorrt_rtx": RtxBackend().doctor(),
        "tensorrt": TensorRTBackend().doctor(),
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
