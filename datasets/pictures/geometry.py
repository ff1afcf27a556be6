"""Where the pixels of a picture land in the model's input: resize, crop, letterbox, and boxes.

Frame follows the arithmetic that detectors are published with. `center` is Ultralytics'
`LetterBox`: sides are rounded, the margin is split and its halves rounded by -0.1 and +0.1.
`top_left` is YOLOX's `preproc`: sides are cut off, the picture stands in the corner.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtune.configs.errors import DataError
from trtune.configs.values import GREY

Size = int | tuple[int, int]
Place = Literal["center", "top_left"]
Filter = Literal[
    "pillow-bilinear", "pillow-bicubic", "opencv-bilinear", "opencv-bicubic", "opencv-area"
]

_PILLOW: Mapping[str, Image.Resampling] = {
    "pillow-bilinear": Image.Resampling.BILINEAR,
    "pillow-bicubic": Image.Resampling.BICUBIC,
}
_OPENCV = {
    "opencv-bilinear": "INTER_LINEAR",
    "opencv-bicubic": "INTER_CUBIC",
    "opencv-area": "INTER_AREA",
}
RESAMPLES = (*_PILLOW, *_OPENCV)


@dataclass(frozen=True, slots=True)
class Frame:
    """The whole picture in a frame, its ratio kept, the rest filled.

    size: a side in pixels, or (height, width). color: of the filling, 0 to 255, RGB or one value.
    place: center or top_left. stride: pad only to the next multiple of it (smallest rectangle)
    instead of to `size`. upscale: enlarge smaller pictures too.

    Raises ValueError for a size or stride below 1, or a colour outside 0 to 255.
    """

    size: Size
    color: tuple[int, ...] = GREY
    place: Place = "center"
    stride: int | None = None
    upscale: bool = True

    def __post_init__(self) -> None:
        if min(height_width(self.size)) < 1 or (self.stride is not None and self.stride < 1):
            raise ValueError("letterbox: size and stride must be at least 1 pixel")
        if len(self.color) not in (1, 3) or not all(0 <= value <= 255 for value in self.color):
            raise ValueError(f"letterbox: color must be 1 or 3 bytes, found {self.color}")


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture is laid into the input.

    The picture of `source` (height, width) is resized to `resized`; its corner then stands at
    `top`, `left` (below 0 where a crop cuts it off) of an input of `size`.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]

    def boxes(self, boxes: NDArray[Any]) -> NDArray[np.float64]:
        """Boxes (K x 4: left, top, right, bottom in pixels of the picture) in the input's pixels.

        What a crop leaves outside is cut off.
        """
        scale = np.array([self.resized[1] / self.source[1], self.resized[0] / self.source[0]] * 2)
        moved = np.asarray(boxes, np.float64) * scale
        moved += np.array([self.left, self.top] * 2)
        high = np.array([self.size[1], self.size[0]] * 2, np.float64)
        clipped: NDArray[np.float64] = np.clip(moved, 0, high)
        return clipped


def height_width(size: Size) -> tuple[int, int]:
    """A side or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def letterboxed(source: tuple[int, int], box: Frame) -> Geometry:
    """Where a picture of `source` (height, width) lands in the letterbox.

    >>> letterboxed((427, 640), Frame(416))
    Geometry(source=(427, 640), resized=(278, 416), top=69, left=0, size=(416, 416))
    >>> letterboxed((427, 640), Frame(416, place="top_left")).resized
    (277, 416)
    """
    height, width = height_width(box.size)
    ratio = min(height / source[0], width / source[1])
    if not box.upscale:
        ratio = min(ratio, 1.0)
    whole = round if box.place == "center" else int
    resized = max(whole(source[0] * ratio), 1), max(whole(source[1] * ratio), 1)
    down, right = height - resized[0], width - resized[1]
    if box.stride is not None:
        down, right = down % box.stride, right % box.stride
    size = resized[0] + down, resized[1] + right
    if box.place == "top_left":
        return Geometry(source, resized, 0, 0, size)
    return Geometry(source, resized, _half(down), _half(right), size)


def _half(margin: int) -> int:
    return round(margin / 2 - 0.1)


def resized_size(source: tuple[int, int], resize: Size) -> tuple[int, int]:
    """(height, width) after `resize`; a short side of the right length is left alone."""
    if not isinstance(resize, int):
        return resize[0], resize[1]
    height, width = source
    if min(height, width) == resize:
        return source
    if width < height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def crop_box(size: tuple[int, int], crop: Size | None) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the centre crop; halves round to even, as torchvision's do."""
    if crop is None:
        return 0, 0, *size
    height, width = height_width(crop)
    if height > size[0] or width > size[1]:
        raise DataError(
            f"{size[0]} x {size[1]} pixels are less than `crop` {height} x {width}; "
            "set `preprocess.resize` to at least the crop"
        )
    return round((size[0] - height) / 2), round((size[1] - width) / 2), height, width


def resampled(picture: NDArray[np.uint8], size: tuple[int, int], how: str) -> NDArray[np.uint8]:
    """A picture of bytes, H x W or H x W x 3, at `size` (height, width), by the named filter.

    Raises DataError if OpenCV is asked for and not installed.
    """
    if picture.shape[:2] == size:
        return picture
    if how in _PILLOW:
        image = Image.fromarray(picture)
        return np.asarray(image.resize((size[1], size[0]), _PILLOW[how]))
    cv2 = _opencv(how)
    flag = getattr(cv2, _OPENCV[how])
    found: NDArray[np.uint8] = cv2.resize(picture, (size[1], size[0]), interpolation=flag)
    return found


def _opencv(how: str) -> Any:
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise DataError(
            f"`resample: {how}` is OpenCV's, which is not installed ({error}); install "
            "opencv-python-headless (trtune's extra `detection`), or take pillow-bilinear"
        ) from error


def framed(
    picture: NDArray[np.uint8], place: Geometry, color: tuple[int, ...]
) -> NDArray[np.uint8]:
    """A resized picture, H x W x C in RGB order, laid into its frame filled with `color`."""
    channels = picture.shape[2]
    fill = np.asarray(color if len(color) == channels else color[:1], np.uint8)
    frame = np.empty((*place.size, channels), np.uint8)
    frame[...] = fill
    height, width = place.resized
    frame[place.top : place.top + height, place.left : place.left + width] = picture
    return frame
