"""Small views of pictures as the network is fed them, bounded in size."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtune.datasets.batches import Batch, BatchSource

LONGER_SIDE = 112
"""Pixels of the longer side."""
QUALITY = 82
DARKEST, BRIGHTEST = 0.5, 99.5
"""Percentiles that become black and white: preprocessed values have no range of their own."""


def thumbnails(
    source: BatchSource, items: Iterable[str], *, reversed_colours: bool = False
) -> dict[str, bytes]:
    """JPEG files of those `items` of `source` that are pictures, by item, in the order asked for.

    A sample is a picture if an input gets 1 or 3 channels of at least 4 x 4 pixels of it, channels
    first or last; the first such input is taken. `reversed_colours`: its channels are blue, green,
    red. The source is read until all are found.
    """
    wanted = list(dict.fromkeys(items))
    found: dict[str, bytes] = {}
    if not wanted:
        return found
    missing = set(wanted)
    for batch in source:
        for row, item in enumerate(batch.items):
            if item not in missing:
                continue
            missing.discard(item)
            pixels = _picture_of(batch, row)
            if pixels is not None:
                found[item] = jpeg(pixels[..., ::-1] if reversed_colours else pixels)
        if not missing:
            break
    return {item: found[item] for item in wanted if item in found}


def jpeg(pixels: NDArray[Any]) -> bytes:
    """`pixels` (height, width, channels; any range) as a JPEG file of at most `LONGER_SIDE` pixels.

    Percentiles of the finite values become black and white; what is smaller than half of that
    is enlarged by whole pixels.
    """
    values = pixels.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (DARKEST, BRIGHTEST)) if finite.size else (0.0, 0.0)
    span = float(high - low) or 1.0
    grey = np.nan_to_num((values - low) / span, nan=0.0, posinf=1.0, neginf=0.0)
    codes = (np.clip(grey, 0.0, 1.0) * 255).round().astype(np.uint8)
    image = Image.fromarray(codes[..., 0] if codes.shape[-1] == 1 else codes)
    factor = LONGER_SIDE // max(image.size)
    if factor >= 2:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    image.thumbnail((LONGER_SIDE, LONGER_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _picture_of(batch: Batch, row: int) -> NDArray[Any] | None:
    """The sample's first input that looks like a picture: (height, width, channels)."""
    for name, array in batch.feeds.items():
        axis = batch.axis(name)
        if axis is None or array.ndim not in (3, 4) or array.dtype.kind not in "fiu":
            continue
        sample = np.take(array, row, axis=axis)
        if sample.ndim == 2:
            sample = sample[..., None]
        elif sample.shape[0] in (1, 3) and min(sample.shape[1:]) >= 4:
            sample = np.moveaxis(sample, 0, -1)
        if sample.shape[-1] in (1, 3) and min(sample.shape[:2]) >= 4:
            return np.asarray(sample)
    return None
