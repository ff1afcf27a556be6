"""Packages whose names are imported when they are first asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from trtune.configs.system.lazy import lazy_names

LAZY = ["trtune", "trtune.calibrate", "trtune.configs", "trtune.precision"]


def for_type_checkers(package: str) -> dict[str, str]:
    """Name -> module, as the package says it below `if TYPE_CHECKING`."""
    source = Path(str(importlib.import_module(package).__file__)).read_text("utf-8")
    (block,) = (node for node in ast.parse(source).body if isinstance(node, ast.If)
                and isinstance(node.test, ast.Name))  # fmt: skip
    return {
        alias.name: str(line.module)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }


@pytest.mark.parametrize("package", LAZY)
def test_what_type_checkers_are_told_is_what_is_there(package: str) -> None:
    module, told = importlib.import_module(package), for_type_checkers(package)
    assert set(told) == set(module.__all__) - {"__version__"}
    for name, place in told.items():
        if f"{package}.{name}" not in sys.modules:  # `trtune.run` is a folder and a stage
            assert getattr(module, name) is getattr(importlib.import_module(place), name)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", LAZY)
def test_importing_it_imports_no_module_of_its_own(package: str, tmp_path: Path) -> None:
    program = (
        f"import sys, {package}; "
        "print(sorted(m for m in sys.modules if m.startswith('trtune.') and m.count('.') > 1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['trtune.configs.system', 'trtune.configs.system.lazy']"


def test_a_name_is_looked_up_in_its_module_and_others_are_refused() -> None:
    find, listing = lazy_names("trtune.configs", {"errors": "nearest did_you_mean"})
    assert find("nearest") is importlib.import_module("trtune.configs.errors").nearest
    assert {"nearest", "did_you_mean", "__doc__"} <= set(listing())
    with pytest.raises(AttributeError, match=r"module 'trtune.configs' has no attribute 'nearst'"):
        find("nearst")
