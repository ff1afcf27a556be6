"""Which pictures are compared, in which pieces, and whose fault a failure is."""

from __future__ import annotations

import pytest
import tinymodels
from comparing import pictures

from trtune.datasets.batches import Batch
from trtune.precision.compare.batches import chunked, culprit, limited


@pytest.mark.parametrize(
    ("items", "shape", "index", "expected"),
    [
        pytest.param(("a", "b"), (2, 3), 4, "picture 'b'", id="batch first: by the row"),
        pytest.param(("a", "b"), (6,), 4, "pictures 'a' to 'b'", id="no batch axis: any of them"),
        pytest.param(("a",), (6,), 4, "picture 'a'", id="no batch axis but one picture"),
        pytest.param(("a", "b"), (), 0, "pictures 'a' to 'b'", id="a scalar"),
    ],
)
def test_culprit(items: tuple[str, ...], shape: tuple[int, ...], index: int, expected: str) -> None:
    assert expected in culprit(Batch({}, items), shape, index)


def test_no_more_batches_are_read_than_the_pictures_take() -> None:
    source = pictures(tinymodels.mlp(), rows=7, size=3)

    def reads(count: int) -> list[int]:
        return [len(batch) for batch in limited(source, count)]

    assert [reads(0), reads(3), reads(5), reads(99)] == [[], [3], [3, 2], [3, 3, 1]]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        pytest.param({"a": 1, "b": 2, "c": 3}, 6, [["a", "b", "c"]], id="all fit exactly"),
        pytest.param({"a": 1, "b": 2, "c": 3}, 5, [["a", "b"], ["c"]], id="one too many"),
        pytest.param({"a": 9, "b": 9}, 5, [["a"], ["b"]], id="larger than the limit: alone"),
        pytest.param({}, 5, [], id="nothing"),
    ],
)
def test_chunked(sizes: dict[str, int], limit: int, expected: list[list[str]]) -> None:
    assert chunked(sizes, limit) == expected
