"""YAML text as plain values that remember their file and line; variables; merging.

The scalars are those of YAML 1.2: `yes`, `on` and `1:30` are text, `5e-3` is a number, and no date
is made of `2024-01-01`. Keys are always text. A tree is the value and, for each key path in it,
where it was written; merging keeps both.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtune.configs.errors import ConfigError

Key = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


class _CoreDumper(yaml.SafeDumper):
    """Quotes exactly the text that `_CoreLoader` would not read back as text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    """Numbers and words side by side, anything larger one below the other."""
    flat = not any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence(
        _TAG + "seq", items, flow_style=flat or dumper.default_flow_style
    )


_CoreDumper.add_representer(list, _represent_list)
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written; its relative paths start at `folder`."""

    file: str
    line: int | None
    folder: Path

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Unset:
    """Stands for a value that needs an environment variable which is not set."""

    variable: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the value at `key`."""

    key: Key
    message: str
    origin: Origin | None = None

    def __str__(self) -> str:
        where = f"{self.origin}: " if self.origin else ""
        return where + (f"{dotted(self.key)}: " if self.key else "") + self.message


@dataclass(frozen=True, slots=True)
class Tree:
    """A value of dicts, lists and scalars, and where each part of it was written."""

    value: Any
    origins: Mapping[Key, Origin]

    def origin(self, key: Key) -> Origin | None:
        """Where `key`, or the nearest part above it, was written."""
        for length in range(len(key), -1, -1):
            if found := self.origins.get(key[:length]):
                return found
        return None


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one ConfigError with a line a problem; return if there is none."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if lines:
        raise ConfigError("\n".join(lines))


def dotted(key: Key) -> str:
    """A key path as `--set` takes it: a part that is not a plain word stands in quotes.

    >>> dotted(("precision", "pin", "a.b"))
    'precision.pin."a.b"'
    """
    return ".".join(
        str(part) if isinstance(part, int) or re.fullmatch(r"[\w:/*-]+", part) else f'"{part}"'
        for part in key
    )


def expand(text: str, environ: Mapping[str, str]) -> str | Unset:
    """`text` with ${VAR} and ${VAR:-default} replaced; `$${` stands for a plain `${`.

    The default is used when VAR is unset or empty, as in a shell, and may hold variables itself.
    Raises ValueError if a `${` is not closed or does not begin with a name.

    >>> expand("${A:-${B:-x}/y}.onnx", {})
    'x/y.onnx'
    """
    out: list[str] = []
    at = 0
    while at < len(text):
        if text.startswith("$${", at):
            out.append("${")
            at += 3
        elif text.startswith("${", at):
            end = _closing(text, at)
            value = _variable(text[at + 2 : end], environ)
            if isinstance(value, Unset):
                return value
            out.append(value)
            at = end + 1
        else:
            out.append(text[at])
            at += 1
    return "".join(out)


def _closing(text: str, start: int) -> int:
    depth, at = 0, start
    while at < len(text):
        if text.startswith("${", at):
            depth, at = depth + 1, at + 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    raise ValueError(f"${{ without its }} in {text!r}; write $${{ for a plain ${{")


def _variable(body: str, environ: Mapping[str, str]) -> str | Unset:
    name, has_default, default = body.partition(":-")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(
            f"{'${' + body + '}'!r} is not ${{NAME}} or ${{NAME:-default}}; "
            "write $${ for a plain ${"
        )
    if has_default:
        return environ.get(name) or expand(default, environ)
    return environ[name] if name in environ else Unset(name)


def parse_yaml(
    text: str,
    origin: Origin,
    *,
    at: Key = (),
    numbered: bool = True,
    environ: Mapping[str, str] | None = None,
) -> Tree:
    """The tree that `text` describes, with variables from `environ` (default: the process's).

    `at` is the key path that the text is the value of; origins are named from there, with line
    numbers if `numbered`. A variable that is not set leaves an `Unset` in the tree, so that a
    later file or `--set` may still replace it.

    Raises ConfigError, with line numbers, for text that is not YAML or gives a key twice.
    """
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(_syntax_error(error, text, origin, numbered)) from error
    walker = _Walker(origin, numbered, os.environ if environ is None else environ)
    value = None if node is None else walker.value(node, at, ())
    raise_problems(walker.problems)
    return Tree(value, {at: origin, **walker.origins})


def _syntax_error(error: Exception, text: str, origin: Origin, numbered: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None or not numbered:
        return f"{origin}: not YAML: {problem}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    hint = ""
    if "\t" in line:
        hint = "; indent with spaces, not tabs"
    elif "${" in line:
        hint = "; put a value with ${...} in quotes when it stands inside { } or [ ]"
    return f"{origin.file}:{mark.line + 1}: not YAML: {problem}{hint}\n    {line.strip()}"


class _Walker:
    """Turns composed nodes into values, and notes where each was written and what is wrong."""

    def __init__(self, origin: Origin, numbered: bool, environ: Mapping[str, str]) -> None:
        self.origins: dict[Key, Origin] = {}
        self.problems: list[Problem] = []
        self._origin = origin
        self._numbered = numbered
        self._environ = environ
        self._resolver = _CoreLoader("")

    def value(self, node: yaml.Node, key: Key, above: tuple[int, ...]) -> Any:
        self.origins.setdefault(key, self._at(node))
        if id(node) in above:
            self._complain(node, key, "an alias that holds itself")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, (*above, id(node)))
        if isinstance(node, yaml.SequenceNode):
            above = (*above, id(node))
            return [self.value(item, (*key, i), above) for i, item in enumerate(node.value)]
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key, above: tuple[int, ...]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        merged: list[yaml.MappingNode] = []
        lines: dict[str, int] = {}
        for name, item in node.value:
            line = name.start_mark.line + 1
            if name.tag == _MERGE:
                nodes = item.value if isinstance(item, yaml.SequenceNode) else [item]
                merged += [other for other in nodes if isinstance(other, yaml.MappingNode)]
            elif not isinstance(name, yaml.ScalarNode):
                self._complain(name, key, "a key must be a word, not a list or a mapping")
            elif name.value in entries:
                first = f"first on line {lines[name.value]}"
                self._complain(name, (*key, name.value), f"this key is given twice ({first})")
            else:
                lines[name.value] = line
                self.origins.setdefault((*key, name.value), self._at(name))
                entries[name.value] = self.value(item, (*key, name.value), above)
        for other in merged:
            if id(other) not in above:
                for name, item in self._mapping(other, key, (*above, id(other))).items():
                    entries.setdefault(name, item)
        return entries

    def _scalar(self, node: yaml.Node, key: Key) -> Any:
        text, tag = node.value, node.tag
        if "${" in text:
            try:
                expanded = expand(text, self._environ)
            except ValueError as error:
                self._complain(node, key, str(error))
                return None
            if isinstance(expanded, Unset):
                return expanded
            text = expanded
            if getattr(node, "style", None) is None:
                tag = self._resolver.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        try:
            return _plain(text, tag.removeprefix(_TAG))
        except ValueError:
            self._complain(node, key, f"{node.value!r} cannot be read as {tag}")
            return None

    def _at(self, node: yaml.Node) -> Origin:
        line = node.start_mark.line + 1 if self._numbered else None
        return Origin(self._origin.file, line, self._origin.folder)

    def _complain(self, node: yaml.Node, key: Key, message: str) -> None:
        self.problems.append(Problem(key, message, self._at(node)))


def _plain(text: str, kind: str) -> Any:
    if kind in ("str", "merge"):
        return text
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2].lower() in ("0x", "0o") else int(text)
    if kind == "float":
        if text.lower().endswith(".nan"):
            return math.nan
        return float(text.lower().replace(".inf", "inf"))
    raise ValueError(kind)


def to_yaml(value: Any) -> str:
    """`value` as block-style YAML that `parse_yaml` reads back equal, whatever text it holds."""
    return yaml.dump(
        _escape(value), Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100
    )


def inline_yaml(value: Any) -> str:
    """`value` on one line, quoted so that it may stand inside { } and [ ].

    >>> inline_yaml(["a b", "1", "x: y"])
    "[a b, '1', 'x: y']"
    """
    text: str = yaml.dump(
        [_escape(value)],
        Dumper=_CoreDumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )
    return text.strip()[1:-1]


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, Mapping):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape(item) for item in value]
    return value


def merge(base: Tree, over: Tree) -> Tree:
    """`base` with what `over` says: mappings key by key, anything else is replaced.

    A mapping with integer keys changes single entries of a list (only `--set` makes one). Keys of
    which a config may have only one of several take the others with them: see `_replaced`. In a
    mapping whose order counts, what `over` says stands last: the last of several pins that name
    a node holds.
    """
    origins = dict(base.origins)

    def forget(key: Key) -> None:
        for known in [known for known in origins if known[: len(key)] == key]:
            del origins[known]

    def join(old: Any, new: Any, key: Key) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            gone = _replaced(old, new, key)
            for name in gone:
                forget((*key, name))
            kept = {name: item for name, item in old.items() if name not in gone}
            changed = {n: join(kept.get(n), item, (*key, n)) for n, item in new.items()}
            if key in _LAST_WINS:
                kept = {name: item for name, item in kept.items() if name not in changed}
            return {**kept, **changed}
        if isinstance(old, list) and isinstance(new, dict) and all(type(n) is int for n in new):
            return [join(o, new.get(i, o), (*key, i)) if i in new else o for i, o in enumerate(old)]
        forget(key)
        return new

    value = join(base.value, over.value, ())
    origins.update(over.origins)
    return Tree(value, origins)


_LAST_WINS = (("precision", "pin"),)
_ALTERNATIVES = ("max_drop", "min"), ("take", "sample")
_OF_ONE_SOURCE = ("path", "labels", "inputs", "args")


def _replaced(old: Mapping[str, Any], new: Mapping[str, Any], key: Key) -> set[str]:
    """Keys of `old` that make no sense any more once `new` is laid over it."""

    def differs(name: str) -> bool:
        return name in new and name in old and new[name] != old[name]

    gone: set[str] = set()
    if key == ("precision", "target"):
        if differs("metric"):
            gone.update(old)
        alternatives = _ALTERNATIVES[0]
    elif len(key) == 2 and key[0] == "data":
        if differs("source"):
            gone.update(_OF_ONE_SOURCE)
        alternatives = _ALTERNATIVES[1]
    else:
        return gone
    if any(new.get(name) is not None for name in alternatives):
        gone.update(name for name in alternatives if name not in new)
    return gone & set(old)
