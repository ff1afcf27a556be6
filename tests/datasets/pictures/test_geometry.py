"""Frame against the published arithmetic of Ultralytics and YOLOX, boxes, resampling."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from trtune.configs.errors import DataError
from trtune.datasets.pictures.geometry import Frame, letterboxed, resampled
from trtune.datasets.pictures.preprocess import Preprocess, geometry, pixels

cv2 = pytest.importorskip("cv2", reason="opencv-python-headless (extra detection) is not there")
RNG = np.random.default_rng(0)


def ultralytics(
    picture: NDArray[np.uint8], size: int, *, auto: bool, scaleup: bool, stride: int = 32
) -> NDArray[np.uint8]:
    """The arithmetic of `ultralytics.data.augment.LetterBox`, centred."""
    height, width = picture.shape[:2]
    r = min(size / height, size / width)
    if not scaleup:
        r = min(r, 1.0)
    new = round(width * r), round(height * r)
    dw, dh = float(size - new[0]), float(size - new[1])
    if auto:
        dw, dh = dw % stride, dh % stride
    dw, dh = dw / 2, dh / 2
    if (width, height) != new:
        picture = cv2.resize(picture, new, interpolation=cv2.INTER_LINEAR)
    top, bottom = round(dh - 0.1), round(dh + 0.1)
    left, right = round(dw - 0.1), round(dw + 0.1)
    return np.asarray(
        cv2.copyMakeBorder(
            picture, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114)
        ),
        np.uint8,
    )


def yolox(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The arithmetic of YOLOX's `preproc`, before the transpose."""
    padded = np.full((*size, 3), 114, np.uint8)
    r = min(size[0] / picture.shape[0], size[1] / picture.shape[1])
    new = int(picture.shape[1] * r), int(picture.shape[0] * r)
    padded[: new[1], : new[0]] = cv2.resize(picture, new, interpolation=cv2.INTER_LINEAR)
    return padded


sides = st.integers(17, 700)


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.sampled_from([96, 160, 416]), st.booleans(), st.booleans())
def test_centred_as_ultralytics(
    height: int, width: int, size: int, auto: bool, scaleup: bool
) -> None:
    picture = RNG.integers(0, 256, (height, width, 3), np.uint8)
    box = Frame(size, stride=32 if auto else None, upscale=scaleup)
    ours = pixels(Image.fromarray(picture), Preprocess(letterbox=box, resample="opencv-bilinear"))
    assert np.array_equal(ours, ultralytics(picture, size, auto=auto, scaleup=scaleup))


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.sampled_from([(96, 96), (160, 224), (416, 416)]))
def test_top_left_as_yolox(height: int, width: int, size: tuple[int, int]) -> None:
    picture = RNG.integers(0, 256, (height, width, 3), np.uint8)
    box = Frame(size, place="top_left")
    ours = pixels(Image.fromarray(picture), Preprocess(letterbox=box, resample="opencv-bilinear"))
    assert np.array_equal(ours, yolox(picture, size))


@pytest.mark.parametrize("how", ["pillow-bilinear", "opencv-bilinear", "opencv-area"])
def test_the_resampling_is_the_one_that_is_named(how: str) -> None:
    picture = RNG.integers(0, 256, (61, 83, 3), np.uint8)
    wanted = {
        "pillow-bilinear": lambda: np.asarray(
            Image.fromarray(picture).resize((40, 30), Image.Resampling.BILINEAR)
        ),
        "opencv-bilinear": lambda: cv2.resize(picture, (40, 30), interpolation=cv2.INTER_LINEAR),
        "opencv-area": lambda: cv2.resize(picture, (40, 30), interpolation=cv2.INTER_AREA),
    }
    assert np.array_equal(resampled(picture, (30, 40), how), wanted[how]())


def test_opencv_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DataError, match="install opencv-python-headless"):
        resampled(np.zeros((4, 4), np.uint8), (2, 2), "opencv-bilinear")


def test_the_colour_of_the_frame_is_in_the_order_of_the_pixels() -> None:
    picture = Image.new("RGB", (40, 20), (9, 9, 9))
    found = pixels(picture, Preprocess(letterbox=Frame(40, color=(1, 2, 3))))
    assert found[0, 0].tolist() == [1, 2, 3]
    assert found[20, 20].tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    ("preprocess", "boxes"),
    [
        pytest.param(Preprocess(), [10, 20, 30, 40], id="as it is"),
        pytest.param(Preprocess(resize=(50, 50)), [5, 10, 15, 20], id="resize"),
        pytest.param(Preprocess(crop=(50, 60)), [0, 0, 10, 15], id="crop"),
        pytest.param(Preprocess(letterbox=Frame((50, 70))), [15, 10, 25, 20], id="letterbox"),
    ],
)
def test_boxes_follow_the_picture(preprocess: Preprocess, boxes: list[float]) -> None:
    place = geometry((100, 100), preprocess)
    assert place.boxes(np.array([[10, 20, 30, 40]])).tolist() == [boxes]


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": 8, "color": (300,)}, {"size": 8, "stride": 0}]
)
def test_letterboxes_that_are_none(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="letterbox"):
        Frame(**wrong)  # type: ignore[arg-type]


def test_letterbox_and_resize_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="takes the place of resize and crop"):
        Preprocess(resize=8, letterbox=Frame(8))


def test_no_side_becomes_nothing() -> None:
    assert letterboxed((1000, 1), Frame(64, place="top_left")).resized == (64, 1)
