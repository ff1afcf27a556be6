"""Each folder imports only what stands above it in the design."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("configs", "datasets", "calibrate", "precision", "reports")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(source: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in `source`, inside functions too.

    `from a.b import c` counts as `a.b.c`, since c may be a module; a relative import as ".".
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else node.module
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def violations(layer: str, source: str) -> list[str]:
    """Imports in a file of `layer` that reach below it, or past the import root."""
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    wrong = []
    for line, module in imported(source):
        root, _, rest = module.partition(".")
        if root == "" or root in LAYERS:
            wrong.append(f"line {line}: {module}: import trtune.<folder> by its full name")
        elif root == "trtune" and rest.partition(".")[0] not in allowed:
            wrong.append(f"line {line}: {module}: {layer} stands above it")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_stands_above_it(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    assert violations(layer, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("layer", "source", "count"),
    [
        pytest.param("datasets", "from trtune.configs.errors import DataError", 0, id="above"),
        pytest.param("datasets", "from trtune.datasets import batches", 0, id="itself"),
        pytest.param("datasets", "import trtune.calibrate.table", 1, id="below"),
        pytest.param("configs", "from trtune import reports", 1, id="below, from the root"),
        pytest.param("reports", "from trtune.cli.commands import main", 1, id="the command line"),
        pytest.param("reports", "import trtune", 1, id="the root itself"),
        pytest.param("precision", "def f():\n    import trtune.reports", 1, id="in a function"),
        pytest.param("precision", "from datasets import load_dataset", 1, id="the bare name"),
        pytest.param("precision", "from . import graph", 1, id="relative"),
        pytest.param("precision", "import numpy.random", 0, id="others"),
    ],
)
def test_what_counts_as_a_violation(layer: str, source: str, count: int) -> None:
    assert len(violations(layer, source)) == count


def test_every_layer_has_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)
