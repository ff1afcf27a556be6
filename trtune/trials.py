"""Which preprocessing a model was trained with: the usual ones tried on FP32, with labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtune.configs.errors import InputError
from trtune.configs.progress import Progress, silent
from trtune.configs.sources import DataSet, source_by_name
from trtune.configs.template import Hints
from trtune.datasets.batches import batch_size
from trtune.datasets.open import open_section, source_on_disk
from trtune.precision.graph.file import Model
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.accuracy import evaluate
from trtune.reports.measures.find import Asked
from trtune.reports.measures.recognise import ModelTask, picture_size, task_of
from trtune.reports.outputs import Layout

log = logging.getLogger(__name__)

PICTURES = 48
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_VALUES: Mapping[str, dict[str, Any]] = {
    "0 to 1": {"scale": 1 / 255},
    "0 to 255": {"scale": 1.0},
    "ImageNet statistics": {"scale": 1 / 255, **_IMAGENET},
    "-1 to 1": {"scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3},
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A preprocessing (keys of `preprocess`), in words, and the FP32 model's value with it."""

    what: str
    preprocess: Mapping[str, Any]
    value: float


def usual(
    task: ModelTask, size: tuple[int, int], layout: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The usual preprocessings of a task for an input of `size`, in words and as keys."""
    for shape, geometry in _geometries(task, size):
        for channels in ("RGB", "BGR"):
            for values, numbers in _VALUES.items():
                yield (
                    f"{shape}, {channels}, {values}",
                    {**geometry, **numbers, "layout": layout, "channels": channels},
                )


def _geometries(task: ModelTask, size: tuple[int, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    height, width = size
    whole = size[0] if height == width else list(size)
    if task.kind == "detection":
        yield "letterbox", {"letterbox": {"size": whole}}
        yield "letterbox top left", {"letterbox": {"size": whole, "place": "top_left"}}
    elif min(size) >= 64:
        yield "short side and crop", {"resize": round(min(size) * 256 / 224), "crop": whole}
    yield "resize", {"resize": [height, width]}


def try_preprocessing(
    model: Model,
    data: DataSet,
    task: ModelTask,
    *,
    pictures: int = PICTURES,
    progress: Progress = silent,
) -> list[Trial]:
    """The usual preprocessings, the best first, by the FP32 model's value of the task's metric.

    On the first `pictures` labelled pictures of `data`. Empty where the input is not a picture of
    fixed size, there are no labels, or none could be measured.
    """
    spec = next((s for s in model.inputs if len(s.shape) == 4), None)
    size = None if spec is None else picture_size(spec.shape)
    if spec is None or size is None or task.kind == "text":
        return []
    layout = "NHWC" if spec.shape[3] in (1, 3) and spec.shape[1] not in (1, 3) else "NCHW"
    if 1 in (spec.shape[1], spec.shape[3]):
        return []
    trials: list[Trial] = []
    options = list(usual(task, size, layout))
    with OrtEngine(lambda: make_session(model.proto, external_dir=model.external_dir)) as engine:
        for number, (what, keys) in enumerate(options):
            plain = data.model_dump(exclude_unset=True)
            section = DataSet.model_validate({**plain, "take": pictures, "preprocess": keys})
            try:
                found = evaluate(
                    engine.infer,
                    open_section(section, model.inputs),
                    metric=task.metric,
                    asked=Asked(output=task.output, decoder=task.decoder),
                    layout=Layout(tuple(model.inputs), tuple(model.outputs)),
                    fixed_batch=batch_size(model.inputs, 0) or None,
                )
            except InputError as error:
                log.info("%s: %s", what, error)
                if not trials and number >= 1:
                    return []
                continue
            value = found.value if found.value is not None else math.nan
            trials.append(Trial(what, keys, -1.0 if math.isnan(value) else value))
            progress("preprocessing", number + 1, len(options))
    return sorted(trials, key=lambda trial: -trial.value)


def hints_for(model: Model, data: Path | None, *, progress: Progress = silent) -> Hints:
    """What a first config can know of a model and, with `data`, of its data.

    Raises DataError if there is nothing at `data`.
    """
    task = task_of(model.inputs, model.outputs)
    hints = Hints()
    if task is not None:
        hints = Hints(task.metric, task.agreement, task.decoder)
    if data is None:
        return hints
    told: str = source_by_name(str(data.resolve()))
    source = source_on_disk(data) if told == "auto" else told
    hints = replace(hints, source=source)
    if source not in ("images", "yolo", "coco"):
        return hints
    section = DataSet.model_validate({"source": source, "path": str(data.resolve())})
    opened = open_section(section, model.inputs)
    count = opened.count or 0
    split = source == "yolo" and data.suffix in (".yaml", ".yml")
    take = max(1, min(256, count // 2))
    hints = replace(hints, take=take, split=split)
    trials = [] if task is None else try_preprocessing(model, section, task, progress=progress)
    if not trials or task is None:
        return hints
    figures = tuple(f"{task.metric} {100 * t.value:.1f} %: {t.what}" for t in trials[:4])
    return replace(hints, labelled=True, preprocess=trials[0].preprocess, tried=figures)
