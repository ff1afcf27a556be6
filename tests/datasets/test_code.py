"""The code of a user's own function: all that it loads counts, and where it stands does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trtune.datasets.code import code_hash, importable, load_function

MINE = """
import functools
from trtune_test_helper import doubled

@doubled
def decorated(x):
    return x

def late(x):
    import trtune_test_late
    return x + trtune_test_late.MORE

partial = functools.partial(late)
"""
HELPER = """
from trtune_test_pkg import deep

def doubled(function):
    return lambda x: deep.BY * function(x)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "a"
    (place / "trtune_test_pkg").mkdir(parents=True)
    (place / "trtune_test_mine.py").write_text(MINE)
    (place / "trtune_test_helper.py").write_text(HELPER)
    (place / "trtune_test_late.py").write_text("MORE = 1\n")
    (place / "trtune_test_pkg" / "deep.py").write_text("BY = 2\n")
    (place / "trtune_test_other.py").write_text("UNUSED = 1\n")
    return place


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("trtune_test_mine.py", True),
        ("trtune_test_helper.py", True),
        ("trtune_test_late.py", True),
        ("trtune_test_pkg/deep.py", True),
        ("trtune_test_other.py", False),
    ],
)
@pytest.mark.parametrize("name", ["decorated", "partial"])
def test_what_it_loads_counts(folder: Path, name: str, file: str, counts: bool) -> None:
    before = code_hash(f"trtune_test_mine:{name}", folder)
    (folder / file).write_text((folder / file).read_text() + "# edited\n")
    assert (code_hash(f"trtune_test_mine:{name}", folder) != before) == counts


def test_what_was_edited_is_loaded_again(folder: Path) -> None:
    reference = "trtune_test_mine:decorated"
    for by in (3, 4):
        (folder / "trtune_test_pkg" / "deep.py").write_text(f"BY = {by}\n")
        assert load_function(reference, folder)(5) == 5 * by
    for more in (1, 7):
        (folder / "trtune_test_late.py").write_text(f"MORE = {more}\n")
        code_hash(reference, folder)
        with importable(folder):
            assert load_function("trtune_test_mine:late", folder)(5) == 5 + more


def test_where_it_stands_does_not_count(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "b" / "deeper")
    here, there = (
        code_hash(f"{place}/trtune_test_mine.py:decorated")
        for place in (folder, tmp_path / "b" / "deeper")
    )
    assert here == there


def test_a_helper_of_another_folder_is_not_taken(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "b"
    shutil.copytree(folder, other)
    (other / "trtune_test_pkg" / "deep.py").write_text("BY = 10\n")
    found = [load_function("trtune_test_mine:decorated", f)(1) for f in (folder, other, folder)]
    assert found == [2, 10, 2]


def test_what_is_installed_counts_by_its_own_file() -> None:
    assert code_hash("numpy:zeros") == code_hash("numpy:ones")
