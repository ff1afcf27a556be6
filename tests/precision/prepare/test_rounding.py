"""Codes rounded on the inputs they meet, and weights that carry them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tinymodels
from numpy.typing import NDArray
from tinyquant import case, inner_values, outputs

from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.rewrite import quantize_weights, weight_scales
from trtune.precision.plan.rules import weight_axis
from trtune.precision.prepare.codes import channel_steps, code_values, with_codes
from trtune.precision.prepare.columns import SAMPLED, columns, grouped, moments, ungrouped
from trtune.precision.prepare.rounding import DAMPING, left_of_columns, rounded_codes
from trtune.precision.prepare.values import Codes

Array = NDArray[np.float64]


def problem(seed: int, *, groups: int = 1, outputs: int = 3, width: int = 6) -> tuple[Array, Array]:
    """Weights, and inputs that go together."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, width, width)) + 2 * rng.standard_normal(
        (groups, width, 1)
    )
    inputs = rng.standard_normal((groups, 200, width)) @ mixed
    return rng.standard_normal((groups, outputs, width)), inputs


def error(weights: Array, inputs: Array, steps: Array, codes: NDArray[np.int8]) -> float:
    lost = weights - codes * steps[:, :, None]
    return float(((inputs @ lost.transpose(0, 2, 1)) ** 2).sum())


def solved(weights: Array, inputs: Array) -> tuple[Array, NDArray[np.int8]]:
    steps = np.abs(weights).max(axis=2) / 127
    return steps, rounded_codes(weights, inputs.transpose(0, 2, 1) @ inputs, steps)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [1, 4])
def test_the_output_is_nearer_than_with_the_nearest_codes(seed: int, groups: int) -> None:
    weights, inputs = problem(seed, groups=groups, outputs=16, width=40)
    steps, codes = solved(weights, inputs)
    nearest = np.rint(weights / steps[:, :, None]).astype(np.int8)
    assert error(weights, inputs, steps, codes) < 0.6 * error(weights, inputs, steps, nearest)


def test_against_every_choice_of_up_or_down() -> None:
    ratios = []
    for seed in range(8):
        weights, inputs = problem(seed, outputs=1, width=5)
        steps, codes = solved(weights, inputs)
        low = np.floor(weights / steps[:, :, None])
        best = min(
            error(weights, inputs, steps, np.clip(low + up, -127, 127).astype(np.int8))
            for up in map(np.array, itertools.product((0, 1), repeat=5))
        )
        ratios.append(error(weights, inputs, steps, codes) / best)
    assert np.median(ratios) < 3


def test_blocks_change_nothing() -> None:
    weights, inputs = problem(1, outputs=4, width=300)
    steps, codes = solved(weights, inputs)
    padded = np.zeros((1, 4, 310))
    padded[:, :, :300] = weights
    wider = np.zeros((1, 200, 310))
    wider[:, :, :300] = inputs
    more = rounded_codes(padded, wider.transpose(0, 2, 1) @ wider * 310 / 300, steps)
    assert np.mean(more[:, :, :300] == codes) > 0.9


@pytest.mark.parametrize("sums", [np.zeros((1, 6, 6)), np.full((1, 6, 6), np.nan)])
def test_without_anything_seen_codes_are_the_nearest(sums: Array) -> None:
    weights, _ = problem(0)
    steps = np.abs(weights).max(axis=2) / 127
    codes = rounded_codes(weights, sums, steps)
    np.testing.assert_array_equal(codes, np.rint(weights / steps[:, :, None]))


def test_a_group_that_cannot_be_factored_is_alone_in_it() -> None:
    weights, inputs = problem(2, groups=4)
    steps = np.abs(weights).max(axis=2) / 127
    sums = inputs.transpose(0, 2, 1) @ inputs
    sound = rounded_codes(weights, sums, steps)
    left = left_of_columns(sums)
    sums[1] = -1e3  # a diagonal below zero
    sums[2] = 1.0
    sums[2][np.diag_indices(6)] = [1, 1, 1, 1, 1, -0.9]  # above zero in the mean, not definite
    found = rounded_codes(weights, sums, steps)
    np.testing.assert_array_equal(found[[0, 3]], sound[[0, 3]])
    nearest = np.rint(weights / steps[:, :, None])
    np.testing.assert_array_equal(found[[1, 2]], nearest[[1, 2]])
    np.testing.assert_allclose(left_of_columns(sums)[[0, 3]], left[[0, 3]], rtol=1e-9)
    np.testing.assert_array_equal(left_of_columns(sums)[2], np.diag(sums[2]))


@pytest.mark.parametrize("width", [5, 64, 150])
def test_what_is_left_of_a_column_is_what_those_behind_it_do_not_explain(width: int) -> None:
    """By least squares, with the damping as further inputs."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((400, width)) @ rng.standard_normal((width, width))
    h = x.T @ x
    damped = np.vstack([x, np.sqrt(DAMPING * np.diag(h).mean()) * np.eye(width)])
    order = np.argsort(-np.diag(h), kind="stable")
    found = left_of_columns(h[None])[0]
    for place in (0, width // 2, width - 1):
        one, behind = damped[:, order[place]], damped[:, order[place + 1 :]]
        part = np.linalg.lstsq(behind, one, rcond=None)[0] if behind.size else np.zeros(0)
        rest = ((one - behind @ part) ** 2).sum()
        assert found[order[place]] == pytest.approx(rest, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_weight_keeps_its_code(seed: int) -> None:
    weights, inputs = problem(seed, groups=3, outputs=8, width=20)
    codes = solved(weights, inputs)[1]
    assert (np.abs(codes).max(axis=2) == 127).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_with_codes_are_quantized_to_them_again(axis: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 48)).astype(np.float32)
    weights[3 if axis == 0 else slice(None), slice(None) if axis == 0 else 3] = 0
    codes = quantize_weights(weights, weight_scales(weights, axis), axis)
    codes += ((np.abs(codes) < 100) & (codes != 0)).astype(np.int8)
    values = code_values(weights, codes, axis)
    again = quantize_weights(values, weight_scales(values, axis), axis)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(weight_scales(values, axis), channel_steps(weights, axis), rtol=1e-6)


@pytest.mark.parametrize("name", ["conv_relu", "depthwise", "mlp", "residual"])
def test_the_lowered_model_holds_the_codes(name: str) -> None:
    prepared = case(tinymodels.MODELS[name]())
    view, plan = prepared.view, prepared.plan
    codes = {}
    for node in (view.by_name[n] for n in plan.int8_nodes):
        weights, axis = view.constant(node.input[1]), weight_axis(node)
        values = quantize_weights(weights, weight_scales(weights, axis), axis)
        values = np.where(np.abs(values) < 100, values + 1, values).astype(np.int8)
        codes[node.input[1]] = Codes(values)
    model = with_codes(prepared.model, plan, codes)
    proto = lower_emulate(model, plan, prepared.table)
    lowered = GraphView.of(replace(model, proto=proto))
    held = [a for a in map(lowered.constant, lowered.initializers) if a.dtype == np.int8 and a.ndim]
    for entry in codes.values():
        assert any(np.array_equal(entry.values, array) for array in held)
    pinned = plan.pin(list(plan.int8_nodes), "fp32", "pinned by the test")
    assert with_codes(prepared.model, pinned, codes) is prepared.model


@pytest.mark.parametrize("name", ["conv_relu", "depthwise", "mlp", "silu_se"])
def test_columns_times_weights_are_the_outputs(name: str) -> None:
    prepared = case(tinymodels.MODELS[name]())
    view = prepared.view
    for node in (view.by_name[n] for n in prepared.plan.int8_nodes):
        data = inner_values(prepared.model, [node.input[0]], prepared.feeds)[node.input[0]]
        result = outputs(prepared.model.proto, prepared.feeds, outputs=[node.output[0]])
        weights = view.constant(node.input[1])
        sampled = columns(node, data, weights.shape, np.random.default_rng(0))
        parts = grouped(node, weights)
        assert parts is not None
        np.testing.assert_array_equal(ungrouped(node, parts, weights.shape), weights)
        products = np.matmul(sampled, parts.transpose(0, 2, 1))
        bias = view.constant(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        found = np.concatenate(list(products), axis=1) + bias
        exact = result[node.output[0]]
        if node.op_type == "Conv":
            exact = exact.reshape(*exact.shape[:2], -1).transpose(0, 2, 1)
        every = exact.reshape(-1, found.shape[1])
        assert len(found) == min(len(every), SAMPLED * len(data))
        np.testing.assert_allclose(np.sort(found, 0), np.sort(every, 0), rtol=1e-3, atol=1e-4)
        assert moments(sampled).shape == (len(parts), parts.shape[2], parts.shape[2])
        assert attribute(node, "group", 1) in (1, len(parts))
