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

from trtune.configs.system.compiled import compiled
from trtune.precision.graph.proto import attribute

Array = NDArray[Any]

SAMPLED = 256
"""Positions sampled of each picture."""

NARROW = 32
"""Groups of so few columns are summed here: a product of such matrices is mostly its own call."""

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
    places = positions(node, data.shape, weights, rng)
    return weighted_columns(node, data, weights, places, np.ones(len(data)))[0]


def positions(
    node: onnx.NodeProto,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Where `weighted_columns` looks in an input of this `shape`: for a convolution in each
    picture, else in all rows; at most `SAMPLED` a row of the batch, drawn by `rng`."""
    if node.op_type != "Conv":
        total, count = int(np.prod(shape[:-1])), SAMPLED * max(shape[0], 1)
        if total <= count:
            return [np.arange(total)]
        return [np.sort(rng.choice(total, count, replace=False))]
    total = int(np.prod(_Windows.of(node, shape, weights).sizes))
    count = min(SAMPLED, total)
    return [np.sort(rng.choice(total, count, replace=False)) for _ in range(shape[0])]


def weighted_columns(
    node: onnx.NodeProto,
    data: Array,
    weights: tuple[int, ...],
    places: Sequence[NDArray[np.int64]],
    counts: NDArray[np.float64],
) -> tuple[NDArray[np.float32], NDArray[np.float64], float]:
    """The inputs of the node's products at `positions`, shape (groups, positions, columns), those
    of row k of the batch times the root of `counts[k]`, as often as it counts; their sums, (groups,
    columns), each as often as it counts; and how many positions that makes."""
    roots = np.sqrt(counts)
    if node.op_type != "Conv":
        rows = data.reshape(-1, data.shape[-1])
        taken = rows if len(places[0]) == len(rows) else rows[places[0]]
        each = counts[places[0] // max(len(rows) // max(len(data), 1), 1)]
        if not np.all(each == 1):
            taken = taken * np.sqrt(each)[:, None]
        sampled = np.ascontiguousarray(taken, np.float32)[None]
        return sampled, (np.sqrt(each) @ sampled[0].astype(np.float64))[None], float(each.sum())
    windows = _Windows.of(node, data.shape, weights)
    group, kernel = int(attribute(node, "group", 1)), int(np.prod(weights[2:]))
    each_group = data.shape[1] // group
    shape = (group, sum(map(len, places)), each_group * kernel)
    # Narrow groups lie with their positions together, which is how their moments are summed.
    narrow = shape[2] <= NARROW
    held = np.empty((shape[0], shape[2], shape[1]) if narrow else shape, np.float32)
    sampled = held.transpose(0, 2, 1) if narrow else held
    sums = np.zeros((group, each_group * kernel))
    start = 0
    for picture, at, root in zip(data, places, roots, strict=True):
        planes = np.ascontiguousarray(picture, np.float32).reshape(len(picture), -1)
        _gather(planes, windows.inside(at, picture.shape[1:]), root, start, sampled, sums)
        start += len(at)
    return sampled, sums, float(counts @ [len(at) for at in places])


@compiled()
def _gather(planes: Any, where: Any, root: Any, start: Any, sampled: Any, sums: Any) -> None:
    """Of each channel what lies at `where` (kernel, positions), 0 for -1, times `root`, into
    `sampled` (groups, positions, columns) from position `start` on; their sums, times `root`
    again, to `sums`."""
    kernel, positions = where.shape
    each = sums.shape[1] // kernel
    factor = np.float32(root)
    for channel in range(planes.shape[0]):
        group = channel // each
        first = (channel - group * each) * kernel
        for k in range(kernel):
            total = 0.0
            for i in range(positions):
                at = where[k, i]
                if at >= 0:
                    value = planes[channel, at] * factor
                    sampled[group, start + i, first + k] = value
                    total += value
                else:
                    sampled[group, start + i, first + k] = np.float32(0)
            sums[group, first + k] += total * root


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

    def inside(self, places: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Which element of a channel of this `shape` each offset of the kernel meets at `places`,
        shape (kernel, places); -1 where that is padding."""
        corners = np.unravel_index(places, self.sizes)
        offsets = np.indices(self.kernel).reshape(len(self.kernel), -1, 1)
        found = np.zeros((offsets.shape[1], len(places)), np.int64)
        padded = np.zeros(found.shape, bool)
        for axis, size in enumerate(shape):
            at = corners[axis] * self.strides[axis] - self.pads[axis][0]
            along = at + offsets[axis] * self.dilations[axis]
            padded |= (along < 0) | (along >= size)
            found = found * size + along
        found[padded] = -1
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
    groups, columns, _ = turned.shape
    with np.errstate(over="ignore", invalid="ignore"):
        if columns <= NARROW and groups > 1:
            found = np.empty((groups, columns, columns))
            _narrow_moments(np.ascontiguousarray(turned, np.float32), found)
        else:
            found = np.matmul(turned, sampled).astype(np.float64)
    if not np.isfinite(np.diagonal(found, axis1=1, axis2=2)).all():  # beyond float32
        found = np.matmul(turned.astype(np.float64), sampled.astype(np.float64))
    return found


@compiled(fastmath=("reassoc", "contract"))
def _narrow_moments(turned: Any, found: Any) -> None:
    """The products of all rows of each group of `turned` (groups, columns, positions)."""
    groups, columns, positions = turned.shape
    for group in range(groups):
        for a in range(columns):
            for b in range(a, columns):
                total = np.float32(0)
                for i in range(positions):
                    total += turned[group, a, i] * turned[group, b, i]
                found[group, a, b] = total
                found[group, b, a] = total
