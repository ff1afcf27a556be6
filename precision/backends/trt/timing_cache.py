"""TensorRT's timing cache as a file that several builds may share.

Each build starts from the file as it is, and at its end adds what it measured: under a lock of the
operating system it reads the file again, merges, and writes it in one step. So two builds at once
lose nothing of each other, and a reader never sees half a file.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trtune.configs.errors import TrtuneError
from trtune.configs.files import write_bytes

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds to wait for another build that is writing, which takes it far less than one."""


def lock_of(path: Path) -> Path:
    """The file that is locked while `path` is written; it stays, empty."""
    return path.with_name(path.name + ".lock")


@contextmanager
def locked(path: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of `path`; the operating system lets go of it if the process dies.

    Raises TrtuneError if another process holds it for longer than `patience` seconds, or the lock
    file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = lock_of(path).open("a+b")
    except OSError as error:
        raise TrtuneError(f"cannot lock the timing cache {path}: {error.strerror}") from error
    with handle:
        until = time.monotonic() + patience
        while not _try_lock(handle):
            if time.monotonic() >= until:
                raise TrtuneError(
                    f"another process has held {lock_of(path)} for {patience:.0f} seconds; wait "
                    "for it to end, or give this build another `timing_cache`"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            _unlock(handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: IO[bytes]) -> bool:
        handle.seek(0)
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(handle: IO[bytes]) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def use_timing_cache(config: Any, path: Path) -> str:
    """Let a build start from the timings in `path`, or from none; a sentence for the log.

    Timings of another GPU or TensorRT version are not used. Raises TrtuneError if the file is
    there and cannot be read.
    """
    data = _read(path)
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return f"timing cache {path}: {f'{len(data)} bytes' if data else 'new'}"
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return f"timing cache {path} is of another GPU or TensorRT version: its timings were not used"


def save_timing_cache(config: Any, path: Path) -> None:
    """Add what the build measured to `path`, with what others wrote there meanwhile.

    A file of another GPU or version is replaced. Raises TrtuneError if it cannot be written.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return
    with locked(path):
        data = _read(path)
        others = config.create_timing_cache(data) if data else None
        if data and (others is None or not cache.combine(others, False)):
            log.info("timing cache %s was of another GPU or TensorRT version: replaced", path)
        write_bytes(path, bytes(cache.serialize()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise TrtuneError(f"cannot read the timing cache {path}: {error.strerror}") from error
