"""The terminal: results on stdout, all else on stderr, progress bars, and how a command ends."""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from trtune.cli.github import annotate
from trtune.configs.errors import TrtuneError
from trtune.configs.system.signals import Signals, Terminated

FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""

INTERRUPTED, TERMINATED = 130, 143
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class Terminal:
    """What a command writes to: its result goes to `out`, all else to `err`.

    With `as_json` the result is JSON text and nothing else reaches stdout. `progress` is the
    `Progress` to give to what takes time: it draws bars, and lets no Ctrl-C get lost.
    """

    def __init__(self, *, as_json: bool = False, verbose: bool = False) -> None:
        from trtune.cli.progress import Bars

        self.as_json, self.verbose = as_json, verbose
        self.out, self.err = make_console(sys.stdout), make_console(sys.stderr)
        self.signals = Signals()
        self.progress = Bars(self.err, check=self.signals.check)
        self._answered = False

    def result(self, value: Any, *shown: RenderableType) -> None:
        """Write the result: `value` as JSON (or as it is, if it is text), or what is `shown`."""
        self.signals.check()
        self.progress.stop()
        if self.as_json:
            self.write_json(value)
            return
        for part in shown:
            self.out.print(Text(part) if isinstance(part, str) else part, soft_wrap=_is_line(part))

    def write_json(self, value: Any) -> None:
        """Write `value` as JSON, whether it was asked for or not; text is JSON already."""
        self._answered = True
        text = value if isinstance(value, str) else json_text(value)
        self.out.file.write(text.rstrip("\n") + "\n")
        self.out.file.flush()

    def note(self, message: str) -> None:
        """A line on stderr, beside the result."""
        self.err.print(Text.assemble(("note: ", "yellow"), message), soft_wrap=True)

    def fail(self, message: str, status: int = 1) -> None:
        """One clear message on stderr, each further line of it below the first, indented.

        With `as_json` stdout holds `{"error": message, "exit_status": status}`, unless the result
        is there already.
        """
        self.progress.stop()
        lines = message.splitlines()
        text = Text.assemble(("error: ", "bold red"))
        text.append("\n  ".join(lines) if lines else message)
        self.err.print(text, soft_wrap=True)
        annotate(self.err.file, "error", message)
        if self.as_json and not self._answered:
            self.write_json({"error": message, "exit_status": status})


def make_console(file: Any) -> Console:
    """A console on `file`, wide enough for tables where there is no terminal to measure."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def json_text(value: Any) -> str:
    """`value` as indented JSON; numbers that JSON lacks become "Infinity", "-Infinity", "NaN".

    >>> print(json_text({"sqnr_db": math.inf}))
    {
      "sqnr_db": "Infinity"
    }
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _is_line(part: RenderableType) -> bool:
    return isinstance(part, (str, Text))


class _Lines(logging.Handler):
    """Log records as lines above the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            style = STYLES.get(record.levelno)
            label = Text(f"{record.levelname.lower()}: ", style) if style else Text()
            self._console.print(label + Text(record.getMessage()), soft_wrap=True)
            if record.levelno == logging.WARNING:
                annotate(self._console.file, "warning", record.getMessage())
        except Exception:  # as logging has it: a line that cannot be shown ends nothing
            self.handleError(record)


@contextmanager
def _logging(console: Console, *, verbose: bool) -> Iterator[None]:
    logger, handler = logging.getLogger("trtune"), _Lines(console)
    level = logger.level
    # the handler has a level of its own: a run's log file lowers that of the logger to INFO
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(min(handler.level, level or handler.level))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def session(
    *, verbose: bool = False, as_json: bool = False, resumes: bool = False
) -> Iterator[Terminal]:
    """The terminal for one command; every way in which its block can end becomes an exit status.

    0 done, 1 a failure, 2 the user's input is wrong, 130 Ctrl-C, 143 SIGTERM. A bug is one line,
    or its traceback with `verbose`. `resumes` says that the same command, given again after it was
    interrupted, goes on from what is complete.
    """
    terminal = Terminal(as_json=as_json, verbose=verbose)
    with ExitStack() as stack:
        stack.callback(terminal.progress.stop)
        stack.enter_context(_logging(terminal.err, verbose=verbose))
        stack.enter_context(terminal.signals.handled())
        if as_json:  # what a user's own function prints must not get between
            stack.enter_context(redirect_stdout(sys.stderr))
        try:
            if resumes:  # what runs for long also takes a while to be imported
                terminal.progress.begin()
            yield terminal
        except TrtuneError as error:
            terminal.fail(str(error), error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            ended = isinstance(error, Terminated)
            kept = "; what was complete is kept: the same command goes on from there"
            what = "terminated" if ended else "interrupted"
            status = TERMINATED if ended else INTERRUPTED
            terminal.fail(what + kept if resumes else what, status)
            raise typer.Exit(status) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except MemoryError as error:
            terminal.fail(
                "out of memory; lower `calibration.memory`, `compare.memory` or `data.*.batch`"
            )
            raise typer.Exit(1) from error
        except Exception as error:  # a bug of ours, whatever it is: said, with status 1
            _bug(terminal, error, verbose=verbose)
            raise typer.Exit(1) from error


def _bug(terminal: Terminal, error: Exception, *, verbose: bool) -> None:
    terminal.progress.stop()
    if verbose:
        terminal.err.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
    advice = "please report it with the traceback above" if verbose else "rerun with -v"
    what = " ".join(f"{type(error).__name__}: {error}".split())
    terminal.fail(f"{what} (this is a bug: {advice})")
