"""Streams, progress bars, log lines, and how every kind of end becomes an exit status."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.text import Text

from trtune.cli.console import Bars, Terminal, json_text, session
from trtune.configs.errors import DataError, TrtuneError


def ending(error: BaseException, *, verbose: bool = False, resumes: bool = False) -> int:
    with pytest.raises(typer.Exit) as caught, session(verbose=verbose, resumes=resumes):
        raise error
    return int(caught.value.exit_code)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        pytest.param(TrtuneError("disk full"), 1, "error: disk full\n", id="a failure"),
        pytest.param(DataError("[a]: b"), 2, "error: [a]: b\n", id="wrong input, no markup"),
        pytest.param(DataError("one\ntwo"), 2, "error: \n  one\n  two\n", id="two problems"),
        pytest.param(KeyboardInterrupt(), 130, "error: interrupted\n", id="Ctrl-C"),
        pytest.param(
            KeyError("a\nb"),
            1,
            "error: KeyError: 'a\\nb' (this is a bug: rerun with -v)\n",
            id="bug",
        ),
    ],
)
def test_an_error_is_one_message_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(error) == status
    assert capsys.readouterr() == ("", message)


def test_a_long_message_is_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    ending(DataError("word " * 100 + "end"))
    assert capsys.readouterr().err.count("\n") == 1


def test_running_out_of_memory_names_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(MemoryError()) == 1
    assert "calibration.memory" in capsys.readouterr().err


def test_a_bug_has_its_traceback_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(ZeroDivisionError("oops"), verbose=True) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "raise error" in shown
    assert "please report it" in shown


def test_an_interrupted_stage_says_that_it_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(KeyboardInterrupt(), resumes=True) == 130
    assert capsys.readouterr().err == (
        "error: interrupted; what was complete is kept: the same command goes on from there\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_sigterm_unwinds_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    unwound = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    with pytest.raises(typer.Exit) as caught, session():
        work()
    assert caught.value.exit_code == 143
    assert unwound == [True]
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to oneself")
@pytest.mark.parametrize("ends", ["progress", "result"])
def test_a_ctrl_c_that_python_dropped_is_raised_again(
    ends: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Clearing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

    def work(terminal: Terminal) -> None:
        Clearing()
        if ends == "progress":
            terminal.progress("calibrate", 0, 8)
        terminal.result(None, "done")

    with pytest.raises(typer.Exit) as caught, session() as terminal:
        work(terminal)
    assert caught.value.exit_code == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with session():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_else_python_drops_is_shown_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_type))

    class Clearing:
        def __del__(self) -> None:
            raise ZeroDivisionError

    with session():
        Clearing()
    assert seen == [ZeroDivisionError]


def test_other_threads_can_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with session() as terminal:
            terminal.result(None, "done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert capsys.readouterr().out == "done\n"


def test_a_status_of_the_command_itself_passes() -> None:
    assert ending(typer.Exit(3)) == 3


def test_a_closed_pipe_is_left_to_typer() -> None:
    with pytest.raises(BrokenPipeError), session():
        raise BrokenPipeError


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with session() as terminal:
        terminal.result({"a": 1}, "[red]x", Text("y " * 90))
    assert capsys.readouterr().out == "[red]x\n" + "y " * 90 + "\n"


def test_with_json_nothing_else_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with session(as_json=True) as terminal:
        print("printed by a user's own function")
        terminal.result({"path": Path("a"), "x": (1, 2.5)}, "a table")
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"path": "a", "x": [1, 2.5]}
    assert shown.err == "printed by a user's own function\n"
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"


def test_json_text_that_is_given_is_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    with session(as_json=True) as terminal:
        terminal.result('{"a":1}\n')
    assert capsys.readouterr().out == '{"a":1}\n'


def test_numbers_that_json_lacks_become_words() -> None:
    text = json_text([math.inf, -math.inf, math.nan, None, True])
    assert json.loads(text) == ["Infinity", "-Infinity", "NaN", None, True]


@pytest.mark.parametrize(
    ("verbose", "expected"),
    [
        pytest.param(False, "warning: [w] 1\n", id="warnings always"),
        pytest.param(True, "said [i]\nwarning: [w] 1\n", id="information with -v"),
    ],
)
def test_log_lines(verbose: bool, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("trtune.somewhere")
    before = logging.getLogger("trtune").handlers[:]
    with session(verbose=verbose):
        log.debug("never")
        log.info("said %s", "[i]")
        log.warning("[w] %d", 1)
    assert capsys.readouterr() == ("", expected)
    assert logging.getLogger("trtune").handlers == before


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


def test_stdout_is_given_back_after_an_error() -> None:
    before = sys.stdout
    with pytest.raises(typer.Exit), session(as_json=True):
        raise DataError("x")
    assert sys.stdout is before
