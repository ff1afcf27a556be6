from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.configs.errors import DataError
from trtune.datasets.selection import Selection


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        pytest.param(Selection(), [0, 1, 2, 3, 4], id="all"),
        pytest.param(Selection(take=2), [0, 1], id="the first two"),
        pytest.param(Selection(skip=3), [3, 4], id="without the first three"),
        pytest.param(Selection(skip=1, take=2), [1, 2], id="skip comes before take"),
        pytest.param(Selection(take=9), [0, 1, 2, 3, 4], id="more than there is: all"),
        pytest.param(Selection(sample=5), [0, 1, 2, 3, 4], id="a sample of everything"),
    ],
)
def test_rows(selection: Selection, expected: list[int]) -> None:
    assert list(selection.rows(5, "x")) == expected


def test_a_sample_is_the_same_everywhere() -> None:
    assert Selection(sample=4, seed=0).rows(20, "x") == [4, 7, 15, 18]


@given(
    count=st.integers(1, 60),
    size=st.integers(1, 60),
    seed=st.integers(0, 9),
    skip=st.integers(0, 5),
)
def test_a_sample_is_ascending_within_the_window_and_grows(
    count: int, size: int, seed: int, skip: int
) -> None:
    count += skip
    rows = list(Selection(skip=skip, sample=size, seed=seed).rows(count, "x"))
    more = list(Selection(skip=skip, sample=size + 1, seed=seed).rows(count, "x"))
    assert rows == sorted(set(rows))
    assert len(rows) == min(size, count - skip)
    assert set(rows) <= set(more) <= set(range(skip, count))


def test_seeds_differ() -> None:
    drawn = {tuple(Selection(sample=10, seed=seed).rows(1000, "x")) for seed in range(5)}
    assert len(drawn) == 5


def test_fewer_rows_than_asked_for_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Selection(skip=1, take=9).rows(5, "x.npz")
    assert caplog.messages == ["x.npz has 4 rows to give, 9 were asked for"]


@pytest.mark.parametrize(
    ("selection", "count", "message"),
    [
        pytest.param(Selection(), 0, "x.npz is empty", id="empty data"),
        pytest.param(Selection(skip=5), 5, "it has 5, and `skip` leaves out 5", id="all skipped"),
    ],
)
def test_nothing_left_is_an_error(selection: Selection, count: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        selection.rows(count, "x.npz")


@pytest.mark.parametrize("options", [{"skip": -1}, {"take": 0}, {"sample": 0}])
def test_nonsense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Selection(**options)
