"""The backends of a run: as the config lists them, those that work here, those that failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtune.calibrate.sessions import device_of
from trtune.configs.errors import ConfigError, TrtuneError, did_you_mean
from trtune.configs.progress import Progress, silent
from trtune.configs.runtimes import Backend as BackendSection
from trtune.configs.runtimes import OnnxRuntime, TensorRT, TensorRTRTX
from trtune.configs.schema import Config
from trtune.datasets.batches import BatchSource
from trtune.datasets.open import open_section
from trtune.precision.backends.gpu.profiles import find_gpu
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.file import Model
from trtune.precision.plan.float8 import FP8, without_float8
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.plan import QUANTIZED
from trtune.precision.runtime.api import Backend
from trtune.precision.tune.scales import IMPLICIT

if TYPE_CHECKING:
    from trtune.precision.backends.rtx.backend import RtxBackend
    from trtune.precision.backends.trt.build import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Absent:
    """A backend of the config that this machine has not, and why."""

    name: str
    reason: str
    remedy: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True)
class Backends:
    """The backends of a config: those that can build here, and the others with their reasons."""

    present: tuple[Backend, ...]
    absent: tuple[Absent, ...]
    lowerings: tuple[str, ...]
    """How the config's backends write a plan, the absent ones too: the table is for all."""

    def chosen(self, name: str | None) -> Backends:
        """Those called `name` (a name or its first part); all of them for None.

        Raises ConfigError, with the nearest name, if there is none.
        """

        def fits(label: str) -> bool:
            return name in (None, label, label.split("/")[0])

        found = replace(
            self,
            present=tuple(b for b in self.present if fits(b.name)),
            absent=tuple(a for a in self.absent if fits(a.name)),
        )
        if not found.present and not found.absent:
            labels = [*(b.name for b in self.present), *(a.name for a in self.absent)]
            raise ConfigError(
                f"--backend {name!r} is none of the config's backends "
                f"({', '.join(labels)}){did_you_mean(str(name), labels)}"
            )
        return found

    def require(self) -> None:
        """Raise ConfigError for one that is absent and required, or if none is present."""
        missing = [absent for absent in self.absent if absent.required]
        if missing:
            raise ConfigError(_refusal(missing, "set `required: false`"))
        if not self.present:
            raise ConfigError(_refusal(self.absent, "add one that does, as {name: onnxruntime}"))


def backends_of(
    config: Config, model: Callable[[], Model], progress: Progress, *, probe: bool = True
) -> Backends:
    """The backends that the config lists; `model` gives the model when data has to be opened.

    With `probe` each is asked whether it works on this machine; without, all count as present.
    Raises ConfigError for settings that one cannot have.
    """
    shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
    batch = config.data.evaluation.batch
    present: list[Backend] = []
    absent: list[Absent] = []
    lowerings = {IMPLICIT}  # what makes the cache complete
    for section in config.backends:
        backend: Backend
        if section.name == "onnxruntime":
            device = device_of(config.runtime.device) if section.lowering == "emulate" else "cpu"
            backend = OnnxruntimeBackend(section.lowering, threads=section.threads, device=device)
        elif section.name == "tensorrt_rtx":
            backend = _rtx(section, shapes, batch)
        else:
            source = partial(_calibration_data, config, model)
            backend = _tensorrt(section, shapes, batch, source, progress)
        lowerings.add(backend.lowering)
        missing = _missing(backend) if probe else None
        if missing is None:
            present.append(backend)
        else:
            absent.append(replace(missing, required=section.required))
    return Backends(tuple(present), tuple(absent), tuple(sorted(lowerings)))


def backend_for(section: BackendSection, shapes: Mapping[str, Any], batch: int) -> Backend:
    """The backend of one section without a config around it: what a node of a cluster builds with.

    TensorRT's own calibrators, which read pictures, do not work with it.
    """
    if isinstance(section, OnnxRuntime):
        return OnnxruntimeBackend(section.lowering, threads=section.threads)
    if isinstance(section, TensorRTRTX):
        return _rtx(section, shapes, batch)
    return _tensorrt(section, shapes, batch, _no_pictures, silent)


def _no_pictures() -> BatchSource:
    raise TrtuneError("this node has no pictures: TensorRT is to take the table's scales here")


def _missing(backend: Backend) -> Absent | None:
    """Why this machine cannot build for `backend`, if it cannot."""
    state = backend.doctor()
    if not state.usable:
        return Absent(backend.name, state.reason, state.remedy)
    targets = getattr(backend, "targets", None)
    if targets is not None:  # neither named nor a GPU here
        try:
            targets()
        except ConfigError as error:
            return Absent(backend.name, str(error))
    return None


def _refusal(absent: Iterable[Absent], otherwise: str) -> str:
    said = [
        f"backend {one.name!r} does not work here: {one.reason}"
        + (f"; {one.remedy}" if one.remedy else "")
        for one in absent
    ]
    return f"{'; '.join(said)}; or take it out of the config, or {otherwise}"


def _calibration_data(config: Config, model: Callable[[], Model]) -> BatchSource:
    return open_section(config.data.calibration, model().inputs)


def _rtx(section: TensorRTRTX, shapes: Mapping[str, Any], batch: int) -> Backend:
    from trtune.precision.backends.rtx.backend import RtxBackend

    return RtxBackend(
        compute_capabilities=section.compute_capabilities,
        workspace=section.workspace,
        optimization_level=section.optimization_level,
        shapes=shapes,
        batch=batch,
        timeout=section.timeout,
        tf32=section.tf32,
    )


def rtx_of(backends: Iterable[Backend]) -> RtxBackend | None:
    """The first of `backends` that is TensorRT-RTX."""
    from trtune.precision.backends.rtx.backend import RtxBackend

    return next((found for found in backends if isinstance(found, RtxBackend)), None)


def _tensorrt(
    section: TensorRT,
    shapes: Mapping[str, Any],
    batch: int,
    source: Callable[[], BatchSource],
    progress: Progress,
) -> Backend:
    from trtune.precision.backends.trt.backend import TensorRTBackend

    settings = tensorrt_settings(section)
    return TensorRTBackend(settings, shapes=shapes, batch=batch, batches=source, progress=progress)


def tensorrt_settings(section: TensorRT) -> Settings:
    """How to build, as the config's `tensorrt` backend says it."""
    from trtune.precision.backends.trt.build import Settings

    return Settings(
        typing=section.typing,
        calibrator=section.calibrator,
        constraints=section.constraints,
        workspace=section.workspace,
        timing_cache=Path(section.timing_cache) if section.timing_cache else None,
        optimization_level=section.optimization_level,
        device=section.device,
        hardware_compatibility=section.hardware_compatibility,
        version_compatible=section.version_compatible,
        tactic_sources=section.tactic_sources,
        dla_core=section.dla_core,
        tf32=section.tf32,
    )


def check_precisions(config: Config) -> None:
    """Raise ConfigError for a backend that cannot run what the config plans."""
    section = config.precision
    chosen = {
        "precision.default": section.default,
        **({"precision.fallback": section.fallback} if section.default in QUANTIZED else {}),
        **{f"precision.pin.{name}": precision for name, precision in section.pin.items()},
        **{f"precision.ladder.{n}": precision for n, precision in enumerate(section.ladder)},
    }
    half = next((key for key, precision in chosen.items() if precision in HALVES), None)
    for index, backend in enumerate(config.backends):
        if half and backend.name == "onnxruntime" and backend.lowering == "deploy":
            raise ConfigError(
                f"backends.{index}.lowering: deploy runs in int8 and fp32 alone, and {half} is "
                f"{chosen[half]}; use emulate, or fp32 there"
            )
        planned = [k for k in chosen if chosen[k] == FP8 and not k.startswith("precision.ladder")]
        reason = no_float8(backend) if planned else ""
        if reason:
            raise ConfigError(f"backends.{index}: {planned[0]} is fp8, and {reason}")


def no_float8(backend: BackendSection) -> str:
    """Why the runtime of a `backends` section takes no FP8, in words; empty if it does.

    onnxruntime takes it everywhere: its emulation computes it, and deploy keeps such nodes float.
    """
    if isinstance(backend, TensorRT) and backend.typing == "weak":
        return (
            "TensorRT's weak typing has no FP8: its flag alone quantizes nothing, and calibration "
            "is for INT8; use typing: strong, or auto"
        )
    targets: Sequence[str] = ()
    if isinstance(backend, TensorRTRTX):
        targets = backend.compute_capabilities
    if not targets and not isinstance(backend, OnnxRuntime):
        gpu = find_gpu()
        targets = (gpu.compute_capability,) if gpu is not None else ()
    lacking = without_float8(targets)
    if not lacking:
        return ""
    return f"GPUs of compute capability {', '.join(lacking)} do not multiply it (8.9 and up do)"


class BackendFailed(Exception):
    """A backend that is there could not build or run; its own error is the cause."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.backend = backend


@contextmanager
def watched(backend: Backend) -> Iterator[None]:
    """Any error in the block as that of `backend`: the others go on."""
    try:
        yield
    except BackendFailed:
        raise
    except Exception as error:  # a runtime may raise anything, and the others go on
        if not isinstance(error, TrtuneError):
            log.exception("%s failed", backend.name)
        raise BackendFailed(backend.name) from error


@dataclass(frozen=True, slots=True)
class Runtimes:
    """The backends of a run while it goes on; `failed` maps those that did to their error.

    `device` is where onnxruntime runs.
    """

    present: tuple[Backend, ...]
    device: str = "cpu"
    failed: dict[str, BaseException] = field(default_factory=dict)

    @property
    def alive(self) -> list[Backend]:
        """Those that have not failed."""
        return [backend for backend in self.present if backend.name not in self.failed]

    @property
    def judges(self) -> list[Backend]:
        """Those of them that plans are measured on: that run here.

        If none does, onnxruntime's emulation of their arithmetic.
        """
        running = [backend for backend in self.alive if not backend.obstacle()]
        return running or [OnnxruntimeBackend("emulate", device=self.device)]

    @property
    def engines(self) -> list[Backend]:
        """The judges that are not onnxruntime."""
        return [b for b in self.judges if not isinstance(b, OnnxruntimeBackend)]

    def fail(self, failure: BackendFailed) -> None:
        """Go on without a backend; raises its error if no other is left."""
        error = failure.__cause__
        assert error is not None
        self.failed[failure.backend] = error
        log.error("%s failed and is left out: %s", failure.backend, error)
        if not self.alive:
            raise error
