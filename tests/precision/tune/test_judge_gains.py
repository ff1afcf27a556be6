"""Gains on a few pictures: what they are believed to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.precision.tune.judge import FEWEST, Gain, expectations, paired_gain, towards


@pytest.mark.parametrize(
    ("before", "after", "gain"),
    [
        pytest.param([1.0] * 8, [0.5] * 8, Gain(0.5, 0.0), id="every picture gains the same"),
        pytest.param([2.0, 0.0] * 4, [0.0, 2.0] * 4, Gain(0.0, 0.7559), id="gains that cancel"),
        pytest.param([1.0, 3.0], [0.0, 3.0], Gain(0.25, 0.0), id="two pictures have no error"),
        pytest.param([0.0] * 8, [1.0] * 8, Gain(0.0), id="no noise before"),
        pytest.param([1.0] * 8, [np.inf] * 8, Gain(-np.inf), id="it becomes infinite"),
        pytest.param([np.inf] * 8, [1.0] * 8, Gain(0.0), id="it was infinite"),
    ],
)
def test_a_paired_gain(before: list[float], after: list[float], gain: Gain) -> None:
    found = paired_gain(np.array(before), np.array(after))
    assert found.part == pytest.approx(gain.part)
    assert found.error == pytest.approx(gain.error, abs=1e-4)


def test_what_is_certain_is_believed_and_what_is_not_is_not() -> None:
    assert towards(Gain(0.4, 0.0), 0.1, 0.0) == 0.4
    assert towards(Gain(0.4, 0.1), 0.1, 0.0) == pytest.approx(0.1)
    assert towards(Gain(0.4, 0.1), 0.1, 0.1) == pytest.approx(0.25)
    assert towards(Gain(-np.inf, 0.0), 0.1, 0.1) == -np.inf


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(-1, 1), st.floats(0, 1))
def test_belief_lies_between_what_is_seen_and_expected(
    part: float, error: float, expected: float, spread: float
) -> None:
    found = towards(Gain(part, error), expected, spread)
    assert min(part, expected) - 1e-9 <= found <= max(part, expected) + 1e-9


def test_gains_that_are_noise_are_expected_from_what_nodes_do_alone() -> None:
    generator = np.random.default_rng(0)
    alone = dict(zip("abcdefghijklmnopqrstuvwxyz", np.linspace(0.1, 0.01, 26), strict=True))
    gains = {n: Gain(float(a / 2 + generator.normal() * 0.1), 0.1) for n, a in alone.items()}
    expected, spread = expectations(gains, alone)
    assert spread < 0.06
    order = sorted(gains, key=lambda n: -towards(gains[n], expected[n], spread))
    assert set("ab") & set(order[:8])
    assert 0 <= expected["a"] <= 0.1
    assert expected["a"] == pytest.approx(10 * expected["z"])


def test_gains_that_are_certain_are_taken_as_they_are() -> None:
    gains = {"a": Gain(0.01, 0.001), "b": Gain(0.5, 0.001), "c": Gain(0.02, 0.001)}
    expected, spread = expectations(gains, {"a": 0.9, "b": 0.1, "c": 0.5})
    assert spread > 0.1
    for node, gain in gains.items():
        assert towards(gain, expected[node], spread) == pytest.approx(gain.part, abs=0.01)


def test_few_pictures_give_no_expectation() -> None:
    assert FEWEST > 4
    gains = {"a": Gain(0.3), "b": Gain(0.1)}
    assert expectations(gains, {"a": 0.0, "b": 1.0}) == ({"a": 0.3, "b": 0.1}, 0.0)
