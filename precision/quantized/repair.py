"""From the scales of a quantized model to those that TensorRT takes: symmetric int8, zero point 0.

Where the same values come out, the repair is exact. Where a range has to be made symmetric, the
model computes something else afterwards, so that needs the user's word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.float8 import float8_weight_scales
from trtune.calibrate.table import FLOAT8_MAX
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.rewrite import QMAX, weight_scales
from trtune.precision.plan.rules import weight_axis
from trtune.precision.quantized.find import (
    INT8_RANGE,
    Pair,
    WeightSource,
    codes_of,
    dequantized,
    spread,
)

TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Scales for int8 with zero point 0: one, or one an output channel (float32).

    `exact` says that the values stay what they were.
    """

    scales: NDArray[np.float32]
    exact: bool


@dataclass(frozen=True, slots=True)
class Requantized:
    """A tensor whose range was made symmetric: the largest step (scale), and the range, before and
    after. `channels` is how many scales it has now.

    With a `shift` the levels are those of the file: the tensor is quantized less that number, which
    its readers add again (`with_shifts`).
    """

    tensor: str
    role: str
    step_before: float
    step_after: float
    range_before: tuple[float, float]
    range_after: tuple[float, float]
    channels: int = 1
    shift: float = 0.0


def code_range(dtype: str) -> tuple[int, int]:
    """Smallest and largest code of an integer type.

    >>> code_range("uint8")
    (0, 255)
    """
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def float_range(pair: Pair) -> tuple[float, float]:
    """The values of the smallest and the largest code."""
    assert pair.scale is not None
    low, high = (-FLOAT8_MAX, FLOAT8_MAX) if pair.codes == "fp8" else code_range(pair.dtype)
    scale = pair.scale.astype(np.float64)
    lows, highs = (low - pair.zero_points) * scale, (high - pair.zero_points) * scale
    return float(np.min(lows)), float(np.max(highs))


def cuts_at_zero(pair: Pair) -> bool:
    """Whether the smallest code stands for 0, so that the pair does what a Relu does as well."""
    return pair.codes == "int8" and bool(np.all(pair.zero_points == code_range(pair.dtype)[0]))


def is_shifted(pair: Pair) -> bool:
    """Whether the codes are int8 ones with 128 added: uint8 with zero point 128 everywhere."""
    return pair.dtype == "uint8" and bool(np.all(pair.zero_points == 128))


def symmetric_activation(pair: Pair) -> Symmetric:
    """One scale for an activation, of its own codes where they are float8.

    int8 with zero point 0, and uint8 with zero point 128, keep theirs. Otherwise it is the
    smallest one with which -128..127 covers the whole range: for uint8 with zero point 0 that is
    255 / 127 of the step, for zero point 133 it is 133 / 128. Of several scales it is the largest.
    """
    assert pair.scale is not None
    scales = pair.scale.astype(np.float32).reshape(-1)
    if pair.codes == "fp8":
        return Symmetric(scales.max().reshape(1), bool(np.all(scales == scales[0])))
    plain = pair.dtype == "int8" and not np.any(pair.zero_points)
    if plain or is_shifted(pair):
        return Symmetric(scales.max().reshape(1), bool(np.all(scales == scales[0])))
    low, high = float_range(pair)
    largest = max(-low / -INT8_RANGE[0], high / INT8_RANGE[1], TINY)
    return Symmetric(np.array([largest], np.float32), False)


def channel_axis(node: onnx.NodeProto, source: WeightSource) -> int:
    """The axis of a node's weights that their scales go along: its output channels, but for a
    ConvTranspose whose scales came along axis 0, as NVIDIA's own toolkits write them."""
    kept = node.op_type == "ConvTranspose" and source.pair.per_channel and source.axis == 0
    return 0 if kept else weight_axis(node)


def symmetric_weights(view: GraphView, source: WeightSource, axis: int) -> Symmetric:
    """Scales for weights whose node wants one a channel along `axis`.

    A channel whose codes, less the zero point, fit int8 keeps its scale, so that its weights stay
    what they are; the others get max|w| / 127. Scales that belong to another axis are made anew.
    """
    pair = source.pair
    assert pair.scale is not None
    value = weight_value(view, source)
    channels = value.shape[axis]
    if pair.codes == "fp8":
        return _float8_weights(pair, value, axis, same_axis=source.axis == axis)
    if pair.per_channel and source.axis != axis:
        return Symmetric(weight_scales(value, axis), False)
    scales = np.broadcast_to(pair.scale.astype(np.float32).reshape(-1), (channels,)).copy()
    whole = codes_of(view, pair) - spread(pair.zero_points, value.ndim, pair.axis)
    whole = whole if source.order is None else whole.transpose(source.order)
    rest = tuple(k for k in range(whole.ndim) if k != axis)
    low, high = whole.min(axis=rest, initial=0), whole.max(axis=rest, initial=0)
    fits = (low >= INT8_RANGE[0]) & (high <= INT8_RANGE[1])
    broken = ~(scales >= TINY)
    changed = ~fits | broken
    scales[changed] = weight_scales(value, axis)[changed]
    zeros = ~np.any(value != 0, axis=rest)
    return Symmetric(scales, bool(np.all((fits & ~broken) | zeros)))


def _float8_weights(
    pair: Pair, value: NDArray[np.float32], axis: int, *, same_axis: bool
) -> Symmetric:
    """The scales as they are, or max|w| / 448 if they go along another axis."""
    assert pair.scale is not None
    if pair.per_channel and not same_axis:
        return Symmetric(float8_weight_scales(value, axis), False)
    scales = pair.scale.astype(np.float32).reshape(-1)
    return Symmetric(np.broadcast_to(scales, (value.shape[axis],)).copy(), True)


def weight_value(view: GraphView, source: WeightSource) -> NDArray[np.float32]:
    """The weights as float32, as the node reads them: the float ones in front of a
    QuantizeLinear, as far as its codes reach, or what stored codes stand for."""
    pair = source.pair
    if pair.quantize:
        value = _within_codes(pair, view.constant(pair.source).astype(np.float32))
    else:
        value = dequantized(view, pair)
    return value if source.order is None else np.ascontiguousarray(value.transpose(source.order))


def _within_codes(pair: Pair, value: NDArray[np.float32]) -> NDArray[np.float32]:
    """`value` cut to what the codes of `pair` hold, unless those are int8's around 0."""
    plain = pair.codes == "fp8" or is_shifted(pair)
    if plain or (pair.dtype == "int8" and not np.any(pair.zero_points)):
        return value
    assert pair.scale is not None
    scale = spread(pair.scale.astype(np.float32), value.ndim, pair.axis)
    zeros = spread(pair.zero_points, value.ndim, pair.axis)
    low, high = ((end - zeros).astype(np.float32) * scale for end in code_range(pair.dtype))
    return np.clip(value, low, high)


def int8_range(scale: float) -> tuple[float, float]:
    """The values of the codes -128 and 127.

    >>> int8_range(0.5)
    (-64.0, 63.5)
    """
    return INT8_RANGE[0] * scale, INT8_RANGE[1] * scale


def requantized_activation(pair: Pair, scale: float) -> Requantized:
    """What a new symmetric scale makes of an activation's step and range."""
    assert pair.scale is not None
    before = float(pair.scale.max())
    after = int8_range(scale)
    return Requantized(pair.source, "activation", before, scale, float_range(pair), after)


def requantized_weights(pair: Pair, name: str, scales: NDArray[np.float32]) -> Requantized:
    """What new symmetric scales make of the steps and range of weights."""
    assert pair.scale is not None
    largest = float(scales.max())
    return Requantized(
        tensor=name,
        role="weight",
        step_before=float(pair.scale.max()),
        step_after=largest,
        range_before=float_range(pair),
        range_after=(-QMAX * largest, QMAX * largest),
        channels=int(scales.size),
    )


def widest(changes: Iterable[Requantized]) -> list[Requantized]:
    """Those whose step grew most first; ties by name."""
    return sorted(changes, key=lambda c: (-c.step_after / c.step_before, c.tensor))
