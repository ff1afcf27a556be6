"""Histograms in a file, so that a report, or a run that was stopped, need not count again."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.histogram import BINS, Histogram, PictureMaxima
from trtune.configs.files import atomic_path


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
