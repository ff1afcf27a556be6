"""Ctrl-C and SIGTERM, so that they end a command wherever they arrive."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work as Ctrl-C does, so that nothing half-written stays."""


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
