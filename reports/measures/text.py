"""Language models: perplexity, the next token, and tokens that agree with FP32's.

Logits are N x T x V. Labels are N x T token numbers, what stands at each place; below 0 (-100, as
PyTorch has it) a place does not count. Without labels the input tokens are taken, one place on.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch
from trtune.reports.measures.base import Array, Mean, Outputs, as_array, named_output, shapes_of


def token_logits(outputs: Outputs, output: str | None) -> Array:
    """The output N x T x V of floats; the one with the largest V of several.

    Raises ModelError if there is none.
    """
    found = []
    for name in [output] if output else outputs:
        array = as_array(named_output(outputs, name))
        if array is not None and array.ndim == 3 and array.dtype.kind == "f":
            found.append(array)
    if not found:
        raise ModelError(
            f"no output is logits over tokens, N x T x V (found: {shapes_of(outputs)})"
        )
    return max(found, key=lambda array: array.shape[2])


def next_tokens(batch: Batch, logits: Array) -> tuple[Array, NDArray[np.int64]]:
    """Logits and the token that each predicts, N x T' x V and N x T'; below 0 does not count.

    Raises DataError if there are neither labels nor input tokens of that shape.
    """
    labels = batch.labels
    if labels is not None and not isinstance(labels, tuple) and labels.shape == logits.shape[:2]:
        wanted = labels.astype(np.int64)
    else:
        tokens = [array for array in batch.feeds.values()
                  if array.dtype.kind in "iu" and array.shape == logits.shape[:2]]  # fmt: skip
        if labels is not None or not tokens:
            raise DataError(
                f"labels of N x T = {logits.shape[:2]} tokens are needed, or an input of such "
                f"tokens (first item: {batch.items[0]})"
            )
        logits, wanted = logits[:, :-1], _masked(tokens, batch)[:, 1:]
    if wanted.max(initial=-1) >= logits.shape[2]:
        raise DataError(
            f"token {int(wanted.max())} of the batch of {batch.items[0]} is beyond the model's "
            f"{logits.shape[2]}"
        )
    return logits, wanted


def _masked(tokens: list[Array], batch: Batch) -> NDArray[np.int64]:
    """The input tokens, -1 where a second input of that shape is a mask with 0 there."""
    ids = max(tokens, key=lambda array: int(array.max(initial=0))).astype(np.int64)
    for array in tokens:
        if array.max(initial=0) <= 1 and ids.max(initial=0) > 1:
            ids = np.where(array.astype(bool) | (array.max(initial=0) == 0), ids, -1)
    return ids


class Perplexity:
    """exp of the mean negative log-likelihood of the next token, over all places that count."""

    def __init__(self, output: str | None = None) -> None:
        self._output = output
        self._sums: list[tuple[float, int]] = []

    def start(self) -> None:
        """Forget everything."""
        self._sums = []

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Take in one batch."""
        logits, wanted = next_tokens(batch, token_logits(outputs, self._output))
        for row, tokens in zip(logits, wanted, strict=True):
            counted = tokens >= 0
            values = row[counted].astype(np.float64)
            top = values.max(axis=1, initial=-np.inf)
            total = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
            own = np.take_along_axis(values, tokens[counted][:, None], axis=1)[:, 0]
            self._sums.append((float((total - own).sum()), int(counted.sum())))

    @property
    def count(self) -> int:
        """Sequences taken in."""
        return len(self._sums)

    def result(self) -> float:
        """Perplexity, 1 or more; infinite where the likelihood is none."""
        return self.weighted(np.ones(self.count))

    def weighted(self, weights: NDArray[np.float64]) -> float:
        """Perplexity if each sequence counted so often."""
        sums = np.array(self._sums, np.float64).reshape(-1, 2)
        total = float(weights @ sums[:, 1])
        if not total:
            return math.nan
        mean = float(weights @ sums[:, 0]) / total
        return math.exp(mean) if mean < 700 else math.inf


class NextToken(Mean):
    """The share of places whose highest logit is the next token; the mean over sequences."""

    highest = 1.0

    def __init__(self, output: str | None = None) -> None:
        super().__init__()
        self._output = output

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Take in one batch."""
        logits, wanted = next_tokens(batch, token_logits(outputs, self._output))
        right = (logits.argmax(axis=2) == wanted) & (wanted >= 0)
        counted = np.maximum((wanted >= 0).sum(axis=1), 1)
        self.add(right.sum(axis=1) / counted)


class TokenAgreement(Mean):
    """The share of places with FP32's highest logit; the mean over sequences."""

    highest = 1.0

    def __init__(self, output: str | None = None) -> None:
        super().__init__()
        self._output = output

    def update_pair(self, reference: Outputs, outputs: Outputs, batch: Batch) -> None:
        """Take in both models' outputs."""
        theirs, mine = (token_logits(o, self._output) for o in (reference, outputs))
        self.add((theirs.argmax(axis=2) == mine.argmax(axis=2)).mean(axis=1))
