"""Factors for channels: before depthwise convolutions free, before others shared with the weights.

The second is that of SmoothQuant (Xiao et al. 2023): what is hard to quantize in an activation is
moved in part into the weights that read it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FLOOR = 1 / 256
"""A channel that reaches less than this part of the largest counts as reaching it."""


def depthwise_factors(maxima: Array) -> NDArray[np.float32]:
    """Factors that let every channel reach as far as the largest; `maxima` is max|x| a channel.

    A channel below `FLOOR` of the largest is taken as that. Ones if all are zero.

    >>> depthwise_factors(np.array([4.0, 1.0, 0.0])).tolist()
    [1.0, 4.0, 256.0]
    """
    return _normalised(1 / _floored(maxima)) if np.any(maxima > 0) else _ones(maxima)


def balanced_factors(maxima: Array, weights: Array, power: float) -> NDArray[np.float32]:
    """max|W_k|^(1 - a) / max|x_k|^a for each channel k, with a = `power` in (0, 1].

    `maxima` and `weights` are max|x| and max|W| a channel, floored as in `depthwise_factors`. The
    factors are divided by that of the channel that reaches furthest, so that it stays as it is.
    """
    if not np.any(maxima > 0) or not np.any(weights > 0):
        return _ones(maxima)
    factors = _floored(weights) ** (1 - power) / _floored(maxima) ** power
    return _normalised(factors, int(np.argmax(maxima)))


def _floored(values: Array) -> NDArray[np.float64]:
    held = values.astype(np.float64)
    floored: NDArray[np.float64] = np.maximum(held, FLOOR * held.max())
    return floored


def _ones(values: Array) -> NDArray[np.float32]:
    return np.ones(values.shape, np.float32)


def _normalised(factors: NDArray[np.float64], at: int | None = None) -> NDArray[np.float32]:
    size = factors.min() if at is None else factors[at]
    normalised: NDArray[np.float32] = (factors / size).astype(np.float32)
    return normalised
