"""The one resolver of pins: what a plan allows, who leads a group, and what a pin leaves alone."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import tinymodels
from tinymodels import Net

from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.half_rules import keep_fp32, tensors_for_ranges
from trtune.precision.plan.pins import first_that_may, hold, match_pin, with_pins
from trtune.precision.plan.plan import COMPILER, RANGE, TUNER, USER, PrecisionPlan
from trtune.precision.plan.rules import make_plan


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto))


def view(name: str) -> GraphView:
    return view_of(tinymodels.MODELS[name]())


def test_the_leader_is_the_compute_node_of_a_group() -> None:
    plan = make_plan(view("residual"))
    led = {name: plan.leader(name) for name in plan.nodes}
    assert led["n_sum_relu"] == led["n_sum"] == led["n_conv2"] == "n_conv2"
    assert all(led[name] == name for name in plan.compute_nodes)
    assert all(member in plan.groups[leader] for member, leader in led.items() if member != leader)


@pytest.mark.parametrize(
    ("name", "node", "precision", "why"),
    [
        pytest.param("residual", "n_conv2", "int8", "", id="a convolution"),
        pytest.param("residual", "n_sum_relu", "int8", "", id="what is fused with one"),
        pytest.param("residual", "n_conv2", "bf16", "", id="any type that ONNX defines for it"),
        pytest.param(
            "attention", "n_scores", "int8", "weights are computed at run time", id="no weights"
        ),
        pytest.param("attention", "n_probs", "int8", "no integer kernel", id="a softmax"),
        pytest.param("dynamic_reshape", "n_shape", "fp32", "it computes shapes", id="a shape"),
    ],
)
def test_may(name: str, node: str, precision: str, why: str) -> None:
    answer = make_plan(view(name)).may(node, precision)
    assert why in answer
    assert bool(answer) == bool(why)


def test_a_node_that_is_not_there_may_nothing() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        make_plan(view("residual")).may("nowhere", "fp32")


def test_a_member_speaks_for_its_group() -> None:
    plan = make_plan(view("residual")).refusing("fp16", {"n_sum_relu": "it reaches 70000"})
    assert plan.may("n_conv2", "fp16") == "'n_sum_relu': it reaches 70000"
    assert plan.may("n_conv2", "bf16") == ""
    found = hold(plan, ["n_sum", "n_stem"], "fp16", "pinned", origin=USER)
    assert (found.nodes, dict(found.refused)) == (
        ("n_stem",),
        {"n_conv2": "'n_sum_relu': it reaches 70000"},
    )
    assert found.plan.pinned == ("n_stem",)


def test_who_pinned_is_kept() -> None:
    plan = make_plan(view("residual"), pins={"n_stem": "fp32"})
    plan = hold(plan, ["n_conv2"], "fp32", "it hurts", origin=TUNER).plan
    assert {n: plan.nodes[n].origin for n in plan.pinned} == {"n_stem": USER, "n_conv2": TUNER}
    refused = plan.without_int8({"n_conv1": "no kernel"}, origin=COMPILER)
    assert refused.nodes["n_conv1"].origin == COMPILER
    assert refused.pinned == plan.pinned
    assert refused.may("n_conv1", "int8") == "no kernel"


def test_the_last_pin_that_names_a_node_holds() -> None:
    graph = view("residual")
    plan = with_pins(graph, make_plan(graph), {"op:Conv": "fp32", "n_conv1": "int8"})
    assert set(plan.int8_nodes) == {"n_conv1", "n_logits"}


def measured(graph: GraphView, plan: PrecisionPlan, **ranges: float) -> PrecisionPlan:
    return keep_fp32(graph, plan, {**dict.fromkeys(tensors_for_ranges(graph), 1.0), **ranges})


def test_what_the_range_rule_forbids_nobody_may(caplog: pytest.LogCaptureFixture) -> None:
    graph = view("residual")
    plan = measured(graph, make_plan(graph, fallback="fp16"), stem=50_000.0)
    assert plan.is_int8("n_stem")
    assert "reaches 50000" in plan.may("n_stem", "fp16")
    assert plan.may("n_stem", "fp32") == plan.may("n_stem", "int8") == ""
    assert "'n_sum': its input 'stem_relu'" in plan.may("n_conv2", "fp16")
    assert plan.may("n_logits", "fp16") == ""
    assert first_that_may(plan, "n_stem", ("fp16", "fp32")) == "fp32"
    assert first_that_may(plan, "n_logits", ("fp16", "fp32")) == "fp16"
    assert plan.without_int8({"n_stem": "no kernel"}, origin=COMPILER).precision("n_stem") == "fp32"
    with caplog.at_level(logging.WARNING):
        pinned = measured(graph, make_plan(graph, pins={"n_stem": "fp16"}), stem=50_000.0)
    assert pinned.precision("n_stem") == "fp16"
    assert "n_stem stays fp16 as you say, although its output 'stem' reaches 50000" in caplog.text


def test_a_long_sum_is_no_matter_in_int8_but_in_half() -> None:
    net = Net()
    net.op("MatMul", net.input("x", ("N", 1 << 16)), net.weight("w", 1 << 16, 2), out="y", name="n")
    graph = view_of(net.model({"y": ("N", 2)}))
    plan = measured(graph, make_plan(graph, fallback="fp16"))
    assert (plan.is_int8("n"), plan.float_type("n")) == (True, "fp16")
    assert plan.may("n", "fp16") == "it sums 65536 values"


def test_a_range_is_the_origin_of_what_it_keeps_in_fp32() -> None:
    graph = view("residual")
    plan = measured(graph, make_plan(graph, default="fp16"), stem=50_000.0)
    assert plan.nodes["n_stem"].origin == RANGE
    assert plan.pinned == ()


def test_a_pin_on_a_folded_node_holds_for_the_one_that_does_its_work() -> None:
    net = tinymodels.Net()
    y = net.op("Conv", net.input("x"), net.weight("w", 8, 3, 3, 3), out="c")
    stats = [net.const(f"p{k}", np.full(8, k + 1.0)) for k in range(4)]
    y = net.op("BatchNormalization", y, *stats, out="bn")
    flat = net.op("Flatten", net.op("GlobalAveragePool", y, out="pooled"), out="flat")
    net.op("MatMul", flat, net.op("Transpose", net.weight("v", 5, 8), out="t"), out="y")
    view = GraphView.of(model_from_proto(net.model({"y": ("N", 5)})))
    for pattern in ("n_bn", "op:BatchNormalization", "re:.*_bn"):
        assert match_pin(view, pattern) == ["n_c"]
    assert match_pin(view, "n_t") == [], "a constant has no precision"
    assert make_plan(view, pins={"n_bn": "fp32", "n_t": "fp32"}).pinned == ("n_c",)
