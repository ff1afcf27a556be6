from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.configs.errors import DataError
from trtune.datasets.arrays import ArraySource
from trtune.datasets.batches import (
    Batch,
    InputSpec,
    batch_axes,
    batch_size,
    check_labels,
    fit_batch,
    labels_of,
    rebatch,
    repeat_to,
    require_labels,
    take_rows,
)


def numbers(first: int, count: int, *, labels: bool = True) -> Batch:
    rows = np.arange(first, first + count)
    return Batch(
        {"x": rows[:, np.newaxis].astype(np.float32), "ids": rows},
        tuple(map(str, rows)),
        rows.astype(np.int64) if labels else None,
    )


def test_fit_batch_repeats_the_last_sample() -> None:
    padded = fit_batch(numbers(5, 2), 4)
    assert padded.items == ("5", "6", "6", "6")
    assert padded.feeds["x"].tolist() == [[5], [6], [6], [6]]
    assert padded.labels is not None
    assert padded.labels.tolist() == [5, 6, 6, 6]


def test_fit_batch_leaves_a_whole_batch_alone() -> None:
    batch = numbers(0, 3)
    assert fit_batch(batch, 3) is batch


@pytest.mark.parametrize("count", [0, 3])
def test_fit_batch_refuses_what_cannot_be_padded(count: int) -> None:
    with pytest.raises(ValueError, match=f"batch of {count} cannot be padded to 2"):
        fit_batch(numbers(0, count), 2)


@pytest.mark.parametrize("rows", [slice(1, 3), [1, 2]], ids=["slice", "numbers"])
def test_take_rows(rows: slice | list[int]) -> None:
    taken = take_rows(numbers(0, 4, labels=False), rows)
    assert taken.items == ("1", "2")
    assert taken.feeds["ids"].tolist() == [1, 2]
    assert taken.labels is None


@given(sizes=st.lists(st.integers(0, 7), max_size=8), size=st.integers(1, 6))
def test_rebatch_keeps_every_sample_in_order(sizes: list[int], size: int) -> None:
    starts = np.cumsum([0, *sizes])
    pieces = [numbers(int(start), count) for start, count in zip(starts, sizes, strict=False)]
    batches = list(rebatch(pieces, size))
    total = sum(sizes)
    assert [len(b) for b in batches] == [size] * (total // size) + [total % size] * (
        total % size > 0
    )
    joined = [int(n) for b in batches for n in b.feeds["ids"]]
    assert joined == list(range(total))
    assert [i for b in batches for i in b.items] == list(map(str, joined))
    assert [int(y) for b in batches if b.labels is not None for y in b.labels] == joined


def test_rebatch_gives_samples_of_another_shape_a_batch_of_their_own() -> None:
    pieces = [
        Batch({"x": np.zeros((1, 3, 4, width))}, (name,))
        for name, width in [("a", 4), ("b", 4), ("c", 5), ("d", 4)]
    ]
    assert [batch.items for batch in rebatch(pieces, 8)] == [("a", "b"), ("c",), ("d",)]


def test_a_feed_for_all_samples_is_neither_cut_nor_joined() -> None:
    camera = np.eye(4)
    pieces = [
        Batch(
            {"x": np.full((2, 3), k), "camera": camera}, (f"{k}0", f"{k}1"), None, {"camera": None}
        )
        for k in range(3)
    ]
    batches = list(rebatch(pieces, 4))
    assert [len(batch) for batch in batches] == [4, 2]
    assert all(batch.feeds["camera"].shape == (4, 4) for batch in batches)
    assert fit_batch(batches[1], 4).feeds["x"].shape == (4, 3)
    assert fit_batch(batches[1], 4).feeds["camera"].shape == (4, 4)


def test_samples_along_another_axis_are_cut_and_joined_there() -> None:
    state = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    whole = Batch({"h": state}, tuple("abcde"), None, {"h": 1})
    parts = [take_rows(whole, slice(0, 2)), take_rows(whole, [2, 3, 4])]
    (joined,) = rebatch(parts, 5)
    assert np.array_equal(joined.feeds["h"], state)
    assert take_rows(whole, [1]).feeds["h"].tolist() == state[:, 1:2].tolist()


def test_an_array_of_labels_for_each_sample() -> None:
    boxes = [np.zeros((k, 5)) for k in range(3)]
    pieces = [Batch({"x": np.zeros((1, 2))}, (str(k),), (boxes[k],)) for k in range(3)]
    (joined,) = rebatch(pieces, 3)
    assert isinstance(joined.labels, tuple)
    assert [len(sample) for sample in joined.labels] == [0, 1, 2]
    assert [len(sample) for sample in take_rows(joined, [2, 0]).labels or ()] == [2, 0]


@pytest.mark.parametrize(
    ("shapes", "axes", "size"),
    [
        pytest.param([("n", 3, 8, 8), (16, 16), ("n",), ()], [0, None, 0, None], 7, id="camera"),
        pytest.param([(1, 3, 8, 8), (5, 8)], [0, None], 1, id="prompts beside a fixed batch"),
        pytest.param([("n", "t", 8), (2, "n", 16)], [0, 1], 7, id="recurrent state"),
        pytest.param([("t", "n", 8), (2, "n", 16)], [1, 1], 7, id="time first"),
        pytest.param([(1, "t"), (1, "t")], [0, 0], 1, id="tokens, batch 1"),
        pytest.param([("b", "t"), ("b", "t")], [0, 0], 7, id="tokens"),
        pytest.param([("a_0", "a_1"), ("b_0", "b_1")], [0, 0], 7, id="a name for every dimension"),
        pytest.param([(-1, 3, 8, 8)], [0], 7, id="-1 is free"),
        pytest.param([(1, 3, "h", "w"), (1, 1, "h", "w")], [0, 0], 1, id="free sides"),
        pytest.param([(None, 3), (4, 4)], [0, None], 7, id="no names"),
        pytest.param([(1, 9), (2, 1, 16)], [0, None], 1, id="a fixed state of higher rank"),
        pytest.param([(4, 3, 8), (1,)], [0, None], 4, id="a fixed batch beside one value"),
    ],
)
def test_the_axis_of_the_samples_is_found_by_shape(
    shapes: list[tuple[int | str | None, ...]], axes: list[int | None], size: int
) -> None:
    inputs = [InputSpec(str(k), shape, "float32") for k, shape in enumerate(shapes)]
    assert list(batch_axes(inputs).values()) == axes
    assert batch_size(inputs, 7) == size


def test_rebatch_refuses_labels_on_some_samples_only() -> None:
    with pytest.raises(DataError, match="only some of the samples 0 to 1 have labels"):
        list(rebatch([numbers(0, 1), numbers(1, 1, labels=False)], 2))


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        pytest.param("N", 8, id="free: as wanted"),
        pytest.param(None, 8, id="unknown: as wanted"),
        pytest.param(1, 1, id="fixed to one: one by one"),
        pytest.param(4, 4, id="fixed to four"),
    ],
)
def test_batch_size(first: int | str | None, expected: int) -> None:
    specs = [InputSpec("x", (first, 3, 8), "float32"), InputSpec("y", ("N",), "int64")]
    assert batch_size(specs, 8) == expected


def test_an_input_without_dimensions_fixes_no_batch() -> None:
    assert InputSpec("x", (), "float32").fixed_batch is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(
            [0, 1, 3], r"label 3 of 2 is out of range.*3 classes, 0 to 2 \(1 of 3", id="high"
        ),
        pytest.param([0, -1, -2], r"label -1 of 1 .* \(2 of 3", id="negative"),
        pytest.param([1, 2, 3], "count from 1: subtract 1", id="one-based"),
    ],
)
def test_labels_out_of_range(labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(np.array(labels), 3)


def test_a_label_out_of_range_names_its_item() -> None:
    with pytest.raises(DataError, match=r"label 9 of cat.png"):
        check_labels(np.array([0, 9]), 3, ["dog.png", "cat.png"])


def test_labels_in_range() -> None:
    check_labels(np.array([0, 2]), 3)


def test_missing_labels_are_named_with_the_metric() -> None:
    spec = [InputSpec("x", (None, 2), "float32")]
    rows = np.zeros((3, 2), np.float32)
    require_labels(ArraySource({"x": rows, "y": np.arange(3)}, spec), "top1")
    with pytest.raises(DataError, match=r"'top1' needs labels.*set `labels`.*sqnr_db"):
        require_labels(ArraySource({"x": rows}, spec), "top1")


def test_labels_of_a_batch() -> None:
    assert labels_of(numbers(0, 2), "top1").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        pytest.param(2, [0, 1], id="fewer"),
        pytest.param(3, [0, 1, 2], id="as many"),
        pytest.param(7, [0, 1, 2, 0, 1, 2, 0], id="more: again from the first"),
    ],
)
def test_repeat_to(size: int, rows: list[int]) -> None:
    batch = Batch({"x": np.arange(6, dtype=np.float32).reshape(3, 2)}, ("a", "b", "c"))
    feeds = repeat_to(batch, size)
    np.testing.assert_array_equal(feeds["x"], batch.feeds["x"][rows])
    assert feeds["x"].flags.c_contiguous
