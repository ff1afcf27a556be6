"""Ranges for float8: by hand, against quantizing the values themselves, and at the output."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tinymodels
from tinyquant import Rows

from trtune.calibrate.float8 import (
    amax_float8,
    float8_amaxes,
    float8_error,
    through_float8,
    with_float8,
)
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.rules import make_plan
from trtune.precision.tune.scales import calibrate_model


def test_the_error_is_that_of_the_values() -> None:
    values = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    for amax in (0.5, 2.0, float(np.abs(values).max())):
        exact = float(((values - through_float8(values, amax / 448)) ** 2).sum())
        assert float8_error(Histogram.of(values), amax) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], 0.0),
        ([448.0, 1.0, 2.0, 4.0], 448.0),  # all of them are numbers of the type
        ([-3.5, 1.75, 0.4375], 3.5),
    ],
)
def test_the_least_square_error_by_hand(values: list[float], expected: float) -> None:
    found = amax_float8(Histogram.of(np.float32(values)))
    assert found == pytest.approx(expected, rel=0.05)


def test_a_long_tail_is_kept_where_int8_would_clip_it() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.standard_normal(50_000), [2000.0]]).astype(np.float32)
    assert amax_float8(Histogram.of(values)) == pytest.approx(2000, rel=0.1)
    read = through_float8(values[:-1], 2000 / 448)
    noise = float(((values[:-1] - read) ** 2).sum() / (values[:-1] ** 2).sum())
    assert 10 * math.log10(1 / noise) > 8  # int8 has a step of 16 there, and keeps nothing


def test_which_method_of_int8_is_which_of_float8() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.standard_normal(20_000), [100.0]]).astype(np.float32)
    held = {"x": Histogram.of(values)}
    assert float8_amaxes(held, "max")["x"] == 100
    clipped = float8_amaxes(held, "percentile", percentile=99.9)["x"]
    assert clipped == pytest.approx(float(np.quantile(np.abs(values), 0.999)), rel=0.02)
    own = amax_float8(held["x"])
    for method in ("entropy", "entropy-s7310", "mse"):
        assert float8_amaxes(held, method)["x"] == own


def test_only_what_int8_does_not_give_is_in_the_table() -> None:
    table = CalibrationTable.from_amax({"same": 2.0, "other": 2.0, "zero": 0.0})
    found = with_float8(table, {"same": 2.0, "other": 4.48, "zero": 0.0})
    assert set(found.float8) == {"other"}
    assert found.float8_scale("other") == pytest.approx(0.01)
    assert found.float8_scale("same") == np.float32(table.amax("same")) / np.float32(448)
    assert found.scales == table.scales
    assert CalibrationTable.from_json(found.to_json()) == found


@pytest.mark.parametrize("method", ["max", "percentile", "entropy", "mse", "auto"])
def test_calibration_gives_both_kinds_of_scales(method: str) -> None:
    proto = tinymodels.MODELS["conv_relu"]()
    model = model_from_proto(proto)
    view = GraphView.of(model)
    source = Rows.of(tinymodels.feeds(proto, batch=40))
    plain = calibrate_model(model, view, make_plan(view), source, method=method, holdout=8).table
    found = calibrate_model(
        model, view, make_plan(view), source, method=method, holdout=8, float8=True
    )
    assert found.table.scales == plain.scales
    assert not plain.float8
    largest = {t: found.histograms[t].maximum for t in plain.scales}
    for tensor in plain.scales:
        amax = found.table.float8_scale(tensor) * 448
        assert 0 < amax <= largest[tensor] * 1.001
    if method == "max":
        assert not found.table.float8
    if method in ("entropy", "mse"):
        assert all(found.table.float8_scale(t) * 448 > 0.5 * largest[t] for t in found.table.scales)
    assert replace(found.table, float8={}).scales == plain.scales
