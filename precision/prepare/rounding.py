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
BLOCK = 128
LARGEST_CODE = 127


def rounded_codes(
    weights: NDArray[np.float64], moments: NDArray[np.float64], scales: Array
) -> NDArray[np.int8]:
    """int8 codes of `weights` (groups, outputs, columns), which minimise |X (W - s q)'|^2 nearly.

    `moments` is X'X (groups, columns, columns), `scales` the steps, (groups, outputs). The largest
    weight of each output keeps its code of 127 or -127, so that max|w| / 127 of the rounded weights
    is the same scale and gives the same codes. Columns that never see an input are rounded to the
    nearest. A group whose moments cannot be factored is rounded to the nearest as a whole.
    """
    held = weights.astype(np.float64)
    steps = np.where(scales > 0, scales, 1.0).astype(np.float64)
    codes = np.empty(held.shape, np.int8)
    for group in range(len(held)):
        scaled = held[group] / steps[group][:, None]
        factor, order = _factor(moments[group])
        if factor is None:
            codes[group] = _nearest(scaled)
        else:
            codes[group] = _rounded(scaled, factor, order)
    return codes


def left_of_columns(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the columns rounded after it do not explain of each column, shape (groups, columns).

    It is 1 / U_jj^2 with the factor and the order that `rounded_codes` uses; all of the column's
    energy where the moments cannot be factored.
    """
    found = np.empty(moments.shape[:2])
    for group, held in enumerate(moments):
        factor, order = _factor(held)
        if factor is None:
            found[group] = np.diag(held)
        else:
            found[group, order] = 1 / np.diag(factor) ** 2
    return found


def _nearest(scaled: Array) -> NDArray[np.int8]:
    return np.clip(np.rint(scaled), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def _factor(moments: NDArray[np.float64]) -> tuple[NDArray[np.float64] | None, NDArray[np.int64]]:
    """The upper Cholesky factor of the damped inverse in falling order of the diagonal."""
    diagonal = np.diag(moments)
    order = np.argsort(-diagonal, kind="stable")
    mean = float(diagonal.mean())
    if not np.isfinite(moments).all() or mean <= 0:
        return None, order
    ordered = moments[np.ix_(order, order)].copy()
    ordered[np.diag_indices_from(ordered)] += DAMPING * mean
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(ordered))
        factor = np.linalg.cholesky(inverse.T @ inverse).T
    except np.linalg.LinAlgError:
        return None, order
    return factor, order


def _rounded(
    scaled: NDArray[np.float64], factor: NDArray[np.float64], order: NDArray[np.int64]
) -> NDArray[np.int8]:
    """Round column by column, in blocks so that most of the passing on is one matrix product."""
    largest = np.argmax(np.abs(scaled), axis=1)
    whole = _nearest(scaled)[np.arange(len(scaled)), largest]
    kept = np.zeros(scaled.shape, bool)
    kept[np.arange(len(scaled)), largest] = np.abs(whole) == LARGEST_CODE
    values, kept = scaled[:, order].copy(), kept[:, order]
    target = _nearest(scaled)[:, order]
    codes = np.empty(values.shape, np.int8)
    width = values.shape[1]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = np.empty((len(values), end - start))
        for column in range(start, end):
            code = np.clip(np.rint(values[:, column]), -LARGEST_CODE, LARGEST_CODE)
            code = np.where(kept[:, column], target[:, column], code)
            codes[:, column] = code
            error = (values[:, column] - code) / factor[column, column]
            values[:, column + 1 : end] -= np.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        values[:, end:] -= errors @ factor[start:end, end:]
    found = np.empty_like(codes)
    found[:, order] = codes
    return found
