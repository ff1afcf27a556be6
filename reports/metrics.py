"""Accuracy metrics: pure functions of scores and labels, or of sums over two models' outputs.

Two families, both in `METRICS`; higher is better for all:

- task metrics (`TASK_METRICS`: top1, top5) score each sample of one batch against its label; the
  value is the mean over samples;
- fidelity metrics (`FIDELITY_METRICS`: sqnr_db, cosine, agreement) compare with the outputs of the
  FP32 model and need no labels; they are computed from sums over the whole data set.

A user's own metric is `module:function` with the signature

    def f(outputs: Mapping[str, NDArray], batch: Batch) -> float | NDArray

which returns one score a sample, or a single number: the mean over the batch. The value is the
mean over samples: a single number weighs as many samples as its batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import ConfigError, ModelError, did_you_mean
from trtune.datasets.batches import Batch
from trtune.datasets.python import load_function
from trtune.precision.runtime.errors import ErrorSums

Array: TypeAlias = NDArray[Any]
Outputs: TypeAlias = Mapping[str, Array]
PythonMetric: TypeAlias = Callable[[Outputs, Batch], Any]


def class_scores(array: Array, output: str) -> Array:
    """`array` as N x C class scores: trailing 1-dimensions of N x C x 1 x 1 are dropped.

    Raises ModelError naming `output` if what remains is not N x C.
    """
    scores = np.asarray(array)
    while scores.ndim > 2 and scores.shape[-1] == 1:
        scores = scores[..., 0]
    if scores.ndim != 2:
        raise ModelError(
            f"output {output!r} has shape {tuple(array.shape)}, which is not one score a class "
            "(N x C); name another output, or give the target a metric of your own: "
            "`metric: module:function`, sqnr_db or cosine"
        )
    return scores


def top_k(scores: Array, labels: NDArray[np.int64], *, k: int) -> NDArray[np.float64]:
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
    right: NDArray[np.float64] = ((rank < k) & ~broken).astype(np.float64)
    return right


def top1(scores: Array, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """1.0 for each sample whose label has the highest score; see `top_k`."""
    return top_k(scores, labels, k=1)


def top5(scores: Array, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """1.0 for each sample whose label is among the five highest scores; see `top_k`."""
    return top_k(scores, labels, k=5)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close tested outputs are to reference outputs, streamed over batches.

    `errors` sums over every element of the compared outputs; `agreeing` of `compared` samples
    have their highest score at the same class (`compared` is 0 where no output is class scores).
    """

    errors: ErrorSums = field(default_factory=ErrorSums)
    agreeing: int = 0
    compared: int = 0

    def add(self, reference: Array, test: Array) -> Fidelity:
        """With another pair of equally shaped outputs; see `ErrorSums.add` for the errors."""
        return replace(self, errors=self.errors.add(reference, test))

    def add_classes(self, reference: Array, test: Array) -> Fidelity:
        """With the agreement of two N x C arrays of class scores; a NaN agrees with nothing."""
        same = (np.argmax(reference, axis=1) == np.argmax(test, axis=1)) & ~np.isnan(test).any(1)
        return replace(
            self,
            agreeing=self.agreeing + int(np.count_nonzero(same)),
            compared=self.compared + len(same),
        )


def sqnr_db(sums: Fidelity) -> float:
    """10 * log10(sum(r^2) / sum((r - t)^2)) over every element of every output, in decibels.

    Equal outputs give +inf; a NaN or Inf in the tested outputs, or a reference of zeros that is
    not met, gives -inf.
    """
    return sums.errors.sqnr_db


def cosine(sums: Fidelity) -> float:
    """sum(r * t) / sqrt(sum(r^2) * sum(t^2)) over every element of every output, -1 to 1.

    Equal outputs give 1; otherwise an all-zero side, or a NaN or Inf in the tested outputs, gives
    0.
    """
    return sums.errors.cosine


def agreement(sums: Fidelity) -> float:
    """The fraction of samples whose highest score is at the same class as FP32's, 0 to 1.

    Raises ModelError where no output holds class scores.
    """
    if not sums.compared:
        raise ModelError(
            "`agreement` needs an output with one score a class (N x C), and this model has none; "
            "use sqnr_db or cosine"
        )
    return sums.agreeing / sums.compared


TASK_METRICS: dict[str, Callable[[Array, NDArray[np.int64]], NDArray[np.float64]]] = {
    "top1": top1,
    "top5": top5,
}
FIDELITY_METRICS: dict[str, Callable[[Fidelity], float]] = {
    "sqnr_db": sqnr_db,
    "cosine": cosine,
    "agreement": agreement,
}
METRICS: dict[str, Callable[..., Any]] = {**TASK_METRICS, **FIDELITY_METRICS}


def find_metric(name: str, *, base_dir: Path | None = None) -> str | PythonMetric:
    """What `evaluate` takes as `metric`: `name` if it is in `METRICS`, or the function it names.

    `module:function` and `file.py:function` are looked for in `base_dir` first.

    Raises ConfigError for an unknown name, with the nearest one; DataError if the function cannot
    be imported.
    """
    if name in METRICS:
        return name
    if ":" in name:
        return load_function(name, base_dir)
    raise ConfigError(
        f"unknown metric {name!r}{did_you_mean(name, METRICS)} "
        f"(known: {', '.join(METRICS)}, or a function of yours as module:function)"
    )


def metric_name(metric: PythonMetric) -> str:
    """`module:function` of a metric function."""
    return f"{metric.__module__}:{getattr(metric, '__qualname__', type(metric).__name__)}"
