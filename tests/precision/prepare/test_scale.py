"""Factors of channels, and what channels reach."""

from __future__ import annotations

import numpy as np
import pytest

from trtune.precision.prepare.scale import balanced_factors, depthwise_factors
from trtune.precision.prepare.statistics import merged, reach_of
from trtune.precision.prepare.values import Codes, Moved, Prepared, sentence


def test_balanced_factors_are_those_of_the_formula() -> None:
    maxima, weights = np.array([8.0, 2.0]), np.array([1.0, 4.0])
    factors = balanced_factors(maxima, weights, 0.5)
    expected = np.sqrt(weights) / np.sqrt(maxima)
    np.testing.assert_allclose(factors, expected / expected[0], rtol=1e-6)
    np.testing.assert_allclose(balanced_factors(maxima, weights, 1.0), [1, 4], rtol=1e-6)
    assert balanced_factors(np.zeros(2), weights, 0.5).tolist() == [1, 1]


def test_dead_channels_get_no_infinite_factor() -> None:
    assert depthwise_factors(np.zeros(3)).tolist() == [1, 1, 1]
    assert depthwise_factors(np.array([1.0, 1e-9])).tolist() == [1, 256]


def test_reach_of_pictures() -> None:
    values = np.zeros((2, 3, 2, 2), np.float32)
    values[0, 1], values[1, 1, 0, 0], values[1, 2, 1, 1] = 2, 5, -4
    reach = reach_of(values, 2, 1)
    assert reach is not None
    assert reach.high.tolist() == [[0, 2, 0], [0, 5, 0]]
    assert reach.low.tolist() == [[0, 2, 0], [0, 0, -4]]
    assert reach.maxima.tolist() == [0, 5, 4]  # too few pictures to call one an outlier
    assert reach.lowest == -4
    assert reach_of(values, 3, 1) is None
    tokens = reach_of(values.reshape(2, 6, 2), 2, -1)
    assert tokens is not None
    assert tokens.high.shape == (2, 2)


def test_one_picture_far_out_ruins_nothing() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(40):
        found = reach_of(rng.standard_normal((1, 4, 5, 5)).astype(np.float32), 1, 1)
        assert found is not None
        parts.append(found)
    usual = merged(parts).maxima
    far = reach_of(np.full((1, 4, 5, 5), 1000.0, np.float32), 1, 1)
    assert far is not None
    np.testing.assert_allclose(merged([*parts, far]).maxima, usual, rtol=0.2)


@pytest.mark.parametrize(
    ("moved", "rounded", "expected"),
    [
        (
            Moved("x", "x", (0.5, 2.0), gain_db=1.5),
            False,
            "n: channels scaled 0.5 to 2; +1.5 dB",
        ),
        (Moved("x", "x", shift=2.0), True, "n: shifted by 2, codes rounded"),
        (None, True, "n: codes rounded"),
    ],
)
def test_sentences(moved: Moved | None, rounded: bool, expected: str) -> None:
    assert sentence("n", moved, rounded=rounded) == expected


def test_summary_names_tensors_and_nodes() -> None:
    moved = (Moved("x", "x", (0.5, 2.0), 1.0),)
    codes = {"w": Codes(np.zeros(1, np.int8)), "v": Codes(np.zeros(1, np.int8), np.zeros(1))}
    prepared = Prepared(None, codes, moved)  # type: ignore[arg-type]
    assert prepared.summary({"w": "conv", "v": "fc"}) == {
        "x": ["scale", "shift"],
        "conv": ["round"],
        "fc": ["round", "bias"],
    }
