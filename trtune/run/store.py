"""The run directory: stages keyed by what they were made from, and the log."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError
from trtune.configs.files import hash_json, write_json
from trtune.configs.system.locks import try_lock

log = logging.getLogger(__name__)

STAGES = "stages"
LEFTOVERS = (".tuning", ".compare", ".writing-*", ".building-*")
"""Folders of half-done work, which only a process that was killed leaves behind."""


def read_stage(folder: Path, name: str, key: Mapping[str, Any]) -> Any | None:
    """The value that stage `name` left in `folder`, if it was made from exactly `key`.

    Otherwise None, and the log says which part of the key changed.
    """
    path = folder / STAGES / f"{name}.json"
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        old, value = dict(held["key"]), held["value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): doing the stage again", path, error)
        return None
    changed = [part for part in {**old, **key} if old.get(part) != key.get(part)]
    if changed:
        log.info("%s: not reused, %s changed", name, ", ".join(changed))
        return None
    log.info("%s: reused from %s", name, path)
    return value


def write_stage(folder: Path, name: str, key: Mapping[str, Any], value: Any) -> None:
    """Keep the value of a stage with its key; in one step, when it is complete."""
    write_json(folder / STAGES / f"{name}.json", {"key": dict(key), "value": value})


class Evaluations:
    """Values measured so far, by the hash of everything they depend on; written as they come."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STAGES / "evaluations.json"
        try:
            held = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = None
        self._known: dict[str, Any] = held if isinstance(held, dict) else {}

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """What was measured for `key`, or None."""
        return self._known.get(hash_json(key))

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a value."""
        self._known[hash_json(key)] = value
        write_json(self._path, self._known)


class _LogFile(logging.FileHandler):
    """A log that may fail to grow: a full disk stops the work where a result is written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: logging's own way is a traceback on stderr for every line."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logged_to(folder: Path) -> Iterator[None]:
    """Everything that trtune logs from INFO up also goes to `folder/log.txt`, appended.

    What a killed run left half-written in `folder` is removed first, and only one process works
    there at a time. Why the block ended, if not by itself, is the log's last line.

    Raises TrtuneError if the folder cannot be written to, or another process works there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise TrtuneError(
            f"cannot write to {folder}: {error.strerror or error}; choose another place with --out"
        ) from error
    try:
        _lock(handler, folder)
        _remove_leftovers(folder)
    except BaseException:
        handler.close()
        raise
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    root = logging.getLogger("trtune")
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    except BaseException as error:
        text = f"stopped by {type(error).__name__}{': ' if str(error) else ''}{error}"
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None))
        raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def _lock(handler: logging.FileHandler, folder: Path) -> None:
    """Hold the log file until it is closed; the lock of a killed process goes with it."""
    assert handler.stream is not None  # open from the start, not from the first line on
    try:
        free = try_lock(handler.stream)
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
