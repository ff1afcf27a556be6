"""What a search may compute is bounded by multiply-accumulates."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tinyquant import Rows

from trtune.calibrate.histogram import Histogram
from trtune.datasets.batches import Batch
from trtune.precision.graph.file import Model, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.precision.tune import scales
from trtune.precision.tune.auto import ranges
from trtune.precision.tune.auto.ranges import SEARCH, pictures_within, ranges_within, trial_macs


def chain(*, free: bool = False) -> Model:
    """Two convolutions of 3 to 4 to 5 channels with kernels of 1 x 1."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in (("v", (4, 3, 1, 1)), ("w", (5, 4, 1, 1)))
    ]
    side: object = "S" if free else 8
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "v"], ["a"], "first"),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("Conv", ["b", "w"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5, side, side])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return model_from_proto(proto)


def batch(size: int = 2, side: int = 8) -> Batch:
    feeds = {"x": np.ones((size, 3, side, side), np.float32)}
    return Batch(items=tuple(f"{k}" for k in range(size)), feeds=feeds)


@pytest.mark.parametrize(("free", "side"), [(False, 8), (True, 8), (True, 16)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_trial_runs_what_lies_behind(free: bool, side: int, size: int) -> None:
    model = chain(free=free)
    costs = trial_macs(model, GraphView.of(model), {"x": ["x"], "b": ["b"]}, batch(size, side))
    assert costs == {"x": side**2 * (12 + 20), "b": side**2 * 20}


@pytest.mark.parametrize(
    ("each", "wanted", "found"),
    [(1, 64, 64), (SEARCH // 20, 64, 20), (SEARCH, 16, 4), (SEARCH, 3, 3), (SEARCH // 20, 16, 16)],
)
def test_pictures(each: int, wanted: int, found: int) -> None:
    assert pictures_within({"a": each}, wanted) == found


def test_where_not_all_ranges_fit_those_are_searched_whose_methods_disagree() -> None:
    rng = np.random.default_rng(0)
    plain = Histogram.of(rng.uniform(-1, 1, 4096).astype(np.float32))
    wide = Histogram.of(np.append(rng.normal(size=4096), 1000.0).astype(np.float32))
    histograms = {"plain": plain, "wide": wide}
    half = SEARCH // 2
    assert ranges_within({"plain": half, "wide": half}, histograms, 1) == {"plain", "wide"}
    assert ranges_within({"plain": half, "wide": half}, histograms, 2) == {"wide"}
    assert ranges_within({"plain": half, "wide": SEARCH}, histograms, 2) == {"plain"}


def test_a_search_of_some_ranges_gives_every_range_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    view = GraphView.of(model)
    plan = make_plan(view)
    rng = np.random.default_rng(1)
    rows = Rows({"x": rng.normal(size=(48, 3, 8, 8)).astype(np.float32)}, range(48))
    placement = place(view, plan)
    monkeypatch.setattr(ranges, "SEARCH", 64 * 20 * 4)  # four pictures of the second range alone
    found = scales.calibrate_model(model, view, plan, rows, method="auto", holdout=8)
    assert set(placement.activations) == set(found.table.scales)
    assert found.table.methods["x"] == "mse"
