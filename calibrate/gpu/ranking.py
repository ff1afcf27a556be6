"""Which pictures hold the largest values, kept for many tensors at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.histogram import BINS, SHIFT, PictureMaxima


class Ranking:
    """The largest |x| a picture of many tensors, picture by picture, into `PictureMaxima`."""

    def __init__(self, tensors: int) -> None:
        self._counts = np.zeros((tensors, BINS), np.uint32)
        self._best = np.full(tensors, -1.0, np.float32)
        self._second = np.zeros(tensors, np.float32)
        self._names = [""] * tensors

    def add(
        self, names: Sequence[str], which: NDArray[np.intp], maxima: NDArray[np.uint32]
    ) -> None:
        """Add the bits of finite maxima of the tensors `which`, a row each, a column a name."""
        order = np.argsort(np.array(names, dtype=object), kind="stable")
        sorted_bits = maxima[:, order]
        np.add.at(self._counts, (which[:, None], sorted_bits >> SHIFT), 1)
        values = sorted_bits.view(np.float32)
        first = values.argmax(axis=1)  # of equals the first by name
        top = values[np.arange(len(values)), first]
        rest = values.copy()
        rest[np.arange(len(values)), first] = -1
        rising = (top >= self._second[which]) | (top >= self._best[which])
        for row in np.flatnonzero(rising).tolist():
            tensor, mine = int(which[row]), float(top[row])
            second = max(float(self._second[tensor]), float(rest[row].max(initial=-1)))
            name, best = names[order[first[row]]], float(self._best[tensor])
            if mine > best or (mine == best and name < self._names[tensor]):
                self._second[tensor] = max(second, best)
                self._best[tensor], self._names[tensor] = mine, name
            else:
                self._second[tensor] = max(second, mine)

    def maxima(self, tensor: int) -> tuple[float, PictureMaxima]:
        """The largest |x| of a tensor, and its pictures."""
        found = PictureMaxima(
            self._counts[tensor].astype(np.int64),
            self._names[tensor],
            max(float(self._second[tensor]), 0.0),
        )
        return max(float(self._best[tensor]), 0.0), found
