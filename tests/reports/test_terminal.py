from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console, RenderableType

from trtune.reports.record import RunRecord
from trtune.reports.tables import Table, result_table
from trtune.reports.terminal import render_result, render_several, render_table


def shown(renderable: RenderableType, *, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_shows_every_cell_of_the_result_table(record: RunRecord) -> None:
    text, table = shown(render_result(record)), result_table(record)
    lines = [line.split() for line in text.splitlines()]
    for row in table.rows:
        assert " ".join(row).split() in lines
    for note in table.footnotes:
        assert note in text
    assert "INT8 with 2 pins: top-1 84.85 %" in text
    assert "target met" in text
    assert "picture 321 sets the range of 45 tensors" in text


def test_names_are_never_markup(record: RunRecord) -> None:
    odd = record.model_copy(update={"name": "[red]x[/red] [link=y]", "notes": ["[bold]n"]})
    text = shown(render_result(odd))
    assert "[red]x[/red] [link=y]" in text
    assert "• [bold]n" in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_is_not_overrun(record: RunRecord, width: int) -> None:
    assert max(map(len, shown(render_result(record), width=width).splitlines())) <= width


def test_a_table_too_wide_is_cut_between_columns(record: RunRecord) -> None:
    table = result_table(record)
    text = shown(render_table(table), width=80)
    lines = [line.split() for line in text.splitlines()]
    assert ["tuned", "onnxruntime/deploy", "84.85", "%"] in [line[:4] for line in lines]
    assert any(line[:3] == ["tuned", "onnxruntime/deploy", "16.4"] for line in lines)
    for column in table.columns[2:]:
        assert text.count(f"  {column} ") == 1


def test_a_run_without_a_target_is_done(record: RunRecord) -> None:
    text = shown(render_result(record.model_copy(update={"target": None})))
    assert f"{record.name}  done" in text


def test_several_runs(record: RunRecord) -> None:
    records: Sequence[RunRecord] = [record, record.model_copy(update={"name": "other"})]
    text = shown(render_several(records))
    assert text.count("other") == 3
    assert "emulation of TensorRT arithmetic" in text


def test_a_verdict_has_the_colour_of_what_it_says() -> None:
    rows = (("int8", "a", "missed"), ("tuned", "a", "met, within noise"))
    table = Table(("variant", "backend", "target"), rows)
    out = io.StringIO()
    console = Console(width=100, force_terminal=True, color_system="standard", file=out)
    console.print(render_table(table))
    assert re.search("33m *missed", out.getvalue())
    assert re.search("32m *met, within noise", out.getvalue())
