"""Average precision, as COCO counts it, and detections that agree with FP32's.

The matching and the curve are those of pycocotools' `COCOeval` (bbox, all areas, 100 detections a
class and picture), kept picture by picture, so that the measure knows its own standard error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch, labels_of
from trtune.reports.measures.base import Mean, Outputs
from trtune.reports.measures.boxes import Detections, overlaps
from trtune.reports.measures.decoders import Decoding, decoder_named, recognise

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST = 100


@dataclass(frozen=True, slots=True)
class Reading:
    """How a config wants detections read; None: found out, or the measure's own.

    output: the only output that is decoded.
    """

    decoder: str | None = None
    score: float | None = None
    iou: float | None = None
    output: str | None = None

    def detections(self, outputs: Outputs, batch: Batch, *, score: float) -> list[Detections]:
        """The detections in each picture of `batch`; `score` counts where none is set.

        Raises ModelError if no decoder fits.
        """
        size = input_size(batch)
        chosen = outputs if self.output is None else {self.output: outputs[self.output]}
        name = self.decoder or recognise(_shapes(chosen), size)
        if name is None:
            shown = ", ".join(f"{n!r} {list(s)}" for n, s in _shapes(chosen).items())
            raise ModelError(
                f"no decoder fits the outputs {shown}; say which in `target.decoder`, or give the "
                "target a measure of your own (`module:Class`)"
            )
        limit = score if self.score is None else self.score
        how = Decoding(size, limit, 0.65 if self.iou is None else self.iou)
        return decoder_named(name)(chosen, how)


def input_size(batch: Batch) -> tuple[int, int]:
    """(height, width) of the pictures that are fed; ModelError if there are none."""
    for array in batch.feeds.values():
        if array.ndim == 4:
            last = array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4)
            return (array.shape[1], array.shape[2]) if last else (array.shape[2], array.shape[3])
    raise ModelError("detections need an input of pictures (four dimensions), and there is none")


def _shapes(outputs: Outputs) -> dict[str, tuple[Any, ...]]:
    return {
        name: (None, *(np.shape(value[0]) if len(value) else ()))
        for name, value in outputs.items()
        if isinstance(value, tuple) or np.ndim(value)
    }


@dataclass(frozen=True, slots=True)
class _Matched:
    """One picture: its detections with what they are at each threshold, its objects by class.

    `right` and `ignored` are T x K: matched to an object, and to none that counts (a crowd).
    """

    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.int64]


def boxes_of(batch: Batch, metric: str) -> list[NDArray[np.float64]]:
    """The objects of each picture, K x 6: class, left, top, right, bottom, crowd.

    Rows of five have no crowds; rows of a class below 0 are filling.
    """
    found = []
    for item, rows in zip(batch.items, labels_of(batch, metric), strict=True):
        rows = np.asarray(rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] not in (5, 6):
            raise DataError(
                f"metric {metric!r} needs boxes (K x 5: class, left, top, right, bottom in pixels "
                f"of the input), and the label of {item} has shape {rows.shape}; take source yolo "
                "or coco, or give such arrays"
            )
        rows = rows[rows[:, 0] >= 0]
        crowd = rows[:, 5:] if rows.shape[1] == 6 else np.zeros((len(rows), 1))
        found.append(np.concatenate([rows[:, :5], crowd], axis=1))
    return found


def match(
    found: Detections, objects: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> _Matched:
    """Match detections with the objects of their class, the surest first, at each threshold."""
    parts: list[tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.bool_]]] = []
    for kind in np.unique(found.classes):
        rows = np.flatnonzero(found.classes == kind)
        rows = rows[np.argsort(-found.scores[rows], kind="stable")][:_MOST]
        mine = objects[objects[:, 0] == kind]
        parts.append((rows, *_match_class(found.boxes[rows], mine, thresholds)))
    order = np.concatenate([p[0] for p in parts]) if parts else np.zeros(0, np.intp)
    empty = np.zeros((len(thresholds), 0), bool)
    right = np.concatenate([p[1] for p in parts], axis=1) if parts else empty
    ignored = np.concatenate([p[2] for p in parts], axis=1) if parts else empty
    counted = objects[objects[:, 5] == 0, 0].astype(np.int64)
    return _Matched(found.scores[order], found.classes[order], right, ignored, counted)


def _match_class(
    boxes: NDArray[np.float32], objects: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    objects = objects[np.argsort(objects[:, 5], kind="stable")]  # crowds last
    crowd = objects[:, 5] > 0
    right = np.zeros((len(thresholds), len(boxes)), bool)
    ignored = np.zeros_like(right)
    if not len(objects):
        return right, ignored
    overlap = overlaps(boxes, objects[:, 1:5], crowd=crowd)
    for level, threshold in enumerate(thresholds):
        taken = np.zeros(len(objects), bool)
        for row in np.flatnonzero(overlap.max(axis=1) >= min(threshold, 1 - 1e-10)):
            free = np.where(taken & ~crowd, -1.0, overlap[row])
            best = _best(free, crowd, min(threshold, 1 - 1e-10))
            if best is None:
                continue
            taken[best] = True
            right[level, row] = not crowd[best]
            ignored[level, row] = crowd[best]
    return right, ignored


def _best(free: NDArray[np.float64], crowd: NDArray[np.bool_], threshold: float) -> int | None:
    """The object with the largest overlap, a later one of equals; a crowd only if no other fits."""
    for group in (~crowd, crowd):
        places = np.flatnonzero(group & (free >= threshold))
        if len(places):
            return int(places[len(places) - 1 - np.argmax(free[places][::-1])])
    return None


class AveragePrecision:
    """COCO's AP over classes and thresholds: 0.5 to 0.95 (`ap`), or 0.5 alone (`ap50`)."""

    def __init__(self, thresholds: NDArray[np.float64], reading: Reading, name: str) -> None:
        self._thresholds, self._reading, self.name = thresholds, reading, name
        self._pictures: list[_Matched] = []
        self._pooled: _Pooled | None = None

    def start(self) -> None:
        """Forget everything."""
        self._pictures, self._pooled = [], None

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Decode, and match with the objects, picture by picture."""
        objects = boxes_of(batch, self.name)
        found = self._reading.detections(outputs, batch, score=0.01)
        self._pooled = None
        for seen, there in zip(found, objects, strict=True):
            self._pictures.append(match(seen, there, self._thresholds))

    @property
    def count(self) -> int:
        """Pictures taken in."""
        return len(self._pictures)

    def result(self) -> float:
        """AP, 0 to 1; NaN where no picture has an object."""
        return self.weighted(np.ones(self.count))

    def weighted(self, weights: NDArray[np.float64]) -> float:
        """AP if each picture counted so often."""
        if self._pooled is None:
            self._pooled = _Pooled(self._pictures)
        return self._pooled.value(weights)


class _Pooled:
    """The detections of all pictures, by class and sureness, ready to be weighted."""

    def __init__(self, pictures: list[_Matched]) -> None:
        pictures = pictures or []
        kinds = [p.objects for p in pictures] or [np.zeros(0, np.int64)]
        self._classes = np.unique(np.concatenate(kinds))
        self._objects = np.array([[np.count_nonzero(p.objects == k) for k in self._classes]
                                  for p in pictures]).reshape(len(pictures), -1)  # fmt: skip
        self._parts = []
        if not pictures:
            return
        scores = np.concatenate([p.scores for p in pictures])
        classes = np.concatenate([p.classes for p in pictures])
        owner = np.repeat(np.arange(len(pictures)), [len(p.scores) for p in pictures])
        right = np.concatenate([p.right for p in pictures], axis=1)
        ignored = np.concatenate([p.ignored for p in pictures], axis=1)
        for kind in self._classes:
            rows = np.flatnonzero(classes == kind)
            rows = rows[np.argsort(-scores[rows], kind="mergesort")]
            self._parts.append((owner[rows], right[:, rows], ~right[:, rows] & ~ignored[:, rows]))

    def value(self, weights: NDArray[np.float64]) -> float:
        totals = weights @ self._objects
        found = [
            _curve(right * weights[owner], wrong * weights[owner], total)
            for (owner, right, wrong), total in zip(self._parts, totals, strict=True)
            if total > 0
        ]
        return float(np.mean(found)) if found else float("nan")


def _curve(
    right: NDArray[np.float64], wrong: NDArray[np.float64], total: float
) -> NDArray[np.float64]:
    """Precision at 101 recalls, its mean at each threshold (rows of T x K)."""
    hits, misses = np.cumsum(right, axis=1), np.cumsum(wrong, axis=1)
    precision = hits / np.maximum(hits + misses, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = np.zeros(len(right))
    for level in range(len(right)):
        places = np.searchsorted(hits[level] / total, _RECALLS, side="left")
        inside = places[places < right.shape[1]]
        means[level] = precision[level][inside].sum() / len(_RECALLS)
    return means


class DetectionAgreement(Mean):
    """How far detections are FP32's: 2 x matched / (found by one + found by the other).

    Of those above a score of 0.3 after suppression, of the same class, overlapping by 0.5 or more,
    the surest first. A mean over pictures; one in which neither finds anything agrees.
    """

    highest = 1.0

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading

    def update_pair(self, reference: Outputs, outputs: Outputs, batch: Batch) -> None:
        """Take in both models' outputs."""
        theirs = self._reading.detections(reference, batch, score=0.3)
        mine = self._reading.detections(outputs, batch, score=0.3)
        self.add(np.array([_alike(a, b) for a, b in zip(theirs, mine, strict=True)]))


def _alike(reference: Detections, found: Detections) -> float:
    both = len(reference.scores) + len(found.scores)
    if not both:
        return 1.0
    rows = np.column_stack([reference.classes, reference.boxes, np.zeros(len(reference.scores))])
    matched = match(found, rows.astype(np.float64), np.array([0.5]))
    return 2 * int(matched.right.sum()) / both
