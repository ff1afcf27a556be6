"""What a step of GitHub Actions gets to read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from trtune.cli.github import annotate, annotation, summarize
from trtune.reports.record import RunRecord


def record(status: str) -> RunRecord:
    return RunRecord.from_json(
        json.dumps(
            {
                "schema": 1,
                "name": "a|b",
                "key": "0123456789",
                "status": status,
                "target": {"metric": "top1", "min": 0.8},
                "baseline": {"metric": "top1", "value": 0.9, "samples": 10},
                "variants": [
                    {"name": "fp32", "backend": "onnxruntime/emulate", "value": 0.9},
                    {"name": "int8", "backend": "onnxruntime/emulate", "value": 0.7, "drop": 0.2},
                ],
            }
        )
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param("plain", "::error title=trtune::plain", id="as it is"),
        pytest.param("50 %\nb\r", "::error title=trtune::50 %25%0Ab%0D", id="escaped"),
    ],
)
def test_annotations_are_one_line(message: str, expected: str) -> None:
    assert annotation("error", message) == expected


def test_a_title_has_no_colon_or_comma() -> None:
    assert annotation("warning", "x", "a: b, c") == "::warning title=a%3A b%2C c::x"


def test_elsewhere_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    file = io.StringIO()
    annotate(file, "error", "x")
    summarize(file, record("missed"))
    assert file.getvalue() == ""
    assert not (tmp_path / "summary.md").exists()


@pytest.mark.parametrize(("status", "warned"), [("missed", True), ("met", False)])
def test_the_summary_has_the_result(
    status: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    file = io.StringIO()
    summarize(file, record(status))
    text = (tmp_path / "summary.md").read_text("utf-8")
    assert text.startswith(f"before\n## a\\|b: target {status}\n")
    assert "| int8" in text
    assert file.getvalue().startswith("::warning title=trtune::a|b: ") == warned
