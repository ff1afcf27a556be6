"""Pictures as yolox takes them: BGR 0 to 255, scaled to fit, at the top left of grey 114."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 416


def letterboxed(folder: str) -> Iterator[dict[str, NDArray[np.float32]]]:
    """One picture a batch, 1 x 3 x 416 x 416; `folder` is relative to this file."""
    for path in sorted((Path(__file__).parent / folder).glob("*.jpg")):
        with Image.open(path) as picture:
            scale = min(SIDE / picture.width, SIDE / picture.height)
            size = int(picture.width * scale), int(picture.height * scale)
            small = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        canvas = np.full((SIDE, SIDE, 3), 114, np.uint8)
        canvas[: size[1], : size[0]] = np.asarray(small)[:, :, ::-1]
        yield {"images": canvas.transpose(2, 0, 1)[None].astype(np.float32)}
