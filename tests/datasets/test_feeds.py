from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.datasets.batches import InputSpec
from trtune.datasets.feeds import (
    cast,
    check_finite,
    check_shape,
    label_array,
    match_inputs,
    picture_feed,
    show_shape,
    to_feeds,
    to_labels,
)
from trtune.datasets.pictures.preprocess import Preprocess

PICTURES = InputSpec("input", ("N", 3, 8, 8), "float32")
IDS = InputSpec("ids", ("N", 4), "int64")
MASK = InputSpec("mask", ("N", 4), "int64")


@pytest.mark.parametrize(
    ("found", "names", "inputs", "expected"),
    [
        pytest.param(["images"], None, [PICTURES], {"input": "images"}, id="only one of each"),
        pytest.param(["input", "more"], None, [PICTURES], {"input": "input"}, id="same name"),
        pytest.param(
            ["mask", "ids"], None, [IDS, MASK], {"ids": "ids", "mask": "mask"}, id="two by name"
        ),
        pytest.param(
            ["a", "mask"], {"ids": "a"}, [IDS, MASK], {"ids": "a", "mask": "mask"}, id="one told"
        ),
        pytest.param(["a", "b"], {"input": "b"}, [PICTURES], {"input": "b"}, id="told which"),
    ],
)
def test_match_inputs(
    found: list[str],
    names: dict[str, str] | None,
    inputs: list[InputSpec],
    expected: dict[str, str],
) -> None:
    assert match_inputs(found, inputs, names=names, where="x.npz") == expected


@pytest.mark.parametrize(
    ("found", "names", "inputs", "message"),
    [
        pytest.param(
            ["image", "inptu"],
            None,
            [PICTURES],
            "nothing for the model's input 'input'; did you mean 'inptu'.*found 'image', 'inptu'",
            id="no array of that name",
        ),
        pytest.param(["ids"], None, [IDS, MASK], "input 'mask'.*found 'ids'", id="one missing"),
        pytest.param([], None, [PICTURES], "found no arrays", id="only labels"),
        pytest.param(
            ["a"], {"inpt": "a"}, [PICTURES], "'inpt', which is no input.*mean 'input'", id="input"
        ),
        pytest.param(
            ["images"],
            {"input": "image"},
            [PICTURES],
            "no array 'image' for the model's input 'input'; did you mean 'images'",
            id="array told is not there",
        ),
    ],
)
def test_match_inputs_errors(
    found: list[str], names: dict[str, str] | None, inputs: list[InputSpec], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        match_inputs(found, inputs, names=names, where="x.npz")


@pytest.mark.parametrize(
    ("found", "labels", "expected"),
    [
        pytest.param(["x", "y", "label"], "auto", "label", id="label before y"),
        pytest.param(["x", "target"], "auto", None, id="nothing that looks like labels"),
        pytest.param(["x", "target"], "target", "target", id="told"),
        pytest.param(["x", "labels"], None, "labels", id="left out, but known not to be data"),
        pytest.param(["ids", "y"], "auto", "y", id="y"),
    ],
)
def test_label_array(found: list[str], labels: str | None, expected: str | None) -> None:
    assert label_array(found, [IDS], labels=labels, where="x.npz") == expected


def test_an_input_called_y_is_no_label() -> None:
    spec = [InputSpec("y", (None, 2), "float32")]
    assert label_array(["y"], spec, labels="auto", where="x.npz") is None


def test_named_labels_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"no array 'lables' for `labels`; did you mean 'labels'"):
        label_array(["x", "labels"], [IDS], labels="lables", where="x.npz")


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        pytest.param(np.array([1.5]), "float32", id="float64 to float32"),
        pytest.param(np.array([1.5], np.float32), "float16", id="float32 to float16"),
        pytest.param(np.array([1.5], ">f4"), "float32", id="big-endian"),
        pytest.param(np.array([7], np.int64), "int32", id="int64 that fits int32"),
        pytest.param(np.array([255], np.uint8), "int64", id="uint8 to int64"),
        pytest.param(np.array([True]), "int64", id="bool to int64"),
        pytest.param(np.array([0, 1]), "bool", id="0 and 1 to bool"),
        pytest.param(np.array([], np.int64), "int8", id="nothing fits anywhere"),
    ],
)
def test_cast(array: NDArray[Any], dtype: str) -> None:
    result = cast(array, InputSpec("x", (None,), dtype), where="x.npz")
    assert result.dtype == np.dtype(dtype)
    assert result.tolist() == array.tolist()


def test_cast_copies_nothing_that_fits() -> None:
    array = np.zeros(3, np.float32)
    assert cast(array, InputSpec("x", (None,), "float32"), where="x.npz") is array


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        pytest.param(np.array([300]), "uint8", "values from 300 to 300 do not fit", id="too big"),
        pytest.param(np.array([-1]), "uint64", "values from -1 to -1", id="negative"),
        pytest.param(np.array([1]), "float32", "takes float32, x.npz has int64", id="int to float"),
        pytest.param(np.array([1.0]), "int64", "takes int64, x.npz has float64", id="float to int"),
        pytest.param(np.array(["a"]), "float32", "x.npz has str", id="text"),
    ],
)
def test_cast_errors(array: NDArray[Any], dtype: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cast(array, InputSpec("x", (None,), dtype), where="x.npz")


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        pytest.param((2, 8, 8, 3), "fit as NCHW", id="channels last"),
        pytest.param((2, 3, 9, 9), "see `preprocess`", id="wrong size"),
        pytest.param((3, 8, 8), "first axis must be the rows", id="no batch axis"),
        pytest.param((2, 3), "gives 2 x 3$", id="wrong rank"),
    ],
)
def test_check_shape(shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(DataError, match=r"'input' takes N x 3 x 8 x 8, x.npz gives") as caught:
        check_shape(shape, InputSpec("input", (None, 3, 8, 8), "float32"), where="x.npz")
    assert caught.match(hint)


def test_check_shape_wants_the_channels_last() -> None:
    spec = InputSpec("input", (None, 8, 8, 3), "float32")
    with pytest.raises(DataError, match="would fit as NHWC"):
        check_shape((2, 3, 8, 8), spec, where="x.npz")


def test_free_dimensions_take_any_size() -> None:
    check_shape((9, 3, 5, 7), InputSpec("x", (1, 3, "height", None), "float32"), where="x.npz")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(np.nan, "item b.png: NaN in 1 of 2 values for input 'input'", id="NaN"),
        pytest.param(np.inf, "item b.png: Inf in 1 of 2", id="Inf"),
        pytest.param(-np.inf, "item b.png: Inf", id="minus Inf"),
    ],
)
def test_check_finite_names_the_item(value: float, message: str) -> None:
    rows = np.array([[0, 1], [value, 1]], np.float32)
    with pytest.raises(DataError, match=message):
        check_finite(rows, PICTURES, items=["a.png", "b.png"], where="x.npz")


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.full((2, 4), 3e38, np.float32), id="a sum that overflows"),
        pytest.param(np.array([[1], [2]]), id="integers"),
    ],
)
def test_check_finite_passes(rows: NDArray[Any]) -> None:
    check_finite(rows, PICTURES, items=["a", "b"], where="x.npz")


def test_an_overflowing_cast_is_found_as_inf() -> None:
    half = InputSpec("x", (None, 1), "float16")
    with pytest.raises(DataError, match=r"item 0: Inf .* 'x' \(float16\)"):
        to_feeds({"x": np.array([[1e6]])}, [half], preprocess=None, items=["0"], where="x.npz")


def test_pictures_and_numbers_together() -> None:
    arrays = {"input": np.full((2, 8, 8, 3), 255, np.uint8), "ids": np.ones((2, 4), np.int32)}
    feeds = to_feeds(
        arrays, [PICTURES, IDS], preprocess=Preprocess(), items=["0", "1"], where="x.npz"
    )
    assert feeds["input"].shape == (2, 3, 8, 8)
    assert (feeds["input"] == 1).all()
    assert feeds["ids"].dtype == np.int64


def test_preprocess_without_pictures_is_an_error() -> None:
    rows = np.zeros((2, 3, 8, 8), np.float32)
    with pytest.raises(DataError, match=r"x.npz has float32 2 x 3 x 8 x 8; leave `preprocess` out"):
        to_feeds(
            {"input": rows}, [PICTURES], preprocess=Preprocess(), items=["0", "1"], where="x.npz"
        )


def test_pictures_without_preprocess_are_an_error() -> None:
    rows = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match=r"takes float32, x.npz has uint8; pictures need `prepro"):
        to_feeds({"input": rows}, [PICTURES], preprocess=None, items=["0", "1"], where="x.npz")


def test_an_integer_input_takes_whole_pictures() -> None:
    spec = InputSpec("input", ("N", 3, 2, 2), "uint8")
    feed = picture_feed(np.full((1, 3, 2, 2), 200, np.float32), spec, where="x.npz")
    assert feed.dtype == np.uint8
    assert (feed == 200).all()
    with pytest.raises(DataError, match=r"takes uint8.*set `scale: 1`"):
        picture_feed(np.full((1, 3, 2, 2), 0.5, np.float32), spec, where="x.npz")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.array([1, 2], np.uint8), id="bytes"),
        pytest.param(np.array([1.0, 2.0]), id="whole floats"),
        pytest.param(np.array([[1], [2]]), id="a column"),
    ],
)
def test_to_labels(values: NDArray[Any]) -> None:
    labels = to_labels(values, where="x.npz")
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.eye(3), id="one-hot"),
        pytest.param(np.array([0.5, 1.0]), id="real numbers"),
        pytest.param(np.zeros((2, 4, 4), np.uint8), id="masks"),
        pytest.param(np.zeros((2, 3, 5), np.float32), id="boxes"),
    ],
)
def test_labels_of_any_rank_stay_as_they_are(values: NDArray[Any]) -> None:
    labels = to_labels(values, where="x.npz")
    assert isinstance(labels, np.ndarray)
    assert labels.dtype == values.dtype
    assert np.array_equal(labels, values)


def test_labels_of_different_lengths_are_an_array_each() -> None:
    labels = to_labels([np.zeros((2, 5)), np.zeros((0, 5))], where="batch 0")
    assert isinstance(labels, tuple)
    assert [row.shape for row in labels] == [(2, 5), (0, 5)]


def test_labels_must_be_numbers() -> None:
    with pytest.raises(DataError, match="must be numbers, found str"):
        to_labels(np.array(["cat"]), where="x.npz")


def test_show_shape_of_a_scalar() -> None:
    assert show_shape(()) == "a single value"
