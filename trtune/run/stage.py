"""A stage: a value that is made once from what it needs, and how it is kept.

Stage("alone", needs={"model": model, "plan": plan}, make=measure, form=ERROR_SUMS)

The key of a stage is derived: the hash of what each need *decides by* (`content`). The words of a
reason, a path, or how often something is said to be done do not decide, and so are in no key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from trtune.calibrate.sessions import gpu_name
from trtune.calibrate.table import CalibrationTable
from trtune.configs.files import hash_json
from trtune.configs.system.machine import package_version
from trtune.precision.graph.file import Model
from trtune.precision.plan.plan import PrecisionPlan

T = TypeVar("T")
Kept = tuple[Any, tuple[str, ...]]
"""A value as JSON, and the names of the files beside it, below the workspace's folder."""


@dataclass(frozen=True, slots=True)
class Need:
    """What goes into a stage, with what of the config it comes from (key path -> value).

    The value alone decides; `told` is what a user can be told has changed, if the value has.
    """

    value: Any
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How a value is written below a folder, and read from what `write` gave.

    `read` raises OSError, ValueError, KeyError, TypeError or TrtuneError for what it cannot read.
    One that is `rooted` belongs to its folder and is not taken over from another run's.
    """

    write: Callable[[T, Path], Kept]
    read: Callable[[Any, Path], T]
    rooted: bool = False


def as_json(dump: Callable[[T], Any], load: Callable[[Any], T]) -> Form[T]:
    """A form without files."""
    return Form(lambda value, folder: (dump(value), ()), lambda value, folder: load(value))


PLAIN: Form[Any] = as_json(lambda value: value, lambda value: value)
"""Of what JSON holds as it is."""


@dataclass(frozen=True, slots=True)
class Stage(Generic[T]):
    """A value to be made from `needs`, unless it was.

    `make` gets the workspace's folder, for scratch. `version` goes up when `make` gives something
    else for the same needs. Of a stage with `many` values each is kept, else the last one alone.
    """

    name: str
    needs: Mapping[str, Any]
    make: Callable[[Path], T]
    form: Form[T] = PLAIN
    version: int = 1
    many: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", MappingProxyType(dict(self.needs)))

    def marks(self) -> dict[str, Any]:
        """What each need decides by: itself where it is short, else its hash."""
        return {"version": self.version} | {name: mark(need) for name, need in self.needs.items()}

    def told(self) -> dict[str, dict[str, Any]]:
        """Of each need the parts of the config that it comes from, as marks."""
        return {
            name: {path: mark(value) for path, value in need.told.items()}
            for name, need in self.needs.items()
            if isinstance(need, Need) and need.told
        }

    def key(self) -> str:
        """SHA-256 over the marks."""
        return hash_json(self.marks())


def mark(value: Any) -> Any:
    """The content of `value` if it is a short word or a number, else its hash.

    >>> mark("entropy"), mark(24), mark({"a": 1}) == mark({"a": 1.0})
    ('entropy', 24, False)
    """
    found = content(value)
    if found is None or isinstance(found, (bool, int, float)):
        return found
    return found if isinstance(found, str) and len(found) <= 64 else hash_json(found)


def content(value: Any) -> Any:
    """What `value` decides by, as JSON has it.

    A model by its file, data by what is in it, a plan by its precisions and not by its words, a
    table by its scales and not by where they came from. Raises TypeError for what nothing is known
    of.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Need):
        return content(value.value)
    if isinstance(value, Model):  # the same file may be cut at other outputs
        judged = [list(value.judged)] if value.counted else []
        return [value.sha256, [spec.name for spec in value.outputs], *judged]
    if isinstance(value, PrecisionPlan):
        return content(value.decisions)
    if isinstance(value, CalibrationTable):
        return {**value.scales, **value.imported()}
    if isinstance(value, BaseModel):
        return content(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): content(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [content(part) for part in value]
    identity = getattr(value, "identity", None)
    if isinstance(identity, str):
        return identity
    raise TypeError(f"{type(value).__name__} has no content that a key could be made of")


def flat(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The leaves of nested mappings by their dotted key path.

    >>> flat({"a": {"b": 1}, "c": [2]}, "data")
    {'data.a.b': 1, 'data.c': [2]}
    """
    found: dict[str, Any] = {}
    for key, part in value.items():
        name = f"{path}.{key}" if path else str(key)
        found.update(flat(part, name) if isinstance(part, Mapping) and part else {name: part})
    return found


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages, as needs of what they decide."""
    return {name: package_version(name) for name in packages}


def device_needs(device: str) -> dict[str, str]:
    """A GPU, by its name, as a need of what is computed on it; nothing for the CPU."""
    return {} if device == "cpu" else {"runtime.device": gpu_name(device)}
