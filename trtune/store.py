"""The run directory: stages keyed by what they were made from, and the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError
from trtune.configs.files import hash_json, write_json

log = logging.getLogger(__name__)

STAGES = "stages"


def read_stage(folder: Path, name: str, key: Mapping[str, Any]) -> Any | None:
    """The value that stage `name` left in `folder`, if it was made from exactly `key`.

    Otherwise None, and the log says which part of the key changed.
    """
    path = folder / STAGES / f"{name}.json"
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        old, value = held["key"], held["value"]
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
            self._known: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """What was measured for `key`, or None."""
        return self._known.get(hash_json(key))

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a value."""
        self._known[hash_json(key)] = value
        write_json(self._path, self._known)


@contextmanager
def logged_to(folder: Path) -> Iterator[None]:
    """Everything that trtune logs from INFO up also goes to `folder/log.txt`, appended."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise TrtuneError(
            f"cannot write to {folder}: {error.strerror or error}; choose another place with --out"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    root = logging.getLogger("trtune")
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
