"""What layers meet, and codes that one picture far out does not decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import tinymodels
from tinyquant import Rows

from trtune.precision.graph.view import GraphView, Model, model_from_proto
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.precision.tune.moments import LOUDEST, POSITIONS, observed, rounded_weights
from trtune.precision.tune.preparing import channel_tensors
from trtune.precision.tune.scales import calibrate_model

MEMORY = 1 << 30


def small() -> tuple[Model, dict[str, Any]]:
    model = model_from_proto(tinymodels.depthwise())
    return model, tinymodels.feeds(model.proto, batch=40, seed=3)


def table_of(model: Model, feeds: dict[str, Any]) -> Any:
    view = GraphView.of(model)
    source = Rows(feeds, range(40))
    return calibrate_model(model, view, make_plan(view), source, method="mse").table


def test_samples_are_what_the_network_has_before_it_is_quantized() -> None:
    model, feeds = small()
    view = GraphView.of(model)
    plan, table = make_plan(view), table_of(model, feeds)
    axes = channel_tensors(view, place(view, plan))
    source = Rows(feeds, range(40))
    (part,) = observed(model, plan, table, source, axes=axes, memory=MEMORY)
    assert set(part.seen) == set(plan.int8_nodes)
    assert set(part.samples) == set(axes)
    for tensor, values in part.samples.items():
        assert values.shape[0] == 40
        assert values.shape[1] <= POSITIONS
        dims = view.shapes[tensor]
        assert values.shape[2] == dims[axes[tensor]]
    (first,) = (s for t, s in part.samples.items() if t in feeds)
    assert set(np.unique(first)) <= set(np.unique(feeds[model.inputs[0].name]))


def test_little_memory_means_several_looks_with_the_same_codes() -> None:
    model, feeds = small()
    plan, table = make_plan(GraphView.of(model)), table_of(model, feeds)
    source = Rows(feeds, range(40))
    parts = list(observed(model, plan, table, source, memory=1))
    assert len(parts) > 1
    names = [name for part in parts for name in part.seen]
    assert sorted(names) == sorted(plan.int8_nodes)
    whole = rounded_weights(model, plan, table, source, memory=MEMORY)
    assert set(whole) == set(rounded_weights(model, plan, table, source, memory=1))


def test_a_picture_far_out_has_no_more_weight_than_a_few_usual_ones() -> None:
    model, feeds = small()
    view = GraphView.of(model)
    plan, table = make_plan(view), table_of(model, feeds)
    name = model.inputs[0].name
    loud = {**feeds, name: feeds[name].copy()}
    loud[name][30] *= 1000
    usual, with_it = (
        next(iter(observed(model, plan, table, Rows(f, range(40)), memory=MEMORY))).seen
        for f in (feeds, loud)
    )
    for node in plan.int8_nodes:
        before, after = (np.trace(s[node].products, axis1=1, axis2=2) for s in (usual, with_it))
        assert after.sum() <= before.sum() * (1 + 2 * LOUDEST / 40)
        assert with_it[node].count <= usual[node].count
