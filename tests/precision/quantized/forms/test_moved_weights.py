"""Weights reshaped behind their DequantizeLinear: int8, with the values that they have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from tinyqat import QatNet, assert_same_bits, channel_scales, imported

from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.quantized.forms.moved_weights import with_weights_in_place
from trtune.precision.quantized.importing import insert_quantization

TO = [16, 3, 3, 3]


def network(
    shape: list[int],
    moves: list[tuple[str, dict[str, Any]]],
    *,
    axis: int | None = 0,
    stored: bool = False,
    twice: bool = False,
) -> onnx.ModelProto:
    """A Conv whose weights of `shape` go through `moves` behind their pair."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    weight = net.weight("w", *shape)
    scale = 0.01 if axis is None else channel_scales(net.value(weight), axis)
    where = {} if axis is None else {"axis": axis}
    if stored:
        codes = np.random.default_rng(3).integers(-127, 128, shape)
        read = net.stored("stored", codes, scale, **where)
    else:
        read = net.pair(weight, scale, **where)
    for number, (op, given) in enumerate(moves):
        attributes = {k: v for k, v in given.items() if k != "to"}
        more = [net.const(f"to{number}", given["to"], np.int64)] if "to" in given else []
        read = net.op(op, read, *more, out=f"moved{number}", **attributes)
    conv = net.op("Conv", x, read, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    if twice:
        other = net.op("Conv", x, read, out="other", kernel_shape=[3, 3], pads=[1] * 4)
        conv = net.op("Concat", conv, other, out="both", axis=1)
    return net.head(conv, 32 if twice else 16)


RESHAPE = ("Reshape", {"to": TO})
MOVES: dict[str, dict[str, Any]] = {
    "reshape": {"shape": [16, 27], "moves": [RESHAPE]},
    "stored": {"shape": [16, 27], "moves": [RESHAPE], "stored": True},
    "one scale": {"shape": [8, 54], "moves": [RESHAPE], "axis": None},
    "copy": {"shape": TO, "moves": [("Identity", {})]},
    "squeeze": {"shape": [16, 1, 3, 3, 3], "moves": [("Squeeze", {"to": [1]})]},
    "unsqueeze": {"shape": [16, 3, 9], "moves": [("Unsqueeze", {"to": [1]}), RESHAPE]},
    "transpose first": {
        "shape": [27, 16],
        "moves": [("Transpose", {"perm": [1, 0]}), RESHAPE],
        "axis": 1,
    },
    "from the end": {
        "shape": [27, 16],
        "moves": [("Transpose", {"perm": [1, 0]}), RESHAPE],
        "axis": -1,
    },
    "two readers": {"shape": [16, 27], "moves": [RESHAPE], "twice": True},
}


@pytest.mark.parametrize("name", MOVES)
def test_they_are_int8_and_the_same_bits(name: str) -> None:
    proto = network(**MOVES[name])
    found = imported(proto)
    assert found.plan.is_int8("n_conv")
    assert found.findings == ()
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=2))


def test_scales_that_a_reshape_tears_apart_stay_where_they_are() -> None:
    proto = network([8, 54], [RESHAPE])
    view = GraphView.of(model_from_proto(proto))
    assert with_weights_in_place(view.proto, view) is view.proto
    assert not imported(proto).plan.is_int8("n_conv")


def test_weights_that_are_only_transposed_are_left_to_their_scales() -> None:
    proto = network([3, 16, 3, 3], [("Transpose", {"perm": [1, 0, 2, 3]})], axis=1)
    view = GraphView.of(model_from_proto(proto))
    assert with_weights_in_place(view.proto, view) is view.proto
    assert imported(proto).plan.is_int8("n_conv")
