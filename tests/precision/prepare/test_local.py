"""What a scale and a shift do to the results of a tensor's readers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtune.precision.prepare.columns import grouped
from trtune.precision.prepare.local import Local, weights_of
from trtune.precision.prepare.rounding import left_of_columns, rounded_codes


def product(channels: int, outputs: int, seed: int = 0) -> tuple[onnx.NodeProto, np.ndarray]:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    weights = np.random.default_rng(seed).standard_normal((channels, outputs)).astype(np.float32)
    return node, weights


def values(channels: int, seed: int = 1, positions: int = 500) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((positions, channels)) @ rng.standard_normal((channels, channels))
    return (mixed * np.exp(rng.normal(0, 1, channels))).astype(np.float32)


def local_of(x: np.ndarray, *, rounded: bool) -> tuple[Local, np.ndarray]:
    node, weights = product(x.shape[1], 24)
    moments = (x.T @ x).astype(np.float64)[None]
    held = weights_of(node, weights, moments, len(x), rounded=rounded)
    assert held is not None
    return Local(x[None], (held,)), weights


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("factor", ["ones", "uneven"])
def test_local_noise_is_what_quantizing_does(rounded: bool, factor: str) -> None:
    x = values(12)
    local, weights = local_of(x, rounded=rounded)
    rng = np.random.default_rng(5)
    scale = np.ones(12, np.float32) if factor == "ones" else np.exp(rng.normal(0, 1, 12))
    scale = scale.astype(np.float32)
    moved = x * scale
    amax = float(np.abs(moved).max())
    codes = np.clip(np.rint(moved / (amax / 127)), -128, 127) * (amax / 127)
    new = (weights / scale[:, None]).T[None].astype(np.float64)
    steps = np.abs(new).max(axis=2) / 127
    h = (moved.T @ moved).astype(np.float64)[None]
    integers = rounded_codes(new, h, steps) if rounded else np.rint(new / steps[:, :, None])
    held = (integers * steps[:, :, None])[0].T
    exact = x.astype(np.float64) @ weights
    noise = ((codes @ held - exact) ** 2).sum() / (exact**2).sum()
    assert local.noise(scale, 0.0, amax) == pytest.approx(noise, rel=0.5)


def test_a_factor_on_columns_is_a_factor_on_what_rounding_leaves_of_them() -> None:
    x = values(6).astype(np.float64)
    scale = np.array([1.0, 2.0, 0.5, 4.0, 1.0, 0.25])
    order = np.argsort(-np.diag(x.T @ x))
    x = x[:, order] * np.linspace(3, 1, 6)  # factors that keep the order of the columns
    plain = left_of_columns((x.T @ x)[None])[0]
    moved = x * (1 + 0.01 * scale)
    np.testing.assert_allclose(
        left_of_columns((moved.T @ moved)[None])[0], plain * (1 + 0.01 * scale) ** 2, rtol=0.05
    )


def test_a_picture_far_out_counts_as_one() -> None:
    rng = np.random.default_rng(0)
    node, weights = product(4, 5)
    x = rng.standard_normal((40, 16, 4)).astype(np.float32)
    held = weights_of(node, weights, np.eye(4)[None] * 640, 640, rounded=False)
    assert held is not None
    usual = Local(x, (held,)).noise(np.ones(4, np.float32), 0.0, 3.0)
    x[7] *= 3000
    with_it = Local(x, (held,)).noise(np.ones(4, np.float32), 0.0, 3.0)
    assert usual < with_it < usual + 1 / 40 + 1e-3
    assert Local(0 * x, (held,)).noise(np.ones(4, np.float32), 0.0, 3.0) == 0


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_grouped_convolutions_keep_their_channels_in_order(
    groups: int, outputs: int, each: int, kernel: int
) -> None:
    rng = np.random.default_rng(groups + 7 * outputs + 49 * each)
    shape = (groups * outputs, each, kernel, 1)
    weights = rng.standard_normal(shape).astype(np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="n", group=groups)
    columns = grouped(node, weights)
    assert columns is not None
    moments = np.tile(np.eye(each * kernel), (groups, 1, 1))
    held = weights_of(node, weights, moments, 1, rounded=True)
    assert held is not None
    assert held.power.shape == (groups * each,)
    assert held.power.sum() == pytest.approx(float((weights.astype(np.float64) ** 2).sum()))
    for channel in range(groups * each):
        group, own = divmod(channel, each)
        part = weights[group * outputs : (group + 1) * outputs, own]
        assert held.power[channel] == pytest.approx(float((part.astype(np.float64) ** 2).sum()))
        np.testing.assert_allclose(
            held.largest[group, :, own], np.abs(part).reshape(outputs, -1).max(axis=1), rtol=1e-6
        )
    left, whole = held.noise(np.ones(groups * each))
    assert left <= whole * 1.011  # 1 % damping
    assert held.share(np.ones(groups * each)) <= 1.006
