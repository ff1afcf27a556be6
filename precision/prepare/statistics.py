"""What each channel of a tensor reaches, robust against single pictures, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

QUANTILE = 0.9
"""A channel's reach is what this part of the pictures stay within."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Largest and smallest value of each channel in each picture, shape (pictures, channels)."""

    high: NDArray[np.float32]
    low: NDArray[np.float32]

    @property
    def maxima(self) -> NDArray[np.float64]:
        """max|x| of each channel: the `QUANTILE` over the pictures that use the channel.

        One picture, however far out, moves it little; with fewer than eight pictures it is the
        maximum.
        """
        return _robust(np.maximum(self.high, -self.low))

    @property
    def lowest(self) -> float:
        """The smallest value of all."""
        return float(self.low.min())


def _robust(values: Array) -> NDArray[np.float64]:
    """The quantile of each column, but at least half its runner-up."""
    if len(values) < 8:
        highest: NDArray[np.float64] = values.max(axis=0).astype(np.float64)
        return highest
    usual: NDArray[np.float64] = np.quantile(values.astype(np.float64), QUANTILE, axis=0)
    second = np.partition(values, -2, axis=0)[-2].astype(np.float64)
    wide = np.minimum(second, 2 * np.maximum(usual, np.median(usual)))
    robust: NDArray[np.float64] = np.maximum(usual, 0.5 * wide)
    return robust


def reach_of(values: Array, pictures: int, axis: int) -> Reach | None:
    """The reach of a batch whose first axis are `pictures`, with channels along `axis`.

    Rows that are no pictures (a sequence in front of the batch) count as pictures if they are a
    multiple of their number; None if they are not.
    """
    if values.ndim < 2 or len(values) % pictures:
        return None
    rows = np.moveaxis(values, axis, 1).reshape(len(values), values.shape[axis], -1)
    high, low = rows.max(axis=2), rows.min(axis=2)
    each = len(values) // pictures
    high = high.reshape(pictures, each, -1).max(axis=1)
    low = low.reshape(pictures, each, -1).min(axis=1)
    return Reach(high, low)


def merged(parts: list[Reach]) -> Reach:
    """The reach over the pictures of all parts."""
    return Reach(np.concatenate([p.high for p in parts]), np.concatenate([p.low for p in parts]))
