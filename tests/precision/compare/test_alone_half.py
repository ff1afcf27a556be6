"""The effect of one node alone in half precision."""

from __future__ import annotations

import math

import numpy as np
import onnx
import tinymodels
from tinyquant import Rows, case, initializer, numpy_outputs, outputs, set_weight

from trtune.precision.compare.alone_half import half_alone_errors, half_nodes
from trtune.precision.plan.rules import make_plan


def test_the_nodes_are_those_in_half_that_nobody_pinned() -> None:
    prepared = case(tinymodels.residual())
    pins = {"n_conv1": "fp32", "n_conv2": "fp16"}
    plan = make_plan(prepared.view, default="fp16", pins=pins)
    assert half_nodes(plan) == ("n_stem", "n_logits")
    assert half_nodes(make_plan(prepared.view, fallback="fp16")) == ()


def test_the_error_is_that_of_the_node_and_what_is_fused_with_it() -> None:
    proto = tinymodels.conv_relu()
    prepared = case(proto, batch=4)
    plan = make_plan(prepared.view, default="fp16")
    steps: list[tuple[str, int, int]] = []
    found = half_alone_errors(
        prepared.model,
        prepared.view,
        plan,
        list(Rows.of(prepared.feeds, batch=2)),
        progress=lambda *step: steps.append(step),
    )
    assert list(found) == ["n_conv1", "n_conv2", "n_logits"]
    assert steps[-1] == ("rank layers", 3, 3)

    def half(value: np.ndarray) -> np.ndarray:
        return value.astype(np.float16).astype(np.float32)

    exact = outputs(proto, prepared.feeds, outputs=["flat"])
    weight, bias = (onnx.numpy_helper.to_array(initializer(proto, f"logits_{c}")) for c in "wb")
    logits = half(half(exact["flat"]) @ half(weight).T + half(bias))
    noise = float(np.sum((exact["logits"].astype(np.float64) - logits) ** 2))
    assert math.isclose(found["n_logits"].noise, noise, rel_tol=0.05)
    assert found["n_logits"].count == exact["logits"].size
    assert all(50 < sums.sqnr_db < 90 for sums in found.values())


def test_the_node_that_overflows_is_the_worst() -> None:
    proto = tinymodels.conv_relu()
    weight = onnx.numpy_helper.to_array(initializer(proto, "conv2_w"))
    set_weight(proto, "conv2_w", weight * 6e4)
    prepared = case(proto)
    (exact,) = numpy_outputs(proto, prepared.feeds).values()
    assert np.isfinite(exact).all()
    plan = make_plan(prepared.view, default="fp16")
    found = half_alone_errors(
        prepared.model, prepared.view, plan, list(Rows.of(prepared.feeds, batch=4))
    )
    assert min(found, key=lambda name: found[name].sqnr_db) == "n_conv2"
    assert found["n_conv2"].not_finite > 0
    assert found["n_conv2"].sqnr_db == -math.inf


def test_only_half_nodes_are_measured_at_the_output_they_reach() -> None:
    prepared = case(tinymodels.two_outputs())
    plan = make_plan(prepared.view, default="bf16", pins={"n_conv": "int8"})
    found = half_alone_errors(
        prepared.model, prepared.view, plan, list(Rows.of(prepared.feeds, batch=4))
    )
    assert list(found) == ["n_logits"]
    assert found["n_logits"].count == 4 * 10
