from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trtune.configs.errors import DataError
from trtune.datasets.pictures.preprocess import (
    Preprocess,
    pixels,
    prepare,
    prepare_pictures,
    value_table,
)

PLAIN = Preprocess(scale=1)


def one_pixel(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (1, 1), value)  # type: ignore[arg-type]


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def sixteen_bit(value: int) -> Image.Image:
    return Image.fromarray(np.full((1, 1), value, np.uint16))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(one_pixel("RGB", (1, 2, 3)), (1, 2, 3), id="RGB: as it is"),
        pytest.param(one_pixel("L", 7), (7, 7, 7), id="grey: repeated"),
        pytest.param(one_pixel("LA", (7, 0)), (7, 7, 7), id="LA: alpha dropped, not blended"),
        pytest.param(one_pixel("RGBA", (1, 2, 3, 0)), (1, 2, 3), id="RGBA: alpha dropped"),
        pytest.param(one_pixel("1", 1), (255, 255, 255), id="1-bit: white is 255"),
        pytest.param(one_pixel("CMYK", (0, 255, 255, 0)), (255, 0, 0), id="CMYK: ink to light"),
        pytest.param(palette(None), (10, 20, 30), id="palette: looked up"),
        pytest.param(palette(1), (10, 20, 30), id="palette: transparent colour kept"),
        pytest.param(palette(b"\xff\x00"), (10, 20, 30), id="palette: transparency table"),
        pytest.param(sixteen_bit(65535), (255, 255, 255), id="16-bit: 65535 is 255"),
        pytest.param(sixteen_bit(0x8080), (128, 128, 128), id="16-bit: 257 v is v"),
        pytest.param(sixteen_bit(385), (1, 1, 1), id="16-bit: 1.498 rounds down"),
        pytest.param(sixteen_bit(386), (2, 2, 2), id="16-bit: 1.502 rounds up"),
        pytest.param(one_pixel("I", 65535), (255, 255, 255), id="I: taken as 16-bit"),
        pytest.param(one_pixel("YCbCr", (128, 128, 128)), (128, 128, 128), id="YCbCr: neutral"),
    ],
)
def test_modes(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert prepare(image, PLAIN).ravel().tolist() == list(expected)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(one_pixel("L", 7), 7, id="grey as it is"),
        pytest.param(one_pixel("RGB", (255, 0, 0)), 76, id="red is 29.9 %"),
        pytest.param(one_pixel("CMYK", (0, 255, 255, 0)), 76, id="CMYK red"),
        pytest.param(palette(None), 18, id="palette by its colour, not its index"),
    ],
)
def test_grey(image: Image.Image, expected: int) -> None:
    grey = prepare(image, Preprocess(scale=1, channels="GRAY"))
    assert grey.shape == (1, 1, 1)
    assert grey.item() == expected


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(one_pixel("F", 0.5), "32-bit floats", id="float picture"),
        pytest.param(one_pixel("I", 70000), "from 70000 to 70000 are not 16-bit", id="beyond 16"),
        pytest.param(one_pixel("I", -1), "from -1 to -1", id="negative"),
    ],
)
def test_modes_without_a_defined_range(image: Image.Image, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(image, PLAIN)


def test_exif_orientation_is_applied_first() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    image.getexif()[0x0112] = 6  # the camera was held so that the top is on the right
    upright = prepare(image, Preprocess(scale=1, channels="GRAY"))
    assert upright[0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_channel_order_and_layout() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert prepare(image, PLAIN).tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]
    last = Preprocess(scale=1, layout="NHWC", channels="BGR")
    assert prepare(image, last).tolist() == [[[3, 2, 1], [6, 5, 4]]]


def test_mean_and_std_are_in_the_order_of_channels() -> None:
    bgr = Preprocess(scale=1, mean=(1, 2, 3), std=(1, 2, 4), channels="BGR")
    assert prepare(one_pixel("RGB", (11, 10, 9)), bgr).ravel().tolist() == [8, 4, 2]


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        pytest.param((300, 200), 100, (100, 150), id="wide: the height is the short side"),
        pytest.param((200, 301), 100, (150, 100), id="tall: 150.5 is rounded down"),
        pytest.param((100, 333), 100, (333, 100), id="short side already right: untouched"),
        pytest.param((50, 50), 100, (100, 100), id="small pictures grow"),
        pytest.param((300, 200), (7, 9), (7, 9), id="height and width given"),
    ],
)
def test_resize(
    size: tuple[int, int], resize: int | tuple[int, int], expected: tuple[int, int]
) -> None:
    image = Image.new("RGB", size)
    assert pixels(image, Preprocess(resize=resize)).shape == (*expected, 3)


def test_resize_is_pillows_antialiased_bilinear() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = np.asarray(image.resize((15, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(pixels(image, Preprocess(resize=10)), expected)


@pytest.mark.parametrize(
    ("width", "crop", "first"),
    [
        pytest.param(5, 3, 1, id="odd in odd: the middle"),
        pytest.param(6, 3, 2, id="1.5 rounds to even: 2"),
        pytest.param(4, 3, 0, id="0.5 rounds to even: 0"),
        pytest.param(3, 3, 0, id="same size"),
    ],
)
def test_crop(width: int, crop: int, first: int) -> None:
    image = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (crop, 1)))
    cut = pixels(image, Preprocess(crop=crop, channels="GRAY"))
    assert cut[0, :, 0].tolist() == list(range(first, first + crop))


def test_crop_of_a_smaller_picture_is_an_error() -> None:
    with pytest.raises(DataError, match="4 x 9 pixels are less than `crop` 5 x 5"):
        prepare(Image.new("RGB", (9, 4)), Preprocess(crop=5))


def test_scale_by_a_255th_is_division_by_255() -> None:
    table = value_table(Preprocess(scale=0.00392156862745098))
    assert np.array_equal(table[0], np.arange(256, dtype=np.float32) / 255)


@given(
    scale=st.floats(1e-4, 4),
    mean=st.tuples(*[st.floats(-200, 200)] * 3),
    std=st.tuples(*[st.floats(1e-3, 200)] * 3),
)
def test_the_table_is_the_formula_bit_for_bit(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    scaled = (picture.astype(np.float64) * scale).astype(np.float32)
    expected = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    found = prepare_pictures(picture, Preprocess(scale=scale, mean=mean, std=std))
    assert np.array_equal(found, expected.transpose(0, 3, 1, 2))


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9)),
    depth=st.sampled_from([None, 1, 3, 4]),
    resize=st.sampled_from([None, 4, 6, (5, 8)]),
    crop=st.sampled_from([None, 4, (4, 3)]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    channels=st.sampled_from(["RGB", "BGR", "GRAY"]),
)
def test_a_batch_is_its_pictures_prepared_one_by_one(
    shape: tuple[int, int, int],
    depth: int | None,
    resize: int | tuple[int, int] | None,
    crop: int | tuple[int, int] | None,
    layout: str,
    channels: str,
) -> None:
    full = shape if depth is None else (*shape, depth)
    pictures = np.random.default_rng(1).integers(0, 256, full, dtype=np.uint8)
    preprocess = Preprocess(resize, crop, 1 / 255, (0.4,), (0.2,), layout, channels)  # type: ignore[arg-type]
    images = [Image.fromarray(p[..., 0] if depth == 1 else p) for p in pictures]
    expected = np.stack([prepare(image, preprocess) for image in images])
    found = prepare_pictures(pictures, preprocess)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param((2, 3, 8, 8), "channels stand first", id="NCHW pictures"),
        pytest.param((2, 8, 8, 5), "found 2 x 8 x 8 x 5$", id="five channels"),
        pytest.param((8, 8), "found 8 x 8$", id="no rows"),
    ],
)
def test_arrays_that_are_no_pictures(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_pictures(np.zeros(shape, np.uint8), PLAIN)


def test_pictures_must_be_bytes() -> None:
    with pytest.raises(ValueError, match="float32"):
        prepare_pictures(np.zeros((1, 2, 2, 3), np.float32), PLAIN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"resize": 0}, "resize", id="resize to nothing"),
        pytest.param({"crop": (3, 0)}, "crop", id="crop to nothing"),
        pytest.param({"mean": (0.1, 0.2)}, "mean has 2 entries", id="two means"),
        pytest.param({"std": (1, 1, 1), "channels": "GRAY"}, "for 1 channel", id="grey, three"),
        pytest.param({"std": (0.0,)}, "std must not be 0", id="zero std"),
        pytest.param({"scale": float("inf")}, "finite", id="infinite scale"),
        pytest.param({"layout": "CHW"}, "unknown layout 'CHW'", id="layout"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)  # type: ignore[arg-type]
