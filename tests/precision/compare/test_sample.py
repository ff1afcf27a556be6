"""Which nodes are asked where asking all of them would take too long."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tinymodels
from hypothesis import given
from hypothesis import strategies as st
from tinymodels import Net
from tinyquant import Case, Rows, case

from trtune.configs.progress import silent
from trtune.precision.compare.sample import by_nearest, placement_of, sampled, spread_out
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import Candidate
from trtune.run.stages.layers import askable, errors_alone


def tower(wide: int, narrow: int) -> Case:
    """`wide` convs of eight channels in a row, then `narrow` of four."""
    net = Net()
    x = net.conv(net.input("input"), "stem", 3, 8)
    for number in range(wide):
        x = net.op("Relu", net.conv(x, f"w{number}", 8, 8), out=f"wr{number}")
    x = net.conv(x, "turn", 8, 4)
    for number in range(narrow):
        x = net.op("Relu", net.conv(x, f"s{number}", 4, 4), out=f"sr{number}")
    return case(net.head(x, 4), batch=4)


@given(st.integers(0, 70))
def test_spread_is_an_order_that_begins_everywhere(count: int) -> None:
    members = [f"n{number}" for number in range(count)]
    order = spread_out(members)
    assert sorted(order) == sorted(members)
    for taken in range(2, count):
        places = sorted(members.index(name) for name in order[:taken])
        widest = max(b - a for a, b in pairwise(places))
        assert widest <= 4 * count / taken


def test_every_kind_has_its_turn() -> None:
    prepared = tower(wide=9, narrow=3)
    found = sampled(prepared.view, prepared.plan.int8_nodes, most=7)
    assert found == ["n_stem", "n_w0", "n_turn", "n_s0", "n_logits", "n_w8", "n_s2"]


def test_a_small_network_is_asked_whole() -> None:
    prepared = tower(wide=9, narrow=3)
    found = sampled(prepared.view, prepared.plan.int8_nodes)
    assert sorted(found) == sorted(prepared.plan.int8_nodes)


def test_what_was_not_asked_is_like_the_nearest_of_its_kind() -> None:
    prepared = tower(wide=5, narrow=2)
    nodes = ["n_w0", "n_w1", "n_w2", "n_w3", "n_w4", "n_turn", "n_s0", "n_s1"]
    found = by_nearest(prepared.view, nodes, {"n_w0": 1, "n_w4": 5, "n_s0": 7})
    assert list(found) == nodes
    assert list(found.values()) == [1, 1, 1, 5, 5, 5, 7, 7]
    assert by_nearest(prepared.view, nodes, {}) == {}


def test_a_part_of_a_placement_is_that_of_its_nodes() -> None:
    prepared = case(tinymodels.residual())
    placement = place(prepared.view, prepared.plan)
    part = placement_of(prepared.view, prepared.plan, placement, ["n_conv2"])
    assert part.activations == {
        "relu1": (("n_conv2", 0),),
        "stem_relu": tuple(e for e in placement.activations["stem_relu"] if e[0] != "n_conv1"),
    }
    whole = placement_of(prepared.view, prepared.plan, placement, prepared.plan.int8_nodes)
    assert whole == placement


@pytest.mark.parametrize("default", ["int8", "fp16"])
@pytest.mark.parametrize(
    ("most", "seconds", "expected"),
    [
        pytest.param(99, 1e9, 12, id="all"),
        pytest.param(5, 1e9, 5, id="as many as stand for all"),
        pytest.param(99, 1e-9, 1, id="one is asked, whatever the time"),
    ],
)
def test_only_so_many_are_asked(default: str, most: int, seconds: float, expected: int) -> None:
    prepared = tower(wide=6, narrow=3)
    plan = make_plan(prepared.view, default=default)
    candidate = Candidate(prepared.model, plan, prepared.table)
    pictures = tuple(Rows.of(prepared.feeds, batch=2))
    found = errors_alone(
        candidate,
        prepared.view,
        pictures,
        memory=1 << 30,
        seconds=seconds,
        most=most,
        progress=silent,
    )
    assert len(askable(plan)) == 12
    assert len(found) == expected
    assert list(found) == [name for name in askable(plan) if name in found]
