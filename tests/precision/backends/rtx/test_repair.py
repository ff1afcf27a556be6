"""Nodes that the compiler refuses or takes apart, and what is done about them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, numpy_helper
from tinyquant import outputs

from trtune.calibrate.table import CalibrationTable
from trtune.precision.backends.rtx.repair import (
    insert_guards,
    refused_nodes,
    torn_apart,
    unquantized,
)
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan

MODEL = model_from_proto(tinymodels.residual())
VIEW = GraphView.of(MODEL)
PLAN = make_plan(VIEW, pins={"n_conv1": "fp32"})
TABLE = CalibrationTable({tensor: 0.05 for tensor in place(VIEW, PLAN).activations})


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        pytest.param("Could not find any implementation for node n_conv2.", ["n_conv2"], id="one"),
        pytest.param(
            "Error Code 10: Could not find any implementation for node n_stem + n_conv2 + PWN(a).",
            ["n_stem", "n_conv2"],
            id="fused",
        ),
        pytest.param(
            "[pass.cpp:337] Cannot compile operation 'n_logits' for Turing", ["n_logits"], id="RTX"
        ),
        pytest.param("Could not find any implementation for node n_conv1.", [], id="not int8"),
        pytest.param("Could not find any implementation for node n_conv22.", [], id="longer name"),
        pytest.param(
            "Could not find any implementation for node a/n_stem/b.", [], id="part of one"
        ),
        pytest.param("n_conv2: something else is wrong", [], id="another problem"),
    ],
)
def test_refused_nodes(problem: str, expected: list[str]) -> None:
    found = refused_nodes([problem], PLAN)
    assert list(found) == expected
    assert all(problem in words for words in found.values())


def test_a_refused_node_runs_in_the_fallback_and_the_others_as_before() -> None:
    changed = unquantized(PLAN, {"n_conv2": "no such kernel"})
    assert changed.precision("n_conv2") == "fp32"
    assert "no such kernel" in changed.nodes["n_conv2"].reason
    assert set(changed.int8_nodes) == set(PLAN.int8_nodes) - {"n_conv2"}
    assert PLAN.precision("n_conv2") == "int8"


def test_only_planned_products_with_weights_of_their_own_count_as_taken_apart() -> None:
    precisions = {node: "fp32" for node in PLAN.nodes} | {"n_stem": "int8", "n_logits": "unknown"}
    assert torn_apart(MODEL.proto, PLAN, precisions) == ("n_conv2",)
    deconv = model_from_proto(tinymodels.resize())
    plan = make_plan(GraphView.of(deconv))
    floats = dict.fromkeys(plan.nodes, "fp32")
    assert "n_up" in plan.int8_nodes
    assert "n_up" not in torn_apart(deconv.proto, plan, floats)


def test_guards_change_no_value() -> None:
    plain = lower_emulate(MODEL, PLAN, TABLE)
    guarded = lower_emulate(MODEL, PLAN, TABLE)
    insert_guards(guarded, ["n_conv2", "n_logits", "n_conv1"])
    onnx.checker.check_model(guarded, full_check=True)
    clips = {node.name for node in guarded.graph.node if node.op_type == "Clip"}
    assert clips == {"n_conv2/guard", "n_logits/guard"}  # n_conv1 has float weights
    feeds = tinymodels.feeds(plain)
    expected, found = (outputs(proto, feeds, optimize="none") for proto in (plain, guarded))
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_guards_of_halves_have_the_range_of_halves() -> None:
    proto = lower_emulate(MODEL, PLAN, TABLE)
    for tensor in proto.graph.initializer:
        if tensor.name == "conv2_w/scale":
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    insert_guards(proto, ["n_conv2"])
    bounds = {t.name: t for t in proto.graph.initializer if t.name.startswith("conv2/")}
    assert {t.data_type for t in bounds.values()} == {TensorProto.FLOAT16}
    assert numpy_helper.to_array(bounds["conv2/greatest"]) == np.finfo(np.float16).max
    assert numpy_helper.to_array(bounds["conv2/least"]) == np.finfo(np.float16).min
