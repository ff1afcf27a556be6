from __future__ import annotations

import numpy as np
import pytest

from trtune.configs.errors import DataError
from trtune.datasets.arrays import ArraySource
from trtune.datasets.axes import feed_axes, sample_count
from trtune.datasets.batches import InputSpec

Shape = tuple[int | str | None, ...]
PICTURES = ("n", 3, 8, 8)


def specs(**shapes: Shape) -> list[InputSpec]:
    return [InputSpec(name, shape, "float32") for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("inputs", "shapes", "axes", "count"),
    [
        pytest.param(
            {"x": PICTURES, "camera": (16, 16)}, [(24, 3, 8, 8), (16, 16)], [0, None], 24,
            id="camera matrix",
        ),
        pytest.param({"x": PICTURES, "s": ()}, [(24, 3, 8, 8), ()], [0, None], 24, id="scalar"),
        pytest.param(
            {"x": (1, 3, 8, 8), "t": (5, 8)}, [(24, 3, 8, 8), (5, 8)], [0, None], 24, id="prompts"
        ),
        pytest.param(
            {"x": PICTURES, "t": ("prompts", 8)}, [(24, 3, 8, 8), (5, 8)], [0, None], 24,
            id="prompts of any number",
        ),
        pytest.param(
            {"a": ("a_0", 8), "b": ("b_0", 8)}, [(24, 8), (24, 8)], [0, 0], 24,
            id="a name for each first axis",
        ),
        pytest.param(
            {"x": (1, 4, 8), "h": (1, 16)}, [(24, 4, 8), (1, 16)], [0, None], 24,
            id="one state for all",
        ),
        pytest.param(
            {"x": (1, 4, 8), "h": (1, 16)}, [(24, 4, 8), (24, 16)], [0, 0], 24,
            id="a state a sample",
        ),
        pytest.param(
            {"x": (1, 4, 8), "h": (2, 1, 16)}, [(24, 4, 8), (2, 24, 16)], [0, 1], 24,
            id="a fixed state a sample",
        ),
        pytest.param(
            {"x": ("n", 4, 8), "h": (2, "n", 16)}, [(24, 4, 8), (2, 24, 16)], [0, 1], 24,
            id="state 2 x N x H",
        ),
        pytest.param(
            {"x": (None, None), "h": (2, None, 16), "rate": ()}, [(24, 9), (2, 24, 16), ()],
            [0, 1, None], 24, id="state of unnamed dimensions",
        ),
        pytest.param(
            {"x": (None, None), "h": (2, None, 16)}, [(24, 9), (2, 1, 16)], [0, None], 24,
            id="one unnamed state for all",
        ),
        pytest.param(
            {"x": (1, 9), "h": (2, 1, 16)}, [(24, 9), (2, 1, 16)], [0, None], 24,
            id="one fixed state of higher rank for all",
        ),
        pytest.param(
            {"x": (1, 9), "h": (2, 1, 16)}, [(24, 9), (2, 24, 16)], [0, 1], 24,
            id="a fixed state of higher rank a sample",
        ),
        pytest.param({"x": (4, 8), "h": (4, 2)}, [(4, 8), (4, 2)], [0, 0], 4, id="one batch"),
    ],
)  # fmt: skip
def test_the_axis_of_the_samples(
    inputs: dict[str, Shape], shapes: list[tuple[int, ...]], axes: list[int | None], count: int
) -> None:
    arrays = {name: np.zeros(shape) for name, shape in zip(inputs, shapes, strict=True)}
    found = feed_axes(arrays, specs(**inputs))
    assert list(found.values()) == axes
    assert sample_count(arrays, found, where="x.npz") == count


def test_the_config_may_say_the_axis() -> None:
    arrays = {"x": np.zeros((7, 24, 8))}
    assert feed_axes(arrays, specs(x=("t", "n", 8)), given={"x": 1}) == {"x": 1}


def test_lengths_that_differ_are_all_named() -> None:
    with pytest.raises(DataError, match="differ in their number of rows: 'x' 3, 'labels' 2"):
        sample_count({"x": np.zeros(3), "labels": np.zeros(2)}, {}, where="x.npz")


def test_a_single_value_has_no_rows() -> None:
    with pytest.raises(DataError, match=r"'x' of x.npz is a single value"):
        sample_count({"x": np.array(3)}, {"x": 0}, where="x.npz")


def test_rows_and_what_is_the_same_for_all_in_one_source() -> None:
    state = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    arrays = {
        "x": np.arange(5 * 4, dtype=np.float32).reshape(5, 4),
        "h": state,
        "camera": np.eye(4, dtype=np.float32),
        "labels": np.zeros((5, 2, 2), np.uint8),
    }
    source = ArraySource(arrays, specs(x=("n", 4), h=(2, "n", 3), camera=(4, 4)), batch=2)
    batches = list(source)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(batches[1].feeds["h"], state[:, 2:4])
    assert all(np.array_equal(batch.feeds["camera"], np.eye(4)) for batch in batches)
    assert np.shape(batches[1].labels) == (2, 2, 2)
    other = ArraySource({**arrays, "camera": 2 * np.eye(4, dtype=np.float32)},
                        specs(x=("n", 4), h=(2, "n", 3), camera=(4, 4)))  # fmt: skip
    assert other.identity != source.identity
