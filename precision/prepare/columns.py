"""The columns that a convolution or product multiplies its weights with, and their moments.

A weight of C output channels in G groups is seen as (G, C / G, columns); the moments are X'X of a
sample of positions, one matrix a group: all that rounding has to know of the data.
"""

from __future__ import annotations

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
    if node.op_type != "Conv":
        rows = data.reshape(-1, data.shape[-1])
        count = SAMPLED * max(len(data), 1)
        if len(rows) > count:
            rows = rows[np.sort(rng.choice(len(rows), count, replace=False))]
        return np.ascontiguousarray(rows, np.float32)[None]
    return _conv_columns(node, data, weights, rng)


def _conv_columns(
    node: onnx.NodeProto, data: Array, weights: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.float32]:
    spatial = data.ndim - 2
    kernel = weights[2:]
    strides = list(attribute(node, "strides", [1] * spatial))
    dilations = list(attribute(node, "dilations", [1] * spatial))
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = _pads(node, data.shape[2:], extent, strides)
    padded = np.pad(data, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
    sizes = [(padded.shape[2 + k] - extent[k]) // strides[k] + 1 for k in range(spatial)]
    total = int(np.prod(sizes))
    group = int(attribute(node, "group", 1))
    parts = []
    for picture in padded:
        at = np.sort(rng.choice(total, min(SAMPLED, total), replace=False))
        places = np.unravel_index(at, sizes)
        windows = np.empty((len(at), data.shape[1], *kernel), np.float32)
        for offset in np.ndindex(*kernel):
            index = tuple(places[k] * strides[k] + offset[k] * dilations[k] for k in range(spatial))
            windows[(slice(None), slice(None), *offset)] = picture[(slice(None), *index)].T
        parts.append(windows.reshape(len(at), group, -1))
    return np.ascontiguousarray(np.moveaxis(np.concatenate(parts), 1, 0))


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
    found: NDArray[np.float64] = np.matmul(sampled.transpose(0, 2, 1), sampled).astype(np.float64)
    return found
