"""float8 E4M3 (the kind without infinities): rounding to it, and ranges for it.

Four bits of exponent, three of mantissa: every number from 2^-6 to 448 keeps one part in 16, so a
range needs no choosing to the last percent. Clipping gains little there and costs much: the largest
value is mostly right, and what entropy finds for 127 equal steps says nothing. Defined in
Micikevicius et al., FP8 Formats for Deep Learning (2022); ONNX calls it FLOAT8E4M3FN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.histogram import Histogram, bin_edges
from trtune.calibrate.methods import amax_percentile
from trtune.calibrate.table import FLOAT8_MAX, CalibrationTable
from trtune.configs.system.compiled import compiled
from trtune.configs.values import PERCENTILE

LARGEST_FIRST = 2.0 ** -(np.arange(0, 65) / 16)
"""Parts of the maximum that the least square error is looked for at: down to 1/16."""


def float8_dtype() -> np.dtype[Any]:
    """The NumPy type of its codes."""
    return onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN)


def float8_codes(values: NDArray[np.floating[Any]]) -> NDArray[Any]:
    """`values` as float8 codes: the nearest, ties to even, saturated at 448; same shape.

    As QuantizeLinear does it with a scale of 1: infinities saturate too, and NaN stays NaN.
    """
    held = np.clip(np.asarray(values, np.float32), -FLOAT8_MAX, FLOAT8_MAX)
    codes: NDArray[Any] = held.astype(float8_dtype())
    return codes


def through_float8(values: NDArray[np.floating[Any]], scale: float) -> NDArray[np.float32]:
    """`values` through float8 and back: nearest(x / scale) * scale, saturated; same shape.

    The arithmetic of QuantizeLinear and DequantizeLinear in float32.

    >>> through_float8(np.float32([0.0, 1.06, 1000.0, -17.0]), 1.0).tolist()
    [0.0, 1.0, 448.0, -16.0]
    """
    step = np.float32(scale)
    with np.errstate(over="ignore"):  # what becomes infinite saturates
        scaled = np.ascontiguousarray(values, np.float32) / step
    result: NDArray[np.float32] = np.clip(scaled, -FLOAT8_MAX, FLOAT8_MAX, out=scaled)
    flat = result.reshape(-1)
    _round(flat, flat.view(np.uint32))
    result *= step
    return result


@compiled()
def _round(values: Any, bits: Any) -> None:
    """Round in place to three bits behind the leading one, ties to even; below 2^-6 to 2^-9.

    `bits` are the same numbers as unsigned integers: half a unit is added, less a bit in a tie that
    is even already, and what lies behind the third bit is cleared.
    """
    for i in range(values.size):
        x = values[i]
        if abs(x) < np.float32(2.0**-6):
            values[i] = np.rint(x * np.float32(512)) / np.float32(512)
        elif x == x:
            found = bits[i]
            even = (found >> np.uint32(20)) & np.uint32(1)
            bits[i] = (found + np.uint32(0x7FFFF) + even) & np.uint32(0xFFF00000)


def float8_weight_scales(weights: NDArray[np.floating[Any]], axis: int) -> NDArray[np.float32]:
    """Scales of weights, max|w| / 448 of each channel along `axis`, float32 of shape (channels,).

    A channel whose scale would be subnormal, one of zeros above all, gets scale 1.

    >>> float8_weight_scales(np.float32([[4.48, -1.0], [0, 0]]), 0).tolist()
    [0.009999999776482582, 1.0]
    """
    rest = tuple(i for i in range(weights.ndim) if i != axis)
    amax = np.abs(weights).max(axis=rest, initial=0).astype(np.float32)
    scales: NDArray[np.float32] = amax / np.float32(FLOAT8_MAX)
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def float8_error(histogram: Histogram, amax: float) -> float:
    """Sum over the values of a tensor of (x - Q(x))^2 in float8 with this amax, by its histogram.

    Q is the nearest of float8's numbers times amax / 448, at most amax. A bin counts as its middle.
    Raises ValueError unless amax is above zero.
    """
    if not amax > 0:
        raise ValueError(f"amax is {amax}; it must be above zero")
    values, counts = _filled(histogram)
    scale = float(np.float32(amax) / np.float32(FLOAT8_MAX))
    found = through_float8(values.astype(np.float32), scale).astype(np.float64)
    return float((counts * (values - found) ** 2).sum())


def _filled(histogram: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles and counts of the filled bins above zero."""
    filled = np.flatnonzero(histogram.counts[1:]) + 1
    edges = bin_edges()
    middles = (edges[filled] + np.minimum(edges[filled + 1], histogram.maximum)) / 2
    return middles, histogram.counts[filled].astype(np.float64)


def amax_float8(histogram: Histogram) -> float:
    """The amax with the least mean squared error of x against its float8 value; 0 for zeros.

    Tried are 64 parts of the maximum, 4 % apart, of which the largest of the best counts.
    """
    if histogram.maximum == 0:
        return 0.0
    amaxes = histogram.maximum * LARGEST_FIRST
    errors = [float8_error(histogram, float(amax)) for amax in amaxes]
    return float(amaxes[int(np.argmin(errors))])


def float8_amaxes(
    histograms: Mapping[str, Histogram], method: str, *, percentile: float = PERCENTILE
) -> dict[str, float]:
    """Range -> amax for float8 by a method for int8: `max` and `percentile` are what they are, and
    every other is the least square error in float8."""
    if method == "max":
        return {name: histogram.maximum for name, histogram in histograms.items()}
    if method == "percentile":
        return {n: amax_percentile(h, percentile=percentile) for n, h in histograms.items()}
    return dict(zip(histograms, map(amax_float8, histograms.values()), strict=True))


def with_float8(table: CalibrationTable, amaxes: Mapping[str, float]) -> CalibrationTable:
    """`table` with scales for float8 from `amaxes`, where those of int8 do not give them.

    A tensor of zeros keeps the scale of int8.
    """
    found = {
        tensor: float(np.float32(amax) / np.float32(FLOAT8_MAX))
        for tensor, amax in amaxes.items()
        if amax > 0 and np.float32(amax) != np.float32(table.amax(tensor))
    }
    return replace(table, float8=found)
