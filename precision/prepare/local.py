"""What a scale and a shift of a tensor do to its readers' results: noise of its own codes and of
their weights' codes, in closed form for the weights.

Rounding weights one after the other (`rounding`) leaves of column j what the columns behind it do
not explain, d_j = 1 / U_jj^2 with U the upper Cholesky factor of the inverse moments. A factor c_j
on the column makes that c_j^2 d_j, whatever the other factors are, so that one factorisation of
a reader serves all of them: with steps s_o the noise is sum_o s_o^2 / 12 sum_j c_j^2 d_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.configs.system.compiled import compiled
from trtune.precision.prepare.columns import grouped
from trtune.precision.prepare.rounding import left_of_columns

Array = NDArray[Any]

LEVELS = 127


@dataclass(frozen=True, slots=True)
class Weights:
    """What of one reader's weights matters: all float64, channels in the order of the tensor.

    `power` (channels,) is the sum of the squares of the weights that read a channel. `largest`
    (groups, outputs, channels a group) is max|w| over the positions of the kernel, `left` (groups,
    channels a group) what rounding leaves of a channel's columns a position, `whole` all of it, and
    `signal` the mean square of all outputs together.
    """

    power: NDArray[np.float64]
    largest: NDArray[np.float64]
    left: NDArray[np.float64]
    whole: NDArray[np.float64]
    signal: float

    def noise(self, scale: Array) -> tuple[float, float]:
        """Noise of the outputs by the codes of weights / `scale`: rounded, and the nearest."""
        groups, _, each = self.largest.shape
        factors = scale.astype(np.float64).reshape(groups, each)
        steps = ((self.largest / factors[:, None, :]).max(axis=2) / LEVELS) ** 2
        found = [
            float((steps.sum(axis=1) * (factors**2 * part).sum(axis=1)).sum()) / 12
            for part in (self.left, self.whole)
        ]
        return found[0], found[1]

    def share(self, scale: Array) -> float:
        """The part of the error of nearest codes that rounding leaves, in root mean square."""
        left, whole = self.noise(scale)
        return float(np.sqrt(left / whole)) if whole else 1.0


def weights_of(
    node: onnx.NodeProto, weights: Array, moments: Array, count: float, *, rounded: bool
) -> Weights | None:
    """The `Weights` of a reader whose inputs have the `moments` X'X over `count` positions.

    `rounded` says that its codes are rounded on the data; nearest codes leave all of a column.
    None for what `columns.grouped` has no form for.
    """
    parts = grouped(node, weights)
    if parts is None:
        return None
    groups, outputs, columns = parts.shape
    kernel = int(np.prod(weights.shape[2:])) if node.op_type == "Conv" else 1
    shaped = np.abs(parts).reshape(groups, outputs, columns // kernel, kernel)
    diagonal = np.diagonal(moments, axis1=1, axis2=2) / count
    left = left_of_columns(moments) / count if rounded else diagonal
    each = (groups, columns // kernel, kernel)
    return Weights(
        power=(shaped**2).sum(axis=(1, 3)).reshape(-1),
        largest=shaped.max(axis=3),
        left=left.reshape(each).sum(axis=2),
        whole=diagonal.reshape(each).sum(axis=2),
        signal=float(np.einsum("goc,gc->", parts**2, diagonal)),
    )


@dataclass(frozen=True, slots=True)
class Local:
    """A tensor's sampled values, shape (pictures, positions, channels), and its readers."""

    samples: NDArray[np.float32]
    readers: Sequence[Weights]

    def noise(self, scale: Array, shift: float, amax: float) -> float:
        """Noise of the readers' results by their signal if they read x' = x c - z in int8.

        Each picture's noise by its own signal (at least a tenth of the median), then the mean: one
        picture far out counts as much as any other.
        """
        power = np.sum([reader.power for reader in self.readers], axis=0)
        c = scale.astype(np.float64)
        squares = power / c**2
        step = np.float32(amax) / np.float32(LEVELS)
        own = np.empty(len(self.samples))
        signal = np.empty(len(self.samples))
        _noise(
            self.samples, c.astype(np.float32), np.float32(shift), step, squares, power, own, signal
        )
        signal = np.maximum(signal, 0.1 * np.median(signal))
        if not np.any(signal > 0):
            return 0.0
        with np.errstate(invalid="ignore"):  # beyond float32 both are infinite: no move is shown
            relative = float(np.mean(own / np.where(signal > 0, signal, 1.0)))
        return relative + self._of_weights(c)

    def _of_weights(self, scale: Array) -> float:
        signal = sum(reader.signal for reader in self.readers)
        noise = sum(reader.noise(scale)[0] for reader in self.readers)
        return noise / signal if signal else 0.0


@compiled()
def _noise(
    samples: Any, scale: Any, shift: Any, step: Any, squares: Any, power: Any, own: Any, signal: Any
) -> None:
    """Channels are summed apart, and over them last: a sum over all cannot be done in parallel."""
    low, high = np.float32(-128), np.float32(127)
    pictures, positions, channels = samples.shape
    noises = np.empty(channels)
    sizes = np.empty(channels)
    for p in range(pictures):
        noises[:] = 0.0
        sizes[:] = 0.0
        for i in range(positions):
            for k in range(channels):
                x = samples[p, i, k]
                moved = x * scale[k] - shift
                code = min(max(np.rint(moved / step), low), high)
                error = moved - code * step
                noises[k] += error * error
                sizes[k] += x * x
        own[p] = np.sum(noises * squares) / positions
        signal[p] = np.sum(sizes * power) / positions
