"""Pictures to model input: resize, crop, scale, mean and std, channel order, layout.

Everything is 8 bits a channel until the very last step, as in the pipelines that published
accuracies come from: Pillow resizes bytes (bilinear, antialiased) and the arithmetic on a byte
has only 256 outcomes a channel, so it is done once, as a table, and looked up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trtune.configs.errors import DataError
from trtune.datasets.pictures.geometry import (
    RESAMPLES,
    Filter,
    Frame,
    Geometry,
    Size,
    crop_box,
    framed,
    height_width,
    letterboxed,
    resampled,
    resized_size,
)

PictureLayout = Literal["NCHW", "NHWC"]
Channels = Literal["RGB", "BGR", "GRAY"]

_ORIENTATION = 0x0112
_ORDERS: dict[Channels, tuple[int, ...]] = {"RGB": (0, 1, 2), "BGR": (2, 1, 0), "GRAY": (0,)}


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a picture becomes what the model reads.

    resize: short side in pixels (the long side keeps the ratio, rounded down), or (height, width).
    crop: side of the centre square, or (height, width) of the centre rectangle.
    scale, mean, std: value = (byte * scale - mean) / std. `mean` and `std` have one entry, or one
        for each channel in the order of `channels`.
    layout: where the channels stand; channels: their order, or grey (ITU-R 601 luma).
    letterbox: the whole picture in a frame, instead of resize and crop.
    resample: whose resizing, and which filter; Pillow's look at all pixels (antialias), OpenCV's
        bilinear and bicubic at the nearest ones.

    Raises ValueError for a size below 1, a value that is not finite, a zero `std`, or a wrong
    number of entries.
    """

    resize: Size | None = None
    crop: Size | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: PictureLayout = "NCHW"
    channels: Channels = "RGB"
    letterbox: Frame | None = None
    resample: Filter = "pillow-bilinear"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if size is not None and min(height_width(size)) < 1:
                raise ValueError(f"{name} must be at least 1 pixel, found {size}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, self.channel_count):
                raise ValueError(
                    f"{name} has {len(values)} entries for {self.channel_count} channel(s)"
                )
        if not all(map(math.isfinite, (self.scale, *(self.mean or ()), *(self.std or ())))):
            raise ValueError("scale, mean and std must be finite")
        if 0.0 in (self.std or ()):
            raise ValueError("std must not be 0")
        if self.layout not in ("NCHW", "NHWC") or self.channels not in ("RGB", "BGR", "GRAY"):
            raise ValueError(f"unknown layout {self.layout!r} or channels {self.channels!r}")
        if self.resample not in RESAMPLES:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLES)}")
        if self.letterbox is not None and (self.resize is not None or self.crop is not None):
            raise ValueError("letterbox takes the place of resize and crop: give one or the other")

    @property
    def channel_count(self) -> int:
        """Channels of the result: 1 for grey, else 3."""
        return 1 if self.channels == "GRAY" else 3


def preprocess_of(values: Mapping[str, Any]) -> Preprocess:
    """A `Preprocess` of plain values, as a config's section dumps them."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if isinstance(box := plain.get("letterbox"), Mapping):
        inner: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in box.items()}
        plain["letterbox"] = Frame(**inner)
    return Preprocess(**plain)


def prepare(image: Image.Image, preprocess: Preprocess) -> NDArray[np.float32]:
    """One picture as float32, C x H x W or H x W x C by `preprocess.layout`.

    Any mode Pillow can turn into RGB: grey, palette, 1-bit, CMYK as it converts them; 16-bit grey
    is scaled to 8 bits (65535 becomes 255); transparency is dropped, not blended, as
    `convert("RGB")` does; an EXIF orientation is applied first.

    Raises DataError if the mode cannot be converted or the picture is smaller than the crop.
    """
    batch = arrange(pixels(image, preprocess)[np.newaxis], preprocess)
    return batch.reshape(batch.shape[1:])


def prepare_pictures(pictures: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """A batch of uint8 pictures, N x H x W x C in RGB order or N x H x W grey, as float32.

    C is 1 (grey), 3, or 4 (alpha, dropped). The result is N x C x H x W or N x H x W x C. Equal
    bit for bit to `prepare` on each picture.

    Raises DataError if the shape is something else or a picture is smaller than the crop.
    """
    pictures = _with_channels(pictures)
    size = pictures.shape[1], pictures.shape[2]
    place = geometry(size, preprocess)
    same_size = preprocess.letterbox is None and place.resized == size
    mixes_colours = preprocess.channels == "GRAY" and pictures.shape[3] > 1
    if same_size and not mixes_colours:
        top, left, height, width = crop_box(size, preprocess.crop)
        return arrange(pictures[:, top : top + height, left : left + width, :3], preprocess)
    images = (Image.fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in pictures)
    return arrange(np.stack([pixels(image, preprocess) for image in images]), preprocess)


def geometry(size: tuple[int, int], preprocess: Preprocess) -> Geometry:
    """Where a picture of `size` (height, width) lands in the model's input."""
    if preprocess.letterbox is not None:
        return letterboxed(size, preprocess.letterbox)
    resized = size if preprocess.resize is None else resized_size(size, preprocess.resize)
    top, left, height, width = crop_box(resized, preprocess.crop)
    return Geometry(size, resized, -top, -left, (height, width))


def pixels(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The resized and cropped picture as bytes, H x W x C: RGB, or one channel if grey."""
    image = upright(image)
    image = _to_mode(image, "L" if preprocess.channels == "GRAY" else "RGB")
    place = geometry((image.height, image.width), preprocess)
    array = resampled(np.asarray(image), place.resized, preprocess.resample)
    array = array[..., np.newaxis] if array.ndim == 2 else array
    if preprocess.letterbox is not None:
        return framed(array, place, preprocess.letterbox.color)
    height, width = place.size
    return array[-place.top : height - place.top, -place.left : width - place.left]


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation means it."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image


def arrange(pictures: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Bytes N x H x W x C (C is 1 or 3, RGB) as float32 in the wanted layout and channel order."""
    table = value_table(preprocess)
    count, height, width, found = pictures.shape
    wanted = preprocess.channel_count
    channels_first = preprocess.layout == "NCHW"
    shape = (count, wanted, height, width) if channels_first else (count, height, width, wanted)
    out = np.empty(shape, np.float32)
    for channel, source in enumerate(_ORDERS[preprocess.channels] if found > 1 else (0,) * wanted):
        plane = out[:, channel] if channels_first else out[..., channel]
        plane[...] = table[channel][pictures[..., source]]
    return out


@functools.lru_cache(maxsize=16)
def value_table(preprocess: Preprocess) -> NDArray[np.float32]:
    """What each byte becomes: C x 256 float32, (byte * scale - mean) / std.

    The product is rounded to float32 once, from float64, so that scale = 1/255 gives exactly
    byte / 255; the subtraction and the division are float32.
    """
    scaled = (np.arange(256) * float(preprocess.scale)).astype(np.float32)
    table = np.tile(scaled, (preprocess.channel_count, 1))
    if preprocess.mean is not None:
        table -= _column(preprocess.mean)
    if preprocess.std is not None:
        table /= _column(preprocess.std)
    table.setflags(write=False)
    return table


def _column(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, np.newaxis]


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image)))
    elif image.mode in ("P", "PA"):
        # Straight to RGB, Pillow warns about palettes whose transparency is a table of bytes.
        image = image.convert("RGBA")
    elif image.mode == "F":
        raise DataError(
            "a picture of 32-bit floats has no defined range; save it with 8 or 16 bits, "
            "or feed it as an array (`source: arrays`)"
        )
    if image.mode == mode:
        return image
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _to_eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit grey to 8: round(v / 257), so that 0 stays 0 and 65535 becomes 255."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(
            f"integer pixels from {values.min()} to {values.max()} are not 16-bit grey; "
            "save the picture with 8 or 16 bits"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _with_channels(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pictures.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8, found {pictures.dtype}")
    if pictures.ndim == 3:
        return pictures[..., np.newaxis]
    if pictures.ndim == 4 and pictures.shape[3] in (1, 3, 4):
        return pictures
    shape = " x ".join(map(str, pictures.shape))
    hint = ""
    if pictures.ndim == 4 and pictures.shape[1] in (1, 3, 4):
        hint = "; the channels stand first: save images.transpose(0, 2, 3, 1)"
    raise DataError(
        f"pictures must be N x height x width x channels (1, 3 or 4), found {shape}{hint}"
    )
