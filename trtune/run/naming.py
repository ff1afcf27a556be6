"""Names of what a run writes: its folder, by what makes it another run, and files in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trtune.configs.files import hash_json
from trtune.configs.schema import Config

CACHE_FILE, HISTOGRAM_FILE = "calibration.cache", "histograms.npz"
PREPARED_MODEL, PREPARED_CACHE = "prepared.onnx", "prepared.cache"

UNDECIDED = (
    ("report",),
    ("runtime",),
    ("calibration", "memory"),
    ("compare", "memory"),
    ("precision", "max_pins"),
    ("precision", "max_evaluations"),
    *(("backends", "*", name) for name in ("threads", "timeout", "timing_cache", "required")),
)
"""Key paths (`*`: every entry of a list) that change how long a run takes or what is shown of it,
but not what comes out. With `max_pins` raised, the run goes on where it stood."""

PATHS = (
    ("model", "path"),
    ("calibration", "cache"),
    ("precision", "target", "metric"),
    *(
        ("data", part, name)
        for part in ("calibration", "evaluation", "validation")
        for name in ("path", "labels")
    ),
)
"""Key paths of places, which count as they are seen from the model: a project may move."""


def run_folder(config: Config, out: Path | str = "runs") -> Path:
    """`OUT/NAME-KEY`; KEY is the start of the hash of what in the config decides the result."""
    return Path(out) / f"{config.name}-{run_key(config)}"


def run_key(config: Config) -> str:
    """Ten hex digits: the hash of everything in the config that decides the result.

    That is all but `UNDECIDED`, and `PATHS` without the place of the project. What the files hold
    is in the keys of the stages: a folder whose model was edited is worked through again.
    """
    value = _decided(config)
    for path in UNDECIDED:
        _remove(value, path)
    home = os.path.dirname(config.model.path)
    for path in PATHS:
        section, name = _section(value, path[:-1]), path[-1]
        if isinstance(section.get(name), str):
            section[name] = _seen_from(home, section[name])
    return hash_json(value)[:10]


def config_hash(config: Config) -> str:
    """The hash of everything in the config."""
    return hash_json(_decided(config))


def _decided(config: Config) -> dict[str, Any]:
    """The config as JSON; what it did not have when it was first hashed is there if it is set.

    Of several pins the last that names a node wins, and a hash knows no order of keys: a list
    does.
    """
    value = config.model_dump(mode="json")
    pins = value["precision"]["pin"]
    if len(pins) > 1:
        value["precision"]["pin"] = [[pattern, precision] for pattern, precision in pins.items()]
    if value["data"]["validation"] is None:
        del value["data"]["validation"]
    return value


def _section(value: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for word in path:
        part = value.get(word)
        value = part if isinstance(part, dict) else {}
    return value


def _remove(value: Any, path: tuple[str, ...]) -> None:
    first, *rest = path
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if first == "*":
            _remove(part, tuple(rest))
        elif rest and isinstance(part, dict) and first in part:
            _remove(part[first], tuple(rest))
        elif isinstance(part, dict):
            part.pop(first, None)


def _seen_from(home: str, place: str) -> str:
    """An absolute path relative to `home`, if they have more in common than the root."""
    file, colon, function = place.partition(".py:")
    path = f"{file}.py" if colon else place
    if not os.path.isabs(path):
        return place
    try:
        common = os.path.commonpath([home, path])
    except ValueError:  # another drive of Windows
        return place
    if common == os.path.abspath(os.sep) or os.path.dirname(common) == common:
        return place
    return Path(os.path.relpath(path, home)).as_posix() + (f":{function}" if colon else "")
