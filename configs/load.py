"""From a YAML file to a `Config`: inheritance, variables, overrides, paths, and what is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtune.configs.errors import ConfigError, did_you_mean, nearest
from trtune.configs.problems import explain, shown
from trtune.configs.schema import Config, DataSet
from trtune.configs.sources import source_by_name
from trtune.configs.yamltree import (
    Key,
    Origin,
    Problem,
    Tree,
    Unset,
    merge,
    parse_yaml,
    raise_problems,
    to_yaml,
)

PRESETS = Path(__file__).parent / "presets"
SCHEMA_ID = "urn:trtune:config:1"
"""Names the schema of this version of the language; it is nowhere to be downloaded."""


def load_config(
    path: str | os.PathLike[str], *, overrides: Sequence[str] = (), check: bool = True
) -> Config:
    """The config in the file at `path`.

    `extends` is followed, `overrides` (`key.path=value`, the value in YAML) are laid over it,
    variables are filled in, and paths are made absolute: from the folder of the file that wrote
    them, those of `overrides` from the current folder. With `check`, the model, data, labels and
    cache files must be there.

    Raises ConfigError with a line for everything that is wrong: file and line, key path, what was
    found, what is expected.
    """
    try:
        return _loaded(Path(path), overrides, check=check)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        name = str(error.filename or path)
        shown_name = name if len(name) < 80 else f"{name[:77]}..."
        raise ConfigError(f"{path}: {error.strerror or error}: {shown_name}") from error


def _loaded(path: Path, overrides: Sequence[str], *, check: bool) -> Config:
    tree = _read(path, ())
    for override in overrides:
        tree = _override(tree, override)
    raise_problems(_unset(tree))
    tree = _absolute_paths(tree)
    try:
        config = Config.model_validate(tree.value)
    except ValidationError as error:
        problems = explain(error, Config, tree)
        raise ConfigError("\n".join(dict.fromkeys(map(str, problems)))) from error
    if check:
        raise_problems(Problem(key, text, tree.origin(key)) for key, text in _file_problems(config))
    return config


def check_files(config: Config) -> None:
    """Raise one ConfigError that names every file of `config` that is not there."""
    raise_problems(Problem(key, text) for key, text in _file_problems(config))


def dump_config(config: Config) -> str:
    """`config` as YAML with every key written out; `load_config` reads it back to an equal one."""
    return to_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors.

    No key is required, because `extends` may bring any of them (an entry of `backends` is
    replaced as a whole and does need its name), and every number or word may be a ${VARIABLE}.
    """
    schema: dict[str, Any] = Config.model_json_schema()
    definitions = schema.pop("$defs")
    sections = [schema, *definitions.values()]
    for section in sections:
        section["required"] = [key for key in section.pop("required", []) if key == "name"]
        properties = section.get("properties", {})
        if "name" not in properties or "const" not in properties["name"]:
            del section["required"]
        for name, value in properties.items():
            properties[name] = _or_variable(value)
    extends = {
        "description": "other config files, or presets, that this one adds to; later keys win",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "examples": [f"presets/{name}" for name in presets()],
    }
    properties = {"extends": extends, **schema.pop("properties")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **schema,
        "title": "trtune config",
        "properties": properties,
        "$defs": {**definitions, "Variable": {"type": "string", "pattern": r"\$\{[^}]+\}"}},
    }


def presets() -> list[str]:
    """File names of the configs that `extends: presets/NAME` finds without a file of one's own."""
    return sorted(path.name for path in PRESETS.glob("*.yaml"))


def _or_variable(schema: dict[str, Any]) -> dict[str, Any]:
    takes_text = schema.get("type") == "string" and not {"enum", "const", "pattern"} & set(schema)
    if takes_text or "const" in schema or "$ref" in schema or schema.get("type") == "object":
        return schema
    if schema.get("type") == "array":
        return schema
    about = ("description", "default", "title")
    outside: dict[str, Any] = {key: schema[key] for key in about if key in schema}
    bare = {key: value for key, value in schema.items() if key not in about}
    return {**outside, "anyOf": [*bare.get("anyOf", [bare]), {"$ref": "#/$defs/Variable"}]}


def _read(path: Path, chain: tuple[Path, ...]) -> Tree:
    """The tree of the file at `path` laid over those that it extends; `chain` is what led here."""
    path = path.expanduser()
    text = _read_text(path)
    folder = Path(os.path.abspath(path)).parent
    tree = parse_yaml(text, Origin(str(path), None, folder))
    where = tree.origins[()]
    if not isinstance(tree.value, dict):
        found = "it is empty" if tree.value is None else f"found {shown(tree.value)}"
        raise ConfigError(f"{where.file}: expected a mapping of keys such as `version: 1`; {found}")
    value = {key: item for key, item in tree.value.items() if key != "extends"}
    own = Tree(value, {key: at for key, at in tree.origins.items() if key[:1] != ("extends",)})
    if "extends" not in tree.value:
        return own
    names = tree.value["extends"]
    names = names if isinstance(names, list) else [names]
    real = path.resolve()
    parents = []
    for name in names:
        origin = tree.origin(("extends",)) or where
        parent = _parent(name, folder, path, origin)
        if parent.resolve() in (*chain, real):
            loop = " -> ".join(str(p) for p in (*chain, real, parent.resolve()))
            raise ConfigError(f"{origin}: extends: goes round in a circle: {loop}")
        parents.append(_read(parent, (*chain, real)))
    return reduce(merge, [*parents, own])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_near(path, ('.yaml', '.yml'))}") from None
    except IsADirectoryError:
        inside = sorted(child.name for child in path.glob("*.y*ml"))[:5]
        hint = f" (it holds {', '.join(inside)})" if inside else ""
        raise ConfigError(f"{path}: is a folder, not a config file{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); is this a YAML file?"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parent(name: object, folder: Path, child: Path, origin: Origin) -> Path:
    if isinstance(name, Unset):
        raise ConfigError(f"{origin}: extends: {_unset_message(name)}")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{origin}: extends: expected a file name or a list of them, found {shown(name)}"
        )
    beside = Path(os.path.join(child.parent, os.path.expanduser(name)))
    built_in = PRESETS.parent / name
    if beside.is_file():
        return beside
    if built_in.parent == PRESETS and built_in.is_file():
        return built_in
    known = [f"presets/{preset}" for preset in presets()]
    hint = did_you_mean(name, known) or f"; built in are {', '.join(known)}"
    raise ConfigError(f"{origin}: extends: no file {name!r} in {folder}{hint}")


def _override(tree: Tree, text: str) -> Tree:
    """`tree` with `text`, as `--set` gives it, laid over it."""
    match = re.fullmatch(r'((?:"[^"]*"|[^"=])+)=(.*)', text, re.DOTALL)
    parts = re.findall(r'(?:^|\.)(?:"([^"]*)"|([^".]+))', match[1].strip()) if match else []
    if match is None or not parts or re.search(r"^\.|\.\.|\.$", match[1].strip()):
        raise ConfigError(
            f"--set {text}: expected key.path=value, such as --set calibration.method=mse"
        )
    origin = Origin("--set", None, Path.cwd())
    key: Key = ()
    value = tree.value
    for quoted, plain in parts:
        part: str | int = quoted or plain
        if key == () and part == "backends" and not value.get("backends"):
            value = {**value, "backends": [{"name": "onnxruntime"}]}
            tree = Tree(value, tree.origins)
        if isinstance(value, list):
            part = _index(str(part), value, (*key, part), origin)
        key = (*key, part)
        known = isinstance(value, list) or (isinstance(value, dict) and part in value)
        value = value[part] if known else None
    over = parse_yaml(match[2], origin, at=key, numbered=False)
    laid: Any = over.value
    for part in reversed(key):
        laid = {part: laid}
    above = (key[:length] for length in range(1, len(key)))
    new = {prefix: origin for prefix in above if prefix not in tree.origins}
    return merge(tree, Tree(laid, {**new, **over.origins}))


def _index(text: str, items: list[Any], key: Key, origin: Origin) -> int:
    if text.isdigit() and int(text) < len(items):
        return int(text)
    entries = f"0 to {len(items) - 1}" if items else "none, the list is empty"
    raise ConfigError(str(Problem(key, f"{text!r} is not an entry of the list: {entries}", origin)))


def _unset(tree: Tree) -> Iterator[Problem]:
    for key, value in _leaves(tree.value, ()):
        if isinstance(value, Unset):
            yield Problem(key, _unset_message(value), tree.origin(key))


def _unset_message(value: Unset) -> str:
    return (
        f"environment variable {value.variable} is not set; set it, or write a default: "
        f"${{{value.variable}:-...}}"
    )


def _leaves(value: Any, key: Key) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, (*key, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*key, index))
    else:
        yield key, value


def _absolute_paths(tree: Tree) -> Tree:
    data = tree.value.get("data")
    sources = _sources(data) if isinstance(data, dict) else {}

    def absolute(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: absolute(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [absolute(item, (*key, index)) for index, item in enumerate(value)]
        origin = tree.origin(key)
        if not isinstance(value, str) or not value or origin is None:
            return value
        if _is_function(key, sources):
            return _absolute_function(value, origin)
        return _absolute(value, origin) if _is_file(key, value, sources) else value

    return Tree(absolute(tree.value, ()), tree.origins)


def _absolute(path: str, origin: Origin) -> str:
    return os.path.abspath(os.path.join(origin.folder, os.path.expanduser(path)))


def _absolute_function(reference: str, origin: Origin) -> str:
    """`file.py:function` with the whole path; so too a module whose file lies beside the config."""
    module, _, function = reference.rpartition(":")
    if module and not module.endswith(".py"):
        beside = origin.folder / f"{module}.py"
        return f"{beside}:{function}" if beside.is_file() else reference
    return f"{_absolute(module, origin)}:{function}" if module else reference


def _sources(data: dict[str, Any]) -> dict[str | int, Any]:
    sections = {name: section for name, section in data.items() if isinstance(section, dict)}
    shared = _source_of(sections.get("calibration", {}), None)
    return {name: _source_of(section, shared) for name, section in sections.items()}


def _source_of(section: dict[str, Any], default: Any) -> Any:
    said, path = section.get("source", "auto"), section.get("path")
    if said != "auto":
        return said
    told = source_by_name(path) if isinstance(path, str) else "auto"
    return default if told == "auto" and default is not None else told


def _is_function(key: Key, sources: dict[str | int, Any]) -> bool:
    if key == ("precision", "target", "metric"):
        return True
    return len(key) == 3 and key[::2] == ("data", "path") and sources.get(key[1]) == "python"


def _is_file(key: Key, value: str, sources: dict[str | int, Any]) -> bool:
    if key in (("model", "path"), ("calibration", "cache")):
        return True
    if len(key) == 3 and key[0] == "data":
        if key[2] == "labels":
            return sources.get(key[1]) in ("images", "idx", "auto") and value != "auto"
        return key[2] in ("path", "classes", "images")
    return len(key) == 3 and key[0] == "backends" and key[2] == "timing_cache"


def _file_problems(config: Config) -> Iterator[tuple[Key, str]]:
    yield from _must_be_file(("model", "path"), config.model.path, "an ONNX file", (".onnx",))
    seen: set[tuple[str, str]] = set()
    for name, section in config.data.sections.items():
        for key, text in _data_problems(section):
            if (key, text) not in seen:
                seen.add((key, text))
                yield ("data", name, key), text
    if config.calibration.cache is not None:
        yield from _must_be_file(
            ("calibration", "cache"), config.calibration.cache, "a calibration cache", ()
        )
    metric = config.precision.target.metric if config.precision.target else ""
    if ".py:" in metric:
        file = metric.rpartition(":")[0]
        yield from _must_be_file(("precision", "target", "metric"), file, "a Python file", (".py",))


_NO_LISTS = (".jpg", ".jpeg", ".png", ".csv", ".npz", ".npy", ".onnx")


def _data_problems(section: DataSet) -> Iterator[tuple[str, str]]:
    path = Path(section.path)
    found: Iterable[tuple[Key, str]] = ()
    if section.source in ("images", "npy", "auto", "yolo"):
        if not path.exists():
            what = "file" if path.suffix in (".yaml", ".yml", ".txt") else "folder"
            yield "path", f"no such {what}: {path}{_near(path, ())}"
        elif not path.is_dir() and (section.source == "npy" or path.suffix in _NO_LISTS):
            what = "the pictures in a folder" if section.source == "images" else "a folder"
            yield "path", f"not a folder: {path}; source {section.source} reads {what}"
    elif section.source != "python":
        found = _must_be_file(("path",), section.path, "a file", (path.suffix,))
    elif ".py:" in section.path:
        file = section.path.rpartition(":")[0]
        found = _must_be_file(("path",), file, "a Python file", (".py",))
    yield from (("path", text) for _, text in found)
    if section.source in ("images", "idx") and section.labels not in (None, "auto"):
        what = "a CSV with the columns file,label" if section.source == "images" else "an idx file"
        if section.source == "images" and Path(section.labels or "").is_dir():
            return  # masks
        for _, text in _must_be_file((), section.labels or "", what, ()):
            yield "labels", text


def _must_be_file(
    key: Key, path: str, what: str, suffixes: tuple[str, ...]
) -> Iterator[tuple[Key, str]]:
    if Path(path).is_dir():
        yield key, f"is a folder: {path}; expected {what}"
    elif not Path(path).exists():
        yield key, f"no such file: {path}{_near(Path(path), suffixes)}"


def _near(path: Path, suffixes: tuple[str, ...]) -> str:
    """What may be meant instead of `path`, which is not there: a neighbour, or a missing folder."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            missing, folder = folder, folder.parent
        return f"; there is no {missing.name!r} in {folder}"
    try:
        names = sorted(c.name for c in folder.iterdir() if c.suffix in suffixes or not suffixes)
    except OSError:
        return ""
    close = nearest(path.name, names)
    if close:
        return f"; did you mean {str(path.with_name(close[0]))!r}?"
    if suffixes and 0 < len(names) <= 5:
        return f"; {folder} holds {', '.join(names)}"
    return ""
