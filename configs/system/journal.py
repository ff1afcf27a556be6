"""A run's folder while it is worked in: made when the first thing is to be kept, locked, logged."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from threading import Lock

from trtune.configs.errors import InputError, TrtuneError
from trtune.configs.system.locks import try_lock

log = logging.getLogger(__name__)

LEFTOVERS = (".tuning", ".compare", ".writing-*", ".building-*")
"""Folders of half-done work, which only a process that was killed leaves behind."""
LOG = "log.txt"

_working: ContextVar[RunFolder | None] = ContextVar("trtune_run", default=None)
_level_lock = Lock()
_open: list[RunFolder] = []
_level_before = [logging.NOTSET]


class RunFolder:
    """The folder of a run that goes on. Nothing is on the disk before `open`.

    What trtune logs in the run's thread from INFO up goes to `log.txt`; what was logged before
    `open` too. What is logged in a thread of no run goes there if this is the only run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handler = _Journal(self)
        self._is_new = False

    def open(self) -> Path:
        """Make and lock the folder, remove what a killed run left half-written, and begin the log.

        Raises TrtuneError if it cannot be written to, or another process or thread works there.
        """
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = _LogFile(self.path / LOG, encoding="utf-8")
        except OSError as error:
            raise TrtuneError(
                f"cannot write to {self.path}: {error.strerror or error}; choose another place "
                "with --out"
            ) from error
        try:
            _lock(file, self.path)
            _remove_leftovers(self.path)
        except BaseException:  # raised again, with the file closed
            file.close()
            raise
        self._is_new = is_new
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handler.write_to(file)
        return self.path

    def is_of(self, run: RunFolder | None) -> bool:
        """Whether what is logged while `run` is worked on belongs here."""
        return run is self or (run is None and len(_open) == 1)

    def _begin(self) -> None:
        root = logging.getLogger("trtune")
        with _level_lock:
            if not _open:
                _level_before[0] = root.level
                root.setLevel(min(root.level or logging.INFO, logging.INFO))
            _open.append(self)
            root.addHandler(self._handler)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            text = f"stopped by {type(error).__name__}{': ' if str(error) else ''}{error}"
            self._handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))
        root = logging.getLogger("trtune")
        with _level_lock:
            root.removeHandler(self._handler)
            _open.remove(self)
            if not _open:
                root.setLevel(_level_before[0])
        self._handler.close()
        if isinstance(error, InputError) and self._is_new:
            shutil.rmtree(self.path, ignore_errors=True)  # nothing in it is of use


@contextmanager
def working_in(path: Path) -> Iterator[RunFolder]:
    """The folder of a run at `path`, to be opened once it is known that there is something to do.

    Why the block ended, if not by itself, is the log's last line. If that is wrong input, a folder
    that was made in it is taken away again.
    """
    run = RunFolder(path)
    token = _working.set(run)
    run._begin()
    error: BaseException | None = None
    try:
        yield run
    except BaseException as raised:  # Ctrl-C too is the last line of the log; raised again
        error = raised
        raise
    finally:
        run._end(error)
        _working.reset(token)


class _LogFile(logging.FileHandler):
    """A log that may fail to grow: a full disk stops the work where a result is written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: logging's own way is a traceback on stderr for every line."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Journal(logging.Handler):
    """Holds what is logged in one run until there is a file for it."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(logging.INFO)
        self._run = run
        self._held: list[logging.LogRecord] = []
        self._file: _LogFile | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep or write a record of this run."""
        if not self._run.is_of(_working.get()):
            return
        if self._file is None:
            self._held.append(record)
        else:
            self._file.handle(record)

    def write_to(self, file: _LogFile) -> None:
        """Write what is held to `file`, and what comes too."""
        self._file = file
        for record in self._held:
            file.handle(record)
        self._held.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _lock(file: logging.FileHandler, folder: Path) -> None:
    """Hold the log file until it is closed; the lock of a killed process goes with it."""
    assert file.stream is not None  # open from the start, not from the first line on
    try:
        free = try_lock(file.stream)
    except OSError as error:  # a file system without locks
        log.info("%s cannot be locked: %s", folder, error)
        return
    if not free:
        raise TrtuneError(
            f"another trtune works in {folder}; wait for it, or choose another place with --out"
        )


def _remove_leftovers(folder: Path) -> None:
    for pattern in LEFTOVERS:
        for leftover in [path for path in folder.rglob(pattern) if path.is_dir()]:
            shutil.rmtree(leftover, ignore_errors=True)
