from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from trtune.reports.markdown import code, escape, report_markdown, several_markdown
from trtune.reports.record import Baseline, LayerRow, RunRecord

NASTY = [
    "a|b",
    "`x`",
    "``y",
    "<script>alert(1)</script>",
    "*bold* _i_ [l](u) ~~s~~",
    "a\nb",
    "&amp;",
]


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(text))


def cells(text: str) -> list[str]:
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(f"| h |\n| --- |\n| {text} |\n")
    inline = [t for t in tokens if t.type == "inline"][1:]
    return ["".join(child.content for child in t.children or []) for t in inline]


@pytest.mark.parametrize("text", NASTY)
def test_any_text_stays_itself_in_one_cell(text: str) -> None:
    assert cells(escape(text)) == [text.replace("\n", " ")]


@pytest.mark.parametrize("text", NASTY)
def test_any_name_stays_itself_as_code(text: str) -> None:
    assert cells(code(text)) == [text.replace("\n", " ")]


def test_the_report_has_every_part(record: RunRecord, layers: list[LayerRow]) -> None:
    text = report_markdown(record, layers)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Not honoured", "Notes", "Tuning", "Error per layer", "Calibration",
        "Every node", "Reproduce",
    ]  # fmt: skip
    html = rendered(text)
    assert html.count("<table>") == 6
    assert "<strong>INT8 with 2 pins: top-1 84.85 % (FP32 85.15 %), 80 of 82 layers" in html
    assert "picture 321 sets the range of 45 tensors, up to 4457 times the median" in html
    assert "1 picture skipped: <code>broken_17.png</code>" in html
    assert record.command in html
    assert text.index("**Alone**") < text.index("**Accumulated**")


def test_parts_that_were_not_measured_are_left_out() -> None:
    record = RunRecord(
        schema=1, name="n", key="k", status="failed",
        baseline=Baseline(metric="top1", value=None, samples=0),
    )  # fmt: skip
    text = report_markdown(record)
    assert "## " not in text
    assert "Nothing measured." in text


def test_several_runs(record: RunRecord) -> None:
    text = several_markdown([record, record])
    assert text.startswith("# 2 runs\n")
    assert rendered(text).count("<tr>") == 1 + 6
