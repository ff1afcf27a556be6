from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trtune
from trtune.calibrate import histogram, methods
from trtune.calibrate.cpu import fill

COUNT = """
import numpy as np
from trtune.calibrate import histogram, methods
found = histogram.Histogram.of(np.float32([1, -3]))
print(methods.__file__, methods.amax_mse(found) > 0, found.maximum)
"""


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """The package where nothing can be written beside `calibrate`, even by root."""
    site = tmp_path / "site"
    source = Path(trtune.__file__).parent
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, site / "trtune", ignore=skip)
    (site / "trtune" / "calibrate" / "__pycache__").write_text("in the way", encoding="utf-8")
    return site


def count(site: Path, cache: Path) -> str:
    """What a fresh process prints that counts with the package in `site`, warnings being errors."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "COV_"))},
        "PYTHONPATH": str(site),
        "HOME": str(cache),
        "XDG_CACHE_HOME": str(cache),
        "LOCALAPPDATA": str(cache),
    }
    command = [sys.executable, "-W", "error", "-c", COUNT]
    done = subprocess.run(
        command, cwd=site, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_read_only_installation_keeps_code_in_the_users_cache(unwritable: Path) -> None:
    cache = unwritable.parent / "cache"
    assert count(unwritable, cache).startswith(str(unwritable))
    assert list(cache.rglob("*.nbi"))


def test_without_any_place_for_a_cache_code_is_compiled_again(unwritable: Path) -> None:
    nowhere = unwritable.parent / "file"
    nowhere.write_text("no folder", encoding="utf-8")
    assert count(unwritable, nowhere).endswith(" 3.0\n")


def interpreted(function: Callable[..., None]) -> Callable[..., None]:
    """The Python that `function` was compiled from."""
    python: Callable[..., None] = function.py_func  # type: ignore[attr-defined]
    return python


SUMS = np.cumsum([[0.0, 0, 3, 5, 0, 2, 1, 0, 4, 2]] * 3, axis=1)
CASES = {
    "fill_anywhere": (
        fill.fill_anywhere,
        [
            np.float32([[0, -1, 2, 3.5, -7, 1e-42], [9, 8, 7, 6, 5, 4]]).view(np.uint32),
            np.zeros((fill.TABLES, histogram.BINS), np.uint32),
            np.zeros(2, np.uint32),
        ],
    ),
    "_spread": (
        methods._spread,
        [np.int64([2, 0, 5, 1]), np.float64([0.5, 1, 4, 9]), 1.5, np.zeros(5)],
    ),
    "_mse": (
        methods._mse,
        [
            np.float64([0.01, 0.5, 2, 8]),
            np.float64([9, 5, 2, 1]),
            np.float64([1, 4, 8]),
            np.zeros(3),
        ],
    ),
    "_logarithms": (
        methods._logarithms,
        [np.float64([1, 0.5, 0.7071, 0.70711, 1.41421356, 1e-300, 3e300, 7]), np.zeros(8)],
    ),
    "_divergences": (
        methods._divergences,
        [*SUMS, np.int64([0, 4, 6, 8]), 3, 0.5, np.zeros(4)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_code_does_what_the_python_says(name: str) -> None:
    function, arguments = CASES[name]
    found, expected = copy.deepcopy(arguments), copy.deepcopy(arguments)
    function(*found)
    interpreted(function)(*expected)
    assert any(np.any(a != b) for a, b in zip(found, arguments, strict=True))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
