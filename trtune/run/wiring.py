"""From the config's values to what the stages take: data, backends, and the checks of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtune.calibrate.sessions import device_of
from trtune.configs.errors import ConfigError, DataError, did_you_mean
from trtune.configs.progress import Progress
from trtune.configs.runtimes import TensorRT, TensorRTRTX
from trtune.configs.schema import Config
from trtune.configs.sources import DataSet
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    InputSpec,
    batch_size,
    first_batch,
    require_labels,
    take_rows,
)
from trtune.datasets.open import open_section
from trtune.precision.backends.gpu.profiles import Profile, make_profiles
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.file import Model
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.plan import QUANTIZED
from trtune.precision.runtime.api import Backend
from trtune.precision.tune.scales import IMPLICIT
from trtune.run.stage import Need, Stage, flat, versions

if TYPE_CHECKING:
    from trtune.precision.backends.trt.build import Settings

log = logging.getLogger(__name__)

PLAIN = ("arrays", "idx", "npy", "python")
"""Sources that hold numbers, and no pictures to be decoded."""


@dataclass(frozen=True, slots=True)
class RunData:
    """A `data` section and the batches that it describes; `where` is its key path."""

    where: str
    section: DataSet
    source: BatchSource

    @property
    def need(self) -> Need:
        """What is in the batches, for keys: pictures depend on the Pillow that decoded them too."""
        decoded = self.section.source not in PLAIN or self.section.preprocess is not None
        told = self.section.model_dump(mode="json", exclude={"batch", "on_error"})
        return Need([self.source, versions("pillow") if decoded else {}], flat(told, self.where))


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


def data_of(config: Config, model: Model) -> dict[str, RunData]:
    """The data of every section by its name, looked into: see `check_data`."""
    found = {
        name: RunData(f"data.{name}", section, open_section(section, model.inputs))
        for name, section in config.data.sections.items()
    }
    fixed = fixed_batch(model)
    check_data(config, {name: data.source for name, data in found.items()}, fixed_batch=fixed)
    shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
    for data in found.values():
        check_shapes_of(data, model.inputs, shapes, fixed=fixed)
    return found


def left_out(data: RunData) -> Stage[list[str]]:
    """The samples of `data` that cannot be read, where the config says to leave them out."""

    def make(folder: Path) -> list[str]:
        if data.section.on_error == "skip" and data.source.count is None:
            for _ in data.source:  # only a whole pass can tell
                pass
        return sorted(data.source.skipped)

    return Stage(f"left-out-{data.where}", {data.where: data.need}, make)


def fixed_batch(model: Model) -> int | None:
    """The batch size that the model fixes, if it does."""
    return batch_size(model.inputs, 0) or None


def check_shapes_of(
    data: RunData,
    inputs: Sequence[InputSpec],
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    fixed: int | None = None,
) -> None:
    """Raise DataError for a batch of `data` that lies outside `model.shapes`.

    Where every sample has the same shape the first batch tells, and the last if it is short; else
    all are read. Raises ConfigError for shapes that do not fit the model.
    """
    profiles = make_profiles(inputs, shapes) if shapes else {}
    if not profiles:
        return
    first: Batch | None = None
    for batch in data.source:
        first = first or batch
        for name, profile in profiles.items():
            shape = batch.feeds[name].shape
            _check_shape(data.where, name, shape, profile, repr(batch.items[0]))
        if _one_shape(data.section):
            break
    count, size = data.source.count, data.section.batch
    if first is None or fixed is not None or count is None or not 0 < count % size < count:
        return
    last = take_rows(first, [0] * (count % size))
    for name, profile in profiles.items():
        shape = last.feeds[name].shape
        _check_shape(data.where, name, shape, profile, f"what is left of {count} samples")


def _one_shape(section: DataSet) -> bool:
    preprocess = section.preprocess
    sized = preprocess is not None and (
        preprocess.crop is not None
        or isinstance(preprocess.resize, tuple)
        or (preprocess.letterbox is not None and preprocess.letterbox.stride is None)
    )
    return section.source in ("arrays", "idx") or sized


def _check_shape(where: str, name: str, shape: Sequence[int], profile: Profile, item: str) -> None:
    inside = len(shape) == len(profile.min) and all(
        low <= size <= high for low, size, high in zip(profile.min, shape, profile.max, strict=True)
    )
    if not inside:
        raise DataError(
            f"{where}: {item} gives input {name!r} the shape {list(shape)}, outside of "
            f"model.shapes.{name}: min {list(profile.min)}, max {list(profile.max)}; change these, "
            f"or what is fed ({where}.batch, preprocess)"
        )


def check_data(
    config: Config, sources: Mapping[str, BatchSource], *, fixed_batch: int | None = None
) -> None:
    """Read the first batch of every section's source, so that what is wrong shows before long work.

    `fixed_batch` is how many samples the model takes at a time, if it fixes that. Raises DataError
    for empty data, arrays that do not fit the model, too few to fill one batch of calibration, or
    labels that the target needs and that are not there.
    """
    first = first_batch(sources["calibration"], "data.calibration")
    if fixed_batch and len(first) < fixed_batch:
        raise DataError(
            f"data.calibration: the model takes {fixed_batch} samples at a time, and there are "
            f"only {len(first)}; give more, or export the model with a free batch dimension"
        )
    others = {name: source for name, source in sources.items() if name != "calibration"}
    sections, target = config.data.sections, config.precision.target
    for name, source in others.items():
        if sections[name] != sections["calibration"]:
            first_batch(source, f"data.{name}")
        if target is not None and target.needs_labels:
            require_labels(source, target.metric)


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
    }
    half = next((key for key, precision in chosen.items() if precision in HALVES), None)
    for index, backend in enumerate(config.backends):
        if half and backend.name == "onnxruntime" and backend.lowering == "deploy":
            raise ConfigError(
                f"backends.{index}.lowering: deploy runs in int8 and fp32 alone, and {half} is "
                f"{chosen[half]}; use emulate, or fp32 there"
            )
