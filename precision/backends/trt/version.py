"""Which TensorRT is installed, and what becomes of the wishes that it cannot meet."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtune.calibrate.calibrators import version_of
from trtune.configs.errors import ConfigError, TrtuneError
from trtune.precision.backends.trt.build import Settings
from trtune.precision.backends.trt.engine_file import Cuda
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.runtime.api import Candidate, Usable

MAJORS = (10, 11)
INSTALL_TENSORRT = (
    "pip install 'trtune[trt10]' for TensorRT 10.x (calibrators, OBEY), or "
    "pip install 'trtune[trt11]' for 11.x; backend onnxruntime runs without either"
)


SYSTEM_FOLDERS = ("python3/dist-packages", f"python3.{sys.version_info.minor}/dist-packages")
"""Where Debian's packages of TensorRT, and so JetPack, put its Python module, below /usr/lib."""


def remedy_for_absent(root: Path = Path("/usr/lib")) -> str:
    """What to do where `tensorrt` cannot be imported: the system may have it, as on a Jetson."""
    found = [root / folder / "tensorrt" for folder in SYSTEM_FOLDERS]
    seen = next((place for place in found if (place / "__init__.py").is_file()), None)
    if seen is None or str(seen.parent) in sys.path:
        return INSTALL_TENSORRT
    return (
        f"the system has it in {seen}, which this environment does not see: make the environment "
        f"with `python3 -m venv --system-site-packages`; or {INSTALL_TENSORRT}"
    )


def load_tensorrt() -> Any:
    """The `tensorrt` module; the only place that imports it.

    Raises TrtuneError with the pip command if it is not there, or is neither 10.x nor 11.x.
    """
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise TrtuneError(
            f"backend 'tensorrt' needs TensorRT, and it cannot be imported ({error}): "
            f"{remedy_for_absent()}"
        ) from error
    found = str(getattr(module, "__version__", "of an unknown version"))
    if not found.split(".")[0].isdigit() or version_of(found)[0] not in MAJORS:
        raise TrtuneError(f"TensorRT {found} is installed, and trtune builds with 10.x or 11.x: "
                          f"{INSTALL_TENSORRT}")  # fmt: skip
    return module


def strong_because(candidate: Candidate) -> str:
    """Why weak typing cannot say what `candidate` says; empty if it can."""
    if any(node.op_type == "QuantizeLinear" for node in candidate.model.proto.graph.node):
        return "the model carries Q/DQ"
    table = candidate.table
    if isinstance(candidate.plan, ImportedPlan) or (table is not None and table.weights):
        return "the plan comes from a quantized model, which says itself what is read quantized"
    if candidate.plan.fp8_nodes:
        return (
            f"{_counted(len(candidate.plan.fp8_nodes), 'node')} of the plan run in FP8, which "
            "TensorRT takes from Q/DQ alone"
        )
    return ""


def is_weak(trt: Any, settings: Settings, candidate: Candidate) -> bool:
    """Whether to build weakly typed: where that exists, unless settings or candidate say no.

    Raises ConfigError if weak typing was asked for by name and cannot say what is wanted.
    """
    if settings.typing == "strong" or not hasattr(trt.BuilderFlag, "INT8"):
        return False
    reason = strong_because(candidate)
    if reason and settings.typing == "weak":
        raise ConfigError(
            f"backends.tensorrt.typing: weak: {reason}; TensorRT's calibration and INT8 flag know "
            "nothing of that. Use typing: strong"
        )
    return not reason


def carried_over(
    trt: Any, settings: Settings, candidate: Candidate, *, weakly: bool
) -> tuple[str, ...]:
    """What only weak typing has and what it became, one sentence each.

    Nothing if the build is `weakly` typed, or strong typing was asked for by name.
    """
    if weakly or settings.typing == "strong":
        return ()
    notes = []
    if hasattr(trt.BuilderFlag, "INT8"):
        notes.append(f"{strong_because(candidate)}: it is built strongly typed")
    elif settings.typing == "weak":
        notes.append(
            f"TensorRT {trt.__version__} has no weak typing: the plan is written as Q/DQ and casts "
            "in the model"
        )
    if settings.calibrator != "table":
        notes.append(
            f"strong typing has no calibrators: instead of {settings.calibrator} the scales of our "
            "calibration table are written as Q/DQ"
        )
    pinned = candidate.plan.pinned
    if pinned:
        notes.append(
            "strong typing has no precision constraints: the pins of "
            f"{_counted(len(pinned), 'node')} are missing Q/DQ, and casts to their precision"
        )
    return tuple(notes)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def diagnose_tensorrt(load_module: Callable[[], Any], cuda: Cuda, device: int) -> Usable:
    """Whether TensorRT 10.x or 11.x works here with GPU `device`, what it can do, what is missing.

    Never raises a TrtuneError.
    """
    try:
        trt = load_module()
    except TrtuneError as error:
        remedy = remedy_for_absent()
        for known in (remedy, INSTALL_TENSORRT):
            if str(error).endswith(f": {known}"):
                return Usable(False, str(error).removesuffix(f": {known}"), known)
        return Usable(False, str(error), remedy)
    found = str(trt.__version__)
    try:
        gpu = cuda.properties(device)
    except TrtuneError as error:
        remedy = "a machine with an NVIDIA GPU, its driver and cuda-python"
        return Usable(False, f"GPU {device}: {error}", remedy, found)
    has = f"{gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver}"
    if hasattr(trt.BuilderFlag, "INT8"):
        return Usable(True, f"{has}; weak typing (calibrators, constraints) and strong", "", found)
    carried = "what needs weak typing (calibrators, constraints) is written as Q/DQ and casts"
    return Usable(True, f"{has}; strong typing only: {carried}", "", found)
