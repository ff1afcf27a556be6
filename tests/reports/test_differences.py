"""What differs between two runs, on two real ones and on tables of values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from tinyproject import config_of, write_project

from trtune.reports.differences import (
    MOST_ROWS,
    RunFiles,
    flat_keys,
    read_files,
    run_differences,
    scale_ratios,
)
from trtune.reports.html import several_html
from trtune.reports.record import RunRecord
from trtune.reports.writer import read_record
from trtune.run.naming import run_folder
from trtune.run.pipeline import report, run


def files(record: RunRecord) -> RunFiles:
    return RunFiles(record, {"a.b": 1}, {"conv": "int8"}, {}, {"x": 1.0, "y": 2.0})


def test_equal_runs_differ_in_nothing(record: RunRecord) -> None:
    assert run_differences(files(record), files(record)) == []


def test_every_kind_is_told_apart(record: RunRecord) -> None:
    second = RunFiles(
        record, {"a.b": 2, "c": 3}, {"conv": "fp32"}, {"conv": "fp32"}, {"x": 4.0, "y": 2.0}
    )
    found = {d.title: d.table.rows for d in run_differences(files(record), second)}
    assert found == {
        "Config": (("a.b", "1", "2"), ("c", "not there", "3")),
        "Pins": (("conv", "not there", "fp32"),),
        "Plan": (("conv", "int8", "fp32"),),
        "Scales": (("x", "1", "4", "4"),),
    }


def test_long_tables_end_and_say_so(record: RunRecord) -> None:
    first = replace(files(record), scales={f"t{k}": 1.0 for k in range(50)})
    second = replace(first, scales={f"t{k}": 2.0 + k for k in range(50)})
    [found] = run_differences(first, second)
    assert (len(found.table.rows), found.more) == (MOST_ROWS, 50 - MOST_ROWS)
    assert found.table.rows[0][0] == "t49"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"a": 1.0}, {"a": 1.0 + 1e-8}, []),
        ({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 2.0}, [("a", 0.1), ("b", 2.0)]),
        ({"a": 0.0}, {"a": 1.0}, [("a", math.inf)]),
        ({}, {"a": 1.0}, [("a", math.inf)]),
    ],
)
def test_scale_ratios(
    first: dict[str, float], second: dict[str, float], expected: list[tuple[str, float]]
) -> None:
    assert [(row[0], row[3]) for row in scale_ratios(first, second)] == expected


def test_keys_of_empty_parts() -> None:
    assert flat_keys({"a": {}, "b": []}) == {"a": {}, "b": []}


def test_two_real_runs_side_by_side(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    homes = []
    for extra in ((), ("precision.pin={'op:Gemm': fp32}", "calibration.percentile=99.9")):
        config = config_of(folder, "calibration.method=percentile", *extra)
        run(config, out=folder / "runs")
        homes.append(run_folder(config, folder / "runs"))
    found = run_differences(*(read_files(read_record(home), home) for home in homes))
    titles = [difference.title for difference in found]
    assert titles[:3] == ["Config", "Pins", "Plan"]
    keys = {row[0] for row in found[0].table.rows}
    assert keys >= {"calibration.percentile", "precision.pin.op:Gemm"}
    report(homes, formats=(), together=tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text("utf-8")
    assert "What differs" in text
    assert "calibration.percentile" in text


def test_several_runs_without_folders_have_no_differences(record: RunRecord) -> None:
    assert "What differs" not in several_html([record, record])
