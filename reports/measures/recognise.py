"""What a model is for, by the shapes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtune.datasets.batches import InputSpec, is_free
from trtune.reports.measures.decoders import recognise


@dataclass(frozen=True, slots=True)
class ModelTask:
    """classification, detection, segmentation or text; with its metric, and a detector's decoder.

    `classes` is the number of classes (or tokens) where the shapes tell; `output` the one scored.
    """

    kind: str
    metric: str
    agreement: str
    decoder: str | None = None
    classes: int | None = None
    output: str | None = None


def task_of(inputs: Sequence[InputSpec], outputs: Sequence[InputSpec]) -> ModelTask | None:
    """The task that the shapes tell, or None.

    A detector by `recognise`; scores N x C x H x W behind a picture segment it; N x C are classes;
    N x T x V behind whole numbers are tokens.
    """
    shapes = {spec.name: spec.shape for spec in outputs}
    picture = next((s for s in inputs if len(s.shape) == 4 and _channels(s.shape)), None)
    if picture is not None:
        size = picture_size(picture.shape)
        decoder = recognise(shapes, size)
        if decoder is not None:
            classes = _detected(decoder, shapes)
            return ModelTask("detection", "ap", "detection_agreement", decoder, classes)
    for spec in outputs:
        found = _by_output(spec, picture, inputs)
        if found is not None:
            return found
    return None


def picture_size(shape: Sequence[int | str | None]) -> tuple[int, int] | None:
    """(height, width) of a picture input where both are fixed."""
    sides = shape[1:3] if shape[3] in (1, 3) and shape[1] not in (1, 3) else shape[2:4]
    height, width = sides
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        return height, width
    return None


def _channels(shape: Sequence[int | str | None]) -> bool:
    return shape[1] in (1, 3) or shape[3] in (1, 3)


def _by_output(
    spec: InputSpec, picture: InputSpec | None, inputs: Sequence[InputSpec]
) -> ModelTask | None:
    inner = [dim for dim in spec.shape[1:] if dim != 1]
    if "float" in spec.dtype and len(inner) == 1 and not is_free(inner[0]) and picture is not None:
        return ModelTask("classification", "top1", "agreement", None, _int(inner[0]), spec.name)
    if picture is not None and len(spec.shape) == 4 and not is_free(spec.shape[1]):
        return ModelTask(
            "segmentation", "miou", "pixel_agreement", None, _int(spec.shape[1]), spec.name
        )
    tokens = any("int" in s.dtype and len(s.shape) == 2 for s in inputs)
    if tokens and len(spec.shape) == 3 and "float" in spec.dtype and not is_free(spec.shape[2]):
        return ModelTask(
            "text", "perplexity", "token_agreement", None, _int(spec.shape[2]), spec.name
        )
    return None


def _int(dim: int | str | None) -> int | None:
    return dim if isinstance(dim, int) else None


def _detected(decoder: str, shapes: Mapping[str, Sequence[int | str | None]]) -> int | None:
    """Classes of a dense detector, from the number of columns."""
    last = [s for s in shapes.values() if len(s) == 3]
    if decoder in ("yolox", "yolov5") and len(last) == 1 and isinstance(last[0][2], int):
        return last[0][2] - 5
    if decoder == "yolov8" and isinstance(last[0][1], int):
        return last[0][1] - 4
    return None
