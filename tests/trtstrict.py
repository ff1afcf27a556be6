"""Classes as strict as TensorRT's bindings, made from the snapshots in trtapi/.

What the real bindings do not have raises AttributeError, read-only properties refuse to be set,
arguments and values of another type are a TypeError (an enum of another kind, a number for a
flag), and a subclass that does not call `super().__init__()` cannot be made. What such a class
does is given as a mixin with `_do_METHOD`, `_get_PROPERTY` and `_put_PROPERTY`; a method without
is an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

API = Path(__file__).parent / "trtapi"

DEPRECATED = {
    *("IBuilderConfig.int8_calibrator", "IBuilderConfig.set_calibration_profile"),
    *("ILayer.precision", "ILayer.precision_is_set", "ILayer.set_output_type"),
    *("Builder.platform_has_fast_int8", "Builder.platform_has_fast_fp16"),
}
"""Members of 10.x whose use emits a DeprecationWarning."""


def snapshot(major: int) -> dict[str, Any]:
    """The names of TensorRT 10 or 11, with members, signatures and enum values."""
    value: dict[str, Any] = json.loads((API / f"trt-{major}.json").read_text("utf-8"))
    return value


class EnumValue:
    """One value of an enum: equal to itself alone, and a number only through `int()`."""

    def __init__(self, name: str, value: int) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} values cannot be changed")

    def __int__(self) -> int:
        return int(self.value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and int(self) == int(other)  # type: ignore[call-overload]

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.value))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"


def make_enum(name: str, values: Mapping[str, int]) -> type:
    """An enum class with its values as attributes."""
    kind = type(name, (EnumValue,), {})
    for word, number in values.items():
        setattr(kind, word, kind(word, number))
    return kind


class Module:
    """Stands for the module `tensorrt`."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")


class Made(type):
    """Refuses objects whose `__init__` was replaced and not called, as pybind11 does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if "_ready" not in vars(made):
            native = next(base for base in cls.__mro__ if base.__dict__.get("_native"))
            raise TypeError(f"{native.__name__}.__init__() must be called when overriding __init__")
        return made


class Strict(metaclass=Made):
    """What every generated class inherits."""

    _members: Mapping[str, Any] = {}
    _native = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        native = next(base for base in type(self).__mro__ if base.__dict__.get("_native"))
        signatures = native._members.get("__init__")
        if not isinstance(signatures, list):
            raise TypeError(f"{native.__name__}: No constructor defined!")
        bound = bind(self._trt, signatures, args, kwargs)
        object.__setattr__(self, "_ready", True)
        self._start(*bound)

    def _start(self, *args: Any) -> None:
        """What the mixin does when an object is made."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = any(name in base.__dict__.get("_members", ()) for base in type(self).__mro__)
        if name.startswith("_") or known or not type(self).__dict__.get("_native"):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def new(kind: type, /, **state: Any) -> Any:
    """An object that the bindings would hand out; `state` becomes its private attributes."""
    made = kind.__new__(kind)
    object.__setattr__(made, "_ready", True)
    for name, value in state.items():
        object.__setattr__(made, f"_{name}", value)
    return made


def warn(name: str) -> None:
    """The warning of a deprecated member; the stack leads to who uses it."""
    if name in DEPRECATED:
        warnings.warn(f"Use of deprecated {name}.", DeprecationWarning, stacklevel=3)


def make_method(owner: str, name: str, signatures: Sequence[str]) -> Any:
    """A method that checks its arguments and then does what the mixin says."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bind(self._trt, signatures, args, kwargs)
        warn(f"{owner}.{name}")
        does = getattr(type(self), f"_do_{name}", None)
        if does is None:
            raise NotImplementedError(f"the double of {owner} does not do {name}")
        return does(self, *bound)

    method.__name__ = name
    return method


def make_property(owner: str, name: str, kinds: Mapping[str, Any]) -> property:
    """A property that refuses to be set, or refuses values of another type."""

    def read(self: Any) -> Any:
        if not kinds["set"]:
            warn(f"{owner}.{name}")
        getter = getattr(type(self), f"_get_{name}", None)
        if getter is not None:
            return getter(self)
        try:
            return vars(self)[f"_{name}"]
        except KeyError:
            raise NotImplementedError(f"the double of {owner} has no {name}") from None

    def write(self: Any, value: Any) -> None:
        if not fits(self._trt, value, kinds["set"]):
            raise TypeError(f"{owner}.{name} must be {kinds['set']}, not {value!r}")
        warn(f"{owner}.{name}")
        putter = getattr(type(self), f"_put_{name}", None)
        if putter is not None:
            putter(self, value)
        object.__setattr__(self, f"_{name}", value)

    return property(read, write if kinds["set"] else None)


def make_class(trt: Module, name: str, entry: Mapping[str, Any], mixin: type, base: type) -> type:
    """A generated class; `base` is the generated one that it derives from, or Strict."""
    body: dict[str, Any] = {"_members": entry["members"], "_native": True, "_trt": trt}
    for word, member in entry["members"].items():
        if word == "__init__":
            continue
        if isinstance(member, list):
            body[word] = make_method(name, word, member)
        elif isinstance(member, dict):
            body[word] = make_property(name, word, member)
    for word, nested in entry["nested"].items():
        kind = make_enum(word, nested["enum"])
        body[word] = kind
        body.update({value: getattr(kind, value) for value in nested["enum"]})
    return Made(name, (mixin, base), body)


def bind(
    trt: Module, signatures: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments in the order of the first signature that they fit; TypeError if none."""
    for signature in signatures:
        parameters = parse_signature(signature)[1:]
        names = [name for name, _, _ in parameters]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        surplus = len(args) > len(names) or not set(kwargs) <= set(names[len(args) :])
        missing = [name for name, _, default in parameters if not default and name not in given]
        if (
            not surplus
            and not missing
            and all(fits(trt, given[name], kind) for name, kind, _ in parameters if name in given)
        ):
            return tuple(given[name] for name in names if name in given)
    shown = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
    raise TypeError(
        "incompatible function arguments. The following argument types are supported: "
        f"{' | '.join(signatures)}. Invoked with: {shown}"
    )


def parse_signature(text: str) -> list[tuple[str, str, bool]]:
    """(name, type, has a default) of each parameter, `self` first.

    >>> parse_signature("f(self: A, x: list[tuple[int, int]], y: E = <E.B: 0>) -> None")
    [('self', 'A', False), ('x', 'list[tuple[int, int]]', False), ('y', 'E', True)]
    """
    inside = text[text.index("(") + 1 : text.rindex(") ->")]
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    found = []
    for part in parts:
        name, _, kind = part.strip().partition(": ")
        kind, equals, _ = kind.partition(" = ")
        found.append((name, kind.strip(), bool(equals)))
    return found


def fits(trt: Module, value: Any, kind: str) -> bool:
    """Whether the bindings would take `value` for a parameter of this type."""
    simple: dict[str, tuple[type, ...]] = {
        "SupportsInt": (int,),
        "int": (int,),
        "SupportsFloat": (int, float),
        "str": (str,),
        "bool": (bool,),
        "tuple": (tuple,),
        "list": (list,),
        "Buffer": (bytes, bytearray, memoryview),
    }
    if kind in ("object", ""):
        return True
    if kind in simple:
        return isinstance(value, simple[kind])
    if kind.startswith(("Sequence[", "list[")):
        inner = kind[kind.index("[") + 1 : -1]
        return isinstance(value, (list, tuple)) and all(fits(trt, v, inner) for v in value)
    if kind == "Dims" and isinstance(value, (list, tuple)):
        return all(isinstance(dim, int) for dim in value)
    target: Any = trt
    for part in kind.split("."):
        target = getattr(target, part)
    return isinstance(value, target)
