"""How long work tells its caller how far it is; only the command line draws anything."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: what is being done, how many steps are done, and of how many."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


def silent(what: str, done: int, total: int | None) -> None:
    """A `Progress` that shows nothing."""
