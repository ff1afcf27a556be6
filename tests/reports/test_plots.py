from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.reports.plots import (
    COLOURS,
    density_per_decade,
    histogram_svg,
    profile_svg,
    tuning_svg,
)
from trtune.reports.record import HistogramPlot, LayerRow, RunRecord, TuningStep


def check(svg: str, name: str) -> ET.Element:
    """The drawing parses, refers only to itself, and leaves every colour to the page."""
    root = ET.fromstring(svg)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(i).startswith(f"{name}-") for i in ids)
    for element in root.iter():
        target = element.get("href")
        assert target is None or target[1:] in ids
    assert "http" not in svg
    assert "DejaVu" not in svg
    assert not any(colour in svg for colour in COLOURS.values())
    return root


def texts(root: ET.Element) -> str:
    return " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("text"))


def test_tuning_shows_each_step_the_target_and_fp32(record: RunRecord) -> None:
    words = texts(check(tuning_svg(record), "tuning"))
    assert "target 84.65 %" in words
    assert "FP32 85.15 %" in words
    assert "top-1 (%)" in words


def step(value: float, pins: int = 0) -> TuningStep:
    names = [f"n{i}" for i in range(pins)]
    return TuningStep(step=0, action="start", pinned=names, value=value, builds=1, seconds=0.0)


@pytest.mark.parametrize("values", [[], [math.inf], [-math.inf]])
def test_no_finite_step_draws_nothing(record: RunRecord, values: list[float]) -> None:
    assert tuning_svg(record.model_copy(update={"tuning": [step(v) for v in values]})) == ""


def test_a_single_step_of_value_zero_still_draws(record: RunRecord) -> None:
    lone = record.model_copy(update={"tuning": [step(0.0)], "target": None})
    bare = lone.model_copy(
        update={"baseline": lone.baseline.model_copy(update={"value": None, "metric": "π:ψ"})}
    )
    assert "ψ" in texts(check(tuning_svg(bare), "tuning"))


def test_profile_draws_finite_layers_and_the_legend(layers: list[LayerRow]) -> None:
    broken = layers[3].model_copy(update={"accumulated_sqnr_db": -math.inf})
    root = check(profile_svg([*layers, broken], frozenset([layers[0].node])), "profile")
    assert {"INT8", "FP32", "pinned"} <= set(texts(root).split())
    none = [row.model_copy(update={"accumulated_sqnr_db": None}) for row in layers]
    assert profile_svg(none, frozenset()) == ""


def test_one_layer_is_enough(layers: list[LayerRow]) -> None:
    check(profile_svg(layers[:1], frozenset()), "profile")


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    st.floats(1e-3, 1e3),
    st.integers(1, 50),
)
def test_density_keeps_the_number_of_values(counts: list[int], width: float, bins: int) -> None:
    edges = [width * 1.5**i for i in range(len(counts) + 1)]
    new, density = density_per_decade(edges, counts, low=edges[0] / 2, bins=bins)
    if not sum(counts):
        assert len(density) == 0
        return
    assert len(new) == bins + 1
    assert float((density * np.diff(np.log10(new))).sum()) == pytest.approx(sum(counts))


def test_density_of_even_counts_on_log_bins_is_flat() -> None:
    edges = [10.0 ** (i / 4) for i in range(-8, 9)]
    _, density = density_per_decade(edges, [5.0] * 16, low=0.01, bins=10)
    assert density == pytest.approx(np.full(10, 20.0))


def test_values_below_the_axis_are_left_out() -> None:
    new, density = density_per_decade([0.0, 1e-9, 1.0, 10.0], [7, 0, 3], low=0.1, bins=4)
    assert new[0] == pytest.approx(0.1)
    assert float((density * np.diff(np.log10(new))).sum()) == pytest.approx(3)


def histogram(counts: list[float], *, amax: float, top: float) -> HistogramPlot:
    edges = np.linspace(0.0, top, len(counts) + 1).tolist()
    return HistogramPlot(
        tensor="t", edges=edges, counts=counts, amax=amax, max=top, method="entropy"
    )


@pytest.mark.parametrize(
    ("plot", "drawn"),
    [
        pytest.param(histogram([9.0, 5, 1], amax=2.0, top=3.0), True, id="clipped"),
        pytest.param(histogram([9.0, 5, 1], amax=3.0, top=3.0), True, id="nothing clipped"),
        pytest.param(histogram([9.0], amax=1e-4, top=3.0), True, id="amax far below the rest"),
        pytest.param(histogram([9.0, 0, 1], amax=40.0, top=3.0), True, id="amax above the data"),
        pytest.param(histogram([9.0, 0, 1], amax=0.0, top=3.0), True, id="amax of zero"),
        pytest.param(histogram([9.0], amax=0.0, top=0.0), False, id="only zeros"),
        pytest.param(histogram([0.0, 0.0], amax=1.0, top=1.0), False, id="no counts"),
    ],
)
def test_histogram(plot: HistogramPlot, drawn: bool) -> None:
    svg = histogram_svg(plot, "hist3")
    assert bool(svg) == drawn
    if drawn:
        assert ("amax" in texts(check(svg, "hist3"))) == (plot.amax > 0)


def test_the_same_record_draws_the_same_bytes(record: RunRecord) -> None:
    assert tuning_svg(record) == tuning_svg(record)
