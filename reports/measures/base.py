"""What a measure is: started, given batch after batch, and asked for one number at the end.

`start()`, `update(outputs, batch)`, `result()`: a measure of a whole data set (average precision,
perplexity) need not be a mean over samples, so nothing here averages batches. `outputs` maps output
name to an array with a row a sample, or to a tuple with an array for each sample where their shapes
differ; what holds no row a sample is there as the model gave it.

A user's own measure is a class with these three methods, as `module:Class`, or a function of one
batch that returns a score a sample, or one number for the batch: the mean over samples counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import ModelError, TrtuneError, did_you_mean
from trtune.datasets.batches import Batch

Array: TypeAlias = NDArray[Any]
Scores: TypeAlias = NDArray[np.float64]
Outputs: TypeAlias = Mapping[str, Any]
PythonMetric: TypeAlias = Callable[[Outputs, Batch], Any]


@runtime_checkable
class Measure(Protocol):
    """A measure of a whole data set; the batches come in order, of any size."""

    def start(self) -> None:
        """Forget everything: a pass over the data begins."""

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Take in the model's outputs for one batch."""

    def result(self) -> float:
        """The value over everything taken in."""


@runtime_checkable
class AgainstReference(Protocol):
    """A measure that compares with the FP32 model's answers to the same batch."""

    def start(self) -> None:
        """Forget everything: a pass over the data begins."""

    def update_pair(self, reference: Outputs, outputs: Outputs, batch: Batch) -> None:
        """Take in both models' outputs for one batch."""

    def result(self) -> float:
        """The value over everything taken in."""


@runtime_checkable
class Resampled(Protocol):
    """A measure that knows its value on any choice of the samples it has seen."""

    @property
    def count(self) -> int:
        """Samples taken in."""

    def weighted(self, weights: NDArray[np.float64]) -> float:
        """The value if each sample counted `weights` times (as many as samples, at least 0)."""


class Mean:
    """The mean of one score a sample; subclasses give the scores.

    `highest` is the most that a score can be, which tells early what can no longer be reached.
    """

    highest: float = math.inf

    def __init__(self) -> None:
        self._scores: list[Scores] = []

    def start(self) -> None:
        """Forget everything."""
        self._scores = []

    def add(self, scores: Array) -> None:
        """Take in scores, one a sample."""
        self._scores.append(np.asarray(scores, np.float64).reshape(-1))

    @property
    def scores(self) -> Scores:
        """All scores so far, in the order of the data."""
        return np.concatenate(self._scores) if self._scores else np.zeros(0)

    @property
    def count(self) -> int:
        """Samples taken in."""
        return sum(map(len, self._scores))

    def result(self) -> float:
        """The mean score; NaN before the first sample."""
        return float(self.scores.mean()) if self.count else float("nan")

    def weighted(self, weights: NDArray[np.float64]) -> float:
        """The mean with these weights."""
        return float(np.average(self.scores, weights=weights))

    def most(self, total: int) -> float:
        """The highest value that is still possible once `total` samples are taken in."""
        left = total - self.count
        return (float(self.scores.sum()) + left * self.highest) / total if left else self.result()


class FunctionMean(Mean):
    """The mean of what a user's function gives: a score a sample, or one number a batch."""

    def __init__(self, function: PythonMetric) -> None:
        super().__init__()
        self.function = function

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Call the function; TrtuneError naming it and the batch if it fails."""
        name = metric_name(self.function)
        try:
            found = np.asarray(self.function(outputs, batch), np.float64)
        except TrtuneError:
            raise
        except Exception as error:  # a user's metric may raise anything
            raise TrtuneError(
                f"metric {name} failed on the batch that starts with "
                f"{batch.items[0]!r}: {type(error).__name__}: {error}"
            ) from error
        if found.shape == (len(batch),):
            self.add(found)
        elif found.size == 1:
            self.add(np.full(len(batch), float(found.reshape(()))))
        else:
            raise TrtuneError(
                f"metric {name} returned shape {found.shape} for {len(batch)} samples; "
                "it must return one number, or one number a sample"
            )


class OwnMeasure:
    """A measure of the user's own class, whose errors are told with its name."""

    def __init__(self, made: Measure, name: str) -> None:
        self._made, self.name = made, name

    def start(self) -> None:
        """Start the user's measure."""
        self._call("start")

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Give it a batch."""
        self._call("update", outputs, batch)

    def result(self) -> float:
        """Its value; TrtuneError if that is no number."""
        found = self._call("result")
        try:
            return float(found)
        except (TypeError, ValueError):
            raise TrtuneError(
                f"measure {self.name}: result() gave {found!r}, which is not a number"
            ) from None

    def _call(self, method: str, *values: Any) -> Any:
        try:
            return getattr(self._made, method)(*values)
        except TrtuneError:
            raise
        except Exception as error:  # a user's metric may raise anything
            raise TrtuneError(
                f"measure {self.name} failed in {method}(): {type(error).__name__}: {error}"
            ) from error


def metric_name(metric: Any) -> str:
    """`module:name` of a function or class of the user's."""
    return f"{metric.__module__}:{getattr(metric, '__qualname__', type(metric).__name__)}"


def named_output(outputs: Outputs, name: str) -> Any:
    """The output `name`; ModelError with the nearest name if there is none."""
    if name not in outputs:
        raise ModelError(
            f"the model has no output {name!r}{did_you_mean(name, outputs)} "
            f"(outputs: {', '.join(map(repr, outputs))})"
        )
    return outputs[name]


def shapes_of(outputs: Outputs) -> str:
    """The outputs with their shapes, for messages."""
    return ", ".join(f"{name!r} {_shape(value)}" for name, value in outputs.items()) or "none"


def _shape(value: Any) -> str:
    if isinstance(value, Sequence):
        return f"{len(value)} arrays of different shapes" if len(value) else "nothing"
    return str(tuple(value.shape))


def as_array(value: Any) -> Array | None:
    """An output as one array with a row a sample, or None where its shape follows the data."""
    if isinstance(value, tuple):
        alike = value and len({np.shape(row) for row in value}) == 1
        return np.stack(value) if alike else None
    return np.asarray(value)
