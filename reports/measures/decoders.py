"""What a detector's tensors mean: by family, from the outputs to detections in each picture.

Each decoder is a plain function; `DECODERS` has them by name, and `recognise` says which fits the
shapes of a model's outputs. Published layouts they follow: YOLOX (`YOLOXHead.decode_outputs`,
`postprocess`), YOLOv5 and v7 (`non_max_suppression`), YOLOv8, v9 and 11 (`Detect`), YOLOv10 and 26
(rows after their own NMS), torchvision's and TensorFlow's SSD, DETR and RT-DETR.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from trtune.configs.errors import ModelError, did_you_mean
from trtune.reports.measures.base import Array, Outputs, as_array, shapes_of
from trtune.reports.measures.boxes import Detections, from_centres, suppress

Shapes: TypeAlias = Mapping[str, Sequence[int | str | None]]
_STRIDES = (8, 16, 32)
_MOST_BEFORE_NMS = 30_000


@dataclass(frozen=True, slots=True)
class Decoding:
    """How detections are read: size (height, width) of the input, and the usual thresholds.

    score: the lowest score that counts; iou: what suppression allows two boxes of a class to
    overlap; most: detections a picture.
    """

    size: tuple[int, int]
    score: float = 0.01
    iou: float = 0.65
    most: int = 300


Decoder: TypeAlias = Callable[[Outputs, Decoding], list[Detections]]


def yolox(outputs: Outputs, how: Decoding) -> list[Detections]:
    """One output N x A x (5 + C): offsets in cells of strides 8, 16, 32, objectness and classes.

    Every class whose score times objectness is above the threshold counts.
    """
    rows = _only(outputs, 3)
    grid, stride = _cells(how.size, rows.shape[1])
    boxes = np.concatenate(
        [(rows[..., :2] + grid) * stride, np.exp(np.minimum(rows[..., 2:4], 20)) * stride], axis=-1
    )
    scores = rows[..., 4:5] * rows[..., 5:]
    return _dense(from_centres(boxes), scores, how, several=True)


def yolov5(outputs: Outputs, how: Decoding) -> list[Detections]:
    """One output N x A x (5 + C): centre and size in pixels, objectness and classes.

    Every class above the threshold counts, as in Ultralytics' validation.
    """
    rows = _only(outputs, 3)
    return _dense(from_centres(rows[..., :4]), rows[..., 4:5] * rows[..., 5:], how, several=True)


def yolov8(outputs: Outputs, how: Decoding) -> list[Detections]:
    """One output N x (4 + C) x A: centre and size in pixels, and classes without objectness."""
    rows = _only(outputs, 3)
    rows = np.swapaxes(rows, 1, 2)
    return _dense(from_centres(rows[..., :4]), rows[..., 4:], how, several=True)


def ssd(outputs: Outputs, how: Decoding) -> list[Detections]:
    """Boxes N x A x 4 (corners, 0 to 1 or pixels) and scores N x A x C, class 0 the background.

    Scores that are no probabilities go through a softmax.
    """
    boxes, scores = _boxes_and(outputs, 3)
    if scores.min() < 0 or scores.max() > 1:
        scores = _softmax(scores)
    return _dense(_in_pixels(boxes, how), scores[..., 1:], how, several=True)


def detr(outputs: Outputs, how: Decoding) -> list[Detections]:
    """Boxes N x Q x 4 (centre and size, 0 to 1) and logits N x Q x C.

    A softmax with the last class for nothing (DETR) where there are 100 queries or fewer, else a
    sigmoid a class (Deformable DETR, RT-DETR); scores from 0 to 1 stay. No suppression.
    """
    boxes, logits = _boxes_and(outputs, 3)
    if logits.min() >= 0 and logits.max() <= 1:
        scores = logits
    elif logits.shape[1] <= 100:
        scores = _softmax(logits)[..., :-1]
    else:
        scores = 1 / (1 + np.exp(-logits))
    corners = from_centres(boxes) * np.array([how.size[1], how.size[0]] * 2)
    return _dense(corners, scores, how, several=True, suppressing=False)


def end2end(outputs: Outputs, how: Decoding) -> list[Detections]:
    """After NMS: rows N x K x 6 (box, score, class), or boxes, scores and classes apart.

    Rows of seven begin with the number of the picture (YOLOv7's export). Boxes of 0 to 1 become
    pixels; a class below 0 and a score of 0 are filling. An output of one whole number a picture
    is the number of detections.
    """
    arrays = {n: a for n, a in outputs.items() if not _is_text(a)}
    count = len(next(iter(arrays.values())))
    return [_rows_of(_finished(arrays, picture), how) for picture in range(count)]


DECODERS: Mapping[str, Decoder] = {
    "yolox": yolox,
    "yolov5": yolov5,
    "yolov8": yolov8,
    "ssd": ssd,
    "detr": detr,
    "end2end": end2end,
}


def recognise(outputs: Shapes, size: tuple[int, int] | None) -> str | None:
    """The decoder that fits outputs of these shapes of a model with input `size`, or None.

    Boxes in cells or in pixels cannot be told apart by shape: of a model with YOLOX's number of
    rows, one a cell, `yolox` is said; three a cell is YOLOv5's.
    """
    ranks = {name: [d if isinstance(d, int) and d > 0 else None for d in s]
             for name, s in outputs.items()}  # fmt: skip
    three = {name: s for name, s in ranks.items() if len(s) == 3}
    if len(outputs) == 1 and len(three) == 1:
        (shape,) = three.values()
        return _one_output(shape[1], shape[2], size)
    last_four = [s for s in ranks.values() if len(s) >= 2 and s[-1] == 4]
    if len(last_four) == 1 and len(ranks) >= 2:
        return _boxes_apart(ranks, last_four[0])
    if len(ranks) == len(last_four) == len(three) == 2:  # four classes, or three and none
        return _boxes_apart(ranks, last_four[0])
    grids = [s for s in ranks.values() if len(s) in (4, 5) and (s[-1] or 0) >= 6]
    return "yolov5" if len(three) == 1 and grids and _anchors(size) else None


def _one_output(rows: int | None, columns: int | None, size: tuple[int, int] | None) -> str | None:
    cells = _anchors(size)
    if columns in (6, 7) and (rows is None or rows <= 1000):
        return "end2end"
    if columns is not None and columns > 5 and cells and rows == cells:
        return "yolox"
    if columns is not None and columns > 5 and rows and rows > columns and rows > 1000:
        return "yolov5"
    if rows is not None and rows >= 5 and (columns is None or columns > 4 * rows):
        return "yolov8"
    return None


def _boxes_apart(ranks: Mapping[str, Sequence[int | None]], boxes: Sequence[int | None]) -> str:
    others = [s for s in ranks.values() if s is not boxes]
    scored = [s for s in others if len(s) == 3 and (s[-1] or 2) > 1]
    if len(boxes) == 3 and len(scored) == 1:
        rows = boxes[1]
        return "detr" if rows is not None and rows <= 1000 else "ssd"
    return "end2end"


def _anchors(size: tuple[int, int] | None) -> int | None:
    if size is None:
        return None
    return sum((size[0] // stride) * (size[1] // stride) for stride in _STRIDES)


def decoder_named(name: str) -> Decoder:
    """The decoder of that name; ModelError with the nearest if there is none."""
    if name not in DECODERS:
        raise ModelError(f"no decoder {name!r}{did_you_mean(name, DECODERS)}; "
                         f"there are {', '.join(DECODERS)}")  # fmt: skip
    return DECODERS[name]


def _cells(size: tuple[int, int], count: int) -> tuple[Array, Array]:
    """Corners (A x 2, x and y, in cells) and strides (A x 1) of the grids of strides 8, 16, 32."""
    grids, strides = [], []
    for stride in _STRIDES:
        ys, xs = np.mgrid[: size[0] // stride, : size[1] // stride]
        grids.append(np.stack([xs, ys], axis=-1).reshape(-1, 2))
        strides.append(np.full((ys.size, 1), stride))
    grid = np.concatenate(grids)
    if len(grid) != count:
        raise ModelError(
            f"decoder yolox: an input of {size[0]} x {size[1]} has {len(grid)} cells of strides "
            f"8, 16, 32, and the output {count} rows; another decoder? ({', '.join(DECODERS)})"
        )
    return grid, np.concatenate(strides)


def _dense(
    boxes: Array, scores: Array, how: Decoding, *, several: bool, suppressing: bool = True
) -> list[Detections]:
    """Boxes N x A x 4 and scores N x A x C to detections; `several` classes of a box may count."""
    return [_picture(b, s, how, several, suppressing) for b, s in zip(boxes, scores, strict=True)]


def _picture(
    boxes: Array, scores: Array, how: Decoding, several: bool, suppressing: bool
) -> Detections:
    if several and scores.shape[1] > 1:
        rows, classes = np.nonzero(scores > how.score)
    else:
        best = scores.argmax(axis=1)
        rows = np.flatnonzero(np.take_along_axis(scores, best[:, None], axis=1)[:, 0] > how.score)
        classes = best[rows]
    values = scores[rows, classes]
    finite = np.isfinite(boxes[rows]).all(axis=1)
    rows, classes, values = rows[finite], classes[finite], values[finite]
    if len(rows) > _MOST_BEFORE_NMS:
        top = np.argsort(-values, kind="stable")[:_MOST_BEFORE_NMS]
        rows, classes, values = rows[top], classes[top], values[top]
    if suppressing:
        kept = suppress(boxes[rows], values, classes, how.iou)[: how.most]
    else:
        kept = np.argsort(-values, kind="stable")[: how.most]
    return Detections(
        boxes[rows[kept]].astype(np.float32),
        values[kept].astype(np.float32),
        classes[kept].astype(np.int64),
    )


def _only(outputs: Outputs, rank: int) -> Array:
    """The one array of `rank` dimensions, the largest of several."""
    arrays = [as_array(value) for value in outputs.values() if not _is_text(value)]
    fitting = [a for a in arrays if a is not None and a.ndim == rank and a.dtype.kind == "f"]
    if not fitting:
        raise ModelError(f"no output of {rank} dimensions to decode (found: {shapes_of(outputs)})")
    found = max(fitting, key=lambda array: array.size)
    return found.astype(np.float32, copy=False)


def _boxes_and(outputs: Outputs, rank: int) -> tuple[Array, Array]:
    """Boxes (last dimension 4) and the scores beside them."""
    arrays = {n: as_array(value) for n, value in outputs.items() if not _is_text(value)}
    known = {n: a for n, a in arrays.items() if a is not None and a.ndim == rank}
    boxes = [n for n, a in known.items() if a.shape[-1] == 4]
    scores = [n for n in known if known[n].shape[-1] != 4]
    if len(boxes) == 2 and not scores:  # four classes
        first, second = (known[n] for n in boxes)
        boxes = boxes[::-1] if _are_scores(first, second) else boxes
        boxes, scores = boxes[:1], boxes[1:]
    if not boxes or not scores:
        raise ModelError(f"no boxes N x A x 4 and scores N x A x C (found: {shapes_of(outputs)})")
    return known[boxes[0]].astype(np.float32), known[scores[0]].astype(np.float32)


def _are_scores(first: Array, second: Array) -> bool:
    """Whether of two arrays N x A x 4 the first is the scores: probabilities that sum to one, or
    logits beside boxes of 0 to 1. In doubt boxes come first, as in torchvision's and TensorFlow's.
    """
    sums = [bool(np.allclose(a.sum(axis=-1), 1, atol=1e-2)) for a in (first, second)]
    if sums[0] != sums[1]:
        return sums[0]
    unit = [bool(a.size) and a.min() >= -0.5 and a.max() <= 1.5 for a in (first, second)]
    return unit == [False, True] and bool(first.min() < -0.5)


def _in_pixels(boxes: Array, how: Decoding) -> Array:
    if boxes.size and np.abs(boxes).max() <= 2:
        return boxes * np.array([how.size[1], how.size[0]] * 2, np.float32)
    return boxes


def _softmax(values: Array) -> Array:
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    found: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return found


def _is_text(value: Any) -> bool:
    return not isinstance(value, tuple) and np.asarray(value).dtype.kind not in "fiub"


def _finished(arrays: Mapping[str, Any], picture: int) -> Array:
    """Rows of box, score, class of one picture from the outputs of a network with its own NMS."""
    mine = {name: np.asarray(value[picture]) for name, value in arrays.items()}
    for array in mine.values():
        if array.ndim >= 2 and array.shape[-1] in (6, 7):
            return array.reshape(-1, array.shape[-1])[:, -6:]
    boxes = next((n for n, a in mine.items() if a.ndim >= 2 and a.shape[-1] == 4), None)
    if boxes is None:
        raise ModelError(
            "decoder end2end: no rows of box, score and class, and no boxes K x 4, in outputs "
            + ", ".join(f"{n!r} {a.shape}" for n, a in mine.items())
        )
    count = mine[boxes].reshape(-1, 4).shape[0]
    lists = {n: a.reshape(-1) for n, a in mine.items() if n != boxes and a.size == count}
    single = [a for n, a in mine.items() if n != boxes and a.size == 1 and count != 1]
    scores, classes = _scores_and_classes(lists)
    rows = np.column_stack([mine[boxes].reshape(-1, 4), lists[scores],
                            lists[classes] if classes else np.zeros(count)])  # fmt: skip
    return rows[: int(single[0].reshape(()))] if single else rows


def _scores_and_classes(lists: Mapping[str, Array]) -> tuple[str, str | None]:
    """Which list is which: whole numbers are classes, else what is called so, else the second."""
    whole = [n for n, a in lists.items() if a.dtype.kind in "iu"]
    floats = [n for n in lists if n not in whole]
    if not floats:
        raise ModelError(f"decoder end2end: no scores among the outputs {', '.join(lists)}")
    if whole:
        return floats[0], whole[0]
    named = [n for n in floats if re.search("class|label|categor", n, re.IGNORECASE)]
    classes = named[0] if named and len(floats) > 1 else floats[1] if len(floats) > 1 else None
    return next(n for n in floats if n != classes), classes


def _rows_of(rows: Array, how: Decoding) -> Detections:
    keep = (rows[:, 4] > how.score) & (rows[:, 5] >= 0) & np.isfinite(rows).all(axis=1)
    rows = rows[keep]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")][: how.most]
    return Detections(
        _in_pixels(rows[:, :4], how).astype(np.float32),
        rows[:, 4].astype(np.float32),
        rows[:, 5].astype(np.int64),
    )
