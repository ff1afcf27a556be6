"""The terminal: results on stdout, all else on stderr, progress bars, and how a command ends."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from trtune.configs.errors import TrtuneError

DELAY = 2.0
"""Seconds that a step must last before it gets a bar."""
FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""

INTERRUPTED, TERMINATED = 130, 143
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work as Ctrl-C does, so that nothing half-written stays."""


class Bars:
    """A `Progress` of this package that draws rich's bars, each once its step lasts two seconds.

    A step that comes round again, from its start, begins a new clock. Without a terminal nothing
    is drawn.
    """

    def __init__(self, console: Console, *, delay: float = DELAY) -> None:
        self._bars = _DelayedBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._bars.delay = delay
        self._tasks: dict[str, Task] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if self._bars.disable:
            return
        task = self._tasks.get(what)
        if task is None:
            self._end_open_ended()
            self._bars.start()
            self._bars.add_task(what, total=total)
            self._tasks[what] = task = self._bars.tasks[-1]
        elif done < task.completed:
            self._bars.reset(task.id)
        self._bars.update(task.id, completed=done, total=total)
        if total is not None and done >= total:
            self._end(what)

    def stop(self) -> None:
        """Take every bar off the screen."""
        for what in list(self._tasks):
            self._end(what)
        if self._bars.live.is_started:
            self._bars.stop()

    def _end(self, what: str) -> None:
        self._bars.remove_task(self._tasks.pop(what).id)

    def _end_open_ended(self) -> None:
        """Steps that cannot say how much there is end when the next one begins."""
        for what in [what for what, task in self._tasks.items() if task.total is None]:
            self._end(what)


class _DelayedBars(Progress):
    delay = DELAY

    def get_renderables(self) -> Iterable[RenderableType]:
        lasting: list[Task] = [task for task in self.tasks if (task.elapsed or 0) >= self.delay]
        if lasting:
            yield self.make_tasks_table(lasting)


class Terminal:
    """What a command writes to: its result goes to `out`, all else to `err`.

    With `as_json` the result is JSON text and nothing else reaches stdout.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out, self.err = make_console(sys.stdout), make_console(sys.stderr)
        self.signals = Signals()
        self.bars = Bars(self.err)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """A `Progress` of this package: draws bars, and lets no Ctrl-C get lost."""
        self.signals.check()
        self.bars(what, done, total)

    def result(self, value: Any, *shown: RenderableType) -> None:
        """Write the result: `value` as JSON (or as it is, if it is text), or what is `shown`."""
        self.signals.check()
        self.bars.stop()
        if self.as_json:
            text = value if isinstance(value, str) else json_text(value)
            self.out.file.write(text.rstrip("\n") + "\n")
            self.out.file.flush()
            return
        for part in shown:
            self.out.print(Text(part) if isinstance(part, str) else part, soft_wrap=_is_line(part))

    def fail(self, message: str) -> None:
        """One clear message on stderr, each problem on a line of its own."""
        self.bars.stop()
        lines = message.splitlines()
        text = Text.assemble(("error: ", "bold red"))
        text.append(message if len(lines) < 2 else "\n  " + "\n  ".join(lines))
        self.err.print(text, soft_wrap=True)


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
        except Exception:
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


class Signals:
    """Ctrl-C and SIGTERM as exceptions that are raised again until they end the command.

    Python drops an exception that is raised while it clears up an object, and a signal can arrive
    just then: `check`, called as the work goes on, raises it once more.
    """

    def __init__(self) -> None:
        self.received: KeyboardInterrupt | None = None

    def check(self) -> None:
        """Raise what was received, if anything was."""
        if self.received is not None:
            raise self.received

    def _is_received(self, error: BaseException | None) -> bool:
        return error is not None and error is self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise self.received

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Receive signals in the block, but not those that whoever started us ignores."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        before = {number: signal.getsignal(number) for number in usual}
        ours = [number for number, handler in usual.items() if before[number] == handler]
        dropped = sys.unraisablehook
        sys.unraisablehook = lambda u: None if self._is_received(u.exc_value) else dropped(u)
        for number in ours:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])
            sys.unraisablehook = dropped


@contextmanager
def session(
    *, verbose: bool = False, as_json: bool = False, resumes: bool = False
) -> Iterator[Terminal]:
    """The terminal for one command; every way in which its block can end becomes an exit status.

    0 done, 1 a failure, 2 the user's input is wrong, 130 Ctrl-C, 143 SIGTERM. A bug is one line,
    or its traceback with `verbose`. `resumes` says that the same command, given again after it was
    interrupted, goes on from what is complete.
    """
    terminal = Terminal(as_json=as_json)
    with ExitStack() as stack:
        stack.callback(terminal.bars.stop)
        stack.enter_context(_logging(terminal.err, verbose=verbose))
        stack.enter_context(terminal.signals.handled())
        if as_json:  # what a user's own function prints must not get between
            stack.enter_context(redirect_stdout(sys.stderr))
        try:
            yield terminal
        except TrtuneError as error:
            terminal.fail(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            ended = isinstance(error, Terminated)
            kept = "; what was complete is kept: the same command goes on from there"
            what = "terminated" if ended else "interrupted"
            terminal.fail(what + kept if resumes else what)
            raise typer.Exit(TERMINATED if ended else INTERRUPTED) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except MemoryError as error:
            terminal.fail(
                "out of memory; lower `calibration.memory`, `compare.memory` or `data.*.batch`"
            )
            raise typer.Exit(1) from error
        except Exception as error:
            _bug(terminal, error, verbose=verbose)
            raise typer.Exit(1) from error


def _bug(terminal: Terminal, error: Exception, *, verbose: bool) -> None:
    terminal.bars.stop()
    if verbose:
        terminal.err.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
    advice = "please report it with the traceback above" if verbose else "rerun with -v"
    what = " ".join(f"{type(error).__name__}: {error}".split())
    terminal.fail(f"{what} (this is a bug: {advice})")
