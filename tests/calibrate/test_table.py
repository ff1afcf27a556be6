from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.calibrate.table import CalibrationTable, MissingScaleError
from trtune.configs.errors import TrtuneError

scales_of = st.dictionaries(st.text(max_size=8), st.floats(0, 2.0**120, width=32), max_size=6)


@pytest.mark.parametrize(
    ("amax", "bits"),
    [
        pytest.param(127.0, 0x3F800000, id="127 is one"),
        pytest.param(0.0, 0x00000000, id="zero"),
        pytest.param(254.0, 0x40000000, id="254 is two"),
        pytest.param(1.0, 0x3C010204, id="one, rounded to float32"),
        pytest.param(0.1, 0x3A4E69A0, id="a tenth"),
    ],
)
def test_scales_are_amax_over_127_in_float32(amax: float, bits: int) -> None:
    scale = CalibrationTable.from_amax({"x": amax}).scale("x")
    assert isinstance(scale, float)
    assert np.float32(scale).view(np.uint32) == bits
    assert float(np.float32(scale)) == scale


@given(st.floats(2.0**-100, 2.0**120, width=32))
def test_amax_returns_within_float32_rounding(amax: float) -> None:
    found = CalibrationTable.from_amax({"x": amax}).amax("x")
    assert found == pytest.approx(amax, rel=2.0**-22)


def test_scales_given_in_double_precision_become_float32() -> None:
    assert CalibrationTable({"x": 0.1}).scale("x") == float(np.float32(0.1)) != 0.1


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        pytest.param("conv1_ou", "did you mean 'conv1_out'?", id="nearly"),
        pytest.param("zzz", "has no scale in the calibration table; recalibrate", id="far off"),
    ],
)
@pytest.mark.parametrize("ask", [CalibrationTable.scale, CalibrationTable.amax])
def test_a_missing_scale_names_the_nearest_tensor(tensor: str, said: str, ask) -> None:  # type: ignore[no-untyped-def]
    table = CalibrationTable.from_amax({"conv1_out": 1.0, "fc": 2.0})
    with pytest.raises(MissingScaleError) as caught:
        ask(table, tensor)
    assert f"tensor '{tensor}'" in str(caught.value)
    assert said in str(caught.value)
    assert "precision.pin" in str(caught.value)
    assert isinstance(caught.value, TrtuneError)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(float("nan"), id="NaN"),
        pytest.param(float("inf"), id="infinity"),
        pytest.param(-0.5, id="negative"),
        pytest.param(1e39, id="more than float32 holds"),
    ],
)
def test_a_bad_scale_is_refused_by_name(scale: float) -> None:
    said = r"scale of 'fc' is .*; it must be finite and not negative"
    with pytest.raises(ValueError, match=said):
        CalibrationTable({"ok": 1.0, "fc": scale})
    with pytest.raises(ValueError, match=said):
        CalibrationTable.from_amax({"ok": 1.0, "fc": scale * 127})


@given(scales=scales_of)
def test_json_reads_back_to_an_equal_table(scales: dict[str, float]) -> None:
    table = CalibrationTable(
        scales,
        methods={name: "entropy" for name in scales},
        provenance={"model": "ab12", "pictures": 512, "versions": {"numpy": "2"}},
    )
    back = CalibrationTable.from_json(table.to_json())
    assert back == table
    assert list(back.scales) == list(scales)


def test_json_keeps_names_readable() -> None:
    text = CalibrationTable({"größe: 1": 0.5}, {"größe: 1": "max"}, {"key": [1]}).to_json()
    assert "größe: 1" in text
    assert json.loads(text) == {
        "scales": {"größe: 1": 0.5},
        "methods": {"größe: 1": "max"},
        "provenance": {"key": [1]},
    }


def test_a_table_keeps_its_own_frozen_copies() -> None:
    scales, methods = {"x": 1.0}, {"x": "max"}
    table = CalibrationTable(scales, methods)
    scales["x"], methods["x"] = 2.0, "mse"
    assert (table.scale("x"), table.methods["x"], dict(table.provenance)) == (1.0, "max", {})
    with pytest.raises(TypeError):
        table.scales["x"] = 3.0  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.scales = {}  # type: ignore[misc]


def test_methods_and_provenance_travel_with_amax() -> None:
    table = CalibrationTable.from_amax({"x": 127.0}, methods={"x": "mse"}, provenance={"k": 1})
    assert (table.methods, table.provenance) == ({"x": "mse"}, {"k": 1})


def test_the_factor_of_a_method_is_a_number_beside_its_name() -> None:
    table = CalibrationTable.from_amax(
        {"x": 127.0, "y": 1.0}, methods={"x": "mse", "y": "max"}, factors={"x": 0.8}
    )
    assert dict(table.methods) == {"x": "mse", "y": "max"}
    assert [table.method(t) for t in ("x", "y", "z")] == ["mse x 0.80", "max", ""]
    assert CalibrationTable.from_json(table.to_json()) == table


def test_what_came_with_a_quantized_model_survives_json() -> None:
    table = CalibrationTable(
        {"x": 0.5}, weights={"w": (0.1, 0.25), "one": [1]}, reads={"x": (("conv", 0), ["add", 1])}
    )
    assert table.weights["w"] == (float(np.float32(0.1)), 0.25)
    assert table.reads["x"] == (("conv", 0), ("add", 1))
    assert CalibrationTable.from_json(table.to_json()) == table


def test_other_tables_are_written_as_before() -> None:
    value = json.loads(CalibrationTable({"x": 0.5}).to_json())
    assert set(value) == {"scales", "methods", "provenance"}


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (float("nan"),), (float("inf"),)])
def test_weight_scales_that_are_none_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weight scales of 'w' must be finite and above zero"):
        CalibrationTable({}, weights={"w": scales})
