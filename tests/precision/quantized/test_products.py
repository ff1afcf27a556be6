"""Products of two tensors of data that a model quantizes itself, as in attention."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from tinyqat import QatNet, assert_same_bits, channel_scales, imported

from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import Alone, alone_errors
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.placement import place
from trtune.precision.quantized.importing import insert_quantization


def attention(*, moved: bool = True) -> onnx.ModelProto:
    """Q and K projections whose product is quantized, with the pairs before what moves them."""
    net = QatNet()
    x = net.pair(net.input("input", ("N", 6, 16)), 0.03, out="read")
    sides = []
    for name, perm in (("q", [0, 2, 1]), ("k", [0, 1, 2])):
        weight = net.weight(f"{name}_w", 16, 6)
        w = net.pair(weight, channel_scales(net.value(weight), 1), axis=1)
        y = net.op("MatMul", x, w, out=name)
        if moved:
            y = net.op("Transpose", net.pair(y, 0.02), out=f"{name}_t", perm=perm)
        else:
            y = net.pair(net.op("Transpose", y, out=f"{name}_t", perm=perm), 0.02)
        sides.append(y)
    net.op("Softmax", net.op("MatMul", *sides, out="scores"), out="output", axis=-1)
    return net.model({"output": ("N", 6, 6)})


@pytest.mark.parametrize("moved", [True, False])
def test_they_are_planned_as_the_file_says(moved: bool) -> None:
    proto = attention(moved=moved)
    found = imported(proto)
    assert found.plan.int8_nodes == ("n_q", "n_k", "n_scores")
    assert found.plan.products == ("n_scores",)
    assert set(place(GraphView.of(found.model), found.plan).weights) == {("n_q", 1), ("n_k", 1)}
    again = insert_quantization(found.model, found.table, found.plan)
    assert_same_bits(proto, again, tinymodels.feeds(found.model.proto, batch=4))


@pytest.mark.parametrize("moved", [True, False])
def test_a_pin_takes_their_pairs_away(moved: bool) -> None:
    found = imported(attention(moved=moved), pins={"n_scores": "fp32"})
    assert found.plan.int8_nodes == ("n_q", "n_k")
    assert {read.tensor for read in found.plan.active_reads} == {"input"}


def test_one_quantized_side_is_not_enough() -> None:
    net = QatNet()
    x = net.input("input", ("N", 6, 16))
    left = net.pair(x, 0.03, out="left")
    right = net.op("Transpose", x, out="right", perm=[0, 2, 1])
    net.op("MatMul", left, right, out="output")
    assert imported(net.model({"output": ("N", 6, 6)})).plan.int8_nodes == ()


def test_the_plan_is_read_back_and_written_for_a_cpu() -> None:
    found = imported(attention())
    again = ImportedPlan.from_json(found.plan.to_json())
    assert again == found.plan
    ruled = found.plan.by_rules()
    assert ruled.int8_nodes == ("n_q", "n_k")
    lower_deploy(found.model, ruled, found.table)


def test_their_errors_alone_are_measured() -> None:
    found = imported(attention())
    view = GraphView.of(found.model)
    feeds = tinymodels.feeds(found.model.proto, batch=4)
    alone = Alone(found.model, view, place(view, found.plan), [Batch(dict(feeds), tuple("abcd"))])
    errors = alone_errors(alone, view, found.plan, found.table)
    assert list(errors) == ["n_q", "n_k", "n_scores"]
    assert all(np.isfinite(error.noise) and error.noise > 0 for error in errors.values())
