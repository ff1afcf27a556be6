"""Which pictures are compared, in which pieces, and whose fault a failure is."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import pictures
from tinyquant import Rows, inner_values

from trtune.datasets.batches import Batch
from trtune.datasets.holdout import hold_out
from trtune.precision.compare.alone import Alone, held_tensors
from trtune.precision.compare.batches import chunked, culprit, held_batches, in_batches, limited
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan


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


def many(proto: onnx.ModelProto, count: int) -> Rows:
    free = onnx.ModelProto()
    free.CopyFrom(proto)
    for info in free.graph.input:
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    return Rows(tinymodels.feeds(free, batch=count, seed=5), range(count))


def held_by(proto: onnx.ModelProto, count: int, memory: int) -> Alone:
    """An `Alone` on as many of `count` pictures as `memory` bytes allow."""
    model = model_from_proto(proto)
    view = GraphView.of(model)
    placement = place(view, make_plan(view))
    rows = hold_out(many(proto, 4 * count), count)
    held = held_batches(model, view, placement, rows, memory=memory)
    return Alone(model, view, placement, held)


@pytest.mark.parametrize(("count", "expected"), [(3, [3]), (5, [5]), (11, [5, 5]), (24, [4] * 6)])
def test_on_a_gpu_batches_are_of_one_size(count: int, expected: list[int]) -> None:
    proto = tinymodels.silu_se()
    model = model_from_proto(proto)
    view = GraphView.of(model)
    rows = hold_out(many(proto, 4 * count), count)
    placement = place(view, make_plan(view))
    held = held_batches(model, view, placement, rows, memory=1 << 30, device="cuda:0")
    assert [len(batch) for batch in held] == expected
    assert [len(batch) for batch in in_batches(model, rows, device="cuda:0")] == expected
    everything = [item for batch in in_batches(model, rows) for item in batch.items]
    assert everything == [item for row in rows for item in row.items]


def test_as_many_held_out_batches_as_memory_allows(caplog: pytest.LogCaptureFixture) -> None:
    proto = tinymodels.silu_se()
    model = model_from_proto(proto)
    view = GraphView.of(model)
    tensors = held_tensors(view, place(view, make_plan(view)))
    first = {name: array[:1] for name, array in tinymodels.feeds(proto, batch=1).items()}
    count = sum(v[:1].size for v in inner_values(model, tensors, first).values())
    batch_bytes = 4 * 4 * (count - 10)  # 4 pictures of float32; the 10 logits are no held tensor
    with caplog.at_level(logging.INFO, "trtune.precision.compare.batches"):
        assert held_by(proto, 16, 1 << 30).batches == 4
        assert caplog.messages == []
        assert held_by(proto, 16, 2 * batch_bytes).batches == 2
        assert held_by(proto, 16, 2 * batch_bytes - 1).batches == 1
        assert held_by(proto, 16, 1).batches == 1
    assert caplog.messages[0].startswith("2 of 4 held-out batches, to stay within")


def test_the_last_held_out_batch_of_a_fixed_size_is_filled() -> None:
    proto = tinymodels.silu_se()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    alone = held_by(proto, 6, 1 << 30)
    assert alone.batches == 2
    assert alone.reference(1)[0].shape == (4, 10)
    last = alone.stored(1, "input")
    np.testing.assert_array_equal(last[2], last[1])
    np.testing.assert_array_equal(last[3], last[1])
