"""The columns that a convolution or product multiplies its weights with, and their moments.

A weight of C output channels in G groups is seen as (G, C / G, columns); the moments are X'X of a
sample of positions, one matrix a group: all that rounding has to know of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.precision.graph.proto import attribute

Array = NDArray[Any]

SAMPLED = 256
"""Positions sampled of each picture."""

WIDEST = 4608
"""More columns than this a group are not rounded together: the matrix would take too much."""


def grouped(node: onnx.NodeProto, weights: Array) -> NDArray[np.float64] | None:
    """`weights` as (groups, outputs a group, columns); None for what is not rounded here."""
    held = weights.astype(np.float64)
    if node.op_type == "Conv":
        group = int(attribute(node, "group", 1))
        return held.reshape(group, len(held) // group, -1)
    if node.op_type == "Gemm":
        return (held if attribute(node, "transB", 0) else held.T)[None]
    if node.op_type == "MatMul" and held.ndim == 2:
        return held.T[None]
    return None


def ungrouped(node: onnx.NodeProto, values: Array, shape: tuple[int, ...]) -> Array:
    """What `grouped` gave, in the `shape` of the weights again."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return values.reshape(shape)
    return np.ascontiguousarray(values[0].T)


def columns(
    node: onnx.NodeProto, data: Array, weights: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Sampled inputs of the node's products, shape (groups, positions, columns).

    At most `SAMPLED` positions a row of the batch, drawn by `rng`.
    """
    return columns_at(node, data, weights, positions(node, data.shape, weights, rng))


def positions(
    node: onnx.NodeProto,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Where `columns_at` looks in an input of this `shape`: for a convolution in each picture, else
    in all rows; at most `SAMPLED` a row of the batch, drawn by `rng`."""
    if node.op_type != "Conv":
        total, count = int(np.prod(shape[:-1])), SAMPLED * max(shape[0], 1)
        if total <= count:
            return [np.arange(total)]
        return [np.sort(rng.choice(total, count, replace=False))]
    total = int(np.prod(_Windows.of(node, shape, weights).sizes))
    count = min(SAMPLED, total)
    return [np.sort(rng.choice(total, count, replace=False)) for _ in range(shape[0])]


def columns_at(
    node: onnx.NodeProto,
    data: Array,
    weights: tuple[int, ...],
    places: Sequence[NDArray[np.int64]],
) -> NDArray[np.float32]:
    """The inputs of the node's products at `positions`, shape (groups, positions, columns)."""
    if node.op_type != "Conv":
        rows = data.reshape(-1, data.shape[-1])
        taken = rows if len(places[0]) == len(rows) else rows[places[0]]
        return np.ascontiguousarray(taken, np.float32)[None]
    windows = _Windows.of(node, data.shape, weights)
    padded = np.pad(data, [(0, 0), (0, 0), *windows.pads])
    group = int(attribute(node, "group", 1))
    parts = [
        windows.at(picture, at).reshape(len(at), group, -1)
        for picture, at in zip(padded, places, strict=True)
    ]
    return np.ascontiguousarray(np.moveaxis(np.concatenate(parts), 1, 0))


@dataclass(frozen=True, slots=True)
class _Windows:
    """Where the windows of a convolution lie in a padded picture; `sizes` is how many along each
    axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, node: onnx.NodeProto, shape: tuple[int, ...], weights: tuple[int, ...]) -> _Windows:
        spatial, kernel = len(shape) - 2, weights[2:]
        strides = list(attribute(node, "strides", [1] * spatial))
        dilations = list(attribute(node, "dilations", [1] * spatial))
        extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        pads = _pads(node, shape[2:], extent, strides)
        around = tuple(zip(pads[:spatial], pads[spatial:], strict=True))
        sizes = tuple(
            (shape[2 + k] + sum(around[k]) - extent[k]) // strides[k] + 1 for k in range(spatial)
        )
        return cls(tuple(kernel), tuple(strides), tuple(dilations), around, sizes)

    def at(self, picture: Array, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The windows at `places`, shape (places, channels, *kernel)."""
        corners = np.unravel_index(places, self.sizes)
        found = np.empty((len(places), len(picture), *self.kernel), np.float32)
        for offset in np.ndindex(*self.kernel):
            index = tuple(
                corner * stride + step * dilation
                for corner, stride, step, dilation in zip(
                    corners, self.strides, offset, self.dilations, strict=True
                )
            )
            found[(slice(None), slice(None), *offset)] = picture[(slice(None), *index)].T
        return found


def _pads(
    node: onnx.NodeProto, shape: tuple[int, ...], extent: list[int], strides: list[int]
) -> list[int]:
    auto = attribute(node, "auto_pad", b"NOTSET")
    if auto in (b"NOTSET", b""):
        return list(attribute(node, "pads", [0] * (2 * len(shape))))
    if auto == b"VALID":
        return [0] * (2 * len(shape))
    before, after = [], []
    for size, reach, stride in zip(shape, extent, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == b"SAME_UPPER" else large)
        after.append(large if auto == b"SAME_UPPER" else small)
    return before + after


def moments(sampled: Array) -> NDArray[np.float64]:
    """X'X of each group, shape (groups, columns, columns); products in float32, sums in float64."""
    turned = sampled.transpose(0, 2, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[np.float64] = np.matmul(turned, sampled).astype(np.float64)
    if not np.isfinite(found).all():  # values whose squares are beyond float32
        found = np.matmul(turned.astype(np.float64), sampled.astype(np.float64))
    return found
