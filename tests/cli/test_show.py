"""What the commands show where there is little, or something odd, to show."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from trtune.calibrate.outliers import DominantPicture
from trtune.calibrate.table import CalibrationTable
from trtune.cli.show import build_table, calibration_summary, layer_tables, near
from trtune.precision.runtime.api import BuildInfo
from trtune.reports.record import LayerRow


def text(parts: Iterable[RenderableType]) -> str:
    console = Console(file=io.StringIO(), width=120, highlight=False)
    for part in parts:
        console.print(part, markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def layer(node: str, *, alone: float | None = None, accumulated: float | None = None) -> LayerRow:
    return LayerRow(
        node=node, op="Conv", shape="1x8", macs=9, parameters=4, precision="int8",
        reason="default", alone_sqnr_db=alone, accumulated_sqnr_db=accumulated,
    )  # fmt: skip


def test_methods_are_counted_whatever_their_factor() -> None:
    table = CalibrationTable(
        {"a": 1.0, "b": 1.0, "c": 0.0},
        {"a": "entropy", "b": "max", "c": "entropy"},
        factors={"a": 1.2},
    )
    assert text(calibration_summary(table)) == (
        "3 tensors with a scale; method: entropy (2), max (1)\n"
        "1 tensor with scale 0 (only zeros were seen): c\n"
    )


def test_long_lists_of_zero_scales_are_cut() -> None:
    table = CalibrationTable({f"t{i}": 0.0 for i in range(9)})
    assert text(calibration_summary(table)) == (
        "9 tensors with a scale\n"
        "9 tensors with scale 0 (only zeros were seen): t0, t1, t2, t3, t4, ...\n"
    )


def test_each_dominant_picture_has_a_sentence() -> None:
    picture = DominantPicture("321", 45, 4457.2, "conv_2_out")
    assert text(calibration_summary(CalibrationTable({}), [picture])).splitlines()[1] == (
        "• picture 321 sets the range of 45 tensors, up to 4457 times the median (conv_2_out)"
    )


def test_what_was_not_built_or_cannot_run_says_why() -> None:
    shown = text(
        build_table(
            [
                BuildInfo("a", reason="no compiler"),
                BuildInfo("b", Path("/x/b.plan"), 1000, {"n": "int8"}, reason="no GPU here"),
                BuildInfo("c", Path("/x/c.onnx"), 10, {"n": "fp32"}, ("n: fp32, not int8",)),
            ]
        )
    )
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "a no compiler 0 — —" in lines
    assert "b /x/b.plan 1 — 1.00 kB" in lines
    assert "c /x/c.onnx 0 1 10 B" in lines
    assert "b: no GPU here" in lines
    assert lines[-2:] == ["c: not as planned", "• n: fp32, not int8"]


def test_worst_layers_come_first_and_the_rest_is_cut() -> None:
    rows = [layer("good", alone=50.0), layer("bad", alone=3.0), layer("same", alone=math.inf)]
    shown = text(layer_tables(rows, worst=2))
    assert shown.index("bad") < shown.index("good")
    assert "same" not in shown
    assert "Accumulated" not in shown


def test_layers_without_any_error() -> None:
    assert text(layer_tables([layer("n")])) == "no error was measured in any of 1 layer\n"


def test_paths_elsewhere_are_shown_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert near("../b.yaml") == "../b.yaml"
    assert near(tmp_path / "a" / "b" / "c.yaml") == "b/c.yaml"
