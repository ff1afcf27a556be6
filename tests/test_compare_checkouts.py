"""What counts as a difference between two checkouts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compare_checkouts", ROOT / "benchmarks" / "compare_checkouts.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    return module


def plan(**nodes: Any) -> bytes:
    return json.dumps({"default": "int8", "nodes": nodes}).encode()


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        pytest.param({"n": {"precision": "int8", "reason": "x"}},
                     {"n": {"precision": "int8", "reason": "y"}}, True, id="other words"),
        pytest.param({"n": {"precision": "int8"}},
                     {"n": {"precision": "int8", "origin": "rule"}}, True, id="one says more"),
        pytest.param({"n": {"precision": "int8"}},
                     {"n": {"precision": "fp32"}}, False, id="another precision"),
        pytest.param({"n": {"precision": "int8"}}, {}, False, id="a node is missing"),
    ],
)  # fmt: skip
def test_plans(script: ModuleType, a: Any, b: Any, same: bool) -> None:
    assert script.same_plan(plan(**a), plan(**b)) == same


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        pytest.param(({"a": b"1"}, ""), ({"a": b"1"}, ""), [], id="the same bytes"),
        pytest.param(({"a": b"1"}, ""), ({"a": b"2"}, ""), ["a: 6b86b273 -> d4735e3a"], id="bytes"),
        pytest.param(({"a": b"1"}, ""), ({}, ""), ["a: only in OLD"], id="a file is missing"),
        pytest.param(({}, "x"), ({}, "x"), [], id="the same failure"),
        pytest.param(({}, "x"), ({"a": b"1"}, ""), ["OLD: x; NEW: works"], id="one fails"),
    ],
)
def test_files(script: ModuleType, old: Any, new: Any, found: list[str]) -> None:
    assert list(script.differences(script.Outcome(*old), script.Outcome(*new))) == found


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        pytest.param(b"H\na: 1\nb: 2\n", b"H\na: 1\nc: 3\nb: 2\n", [], id="one knows more"),
        pytest.param(b"H\na: 1\nb: 2\n", b"H\na: 1\nb: 3\n", ["b: 2"], id="a scale moved"),
        pytest.param(b"H\na: 1\nb: 2\n", b"H\na: 1\n", ["b: 2"], id="a scale is missing"),
        pytest.param(b"H\na: 1\n", b"G\na: 1\n", ["H"], id="another header"),
    ],
)
def test_caches(script: ModuleType, old: bytes, new: bytes, moved: list[str]) -> None:
    assert script.cache_differences(old, new) == moved
    cache = {"calibration.cache": old}, {"calibration.cache": new}
    found = list(script.differences(*(script.Outcome(files) for files in cache)))
    assert bool(found) == bool(moved)
