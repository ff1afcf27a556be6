"""From the config's values to what the stages take: data sources, backends, checks of the two."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from trtune.configs.errors import ConfigError, DataError
from trtune.configs.schema import Config
from trtune.configs.sources import DataSet
from trtune.configs.sources import Preprocess as PreprocessSection
from trtune.datasets import open_source
from trtune.datasets.batches import Batch, BatchSource, require_labels
from trtune.datasets.preprocess import Preprocess
from trtune.precision.backends.onnxruntime import OnnxruntimeBackend
from trtune.precision.model import Model

log = logging.getLogger(__name__)


def open_data(data: DataSet, model: Model) -> BatchSource:
    """The batches that a `data` section describes, for the inputs of `model`."""
    return open_source(
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


def backends_of(config: Config) -> list[OnnxruntimeBackend]:
    """The backends that the config lists.

    Raises ConfigError for what this version cannot do, before anything is computed.
    """
    backends = []
    for index, section in enumerate(config.backends):
        if section.name != "onnxruntime":
            raise ConfigError(
                f"backends.{index}.name: {section.name!r} is not available in this version of "
                "trtune, which runs onnxruntime (lowerings emulate and deploy). The emulate model "
                "is explicit Q/DQ as TensorRT reads it: build it with trtexec --onnx=model.onnx "
                "--stronglyTyped, and take this backend out of the config"
            )
        backends.append(OnnxruntimeBackend(section.lowering, threads=section.threads))
    return backends


def check_precisions(config: Config) -> None:
    """Raise ConfigError for precisions that this version cannot lower."""
    chosen: dict[str, Any] = {
        "precision.default": config.precision.default,
        "precision.fallback": config.precision.fallback,
        **{f"precision.pin.{name}": p for name, p in config.precision.pin.items()},
    }
    for key, precision in chosen.items():
        if precision not in ("int8", "fp32"):
            raise ConfigError(
                f"{key}: {precision!r} is not available in this version of trtune; use int8 or fp32"
            )


def repeat_to(batch: Batch, size: int) -> dict[str, Any]:
    """Feeds of exactly `size` samples, those of `batch` again and again."""
    rows = np.arange(size) % len(batch)
    return {name: np.ascontiguousarray(array[rows]) for name, array in batch.feeds.items()}
