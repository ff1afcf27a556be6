"""Histograms of |x| whose bins need no range, no order and no second pass.

A bin holds the magnitudes that share exponent and the first seven mantissa bits, that is, the
upper 15 bits of a float32 without its sign. A bin is therefore between 1/256 and 1/128 of its
value wide, from the smallest subnormal to the largest float: nothing has to be known about the
data before the first number is counted, nothing grows, and integer counts can be added in any
order. Two passes over the same data in any order, or split over any number of threads, give the
same histogram bit for bit.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import ModelError
from trtune.configs.files import atomic_path

SHIFT = 16
BINS = 1 << (31 - SHIFT)
INFINITY_BITS = 0x7F800000
FIRST_NON_FINITE = INFINITY_BITS >> SHIFT

Counts = NDArray[np.int64]


@lru_cache(maxsize=1)
def bin_edges() -> NDArray[np.float64]:
    """Lower edges of all bins and the upper edge of the last, `BINS + 1` values, float64.

    Bin `b` holds `edges[b] <= |x| < edges[b + 1]`; bin 0 holds zero (and what is below 1e-40).
    The edges of the bins of infinity and NaN are set to infinity.
    """
    bits = np.arange(BINS + 1, dtype=np.uint64) << np.uint64(SHIFT)
    bits[FIRST_NON_FINITE:] = 0x7F800000
    edges: NDArray[np.float64] = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    edges.flags.writeable = False
    return edges


@dataclass(frozen=True, slots=True)
class PictureMaxima:
    """The largest |x| of a tensor in each picture, summed up in constant memory.

    `counts` is a histogram of those maxima in the bins of this module; `item` the picture that
    holds the largest (of equals the first by name), `runner_up` the largest among the others.
    """

    counts: Counts
    item: str
    runner_up: float

    @property
    def pictures(self) -> int:
        """How many pictures were seen."""
        return int(self.counts.sum())

    @property
    def median(self) -> float:
        """Median of the per-picture maxima: the middle of the bin that holds it (within 0.4 %)."""
        return quantile(self.counts, 0.5) if self.pictures else 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of |x| over a whole data set, one tensor.

    `counts` has `BINS` entries (see `bin_edges`); `maximum` is the exact largest |x|.
    """

    counts: Counts
    maximum: float
    pictures: PictureMaxima

    def plus(self, other: Histogram) -> Histogram:
        """That of both data sets together, in whichever order they are added."""
        mine, others = self.pictures, other.pictures
        first, second = sorted(
            ((-self.maximum, mine.item), (-other.maximum, others.item)),
        )
        runner_up = max(-second[0], mine.runner_up, others.runner_up)
        maxima = PictureMaxima(mine.counts + others.counts, first[1], runner_up)
        return Histogram(self.counts + other.counts, -first[0], maxima)

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    @classmethod
    def of(cls, *pictures: NDArray[np.float32]) -> Histogram:
        """The histogram of arrays held in memory, each one picture named by its place.

        >>> Histogram.of(np.float32([0, -3, 1])).maximum
        3.0
        """
        rows = [np.abs(np.asarray(picture, np.float32)).ravel() for picture in pictures]
        bits = np.concatenate(rows or [np.empty(0, np.float32)]).view(np.uint32)
        maxima = np.array([row[np.isfinite(row)].max(initial=0) for row in rows], np.float32)
        ranked = sorted(((-m, str(i)) for i, m in enumerate(maxima.tolist())))
        best, second = (*ranked, (0.0, ""), (0.0, ""))[:2]
        binned = _binned(maxima.view(np.uint32))
        seen = PictureMaxima(binned, best[1], -second[0] or 0.0)
        return cls(finite_counts(_binned(bits)), -best[0] or 0.0, seen)


def _binned(bits: NDArray[np.uint32]) -> Counts:
    """How many of the magnitudes whose bits these are lie in each bin."""
    return np.bincount(bits >> SHIFT, minlength=BINS).astype(np.int64)


def finite_counts(counts: Counts) -> Counts:
    """`counts` with the bins of infinity and NaN emptied, in place."""
    counts[..., FIRST_NON_FINITE:] = 0
    return counts


def filled_bins(counts: Counts) -> NDArray[np.intp]:
    """Which bins hold something, rising. NumPy finds them five times as fast among booleans."""
    return np.flatnonzero(counts != 0)


def quantile(counts: Counts, q: float) -> float:
    """The value below which a share `q` of the counted magnitudes lies: its bin's middle."""
    filled = filled_bins(counts)
    if not filled.size:
        raise ValueError("quantile of an empty histogram")
    below = np.cumsum(counts[filled])
    total = int(below[-1])
    rank = min(max(int(np.ceil(q * total)), 1), total)
    index = int(filled[np.searchsorted(below, rank)])
    edges = bin_edges()
    return 0.0 if index == 0 else float((edges[index] + edges[index + 1]) / 2)


def save_histograms(path: Path, histograms: Mapping[str, Histogram]) -> None:
    """Write histograms, their filled bins only, as an .npz file in one step."""
    arrays: dict[str, Any] = {"names": np.array(list(histograms))}
    for i, histogram in enumerate(histograms.values()):
        for part, counts in (("values", histogram.counts), ("maxima", histogram.pictures.counts)):
            filled = np.flatnonzero(counts)
            arrays[f"{i}/{part}"] = np.stack([filled, counts[filled]])
        arrays[f"{i}/max"] = np.array([histogram.maximum, histogram.pictures.runner_up])
        arrays[f"{i}/item"] = np.array(histogram.pictures.item)
    with atomic_path(path) as target, target.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


def load_histograms(path: Path) -> dict[str, Histogram]:
    """Read what `save_histograms` wrote. Raises OSError, ValueError or KeyError otherwise."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = enumerate(arrays["names"].tolist())
            return {name: _read_histogram(arrays, i) for i, name in names}
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_histogram(arrays: Mapping[str, NDArray[Any]], i: int) -> Histogram:
    counts = {}
    for part in ("values", "maxima"):
        filled, amounts = arrays[f"{i}/{part}"]
        counts[part] = np.zeros(BINS, np.int64)
        counts[part][filled] = amounts
    maximum, runner_up = arrays[f"{i}/max"].tolist()
    maxima = PictureMaxima(counts["maxima"], str(arrays[f"{i}/item"]), runner_up)
    return Histogram(counts["values"], maximum, maxima)


def not_a_number(tensor: str, item: str) -> ModelError:
    """The error for a tensor that holds NaN for the picture `item`."""
    return ModelError(
        f"tensor {tensor!r} holds NaN for picture {item!r}; the FP32 model itself gives it, so no "
        "scale can be right: check the model and the preprocessing of that picture"
    )


def overflowed(tensor: str, item: str) -> ModelError:
    """The error for a tensor that is infinite for the picture `item`, and not for all others."""
    return ModelError(
        f"tensor {tensor!r} holds infinity for picture {item!r}, and not for all pictures; the "
        "FP32 model itself overflows there, so no scale can be right: check the preprocessing of "
        "that picture"
    )
