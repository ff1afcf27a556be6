"""The workspace: keeps what stages made, gives it back, and explains why something is made again.

One file a value: `stages/NAME.json` holds the key, what it was derived from, the hashes of the
files beside it, the value itself, and the hash of all this. It is written last, so that whoever is
killed leaves a value that is whole, or none. Runs of the same name beside this one are looked
through too: what another target or another pin does not change is not made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trtune.configs.errors import TrtuneError
from trtune.configs.files import hash_file, hash_json, write_json
from trtune.run.stage import Stage

log = logging.getLogger(__name__)

T = TypeVar("T")
FOLDER = "stages"
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, TrtuneError),
)
"""What a form may raise for a value that is not one of its own: it is made again."""


@dataclass(frozen=True, slots=True)
class _Record:
    """What `stages/NAME.json` holds."""

    folder: Path
    marks: Mapping[str, Any]
    told: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]
    value: Any

    def damage(self) -> str:
        """Which of its files is not what was written; empty if all are."""
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file():
                return f"{path} is not there"
            if hash_file(path) != digest:
                return f"{path} was changed, or cut off"
        return ""


class Workspace:
    """What the stages of a run made, in `folder`; `others` are folders of runs to take from."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._others = tuple(others)
        self._values: dict[tuple[str, str], Any] = {}
        self._made: set[str] = set()

    def get(self, stage: Stage[T]) -> T:
        """The value of `stage`: as it was made for the same needs, or made now and kept."""
        key = (stage.name, stage.key())
        if key not in self._values:
            self._values[key] = self._found(stage)
        value: T = self._values[key]
        return value

    def holds(self, stage: Stage[Any]) -> bool:
        """Whether `get` would give something that was made before."""
        known = (stage.name, stage.key()) in self._values
        return known or self._kept(stage) is not None

    def made(self, name: str) -> bool:
        """Whether stage `name` was made here and now, and not taken from what was kept."""
        return name in self._made

    def why(self, stage: Stage[Any]) -> str:
        """Why `stage` is to be made: what changed, as the config calls it; empty if it is not.

        Compared with what was kept last, here or in another run's folder; "never made" if nothing
        was.
        """
        if self._kept(stage) is not None:
            return ""
        for folder in (self.folder, *self._others):
            record = _read(folder, self._file(stage))
            if record is not None:
                return changed(stage, record.marks, record.told) or record.damage()
        return "never made"

    def drop(self, name: str) -> None:
        """Take away what stage `name` kept here, its files too."""
        file = f"{name}.json"
        record = _read(self.folder, file)
        (self.folder / FOLDER / file).unlink(missing_ok=True)
        for path in record.files if record is not None else ():
            (self.folder / path).unlink(missing_ok=True)

    def _found(self, stage: Stage[T]) -> T:
        record = self._kept(stage)
        if record is not None:
            try:
                value = stage.form.read(record.value, record.folder)
            except UNREADABLE as error:
                log.warning("%s cannot be read (%s): made again", stage.name, error)
            else:
                log.info(
                    "%s: reused from %s", stage.name, record.folder / FOLDER / self._file(stage)
                )
                if record.folder != self.folder:
                    self._keep(stage, value)
                return value
        elif (why := self.why(stage)) and why != "never made":
            log.info("%s again: %s", stage.name, why)
        if not stage.many:
            self.drop(stage.name)
        value = stage.make(self.folder)
        self._made.add(stage.name)
        self._keep(stage, value)
        return value

    def _keep(self, stage: Stage[T], value: T) -> None:
        held, files = stage.form.write(value, self.folder)
        record = {
            "stage": stage.name,
            "key": stage.key(),
            "needs": stage.marks(),
            "told": stage.told(),
            "files": {name: hash_file(self.folder / name) for name in files},
            "value": held,
        }
        record = json.loads(json.dumps(record))  # as it is read: lists, and keys that are text
        path = self.folder / FOLDER / self._file(stage)
        write_json(path, {**record, "digest": hash_json(record)})

    def _kept(self, stage: Stage[Any]) -> _Record | None:
        """The record of exactly this stage, its files as they were written."""
        marks = stage.marks()
        for folder in (self.folder, *(() if stage.form.rooted else self._others)):
            record = _read(folder, self._file(stage))
            if record is not None and record.marks == marks and not record.damage():
                return record
        return None

    def _file(self, stage: Stage[Any]) -> str:
        return f"{stage.name}-{stage.key()[:16]}.json" if stage.many else f"{stage.name}.json"


def changed(
    stage: Stage[Any], marks: Mapping[str, Any], told: Mapping[str, Mapping[str, Any]]
) -> str:
    """Which needs of `stage` are not as they were, by the config where that tells it.

    >>> from trtune.run.stage import Need
    >>> stage = Stage("x", {"data": Need("new", {"preprocess.mean": 1, "path": "p"})}, print)
    >>> before = {"data": {"preprocess.mean": 0, "path": "p"}}
    >>> changed(stage, {"version": 1, "data": "old"}, before)
    'preprocess.mean changed'
    """
    now, says = stage.marks(), stage.told()
    words: list[str] = []
    for name in {**marks, **now}:
        if name in marks and name in now and marks[name] == now[name]:
            continue
        was, is_ = told.get(name, {}), says.get(name, {})
        paths = [path for path in {**was, **is_} if was.get(path) != is_.get(path)]
        words += paths or [name]
    return f"{', '.join(dict.fromkeys(words))} changed" if words else ""


def _read(folder: Path, file: str) -> _Record | None:
    path = folder / FOLDER / file
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.pop("digest") != hash_json(held):
            raise ValueError("it is not as it was written")
        told = {name: dict(paths) for name, paths in held["told"].items()}
        return _Record(folder, dict(held["needs"]), told, dict(held["files"]), held["value"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): doing the stage again", path, error)
        with suppress(OSError):
            path.unlink()
        return None
