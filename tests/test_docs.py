"""What the texts say of the tree is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks/README.md"]
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")
"""A path in backticks: at least one folder."""
FOLDERS = ("configs", "datasets", "calibrate", "precision", "reports", "trtune", "tests", "docs",
           "examples")  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_that_are_named_are_there(text: Path) -> None:
    named = {path for path in PATH.findall(text.read_text("utf-8"))
             if path.split("/")[0] in FOLDERS and "NAME" not in path}  # fmt: skip
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(text: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text.read_text("utf-8"))
    inside = [link for link in links if "://" not in link]
    assert [link for link in inside if not (text.parent / link).exists()] == []
