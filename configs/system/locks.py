"""Locks that the operating system holds on files, on POSIX and on Windows.

The lock belongs to the open file, so that two threads of one process keep each other out as two
processes do, and whoever dies lets go of it.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trtune.configs.errors import TrtuneError

log = logging.getLogger(__name__)

FAR = 0x7FFF0000
"""Windows locks bytes, and nobody else may read those: this one is behind the end of any log."""
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK, getattr(errno, "EDEADLOCK", errno.EDEADLK))


def try_lock(handle: IO[Any]) -> bool:
    """Lock the open file until `unlock`, or until it is closed; False if another handle holds it.

    Raises OSError where the file system has no locks.
    """
    try:
        _lock(handle)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


def unlock(handle: IO[Any]) -> None:
    """Let go of what `try_lock` locked."""
    posix, windows = _modules()
    if posix is not None:
        posix.flock(handle, posix.LOCK_UN)
    elif windows is not None:
        _on_far_byte(windows, handle, windows.LK_UNLCK)


def _lock(handle: IO[Any]) -> None:
    posix, windows = _modules()
    if posix is not None:
        posix.flock(handle, posix.LOCK_EX | posix.LOCK_NB)
    elif windows is not None:
        _on_far_byte(windows, handle, windows.LK_NBLCK)
    else:
        raise OSError(errno.ENOLCK, "this Python has neither fcntl nor msvcrt")


def _on_far_byte(windows: Any, handle: IO[Any], way: int) -> None:
    """`msvcrt.locking` works where the file stands; where that was is restored."""
    file = handle.fileno()
    before = os.lseek(file, 0, os.SEEK_CUR)
    os.lseek(file, FAR, os.SEEK_SET)
    try:
        windows.locking(file, way, 1)
    finally:
        os.lseek(file, before, os.SEEK_SET)


def _modules() -> tuple[Any, Any]:
    """fcntl and msvcrt, of which a system has one; found by name, since the other cannot be
    imported there."""
    found: list[Any] = []
    for name in ("fcntl", "msvcrt"):
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            found.append(None)
    return found[0], found[1]


def lock_of(path: Path) -> Path:
    """The file that is locked while `path` is written; it stays, empty."""
    return path.with_name(path.name + ".lock")


@contextmanager
def locked(path: Path, *, patience: float, remedy: str) -> Iterator[None]:
    """Hold the lock of `path`, a file beside it, for the block.

    `remedy` is what the user can do if another process does not let go of it. Where the file system
    has no locks, the block runs without one, and the log says so.

    Raises TrtuneError if another process holds it for longer than `patience` seconds, or the lock
    file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = lock_of(path).open("a+b")
    except OSError as error:
        raise TrtuneError(f"cannot lock {path}: {error.strerror}; {remedy}") from error
    with handle:
        held = _wait_for(handle, path, patience, remedy)
        try:
            yield
        finally:
            if held:
                unlock(handle)


def _wait_for(handle: IO[bytes], path: Path, patience: float, remedy: str) -> bool:
    """Whether `handle` is locked now; False where there are no locks."""
    until = time.monotonic() + patience
    try:
        while not try_lock(handle):
            if time.monotonic() >= until:
                raise TrtuneError(
                    f"another process has held {lock_of(path)} for {patience:.0f} seconds; wait "
                    f"for it to end, or {remedy}"
                )
            time.sleep(0.05)
    except OSError as error:
        log.info("%s cannot be locked: %s", path, error)
        return False
    return True
