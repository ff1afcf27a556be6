"""How close a model's outputs are to FP32's: each output by its own energy, the worst decides."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from trtune.configs.errors import ModelError
from trtune.precision.runtime.errors import ErrorSums
from trtune.reports.measures.base import Array, as_array
from trtune.reports.measures.classification import class_scores, is_class_scores, same_answer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close tested outputs are to reference outputs, streamed over batches.

    `outputs` has the sums of every output compared. Where outputs of floats are among them, only
    those decide: a difference of class indices or of picked rows says nothing about closeness.
    `agreeing` of `compared` samples have their highest score at the same class (`compared` is 0
    where no output is class scores). `left_out` counts, by output, the samples whose tensor has
    another shape than the reference's, which happens where shapes follow the data.
    """

    outputs: Mapping[str, ErrorSums] = field(default_factory=dict)
    floats: frozenset[str] = frozenset()
    agreeing: int = 0
    compared: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

    def add(self, name: str, reference: Array, test: Array) -> Fidelity:
        """With another pair of equally shaped outputs; see `ErrorSums.add` for the errors."""
        sums = self.outputs.get(name, ErrorSums()).add(reference, test)
        floats = self.floats | {name} if test.dtype.kind == "f" else self.floats
        return replace(self, outputs={**self.outputs, name: sums}, floats=floats)

    def add_left_out(self, name: str, count: int) -> Fidelity:
        """With `count` samples of an output that cannot be compared."""
        left = {**self.left_out, name: self.left_out.get(name, 0) + count}
        return replace(self, left_out=left)

    def add_classes(self, reference: Array, test: Array) -> Fidelity:
        """With the agreement of two N x C arrays of class scores; a NaN agrees with nothing."""
        same = same_answer(reference, test)
        agreeing = self.agreeing + int(np.count_nonzero(same))
        return replace(self, agreeing=agreeing, compared=self.compared + len(same))

    @property
    def judged(self) -> dict[str, ErrorSums]:
        """The outputs that decide: those of floats, or all where there are none."""
        return {n: s for n, s in self.outputs.items() if n in self.floats or not self.floats}

    @property
    def not_finite(self) -> int:
        """Elements of the tested outputs that are NaN or Inf."""
        return sum(sums.not_finite for sums in self.outputs.values())


def sqnr_db(sums: Fidelity) -> float:
    """10 * log10(sum(r^2) / sum((r - t)^2)) of each output, in decibels; the lowest.

    Equal outputs give +inf; a NaN or Inf in the tested outputs, a reference of zeros that is not
    met, or nothing that could be compared, gives -inf.
    """
    return min((found.sqnr_db for found in sums.judged.values()), default=-math.inf)


def cosine(sums: Fidelity) -> float:
    """sum(r * t) / sqrt(sum(r^2) * sum(t^2)) of each output, -1 to 1; the lowest.

    Equal outputs give 1; otherwise an all-zero side, a NaN or Inf in the tested outputs, or
    nothing that could be compared, gives 0.
    """
    return min((found.cosine for found in sums.judged.values()), default=0.0)


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


CLOSENESS = "sqnr_db"
"""What is measured where there is no target."""

FIDELITY_METRICS: dict[str, Callable[[Fidelity], float]] = {
    "sqnr_db": sqnr_db,
    "cosine": cosine,
    "agreement": agreement,
}


def agreeing_output(outputs: Mapping[str, object], output: str | None) -> str | None:
    """The output whose class answers are compared: `output`, or the first that is class scores."""
    for name in [output] if output else outputs:
        array = as_array(outputs.get(name))
        if array is not None and array.dtype.kind == "f" and is_class_scores(array):
            return name
    return None


def class_rows(value: object, name: str) -> Array:
    """An output found by `agreeing_output` as N x C."""
    array = as_array(value)
    assert array is not None
    return class_scores(array, name)
