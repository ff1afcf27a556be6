"""What the texts say of the tree is so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from trtune.cli.commands import app
from trtune.configs.load import json_schema
from trtune.precision.quantized.findings import SEVERITY
from trtune.precision.traces.messages import MESSAGES

ROOT = Path(__file__).parents[1]


def load_hooks() -> ModuleType:
    """docs/hooks.py, which MkDocs loads as it lies there."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
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


def keys_of(schema: object) -> set[str]:
    """Every name of a key anywhere in a schema."""
    if isinstance(schema, list):
        return {key for inner in schema for key in keys_of(inner)}
    if not isinstance(schema, dict):
        return set()
    own = set(schema["properties"]) if isinstance(schema.get("properties"), dict) else set()
    return own | {key for inner in schema.values() for key in keys_of(inner)}


def test_the_config_reference_has_every_key_and_its_meaning() -> None:
    page = HOOKS.config_reference()
    rows = dict(re.findall(r"^\| `([a-z_0-9]+)` \|.*\| (.*) \|$", page, re.M))
    keys = keys_of(json.loads(json.dumps(json_schema())))
    assert keys - set(rows) == set()
    assert [key for key in keys if not rows[key].strip()] == []
    anchors = set(re.findall(r"\{ #([\w-]+) \}", page))
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= anchors


def test_the_command_reference_has_every_command() -> None:
    page = HOOKS.command_reference()
    titles = re.findall(r"^## (trtune.*)$", page, re.M)
    wanted = ["trtune", *(f"trtune {name}" for name in get_command(app).commands)]
    assert set(wanted) <= set(titles)
    assert "Example: trtune run" in page
    assert "\x1b" not in page


def test_messages_and_findings_are_all_there() -> None:
    assert HOOKS.message_reference().count("\n| ") == len(MESSAGES) + 1
    assert "{" not in HOOKS.message_reference().replace("{node: fp32}", "").replace("{NODE", "")
    assert HOOKS.finding_reference().count("\n| `") == len(SEVERITY)


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        pytest.param("[a](how.md#x)", "docs/a.md", "[a](how.md#x)", id="a page beside it"),
        pytest.param("[a](docs/how.md)", "README.md", "[a](how.md)", id="from the root"),
        pytest.param(
            "[a](../benchmarks/README.md)", "docs/a.md", "[a](benchmarks/README.md)", id="outside"
        ),
        pytest.param(
            "[a](../../docs/how.md)", "examples/digits/README.md", "[a](../../how.md)", id="inside"
        ),
        pytest.param("[a](../pyproject.toml)", "docs/a.md", "a", id="no page of the site"),
        pytest.param("[a](https://b.c/d)", "docs/a.md", "[a](https://b.c/d)", id="elsewhere"),
        pytest.param("[a](gone.md)", "docs/a.md", "[a](gone.md)", id="nothing: MkDocs warns"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    text: str, source: str, expected: str
) -> None:
    known = {"how.md", "a.md", "benchmarks/README.md", "examples/digits/README.md"}
    assert HOOKS.relinked(text, source, known) == expected
