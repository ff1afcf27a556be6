"""Pictures that set ranges, made small."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trtune.datasets.batches import Batch
from trtune.datasets.pictures.thumbnails import LONGER_SIDE, jpeg, thumbnails


class Given:
    """A source of batches that counts how many were read."""

    def __init__(self, *batches: Batch) -> None:
        self.batches, self.read = batches, 0
        self.count, self.identity, self.skipped = None, "given", ()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.read += 1
            yield batch


def opened(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)))


def red(layout: str) -> NDArray[np.float32]:
    """One picture that is red on the left half, normalised to about -2 to 2."""
    picture = np.full((1, 8, 8, 3), -2.0, np.float32)
    picture[:, :, :4, 0] = 2.0
    return picture if layout == "NHWC" else picture.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("swapped", [False, True], ids=["RGB", "BGR"])
def test_the_picture_has_its_colours_in_either_layout(layout: str, swapped: bool) -> None:
    source = Given(Batch({"x": red(layout)}, ("a",)))
    small = opened(thumbnails(source, ["a"], reversed_colours=swapped)["a"])
    left = small[LONGER_SIDE // 2, LONGER_SIDE // 4].astype(int)
    assert left.argmax() == (2 if swapped else 0)
    assert small[LONGER_SIDE // 2, -4].max() < 60


def test_only_as_much_is_read_as_it_takes_and_the_order_is_that_asked_for() -> None:
    batches = [Batch({"x": red("NCHW")}, (item,)) for item in "abcd"]
    source = Given(*batches)
    assert list(thumbnails(source, ["c", "a", "c"])) == ["c", "a"]
    assert source.read == 3
    assert thumbnails(source, []) == {}
    assert source.read == 3


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.zeros((1, 128), np.int64), id="tokens"),
        pytest.param(np.zeros((1, 16, 8, 8), np.float32), id="sixteen channels"),
        pytest.param(np.zeros((1, 3, 2, 2), np.float32), id="hardly a pixel"),
    ],
)
def test_what_is_no_picture_has_no_thumbnail(array: NDArray[np.generic]) -> None:
    assert thumbnails(Given(Batch({"x": array}, ("a",))), ["a"]) == {}


def test_an_input_that_is_the_same_for_all_is_not_the_picture() -> None:
    feeds = {"k": np.zeros((3, 8, 8), np.float32), "x": red("NCHW")}
    batch = Batch(feeds, ("a",), axes={"k": None})
    assert opened(thumbnails(Given(batch), ["a"])["a"])[LONGER_SIDE // 2, 10, 0] > 200


@pytest.mark.parametrize(
    ("shape", "longest"),
    [((500, 300, 3), LONGER_SIDE), ((8, 8, 1), LONGER_SIDE), ((100, 60, 3), 100)],
)
def test_the_size_is_bounded(shape: tuple[int, ...], longest: int) -> None:
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    file = jpeg(noise)
    assert max(opened(file).shape[:2]) == longest
    assert len(file) < 16_000


def test_values_without_a_range_or_a_number_are_drawn() -> None:
    flat = np.full((8, 8, 1), 3.0, np.float32)
    assert opened(jpeg(flat)).max() == 0
    flat[0, 0], flat[1, 1] = np.nan, np.inf
    assert opened(jpeg(flat)).shape == (LONGER_SIDE, LONGER_SIDE)
