"""float8 E4M3 (the kind without infinities): what it holds, and which hardware multiplies it.

Four bits of exponent, three of mantissa: every number from 2^-6 to 448 keeps one part in 16, so a
range needs no choosing to the last percent. Defined in Micikevicius et al., FP8 Formats for Deep
Learning (2022); ONNX calls it FLOAT8E4M3FN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.table import FLOAT8_MAX
from trtune.configs.system.compiled import compiled

FP8 = "fp8"
TENSOR_TYPE: int = onnx.TensorProto.FLOAT8E4M3FN
OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take it."""
LEAST_CAPABILITY = (8, 9)
"""Ada; Hopper and Blackwell have it too."""


def float8_dtype() -> np.dtype[Any]:
    """The NumPy type of its codes."""
    return onnx.helper.tensor_dtype_to_np_dtype(TENSOR_TYPE)


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


def without_float8(capabilities: Iterable[str]) -> list[str]:
    """Those compute capabilities, as "8.6", whose GPUs do not multiply float8.

    >>> without_float8(["8.6", "8.9", "12.0"])
    ['8.6']
    """
    numbers = {text: tuple(int(part) for part in text.split(".")) for text in capabilities}
    return [text for text, number in numbers.items() if number < LEAST_CAPABILITY]
