"""Pictures set apart: the same whatever the order and the batches, and what is left of the data."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.datasets.batches import Batch
from trtune.datasets.holdout import (
    SHARE,
    WholeBatches,
    Without,
    fitting_pictures,
    hold_out,
    hold_out_more,
    join,
)


@dataclass(frozen=True)
class Source:
    """Pictures by number: `order` of those in `content`, a small array each."""

    content: Sequence[int]
    order: Sequence[int]
    batch: int = 4
    count: int | None = None
    skipped: tuple[str, ...] = ("broken.png",)
    identity: str = "this data"

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.order), self.batch):
            rows = self.order[start : start + self.batch]
            yield Batch(
                {"x": np.stack([picture(self.content[row]) for row in rows])},
                tuple(f"p{row}" for row in rows),
                np.array([self.content[row] for row in rows], np.int64),
            )


def picture(content: int) -> NDArray[np.float32]:
    return np.random.default_rng(content).standard_normal((2, 3)).astype(np.float32)


def source(available: int, *, batch: int = 4, **options: Any) -> Source:
    return Source(range(available), range(available), batch, **options)


def digest(content: int) -> str:
    """What pictures are ranked by, computed here by hand."""
    return hashlib.blake2b(b"x" + picture(content).tobytes(), digest_size=16).hexdigest()


def contents(held: Sequence[Batch]) -> list[int]:
    return [int(batch.labels[0]) for batch in held if batch.labels is not None]


# hold_out


@pytest.mark.parametrize(
    ("available", "count", "expected"),
    [
        pytest.param(40, 3, 3, id="as many as asked for"),
        pytest.param(40, 24, 10, id="at most a quarter"),
        pytest.param(40, 100, 10, id="more than there are"),
        pytest.param(7, 5, 1, id="a quarter, rounded down"),
        pytest.param(3, 5, 1, id="one at least"),
        pytest.param(1, 5, 1, id="the only one"),
    ],
)
def test_how_many_are_set_apart(available: int, count: int, expected: int) -> None:
    assert SHARE == 4
    held = hold_out(source(available), count)
    assert contents(held) == sorted(range(available), key=digest)[:expected]


def test_each_is_a_batch_of_its_own_with_its_name_and_label() -> None:
    for batch in hold_out(source(20), 4):
        assert len(batch) == 1
        (content,) = contents([batch])
        assert batch.items == (f"p{content}",)
        np.testing.assert_array_equal(batch.feeds["x"], picture(content)[None])


def test_the_pictures_are_copies() -> None:
    block = np.zeros((4, 2), np.float32)

    class Reusing(Source):
        """Yields the same memory again and again."""

        def __iter__(self) -> Iterator[Batch]:
            for start in range(3):
                block[:] = np.arange(8).reshape(4, 2) + 100 * start
                yield Batch({"x": block}, tuple(f"{start}.{i}" for i in range(4)))

    for batch in hold_out(Reusing([], []), 3):
        start, row = map(int, batch.items[0].split("."))
        expected = np.arange(8).reshape(4, 2)[row] + 100 * start
        np.testing.assert_array_equal(batch.feeds["x"][0], expected)


@given(data=st.data(), available=st.integers(1, 30), count=st.integers(1, 12))
def test_neither_order_nor_batch_size_matters(
    data: st.DataObject, available: int, count: int
) -> None:
    content = data.draw(st.lists(st.integers(0, 8), min_size=available, max_size=available))
    order = data.draw(st.permutations(range(available)))
    batch = data.draw(st.integers(1, 10))
    expected = contents(hold_out(Source(content, range(available), 1), count))
    assert contents(hold_out(Source(content, order, batch), count)) == expected
    assert len(expected) == min(count, len(set(content)), max(1, available // 4))
    assert len(set(expected)) == len(expected)


def test_equal_pictures_count_once() -> None:
    assert contents(hold_out(Source([5] * 12, range(12)), 3)) == [5]
    held = contents(hold_out(Source([5, 7] * 12, range(24)), 6))
    assert held == sorted([5, 7], key=digest)


def test_every_input_decides() -> None:
    def pair(b: float) -> Batch:
        return Batch({"b": np.float32([[b]]), "a": np.float32([[1.0]])}, (str(b),))

    class Two(Source):
        def __iter__(self) -> Iterator[Batch]:
            yield from (pair(float(i)) for i in range(8))

    assert len({b.items for b in hold_out(Two([], []), 2)}) == 2


def test_inputs_that_are_not_contiguous_have_the_hash_of_their_content() -> None:
    class Turned(Source):
        def __iter__(self) -> Iterator[Batch]:
            for batch in Source.__iter__(self):
                turned = np.ascontiguousarray(batch.feeds["x"].transpose(0, 2, 1))
                yield Batch({"x": turned.transpose(0, 2, 1)}, batch.items, batch.labels)

    assert contents(hold_out(Turned(range(20), range(20)), 4)) == contents(hold_out(source(20), 4))


def test_no_data() -> None:
    with pytest.raises(DataError, match="calibration data is empty; check path, take and skip"):
        hold_out(source(0), 4)


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_to_set_apart_is_a_bug(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}"):
        hold_out(source(8), count)


# Without


def names(batches: Iterator[Batch]) -> list[tuple[str, ...]]:
    return [batch.items for batch in batches]


def test_without_leaves_items_out_by_name() -> None:
    left = Without(source(10, count=10), frozenset({"p1", "p4", "p5", "p6", "p7"}))
    assert names(iter(left)) == [("p0", "p2", "p3"), ("p8", "p9")]
    assert names(iter(left)) == names(iter(left))  # any number of times
    first, second = left
    np.testing.assert_array_equal(first.feeds["x"][1], picture(2))
    assert first.labels is not None
    assert first.labels.tolist() == [0, 2, 3]
    assert len(second) == 2


def test_without_counts_what_is_left() -> None:
    assert Without(source(10, count=10), frozenset({"p1", "p2"})).count == 8
    assert Without(source(10), frozenset({"p1"})).count is None
    assert Without(source(10), frozenset()).skipped == ("broken.png",)


def test_withouts_identity_is_that_of_what_is_left() -> None:
    some = Without(source(10), frozenset({"p1", "p2"})).identity
    assert some == Without(source(10), frozenset({"p2", "p1"})).identity
    assert some != Without(source(10), frozenset({"p1"})).identity
    assert some != Without(source(10, identity="other"), frozenset({"p1", "p2"})).identity
    assert len(some) == 64


# WholeBatches


def test_whole_batches_have_one_size_and_the_rest_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = WholeBatches(source(10, batch=3, count=10), 4)
    with caplog.at_level(logging.WARNING, "trtune.datasets.holdout"):
        found = names(iter(whole))
    assert found == [("p0", "p1", "p2", "p3"), ("p4", "p5", "p6", "p7")]
    assert caplog.messages == ["the last 2 pictures are left out: the model takes 4 at a time"]
    assert whole.count == 8
    assert whole.identity == "this data"
    assert whole.skipped == ("broken.png",)


def test_nothing_is_said_when_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    whole = WholeBatches(source(8, batch=5), 4)
    assert [len(batch) for batch in whole] == [4, 4]
    assert caplog.messages == []
    assert whole.count is None


# join


def single(name: str, *shape: int) -> Batch:
    return Batch({"x": np.full((1, *shape), int(name[1:]), np.float32)}, (name,))


@pytest.mark.parametrize(
    ("shapes", "size", "expected"),
    [
        pytest.param([(2,)] * 5, 2, ["p0 p1", "p2 p3", "p4"], id="the last one is short"),
        pytest.param([(2,)] * 4, 4, ["p0 p1 p2 p3"], id="one batch"),
        pytest.param([(2,)] * 2, 1, ["p0", "p1"], id="one by one"),
        pytest.param([], 4, [], id="nothing"),
        pytest.param([(2,), (3,), (3,), (2,)], 4, ["p0", "p1 p2", "p3"], id="shapes are not mixed"),
    ],
)
def test_join(shapes: list[tuple[int, ...]], size: int, expected: list[str]) -> None:
    pictures = tuple(single(f"p{i}", *shape) for i, shape in enumerate(shapes))
    joined = join(pictures, size)
    assert [" ".join(batch.items) for batch in joined] == expected
    for batch in joined:
        numbers = [int(item[1:]) for item in batch.items]
        assert batch.feeds["x"][:, 0].tolist() == numbers


@pytest.mark.parametrize(
    ("total", "count", "more", "part", "sizes"),
    [
        pytest.param(40, 4, 8, 0.5, (4, 8), id="enough"),
        pytest.param(16, 6, 12, 0.5, (4, 4), id="a quarter, and half together"),
        pytest.param(20, 5, 30, 0.7, (5, 9), id="as many as may be set apart"),
        pytest.param(3, 2, 4, 0.5, (1, 0), id="too few for others"),
        pytest.param(1, 2, 4, 0.5, (1, 0), id="one"),
    ],
)
def test_others_follow_those_that_are_held_out(
    total: int, count: int, more: int, part: float, sizes: tuple[int, int]
) -> None:
    data = source(total)
    first, others = hold_out_more(data, count, more, part=part)
    assert (len(first), len(others)) == sizes
    assert [b.items for b in first] == [b.items for b in hold_out(data, count)]
    names = [b.items for b in (*first, *others)]
    assert len(set(names)) == len(names)


def test_how_many_pictures_fit() -> None:
    data = source(6)
    first = next(iter(data))
    each = sum(array.nbytes for array in first.feeds.values()) // len(first)
    assert fitting_pictures(data, 3 * each + each / 2) == 3
    assert fitting_pictures(data, each - 1) == 0
    assert fitting_pictures(source(0), each) == 0
