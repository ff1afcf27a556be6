"""Streams, progress bars, log lines, and how every kind of end becomes an exit status."""

from __future__ import annotations

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
from rich.text import Text

from trtune.cli.console import Terminal, json_text, session
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
        pytest.param(DataError("one\ntwo"), 2, "error: one\n  two\n", id="two problems"),
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
            signal.raise_signal(signal.SIGTERM)
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
            signal.raise_signal(signal.SIGINT)

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
        terminal.result({"a": 1}, "[red]x", Text("y " * 90 + "y"))
    assert capsys.readouterr().out == "[red]x\n" + "y " * 90 + "y\n"


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


def test_stdout_is_given_back_after_an_error() -> None:
    before = sys.stdout
    with pytest.raises(typer.Exit), session(as_json=True):
        raise DataError("x")
    assert sys.stdout is before


@pytest.mark.parametrize(
    ("error", "status"),
    [
        pytest.param(DataError("labels.csv: no column 'label'"), 2, id="wrong input"),
        pytest.param(TrtuneError("disk full"), 1, id="a failure"),
        pytest.param(KeyboardInterrupt(), 130, id="Ctrl-C"),
    ],
)
def test_with_json_a_failure_is_json_too(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), session(as_json=True):
        raise error
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "error": str(error) or "interrupted",
        "exit_status": status,
    }
    assert shown.err.startswith("error: ")


def test_a_failure_behind_the_result_adds_no_second_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(terminal: Terminal) -> None:
        terminal.result([1])
        raise DataError("late")

    with pytest.raises(typer.Exit), session(as_json=True) as terminal:
        work(terminal)
    assert json.loads(capsys.readouterr().out) == [1]


def test_github_shows_errors_and_warnings_beside_the_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    with session():
        logging.getLogger("trtune.x").warning("3 % lost")
    ending(DataError("a\nb"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "::warning title=trtune::3 %25 lost\n" in shown.err
    assert "::error title=trtune::a%0Ab\n" in shown.err


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_heeded(
    colours: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    with session() as terminal:
        terminal.result(None, Text("target met", style="green"))
    assert ("\x1b[32m" in capsys.readouterr().out) == colours
