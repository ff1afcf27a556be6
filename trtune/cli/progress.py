"""Progress on the terminal: the stages of a run, the time that it takes, and a bar a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

DELAY = 2.0
"""Seconds that something must last before it is drawn."""
STARTING = "starting"

DONE, RUNNING, TO_COME = "done", "running", "to come"
STATES = {DONE: ("✓", "green"), RUNNING: ("▸", "bold"), TO_COME: ("·", "dim")}
PLAIN_MARKS = {DONE: "[x]", RUNNING: "[>]", TO_COME: "[ ]"}


class Bars:
    """A `StagedProgress` of this package that draws rich's bars, each once its step lasts.

    A step that comes round again, from its start, begins a new clock. Above the bars stand the
    stages, if they were said, and the time since `begin`. Without a terminal nothing is drawn.
    `check` is called with each step, and may raise what is to end the work.
    """

    def __init__(
        self,
        console: Console,
        *,
        delay: float = DELAY,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self.overview = Overview(clock, ascii_only=console.options.ascii_only)
        self._bars = _DelayedBars(
            SpinnerColumn("line" if console.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Count(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._bars.delay, self._bars.overview = delay, self.overview
        self._tasks: dict[str, Task] = {}

    def begin(self, what: str = STARTING) -> None:
        """Start the clock: what comes before the first step, such as imports, is `what`."""
        self.overview.begin()
        self(what, 0, None)

    def stages(self, names: Sequence[str]) -> None:
        """Say which stages there will be, in order."""
        self.overview.names = tuple(names)

    def stage(self, name: str) -> None:
        """Say that the stage `name` begins, and with it that those before it are over."""
        self.overview.enter(name)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self._check()
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


class Overview:
    """Which stages are done, running and to come, and the time since the beginning."""

    def __init__(self, clock: Callable[[], float], *, ascii_only: bool = False) -> None:
        self.names: tuple[str, ...] = ()
        self._clock, self._ascii = clock, ascii_only
        self._began: float | None = None
        self._current = ""
        self._entered = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._began = self._clock()

    def enter(self, name: str) -> None:
        """Make `name` the stage that is running; one that was not announced comes last."""
        if name not in self.names:
            self.names = (*self.names, name)
        self._current, self._entered = name, self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return 0.0 if self._began is None else self._clock() - self._began

    def states(self) -> list[tuple[str, str]]:
        """Each stage with what has become of it."""
        here = self.names.index(self._current) if self._current else -1
        return [
            (name, DONE if i < here else RUNNING if i == here else TO_COME)
            for i, name in enumerate(self.names)
        ]

    def text(self) -> Text:
        """All of it in a line."""
        parts = []
        for name, state in self.states():
            mark, style = STATES[state]
            shown = f"{PLAIN_MARKS[state] if self._ascii else mark} {name}"
            if state == RUNNING:
                shown += f" {_minutes(self._clock() - self._entered)}"
            parts.append(Text(shown, style))
        return Text(" ").join([*parts, Text(f" {_minutes(self.elapsed)}", "dim")])


class _Count(MofNCompleteColumn):
    """Steps done of all; nothing while there are none to count."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None or task.completed else Text()


class RateColumn(ProgressColumn):
    """Steps a second, or seconds a step, as soon as one step is done."""

    def render(self, task: Task) -> Text:
        """What a row of the table shows of `task`."""
        return Text(rate(task.completed, task.elapsed or 0.0), "cyan")


def rate(done: float, seconds: float) -> str:
    """How fast it goes; nothing before the first step is done.

    >>> rate(30, 10.0), rate(3, 12.0), rate(0, 5.0)
    ('3.0/s', '4.0 s each', '')
    """
    if not done or not seconds:
        return ""
    return f"{done / seconds:.1f}/s" if done >= seconds else f"{seconds / done:.1f} s each"


class _DelayedBars(Progress):
    delay = DELAY
    overview = Overview(time.monotonic)  # rich draws once before it has another

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.overview.elapsed >= self.delay and self.overview.names:
            yield self.overview.text()
        lasting: list[Task] = [task for task in self.tasks if (task.elapsed or 0) >= self.delay]
        if lasting:
            yield self.make_tasks_table(lasting)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
