"""From the config's values to what the stages take: data sources, backends, checks of the two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trtune.configs.errors import ConfigError, DataError
from trtune.configs.progress import Progress
from trtune.configs.runtimes import TensorRT, TensorRTRTX
from trtune.configs.schema import Config
from trtune.configs.sources import DataSet
from trtune.configs.sources import Preprocess as PreprocessSection
from trtune.datasets import open_source
from trtune.datasets.batches import Batch, BatchSource, require_labels, take_rows
from trtune.datasets.labels import Shifted
from trtune.datasets.preprocess import Preprocess
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.file import Model
from trtune.precision.plan.half_types import HALVES
from trtune.precision.runtime.api import Backend

log = logging.getLogger(__name__)


def open_data(data: DataSet, model: Model) -> BatchSource:
    """The batches that a `data` section describes, for the inputs of `model`."""
    source = open_source(
        data.source,
        data.path,
        inputs=model.inputs,
        preprocess=_preprocess(data.preprocess),
        labels=data.labels,
        take=data.take,
        skip=data.skip,
        sample=data.sample,
        seed=data.seed,
        batch=data.batch,
        on_error=data.on_error,
        input_names=data.inputs,
        args=data.args,
    )
    return Shifted(source, data.label_offset) if data.label_offset else source


def _preprocess(section: PreprocessSection | None) -> Preprocess | None:
    if section is None:
        return None
    dumped = section.model_dump()
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in dumped.items()}
    return Preprocess(**values)


def first_batch(source: BatchSource, where: str) -> Batch:
    """The first batch; DataError if there is none."""
    batch = next(iter(source), None)
    if batch is None or not len(batch):
        raise DataError(f"{where}: the data is empty; check path, take and skip")
    return batch


def check_data(
    config: Config,
    calibration: BatchSource,
    evaluation: BatchSource,
    *,
    fixed_batch: int | None = None,
) -> None:
    """Read the first batch of both sources, so that what is wrong shows before long work.

    `fixed_batch` is how many samples the model takes at a time, if it fixes that. Raises DataError
    for empty data, arrays that do not fit the model, too few to fill one batch of calibration, or
    labels that the target needs and that are not there.
    """
    first = first_batch(calibration, "data.calibration")
    if fixed_batch and len(first) < fixed_batch:
        raise DataError(
            f"data.calibration: the model takes {fixed_batch} samples at a time, and there are "
            f"only {len(first)}; give more, or export the model with a free batch dimension"
        )
    if config.data.evaluation != config.data.calibration:
        first_batch(evaluation, "data.evaluation")
    target = config.precision.target
    if target is not None and target.needs_labels:
        require_labels(evaluation, target.metric)


def backends_of(config: Config, model: Callable[[], Model], progress: Progress) -> list[Backend]:
    """The backends that the config lists; `model` gives the model when data has to be opened.

    Raises ConfigError for settings that one cannot have. Whether it works here: `require_usable`.
    """
    shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
    backends: list[Backend] = []
    for section in config.backends:
        backend: Backend
        if section.name == "onnxruntime":
            backend = OnnxruntimeBackend(section.lowering, threads=section.threads)
        elif section.name == "tensorrt_rtx":
            backend = _rtx(section, shapes, config.data.evaluation.batch)
        else:
            source = partial(_calibration_data, config, model)
            backend = _tensorrt(section, shapes, config.data.evaluation.batch, source, progress)
        backends.append(backend)
    return backends


def require_usable(backends: Iterable[Backend]) -> None:
    """Raise ConfigError for a backend that cannot build on this machine, with what to do."""
    for backend in backends:
        state = backend.doctor()
        if not state.usable:
            remedy = f"{state.remedy}, or take" if state.remedy else "take"
            raise ConfigError(
                f"backend {backend.name!r} does not work here: {state.reason}; {remedy} it out of "
                "the config"
            )


def _calibration_data(config: Config, model: Callable[[], Model]) -> BatchSource:
    return open_data(config.data.calibration, model())


def _rtx(section: TensorRTRTX, shapes: Mapping[str, Any], batch: int) -> Backend:
    from trtune.precision.backends.rtx.backend import RtxBackend

    backend = RtxBackend(
        compute_capabilities=section.compute_capabilities,
        workspace=section.workspace,
        optimization_level=section.optimization_level,
        shapes=shapes,
        batch=batch,
        timeout=section.timeout,
        tf32=section.tf32,
    )
    backend.targets()  # neither named nor a GPU here: say so now
    return backend


def _tensorrt(
    section: TensorRT,
    shapes: Mapping[str, Any],
    batch: int,
    source: Callable[[], BatchSource],
    progress: Progress,
) -> Backend:
    from trtune.precision.backends.trt.backend import TensorRTBackend
    from trtune.precision.backends.trt.build import Settings

    settings = Settings(
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
    return TensorRTBackend(settings, shapes=shapes, batch=batch, batches=source, progress=progress)


def check_precisions(config: Config) -> None:
    """Raise ConfigError for a backend that cannot run what the config plans."""
    section = config.precision
    chosen = {
        "precision.default": section.default,
        **({"precision.fallback": section.fallback} if section.default == "int8" else {}),
        **{f"precision.pin.{name}": precision for name, precision in section.pin.items()},
    }
    half = next((key for key, precision in chosen.items() if precision in HALVES), None)
    for index, backend in enumerate(config.backends):
        if half and backend.name == "onnxruntime" and backend.lowering == "deploy":
            raise ConfigError(
                f"backends.{index}.lowering: deploy runs in int8 and fp32 alone, and {half} is "
                f"{chosen[half]}; use emulate, or fp32 there"
            )


def repeat_to(batch: Batch, size: int) -> dict[str, Any]:
    """Feeds of exactly `size` samples, those of `batch` again and again."""
    rows = (np.arange(size) % len(batch)).tolist()
    feeds = take_rows(batch, rows).feeds
    return {name: np.ascontiguousarray(array) for name, array in feeds.items()}
