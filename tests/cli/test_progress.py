"""Bars, rates, and the list of stages above them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trtune.cli.progress import Bars, Overview, rate
from trtune.configs.progress import StagedProgress, announce, enter, silent
from trtune.run.pipeline import STAGES


def screen(*, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_step_that_lasts_gets_a_bar() -> None:
    console = screen()
    bars = Bars(console, delay=0)
    bars("comparing [layers]", 0, 8)
    bars("comparing [layers]", 3, 8)
    bars._bars.refresh()
    assert "comparing [layers]" in drawn(console)
    assert "3/8" in drawn(console)
    bars.stop()


def test_a_short_step_gets_none() -> None:
    console = screen()
    bars = Bars(console, delay=3600)
    for done in range(9):
        bars("calibrate", done, 8)
        bars._bars.refresh()
    bars.stop()
    assert "calibrate" not in drawn(console)


def test_without_a_terminal_nothing_is_drawn() -> None:
    console = screen(terminal=False)
    bars = Bars(console, delay=0)
    bars("calibrate", 1, 8)
    bars.stop()
    assert drawn(console) == ""


def test_a_finished_step_disappears_and_an_outer_one_stays() -> None:
    bars = Bars(screen(), delay=0)
    bars("tuning", 1, 8)
    bars("evaluate", 1, 2)
    assert [task.description for task in bars._bars.tasks] == ["tuning", "evaluate"]
    bars("evaluate", 2, 2)
    assert [task.description for task in bars._bars.tasks] == ["tuning"]
    bars.stop()
    assert bars._bars.tasks == []


def test_a_step_of_unknown_length_ends_when_the_next_begins() -> None:
    bars = Bars(screen(), delay=0)
    bars("calibrate", 1, None)
    bars("calibrate", 2, None)
    bars("evaluate", 1, 2)
    assert [task.description for task in bars._bars.tasks] == ["evaluate"]
    bars.stop()


def test_a_step_that_starts_again_has_a_new_clock() -> None:
    bars = Bars(screen(), delay=0)
    bars("evaluate", 5, 8)
    (task,) = bars._bars.tasks
    task.start_time = 0.0
    bars("evaluate", 1, 8)
    assert task.start_time > 0
    assert task.completed == 1
    bars.stop()


@pytest.mark.parametrize(
    ("done", "seconds", "shown"),
    [
        pytest.param(0, 3.0, "", id="nothing is done yet"),
        pytest.param(1, 2.5, "2.5 s each", id="the first step already"),
        pytest.param(50, 2.0, "25.0/s", id="many a second"),
        pytest.param(5, 0.0, "", id="no time has passed"),
    ],
)
def test_the_rate(done: float, seconds: float, shown: str) -> None:
    assert rate(done, seconds) == shown


def test_a_bar_has_its_rate_from_the_first_step_on() -> None:
    console = screen()
    bars = Bars(console, delay=0)
    bars("calibrate", 0, 8)
    bars._bars.tasks[0].start_time -= 4.0  # type: ignore[operator]
    bars("calibrate", 1, 8)
    bars._bars.refresh()
    assert "4.0 s each" in drawn(console)
    bars.stop()


class TestStages:
    def test_what_is_done_running_and_to_come(self) -> None:
        now = [10.0]
        overview = Overview(lambda: now[0])
        overview.names = ("gate", "calibrate", "tune")
        overview.begin()
        assert [state for _, state in overview.states()] == ["to come"] * 3
        overview.enter("calibrate")
        now[0] = 85.0
        assert overview.states() == [
            ("gate", "done"),
            ("calibrate", "running"),
            ("tune", "to come"),
        ]
        assert overview.text().plain == "✓ gate ▸ calibrate 1:15 · tune  1:15"

    def test_a_screen_without_such_signs(self) -> None:
        overview = Overview(lambda: 0.0, ascii_only=True)
        overview.names = ("gate", "tune")
        overview.enter("tune")
        assert overview.text().plain == "[x] gate [>] tune 0:00  0:00"

    def test_a_stage_that_was_not_announced_comes_last(self) -> None:
        overview = Overview(lambda: 0.0)
        overview.enter("export")
        assert overview.states() == [("export", "running")]

    def test_it_stands_above_the_bars_once_work_lasts(self) -> None:
        now = [0.0]
        console = screen()
        bars = Bars(console, clock=lambda: now[0])
        bars.begin()
        announce(bars, ["calibrate", "tune"])
        enter(bars, "calibrate")
        bars._bars.refresh()
        assert "calibrate" not in drawn(console)
        now[0] = 2.5
        bars._bars.refresh()
        assert "▸ calibrate 0:02 · tune  0:02" in drawn(console)
        bars.stop()

    def test_imports_and_other_beginnings_have_a_line_too(self) -> None:
        console = screen()
        bars = Bars(console, delay=0)
        bars.begin()
        bars._bars.refresh()
        assert "starting" in drawn(console)
        assert "/?" not in drawn(console)
        bars("calibrate", 0, 8)
        assert [task.description for task in bars._bars.tasks] == ["calibrate"]
        bars.stop()

    def test_other_progress_is_not_asked(self) -> None:
        assert not isinstance(silent, StagedProgress)
        announce(silent, ["calibrate"])
        enter(silent, "calibrate")

    def test_the_stages_of_a_run_fit_80_columns(self) -> None:
        overview = Overview(lambda: 60.0 * 12)
        overview.names = STAGES
        overview.begin()
        for name in STAGES:
            overview.enter(name)
            assert len(overview.text().plain) <= 80
