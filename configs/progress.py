"""How long work tells its caller how far it is; only the command line draws anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """Called as work goes on: what is being done, how many steps are done, and of how many."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


@runtime_checkable
class StagedProgress(Protocol):
    """A `Progress` that also wants to know the stages of a run: all of them, then each as it
    begins."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...

    def stages(self, names: Sequence[str]) -> None:
        """Said once: the stages to come, in order."""

    def stage(self, name: str) -> None:
        """Said as a stage begins; those before it are over."""


def silent(what: str, done: int, total: int | None) -> None:
    """A `Progress` that shows nothing."""


def announce(progress: Progress, names: Sequence[str]) -> None:
    """Tell `progress` which stages there will be, if it wants to know."""
    if isinstance(progress, StagedProgress):
        progress.stages(names)


def enter(progress: Progress, name: str) -> None:
    """Tell `progress` that a stage begins, if it wants to know."""
    if isinstance(progress, StagedProgress):
        progress.stage(name)
