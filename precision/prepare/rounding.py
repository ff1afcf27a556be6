"""Integer rounding of weights on the inputs they meet: the error of one is passed to the next.

The algorithm is that of GPTQ (Frantar et al. 2023), after optimal brain surgeon: with H = X'X of
the inputs, columns are rounded one after the other by falling diagonal of H, and what is lost is
made up for by the columns not yet rounded, as far as the inputs go together. Everything is float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DAMPING = 0.01
BLOCK = 32
LARGEST_CODE = 127
AT_ONCE = 1 << 21
"""Elements of the moments of the groups that are factored together."""

TRIANGLE = 64
"""A triangular matrix up to this wide is inverted as it is, a wider one by quarters."""


def rounded_codes(
    weights: NDArray[np.float64], moments: NDArray[np.float64], scales: Array
) -> NDArray[np.int8]:
    """int8 codes of `weights` (groups, outputs, columns), which minimise |X (W - s q)'|^2 nearly.

    `moments` is X'X (groups, columns, columns), `scales` the steps, (groups, outputs). The largest
    weight of each output keeps its code of 127 or -127, so that max|w| / 127 of the rounded weights
    is the same scale and gives the same codes. Columns that never see an input are rounded to the
    nearest. A group whose moments cannot be factored is rounded to the nearest as a whole.
    """
    steps = np.where(scales > 0, scales, 1.0).astype(np.float64)
    scaled = weights.astype(np.float64) / steps[:, :, None]
    codes = _nearest(scaled)
    for some in _together(moments):
        factors, orders, sound = _factored(moments[some])
        kept = np.arange(len(moments))[some][sound]
        if len(kept):
            codes[kept] = _rounded(scaled[kept], factors[sound], orders[sound])
    return codes


def left_of_columns(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the columns rounded after it do not explain of each column, shape (groups, columns).

    It is 1 / U_jj^2 with the factor and the order that `rounded_codes` uses; all of the column's
    energy where the moments cannot be factored.
    """
    found: NDArray[np.float64] = np.diagonal(moments, axis1=1, axis2=2).copy()
    for some in _together(moments):
        factors, orders, sound = _factored(moments[some])
        left = 1 / np.diagonal(factors, axis1=1, axis2=2) ** 2
        back = np.empty(left.shape)
        np.put_along_axis(back, orders, left, axis=1)
        found[some][sound] = back[sound]
    return found


def _together(moments: Array) -> list[slice]:
    """The groups whose moments are factored together."""
    groups, width = moments.shape[:2]
    step = max(AT_ONCE // max(width**2, 1), 1)
    return [slice(start, start + step) for start in range(0, groups, step)]


def _nearest(scaled: Array) -> NDArray[np.int8]:
    return np.clip(np.rint(scaled), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def _factored(
    moments: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """For each group the upper Cholesky factor of the damped inverse in falling order of the
    diagonal, that order, and whether there is a factor: where there is none it is the identity."""
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    orders = np.argsort(-diagonal, axis=1, kind="stable")
    mean = diagonal.mean(axis=1)
    sound = np.isfinite(moments).all(axis=(1, 2)) & (mean > 0)
    ordered = np.take_along_axis(moments, orders[:, :, None], axis=1)
    ordered = np.take_along_axis(ordered, orders[:, None, :], axis=2)
    ordered[~sound] = 0
    each = np.arange(moments.shape[1])
    ordered[:, each, each] += np.where(sound, DAMPING * mean, 1.0)[:, None]
    try:
        factors = _factor(ordered)
    except np.linalg.LinAlgError:
        factors = np.zeros_like(ordered)
        factors[:] = np.eye(len(each))
        for group in np.flatnonzero(sound):
            try:
                factors[group] = _factor(ordered[group : group + 1])[0]
            except np.linalg.LinAlgError:
                sound[group] = False
    return factors, orders, sound


def _factor(held: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper Cholesky factor U of each inverse, U'U = inv(H).

    With H = R R', R upper, it is the inverse of R; R is the lower factor of the matrix that is
    turned around, turned back.
    """
    lower: Any = np.linalg.cholesky(held[:, ::-1, ::-1])
    return _inverse(np.ascontiguousarray(lower[:, ::-1, ::-1]))


def _inverse(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverses of upper triangular matrices."""
    width = upper.shape[-1]
    if width <= TRIANGLE:
        found: Any = np.linalg.inv(upper)
        return np.asarray(found, np.float64)
    half = width // 2
    result: NDArray[np.float64] = np.zeros(upper.shape)
    first, last = _inverse(upper[:, :half, :half]), _inverse(upper[:, half:, half:])
    result[:, :half, :half], result[:, half:, half:] = first, last
    result[:, :half, half:] = -(first @ upper[:, :half, half:] @ last)
    return result


def _rounded(
    scaled: NDArray[np.float64], factors: NDArray[np.float64], orders: NDArray[np.int64]
) -> NDArray[np.int8]:
    """Round column by column, in blocks so that most of the passing on is one matrix product.

    All groups go together; inside, columns come before outputs.
    """
    target = _nearest(scaled)
    largest = np.argmax(np.abs(scaled), axis=2)[:, :, None]
    kept = np.zeros(scaled.shape, bool)
    whole = np.abs(np.take_along_axis(target, largest, axis=2)) == LARGEST_CODE
    np.put_along_axis(kept, largest, whole, axis=2)
    values, kept, target = (
        np.ascontiguousarray(np.take_along_axis(a, orders[:, None, :], axis=2).transpose(0, 2, 1))
        for a in (scaled, kept, target)
    )
    codes = np.empty(values.shape, np.int8)
    width = values.shape[1]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = np.empty((len(values), end - start, values.shape[2]))
        for column in range(start, end):
            code = np.clip(np.rint(values[:, column]), -LARGEST_CODE, LARGEST_CODE)
            code = np.where(kept[:, column], target[:, column], code)
            codes[:, column] = code
            row = factors[:, column]
            error = (values[:, column] - code) / row[:, column, None]
            values[:, column + 1 : end] -= row[:, column + 1 : end, None] * error[:, None, :]
            errors[:, column - start] = error
        values[:, end:] -= factors[:, start:end, end:].transpose(0, 2, 1) @ errors
    found = np.empty(scaled.shape, np.int8)
    np.put_along_axis(found, orders[:, None, :], codes.transpose(0, 2, 1), axis=2)
    return found
