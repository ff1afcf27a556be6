"""Right answers of a classifier: top-1 and top-5, and the answers that agree with FP32's."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch, check_labels, labels_of
from trtune.reports.measures.base import (
    Array,
    Outputs,
    Scores,
    as_array,
    named_output,
    shapes_of,
)


def class_scores(array: Array, output: str) -> Array:
    """`array` as N x C class scores: 1-dimensions but the first are dropped.

    Raises ModelError naming `output` if what remains is not N x C.
    """
    scores = np.asarray(array)
    if scores.ndim > 2 and scores.size == scores.shape[0] * max(scores.shape[1:], default=0):
        scores = scores.reshape(scores.shape[0], -1)
    if scores.ndim != 2:
        raise ModelError(
            f"output {output!r} has shape {tuple(array.shape)}, which is not one score a class "
            "(N x C); name another output in `target.output`, or give the target a metric of your "
            "own: `metric: module:function`, sqnr_db or cosine"
        )
    return scores


def is_class_scores(array: Array) -> bool:
    """Whether `array` (N rows) holds one score a class, of two classes or more."""
    widest = max(array.shape[1:], default=0)
    return array.ndim >= 2 and widest > 1 and array.size == array.shape[0] * widest


def top_k(scores: Array, labels: NDArray[np.int64], *, k: int) -> Scores:
    """1.0 for each sample whose label is among its `k` highest scores, else 0.0.

    `scores` is N x C, `labels` N class indices inside 0..C-1. Equal scores rank by class index,
    as argmax does; a sample whose scores hold a NaN is wrong.

    >>> top_k(np.array([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]]), np.array([2, 0]), k=1)
    array([0., 1.])
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None, :] < labels[:, None]
    rank = np.count_nonzero((scores > own) | ((scores == own) & earlier), axis=1)
    broken = np.isnan(scores).any(axis=1)
    right: Scores = ((rank < k) & ~broken).astype(np.float64)
    return right


def class_labels(batch: Batch, metric: str) -> NDArray[np.int64]:
    """The class index of each sample; DataError if there are none or they are something else."""
    labels = labels_of(batch, metric)
    if isinstance(labels, tuple):
        raise DataError(
            f"metric {metric!r} needs one class index a sample, and {batch.items[0]} has an array "
            f"of shape {labels[0].shape} (boxes?); take `ap` or `ap50` for detections"
        )
    if labels.ndim != 1:
        raise DataError(
            f"metric {metric!r} needs one class index a sample, and the labels are "
            f"{' x '.join(map(str, labels.shape))}; one-hot labels become indices with "
            "argmax(axis=1), a class a pixel is for `miou`, tokens are for `perplexity`"
        )
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"metric {metric!r} needs class indices, whole numbers, and the labels are "
            f"{labels.dtype.name} (first: {labels[0]} of {batch.items[0]})"
        )
    return labels.astype(np.int64)


@dataclass
class _Scored:
    """The scores of one output that may hold the class scores."""

    classes: int
    scores: list[Scores] = field(default_factory=list)


@dataclass
class TopK:
    """The share of samples whose label is among the `k` highest class scores.

    `output` names the output with the scores. Without it the one that fits the labels is taken:
    N x C with C above every label, the smallest such C, or N whole numbers (a model that ends in
    ArgMax). Which, is decided by all labels of the pass, and is in `chosen` after `result`.
    """

    k: int
    output: str | None = None
    chosen: str | None = None
    _candidates: dict[str, _Scored] | None = None
    _refused: str = ""

    def __post_init__(self) -> None:
        self.name = f"top{self.k}"

    def start(self) -> None:
        """Forget everything."""
        self._candidates, self.chosen, self._refused = None, None, ""

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Score one batch; DataError for labels that fit no output, ModelError for no output."""
        labels = class_labels(batch, self.name)
        arrays = self._arrays(outputs, len(batch))
        if self._candidates is None:
            self._candidates = {name: _Scored(_classes(a)) for name, a in arrays.items()}
        for name in list(self._candidates):
            found = self._candidates[name]
            if found.classes and (labels.min() < 0 or labels.max() >= found.classes):
                del self._candidates[name]
                if not self._candidates:
                    check_labels(labels, found.classes, batch.items)
                continue
            found.scores.append(self._right(arrays[name], labels))

    def _arrays(self, outputs: Outputs, count: int) -> dict[str, Array]:
        if self.output is not None:
            array = as_array(named_output(outputs, self.output))
            if array is None:
                raise ModelError(f"output {self.output!r} has another shape for each sample")
            is_answer = self._is_answer(array, count)
            return {self.output: array if is_answer else class_scores(array, self.output)}
        found = {}
        for name, value in outputs.items():
            array = as_array(value)
            if array is None or array.shape[:1] != (count,) or array.dtype.kind not in "fiub":
                continue
            if self._is_answer(array, count):
                found[name] = array
            elif is_class_scores(array):
                found[name] = class_scores(array, name)
        if not found:
            raise ModelError(
                f"no output is one score a class (N x C) for {self.name} (found: "
                f"{shapes_of(outputs)}); name it in `target.output`, or give the target a metric "
                "that fits: ap, miou, perplexity, sqnr_db, cosine, or `module:function`"
            )
        return dict(sorted(found.items(), key=lambda entry: -_classes(entry[1])))

    def _is_answer(self, array: Array, count: int) -> bool:
        return self.k == 1 and array.size == count and array.dtype.kind in "iu"

    def _right(self, array: Array, labels: NDArray[np.int64]) -> Scores:
        if not _classes(array):
            right: Scores = (array.reshape(-1) == labels).astype(np.float64)
            return right
        return top_k(array, labels, k=self.k)

    @property
    def scores(self) -> Scores:
        """1 or 0 for each sample, by the output that fits the labels best."""
        found = self._candidates or {}
        if not found:
            return np.zeros(0)
        # Class indices say what is meant; of scores, the fewest classes that hold all labels.
        self.chosen = min(found, key=lambda name: found[name].classes)
        return np.concatenate(found[self.chosen].scores or [np.zeros(0)])

    @property
    def count(self) -> int:
        """Samples taken in."""
        return len(self.scores)

    def result(self) -> float:
        """The share of right answers, 0 to 1."""
        scores = self.scores
        return float(scores.mean()) if len(scores) else float("nan")

    def most(self, total: int) -> float:
        """The highest share that is still possible once `total` samples are taken in."""
        found = [np.concatenate(c.scores) for c in (self._candidates or {}).values() if c.scores]
        best = max((float(rows.sum()) - len(rows) for rows in found), default=0.0)
        return (best + total) / total

    def weighted(self, weights: NDArray[np.float64]) -> float:
        """The share with these weights."""
        return float(np.average(self.scores, weights=weights))


def _classes(array: Array) -> int:
    """Columns of class scores, 0 for class indices."""
    return array.shape[1] if array.ndim == 2 and array.shape[1] > 1 else 0


def same_answer(reference: Array, test: Array) -> Scores:
    """1.0 for each row of two N x C arrays with the highest score at the same class, else 0.0.

    A row of the tested scores with a NaN agrees with nothing.
    """
    same = (np.argmax(reference, axis=1) == np.argmax(test, axis=1)) & ~np.isnan(test).any(1)
    found: Scores = same.astype(np.float64)
    return found
