"""What TensorRT-RTX is there, which GPUs it knows, and why an engine cannot run on one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from trtune.precision.backends.gpu.profiles import Gpu, Profile

NAME = "tensorrt_rtx"
DISTRIBUTION = "tensorrt-rtx"
REMEDY = "pip install 'trtune[rtx]'"
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 builds for, and runs on."""
WITHOUT_INT8 = ("7.5",)
"""For these it compiles no INT8: with one of them in an engine, all of it is float, silently."""

FLOAT_ONLY = ("ConvTranspose",)
"""Operators that it computes in float whatever scales stand around them."""


def unsupported(found: str) -> str:
    """That compute capability `found` is not supported, in words."""
    known = ", ".join(COMPUTE_CAPABILITIES)
    return f"compute capability {found} is not supported by TensorRT-RTX (it has {known})"


def rtx_version() -> str | None:
    """The version of TensorRT-RTX that is installed; None if it is not."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def cuda_version() -> str | None:
    """The major version of CUDA that the installed TensorRT-RTX is made for."""
    for number in ("13", "12"):
        try:
            version(f"tensorrt_rtx_cu{number}")
        except PackageNotFoundError:
            continue
        return number
    return None


def why_not(gpu: Gpu | None, targets: Sequence[str]) -> str:
    """Why an engine for `targets` cannot run on `gpu`; empty if it can."""
    if gpu is None:
        return "no NVIDIA GPU was found (nvidia-smi lists none)"
    if gpu.compute_capability not in COMPUTE_CAPABILITIES:
        return f"{unsupported(gpu.compute_capability)}: this is {gpu}"
    if gpu.compute_capability not in targets:
        return (
            f"it was built for compute capability {', '.join(targets)}, and this is {gpu}; "
            f'add "{gpu.compute_capability}" to compute_capabilities and build again'
        )
    return ""


def build_command(
    model: str,
    plan: str,
    targets: Sequence[str],
    profiles: Mapping[str, Profile],
    *,
    workspace: int | None = None,
    optimization_level: int | None = None,
    tf32: bool = False,
) -> str:
    """The line for a shell that builds the same with NVIDIA's own tool.

    >>> build_command("m.onnx", "e.plan", ["8.9"], {}, tf32=True)
    'tensorrt_rtx --onnx=m.onnx --saveEngine=e.plan --computeCapabilities=89 --skipInference'
    """
    words = [
        "tensorrt_rtx",
        f"--onnx={model}",
        f"--saveEngine={plan}",
        f"--computeCapabilities={','.join(found.replace('.', '') for found in targets)}",
        "--skipInference",
    ]
    for word in ("min", "opt", "max") if profiles else ():
        shapes = ((name, "x".join(map(str, p.to_json()[word]))) for name, p in profiles.items())
        words.append(f"--{word}Shapes=" + ",".join(f"{name}:{shape}" for name, shape in shapes))
    if workspace is not None:
        words.append(f"--memPoolSize=workspace:{workspace / (1 << 20):g}M")
    if optimization_level is not None:
        words.append(f"--builderOptimizationLevel={optimization_level}")
    if not tf32:
        words.append("--noTF32")
    return shlex.join(words)
