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
    batch_size,
    check_labels,
    fit_batch,
    labels_of,
    rebatch,
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


def test_rebatch_names_the_samples_whose_shapes_differ() -> None:
    pieces = [
        Batch({"x": np.zeros((1, 3, 4, 4))}, ("a.png",)),
        Batch({"x": np.zeros((1, 3, 4, 5))}, ("b.png",)),
    ]
    with pytest.raises(DataError, match=r"b.png is 3 x 4 x 5 .* a.png is 3 x 4 x 4.*`preprocess"):
        list(rebatch(pieces, 2))


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
    specs = [InputSpec("x", (first, 3), "float32"), InputSpec("y", ("N",), "int64")]
    assert batch_size(specs, 8) == expected


def test_inputs_that_fix_different_batches_are_an_error() -> None:
    specs = [InputSpec("x", (1, 3), "float32"), InputSpec("y", (2,), "int64")]
    with pytest.raises(DataError, match="'x' 1, 'y' 2"):
        batch_size(specs, 8)


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
