from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtune.configs.errors import DataError, TrtuneError
from trtune.reports.record import LayerRow, RunRecord
from trtune.reports.tables import read_layers
from trtune.reports.writer import read_record, write_report


def test_the_files_of_every_format(
    tmp_path: Path, record: RunRecord, layers: list[LayerRow]
) -> None:
    written = write_report(tmp_path, record, layers)
    assert [path.name for path in written] == [
        "report.md", "report.html", "layers.csv", "variants.csv", "run.json",
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in written)
    assert read_record(tmp_path) == record
    assert read_record(tmp_path / "run.json") == record
    assert read_layers(tmp_path / "layers.csv") == layers


def test_without_layers_an_earlier_comparison_stays(
    tmp_path: Path, record: RunRecord, layers: list[LayerRow]
) -> None:
    write_report(tmp_path, record, layers, formats=["csv"])
    write_report(tmp_path, record, formats=["csv", "md"])
    assert read_layers(tmp_path / "layers.csv") == layers


def test_an_unknown_format_is_refused_before_anything_is_written(
    tmp_path: Path, record: RunRecord
) -> None:
    with pytest.raises(ValueError, match="unknown report format 'htm'; did you mean 'html'"):
        write_report(tmp_path, record, formats=["md", "htm"])
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path, record: RunRecord) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrtuneError, match=r"cannot write .*report\.md"):
        write_report(tmp_path / "file", record, formats=["md"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; give a run's folder"),
        ("{}", "not a run record"),
        ("nonsense", "not a run record"),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_record(tmp_path)
