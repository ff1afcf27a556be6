"""Runs the examples in the docstrings of every module of the package."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import trtune

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(trtune.__path__, "trtune.")
    if not info.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), report=True)
    assert result.failed == 0


def test_the_walk_reaches_every_folder() -> None:
    folders = {name.split(".")[1] for name in MODULES}
    assert folders >= {"configs", "datasets", "calibrate", "precision", "reports"}
    finder = doctest.DocTestFinder()
    modules = map(importlib.import_module, MODULES)
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) > 10
