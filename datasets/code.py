"""A user's own Python: found and imported as it stands now, and hashed with all that it loads."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from threading import RLock
from typing import Any

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.files import hash_bytes, hash_json

PACKAGE = "trtune"
_importing = RLock()
_seen: dict[str, tuple[Path, str]] = {}
"""Modules of users that were imported here: their file, and the hash of what stood in it."""


@contextmanager
def importable(folder: Path | None) -> Iterator[None]:
    """`folder` first on `sys.path` inside the block."""
    if folder is None:
        yield
        return
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def load_function(reference: str, base_dir: Path | None = None) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names, seen from `base_dir`.

    A module beside the config wins over one of that name that was imported from elsewhere, and one
    that was edited since it was imported, or that imports one that was, is imported again.

    Raises DataError if the reference, the module or the function is wrong, with the user's own
    exception as its cause if importing raised one.
    """
    folder, module_name, name = _place_of(reference, base_dir)
    with _importing, importable(folder):
        _forget_namesake(module_name, folder)
        _forget_others(folder)
        before = set(sys.modules)
        try:
            with _without_bytecode():
                module = importlib.import_module(module_name)
        except Exception as error:  # a user's module may raise anything
            raise DataError(
                f"cannot import {module_name!r} (from {reference!r}, looked in "
                f"{folder or 'sys.path'} first): {type(error).__name__}: {error}"
            ) from error
        _remember({*sys.modules} - before | {module_name})
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise DataError(f"{module_name!r} has no function {name!r}{did_you_mean(name, names)}")
    checked: Callable[..., Any] = function
    return checked


def code_hash(reference: str, base_dir: Path | None = None) -> str:
    """SHA-256 of the source of `reference` and of everything of the user's own that it loads.

    That is the module that is named, and whatever it imports, in a function or at the top, from
    anywhere but Python's own library, installed packages and this one: so a decorator, a partial,
    a closure or a helper module that is edited gives another hash. Where the files stand does not
    count, what they are called and hold does. Modules that are loaded are followed too, by the
    objects in them, since an import may be made by a name that is computed.

    Raises DataError as `load_function` does.
    """
    folder, module_name, _ = _place_of(reference, base_dir)
    load_function(reference, base_dir)
    roots = [*([folder] if folder else []), *_own_roots()]
    found: dict[str, str] = {}
    named = getattr(sys.modules.get(module_name), "__file__", None)
    if named is not None and not _is_own(Path(named)):  # installed: its own file has to do
        return hash_json({module_name: hash_bytes(Path(named).read_bytes())})
    waiting = [module_name]
    while waiting:
        name = waiting.pop()
        file = None if name in found else _file_of(name, roots)
        if file is None:
            continue
        data = file.read_bytes()
        found[name] = hash_bytes(data)
        _seen[name] = (file, found[name])  # also of what is imported only when it is called
        parents = name.split(".")[:-1]
        waiting += [".".join(parents[: n + 1]) for n in range(len(parents))]
        is_package = file.name == "__init__.py"
        waiting += _imports(data, name if is_package else ".".join(parents))
        waiting += _loaded_by(name)
    return hash_json(found)


def _place_of(reference: str, base_dir: Path | None) -> tuple[Path | None, str, str]:
    """Where to look first, the module, and the name in it."""
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise DataError(f"{reference!r} must be 'module:function' or 'file.py:function'")
    if not place.endswith(".py"):
        return base_dir, place, name
    file = (base_dir or Path()) / place
    if not file.is_file():
        raise DataError(f"no such file: {file} (from {reference!r})")
    return file.resolve().parent, file.stem, name


def _imports(data: bytes, package: str) -> list[str]:
    """Every module that source names in an import, and what it takes from one: that may be one."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):  # no Python: a compiled module
        return []
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if node.level and package else []
            above = above[: len(above) - node.level + 1]
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return [name.strip(".") for name in found if name.strip(".")]


def _loaded_by(name: str) -> list[str]:
    """The modules of the objects in a loaded module, through decorators and partials."""
    module = sys.modules.get(name)
    found = []
    for value in list(vars(module).values()) if module is not None else []:
        while isinstance(value, functools.partial):
            value = value.func
        for part in (value, inspect.unwrap(value) if callable(value) else None, type(value)):
            owner = getattr(part, "__module__", None)
            found += [owner] if isinstance(owner, str) else []
        found += [value.__name__] if isinstance(value, type(sys)) else []
    return list(dict.fromkeys(found))


def _file_of(name: str, roots: list[Path]) -> Path | None:
    """The file of a module of the user's own; None for any other, and for what is none."""
    if name.partition(".")[0] == PACKAGE:
        return None
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is not None:
        file = Path(loaded)
        return file if file.is_file() and _is_own(file) else None
    if name in sys.modules or name.partition(".")[0] in sys.stdlib_module_names:
        return None
    found = (_file_in(root, name) for root in roots)
    return next((place for place in found if place is not None), None)


def _own_roots() -> list[Path]:
    return [path for entry in sys.path if _is_own(path := Path(entry or ".").resolve())]


@functools.cache
def _installed() -> tuple[Path, ...]:
    """The folders of Python's own library and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    known = {sysconfig.get_path(name) for name in names}
    known |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(Path(place).resolve() for place in known if place)


def _is_own(path: Path) -> bool:
    path = path.resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(path.is_relative_to(place) for place in _installed())


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """Compiled files are dated by the second: one would hide an edit in the same second."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _remember(names: set[str]) -> None:
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        own = file is not None and name.partition(".")[0] != PACKAGE and _is_own(Path(file))
        if file is not None and own and Path(file).is_file():
            _seen[name] = (Path(file), hash_bytes(Path(file).read_bytes()))


def _forget_others(folder: Path | None) -> None:
    """Drop every module of the user's once one was edited, or `folder` has another of its name:
    the others may have taken names from it."""
    if all(
        file.is_file()
        and hash_bytes(file.read_bytes()) == digest
        and (folder is None or (_file_in(folder, name) or file).samefile(file))
        for name, (file, digest) in _seen.items()
    ):
        return
    tops = {name.partition(".")[0] for name in _seen}
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]
    _seen.clear()
    importlib.invalidate_caches()


def _file_in(root: Path, name: str) -> Path | None:
    place = root.joinpath(*name.split("."))
    files = (place / "__init__.py", place.with_name(place.name + ".py"))
    return next((file for file in files if file.is_file()), None)


def _forget_namesake(module: str, folder: Path | None) -> None:
    """Drop an imported module of this name if `folder` has another: two configs, two folders."""
    if folder is None:
        return
    top = module.partition(".")[0]
    loaded, spec = sys.modules.get(top), PathFinder.find_spec(top, [str(folder)])
    if loaded is None or spec is None or spec.origin is None:
        return
    if getattr(loaded, "__file__", None) != spec.origin:
        importlib.invalidate_caches()
        for name in [n for n in sys.modules if n == top or n.startswith(top + ".")]:
            del sys.modules[name]
