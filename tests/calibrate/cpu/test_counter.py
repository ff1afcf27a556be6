from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from trtune.calibrate.cpu import counter as module
from trtune.calibrate.cpu.counter import Counter, count_each
from trtune.calibrate.histogram import BINS, FIRST_NON_FINITE, Histogram, bin_edges

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
pictures_of = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.integers(1, 9)), elements=finite
)


def names(count: int) -> list[str]:
    return [f"{i:03d}.png" for i in range(count)]


def count_all(rows: NDArray[np.float32], items: list[str] | None = None) -> Histogram:
    counter = Counter()
    counter.add(items or names(len(rows)), rows)
    return counter.histogram()


def assert_same(found: Histogram, expected: Histogram) -> None:
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.pictures.counts, expected.pictures.counts)
    assert found.maximum == expected.maximum
    assert found.pictures.item == expected.pictures.item
    assert found.pictures.runner_up == expected.pictures.runner_up


@given(rows=pictures_of)
def test_every_value_is_counted_in_the_bin_that_holds_it(rows: NDArray[np.float32]) -> None:
    found = count_all(rows)
    index = np.searchsorted(bin_edges()[:FIRST_NON_FINITE], np.abs(rows).ravel(), "right") - 1
    np.testing.assert_array_equal(found.counts, np.bincount(index, minlength=BINS))
    assert found.total == rows.size


@given(rows=pictures_of)
def test_maxima_are_exact(rows: NDArray[np.float32]) -> None:
    counter = Counter()
    returned = counter.add(names(len(rows)), rows)
    np.testing.assert_array_equal(returned, np.abs(rows).max(axis=1))
    found = counter.histogram()
    largest = sorted(np.abs(rows).max(axis=1).tolist())
    assert found.maximum == largest[-1]
    assert found.pictures.pictures == len(rows)
    assert found.pictures.runner_up == (largest[-2] if len(rows) > 1 else 0.0)


@given(rows=pictures_of, data=st.data())
def test_the_order_of_pictures_and_values_does_not_matter(
    rows: NDArray[np.float32], data: st.DataObject
) -> None:
    items = names(len(rows))
    order = data.draw(st.permutations(range(len(rows))))
    columns = data.draw(st.permutations(range(rows.shape[1])))
    shuffled = np.ascontiguousarray(rows[order][:, columns])
    assert_same(count_all(shuffled, [items[i] for i in order]), count_all(rows, items))


@given(rows=pictures_of, data=st.data())
def test_splitting_over_counters_merged_in_any_order_does_not_matter(
    rows: NDArray[np.float32], data: st.DataObject
) -> None:
    counters = [Counter() for _ in range(data.draw(st.integers(1, 4)))]
    for item, row in zip(names(len(rows)), rows, strict=True):
        data.draw(st.sampled_from(counters)).add([item], row.reshape(1, -1))
    first, *rest = data.draw(st.permutations(counters))
    for counter in rest:
        first.merge(counter)
    assert_same(first.histogram(), count_all(rows))


def test_merging_goes_on_after_more_was_counted() -> None:
    rows = np.float32([[1, 2], [8, 3], [5, 0], [-8, 7]])
    one, two = Counter(), Counter()
    one.add(["000.png"], rows[:1])
    two.add(["001.png"], rows[1:2])
    one.merge(two)
    one.add(["002.png", "003.png"], rows[2:])
    assert_same(one.histogram(), count_all(rows))


def test_tables_that_are_full_are_emptied_without_losing_a_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.float32(np.arange(60).reshape(12, 5) % 7)
    expected = count_all(rows)
    monkeypatch.setattr(module, "TABLE_ROOM", 8)
    one, two = Counter(), Counter()
    for i, row in enumerate(rows):
        (one if i % 3 else two).add([f"{i:03d}.png"], row.reshape(1, -1))
    one.merge(two)
    assert_same(one.histogram(), expected)


@pytest.mark.parametrize(
    ("row", "check"),
    [
        pytest.param([1, math.inf], lambda largest: largest == 1, id="infinity is no range"),
        pytest.param([-math.inf, -3], lambda largest: largest == 3, id="minus infinity"),
        pytest.param([math.inf, math.inf], lambda largest: largest == 0, id="nothing else"),
        pytest.param([math.nan, 1e38], math.isnan, id="NaN"),
        pytest.param([math.nan, math.inf], math.isnan, id="NaN outranks infinity"),
    ],
)
def test_the_largest_finite_value_of_a_picture_or_nan(row, check) -> None:  # type: ignore[no-untyped-def]
    maxima = Counter().add(["a", "b"], np.float32([[3, 4], row]))
    assert maxima[0] == 4
    assert check(maxima[1])


def test_each_picture_needs_a_name() -> None:
    with pytest.raises(ValueError, match="1 names for 2 pictures"):
        Counter().add(["a"], np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("maxima", "item", "runner_up"),
    [
        pytest.param({"a": 1, "b": 9, "c": 4}, "b", 4, id="the largest and the next"),
        pytest.param({"b": 9, "a": 9, "c": 1}, "a", 9, id="of equals the first by name"),
        pytest.param({"a": 5}, "a", 0, id="one picture has no runner-up"),
        pytest.param({"b": 0, "a": 0}, "a", 0, id="all zero"),
        pytest.param({"a": 9, "b": 8, "c": 7}, "a", 8, id="falling"),
        pytest.param({"c": 7, "b": 8, "a": 9}, "a", 8, id="rising"),
    ],
)
def test_the_picture_with_the_largest_value(
    maxima: dict[str, float], item: str, runner_up: float
) -> None:
    counter = Counter()
    for name, value in maxima.items():
        counter.add([name], np.float32([[0, -value]]))
    pictures = counter.histogram().pictures
    assert (pictures.item, pictures.runner_up) == (item, runner_up)


def test_nothing_counted_is_an_empty_histogram() -> None:
    found = Counter().histogram()
    assert (found.total, found.maximum) == (0, 0.0)
    assert (found.pictures.item, found.pictures.pictures) == ("", 0)


@given(rows=pictures_of)
def test_what_is_counted_is_what_numpy_counts(rows: NDArray[np.float32]) -> None:
    assert_same(count_all(rows, [str(i) for i in range(len(rows))]), Histogram.of(*rows))


def test_infinities_are_not_counted() -> None:
    rows = np.float32([[-np.inf, 2, 3, np.inf], [np.inf, 1, 1, 0]])
    counter = Counter()
    assert counter.add(["a", "b"], rows).tolist() == [3, 1]
    assert sorted(counter.overflowed) == ["a", "b"]
    assert counter.histogram().total == 5


def test_several_tensors_at_once_are_each_counted_alone() -> None:
    arrays = [np.float32([[1, -2], [0, 3]]), np.float32([[7] * 50]), np.zeros((3, 0), np.float32)]
    counters = [Counter() for _ in arrays]
    jobs = [(c, names(len(a)), a) for c, a in zip(counters, arrays, strict=True)]
    maxima = count_each(jobs)
    assert maxima.tolist() == [2, 3, 7, 0, 0, 0]
    for counter, array in zip(counters, arrays, strict=True):
        assert_same(counter.histogram(), count_all(array))


def test_a_counter_goes_to_another_process_and_back() -> None:
    counter = Counter()
    counter.add(["a", "b"], np.float32([[1, 2, 0], [-5, np.inf, 0]]))
    again = pickle.loads(pickle.dumps(counter))
    assert_same(again.histogram(), counter.histogram())
    assert again.overflowed == ["b"]
    again.add(["c"], np.float32([[9, 9, 9]]))
    assert again.histogram().total == counter.histogram().total + 3
