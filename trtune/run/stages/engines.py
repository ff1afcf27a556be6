"""The engines as stages: one folder each, whose reuse is decided by what was built and by what."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate
from trtune.precision.runtime.engine_json import ENGINE_JSON, read_engine_json
from trtune.run.stage import Form, Kept, Need, Stage, device_needs

if TYPE_CHECKING:
    from trtune.run.subject import Subject

FP32, UNTUNED, TUNED = "fp32", "untuned", "tuned"
INTEGER_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""What decides which integer kernels onnxruntime takes, and whether their sums saturate."""


def label(backend: Backend) -> str:
    """The name of a backend as that of a folder."""
    return backend.name.replace("/", "-")


def engine_folder(run: Path, backend: Backend, below: str = "") -> Path:
    """Where a backend's engine stands; `below` that the untuned one where tuning changed it."""
    return run / label(backend) / below


def is_emulation(backend: Backend) -> bool:
    """Whether the time that the backend's models take says nothing."""
    return isinstance(backend, OnnxruntimeBackend) and backend.lowering == "emulate"


def candidate_of(
    subject: Subject, plan: PrecisionPlan, table: CalibrationTable | None
) -> Candidate:
    """`plan` with the model, and the table if anything in it is int8."""
    return Candidate(subject.model, plan, table if plan.quantized_nodes else None)


def engine_needs(candidate: Candidate, backend: Backend) -> dict[str, Any]:
    """What decides an engine: the candidate, the backend's settings, and what it builds with."""
    return {
        "model": candidate.model,
        "plan": candidate.plan,
        "scales": candidate.table,
        "backend": backend.name,
        "settings": _told(backend),
        **backend.versions,
    }


def _told(backend: Backend) -> Need:
    settings: Mapping[str, Any] = dict(backend.settings)
    return Need(settings, {f"{backend.name}.{name}": value for name, value in settings.items()})


def measured_with(candidate: Candidate, backend: Backend) -> dict[str, Any]:
    """What decides what an engine gives: itself, and where integer kernels differ the processor."""
    needs = engine_needs(candidate, backend)
    if isinstance(backend, OnnxruntimeBackend) and not is_emulation(backend):
        needs["processor"] = cpu_model()
    if isinstance(backend, OnnxruntimeBackend):
        needs |= device_needs(backend.device)
    return needs


def engine_of(
    candidate: Candidate, backend: Backend, below: str, progress: Progress
) -> Stage[BuildInfo]:
    """The engine of `candidate`, in the run's folder for `backend`."""

    def make(run: Path) -> BuildInfo:
        return make_engine(candidate, backend, engine_folder(run, backend, below), progress)

    place = engine_folder(Path(), backend, below)
    name = "-".join(filter(None, ("engine", label(backend), below)))
    return Stage(name, engine_needs(candidate, backend), make, engine_form(place))


def make_engine(
    candidate: Candidate, backend: Backend, folder: Path, progress: Progress
) -> BuildInfo:
    """Build the engine of `candidate` in `folder`."""
    progress(f"build {backend.name}", 0, 1)
    info = backend.build(candidate, folder)
    progress(f"build {backend.name}", 1, 1)
    return info


def engine_form(place: Path) -> Form[BuildInfo]:
    """An engine's folder at `place` below the run's, as its engine.json tells of it."""

    def write(info: BuildInfo, run: Path) -> Kept:
        files = sorted(path for path in (run / place).iterdir() if path.is_file())
        return ENGINE_JSON, tuple((place / path.name).as_posix() for path in files)

    def read(value: Any, run: Path) -> BuildInfo:
        return read_engine_json(run / place)

    return Form(write, read, rooted=True)


@functools.cache
def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor, with the instructions that integer kernels differ by.

    Where the system does not tell it is the architecture alone. Never raises.
    """
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = facts.get("model name") or facts.get("CPU part") or platform.machine()
    known = (facts.get("flags") or facts.get("Features") or "").split()
    return ", ".join([name, *(flag for flag in INTEGER_FLAGS if flag in known)])
