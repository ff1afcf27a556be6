"""Which preprocessing a model was trained with: the usual ones tried on FP32, with labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtune.configs.errors import InputError
from trtune.configs.progress import Progress, silent
from trtune.configs.sources import DataSet, source_by_name
from trtune.configs.template import Hints
from trtune.datasets.batches import batch_size
from trtune.datasets.open import open_section, source_on_disk
from trtune.datasets.pictures.detection import YAMLS, described_by
from trtune.precision.graph.file import Model
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.accuracy import evaluate
from trtune.reports.measures.find import Asked
from trtune.reports.measures.recognise import ModelTask, picture_size, task_of
from trtune.reports.outputs import Layout

log = logging.getLogger(__name__)

PICTURES = 48
SEEN = 0.05
"""AP below which a detector with another preprocessing or counting may have found nothing."""
COUNTINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"categories": "ids"},
    {"categories": "ids", "label_offset": -1},
)
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_VALUES: Mapping[str, dict[str, Any]] = {
    "0 to 1": {"scale": 1 / 255},
    "0 to 255": {"scale": 1.0},
    "ImageNet statistics": {"scale": 1 / 255, **_IMAGENET},
    "-1 to 1": {"scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3},
}


PUBLISHED: Mapping[str, str] = {
    "yolox": "letterbox top left, BGR, 0 to 255",
    "yolov5": "letterbox, RGB, 0 to 1",
    "yolov8": "letterbox, RGB, 0 to 1",
}
"""What a decoder's family is published with."""
NOISE = 0.015
"""As much AP as another preprocessing may have by the luck of so few pictures."""


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
    """The usual preprocessings, the best first, by the FP32 model's value of the task's metric; see
    `published_first`.

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
    pictures = min(pictures, open_section(data, model.inputs).count or pictures)
    with OrtEngine(lambda: make_session(model.proto, external_dir=model.external_dir)) as engine:
        for number, (what, keys) in enumerate(options):
            plain = data.model_dump(exclude_unset=True)
            section = DataSet.model_validate({**plain, "take": pictures, "preprocess": keys})
            try:
                value = _value(engine, model, section, task)
            except InputError as error:
                log.info("%s: %s", what, error)
                if not trials and number >= 1:
                    return []
                continue
            trials.append(Trial(what, keys, value))
            progress("preprocessing", number + 1, len(options))
    return published_first(sorted(trials, key=lambda trial: -trial.value), task.decoder)


def published_first(trials: list[Trial], decoder: str | None) -> list[Trial]:
    """`trials`, the best first, with what the decoder's family is published with in front where
    it is as good but for noise."""
    own = next((t for t in trials if t.what == PUBLISHED.get(decoder or "")), None)
    if own is None or own.value < trials[0].value - NOISE:
        return trials
    return [own, *(t for t in trials if t is not own)]


def _value(engine: OrtEngine, model: Model, section: DataSet, task: ModelTask) -> float:
    """The task's metric of the FP32 model; -1 where it has no value."""
    found = evaluate(
        engine.infer,
        open_section(section, model.inputs),
        metric=task.metric,
        asked=Asked(output=task.output, decoder=task.decoder),
        layout=Layout(tuple(model.inputs), tuple(model.outputs)),
        fixed_batch=batch_size(model.inputs, 0) or None,
    )
    return -1.0 if found.value is None or math.isnan(found.value) else found.value


def try_counting(
    model: Model,
    data: DataSet,
    task: ModelTask,
    trials: list[Trial],
    *,
    progress: Progress = silent,
) -> tuple[list[Trial], Mapping[str, Any]]:
    """How a detector counts COCO's categories: the trials so, and keys of `data` (none: in order).

    By the figures again: detectors with 91 classes have the ids themselves as classes, with or
    without one for the background. Where nothing was found in order, every preprocessing is tried
    with the ids.
    """

    plain = data.model_dump(exclude_unset=True)
    most = min(PICTURES, open_section(data, model.inputs).count or PICTURES)

    def counted(keys: Mapping[str, Any], **more: Any) -> DataSet:
        return DataSet.model_validate({**plain, "take": most, **keys, **more})

    if trials[0].value < SEEN:
        again = try_preprocessing(model, counted(COUNTINGS[1]), task, progress=progress)
        trials = max(trials, again, key=lambda found: found[0].value if found else -1.0)
    best = trials[0]
    values = []
    with OrtEngine(lambda: make_session(model.proto, external_dir=model.external_dir)) as engine:
        for keys in COUNTINGS:
            section = counted(keys, preprocess=best.preprocess)
            values.append(_value(engine, model, section, task))
    place = max(range(len(values)), key=lambda k: (values[k], -k))
    return [replace(best, value=values[place]), *trials[1:]], COUNTINGS[place]


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
    data = data if _is_pair(data) else described_by(data) or data
    told: str = source_by_name(str(data.resolve()))
    source = source_on_disk(data) if told == "auto" else told
    if source == "images" and task is not None and task.kind == "detection":
        source = "yolo"  # its folders and lists, with the boxes beside them
    hints = replace(hints, source=source, path=data)
    if source not in ("images", "yolo", "coco"):
        return hints
    split = source == "yolo" and data.suffix.casefold() in YAMLS
    keys: dict[str, Any] = {"source": source, "path": str(data.resolve())}
    hints = replace(hints, split=split)
    section = DataSet.model_validate(keys)
    part = DataSet.model_validate({**keys, "split": "train"}) if split else section
    count = open_section(part, model.inputs).count or 0
    with _once_said():
        return _tried(model, section, task, hints, count, progress)


@contextmanager
def _once_said() -> Iterator[None]:
    """Keeps what is said of the data from being said again with every trial."""
    logger = logging.getLogger("trtune.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tried(
    model: Model,
    section: DataSet,
    task: ModelTask | None,
    hints: Hints,
    count: int,
    progress: Progress,
) -> Hints:
    """`hints` with what the trials on the `count` pictures of `section` say."""
    split = hints.split
    take = max(1, min(256, count if split else count // 2))
    hints = replace(hints, take=take, pictures=count)
    trials = [] if task is None else try_preprocessing(model, section, task, progress=progress)
    if not trials or task is None:
        return hints
    if section.source == "coco" and task.kind == "detection":
        trials, counting = try_counting(model, section, task, trials, progress=progress)
        hints = replace(hints, counting=counting)
    figures = tuple(f"{task.metric} {100 * t.value:.1f} %: {t.what}" for t in trials[:4])
    return replace(hints, labelled=True, preprocess=trials[0].preprocess, tried=figures)


def _is_pair(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()
