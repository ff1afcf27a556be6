"""The order of folders and packages, what a folder may hold, and no public name twice."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from structure import LAYERS, Module, cycles, import_graph, modules, names_twice, own_constants  # noqa: E402

FOUND = modules(ROOT)
SOURCES = [module for module in FOUND if module.path.relative_to(ROOT).parts[0] != "trtune"]
PRECISION = (
    "graph", "plan", "prepare", "lower", "runtime", "compare", "tune", "traces", "quantized",
    "backends",
)  # fmt: skip
"""The packages in precision, each of which imports only what stands before it."""
BACKENDS = ("ort", "trt", "rtx")
"""Backends that know nothing of each other; what they share is in `gpu`."""

SMALL = {
    "trtune.precision": "its modules stand in packages",
    "trtune.precision.backends": "its modules stand in packages",
}
"""Folders with fewer than four modules, and why."""


def violations(module: Module) -> list[str]:
    """Imports that reach below the module's folder or package, or past the import root."""
    layer, package = place(module)
    wrong = []
    for line, name in module.imports():
        root, *rest = name.split(".")
        target = rest[0] if rest else ""
        if root == "" or root in LAYERS[:-1]:
            wrong.append(f"line {line}: {name}: import trtune.<folder> by its full name")
        elif root != "trtune":
            continue
        elif target not in LAYERS[: LAYERS.index(layer) + 1]:
            wrong.append(f"line {line}: {name}: {layer} stands above it")
        elif target == "precision" == layer and package:
            inner = rest[1] if len(rest) > 1 else ""
            if inner not in PRECISION[: PRECISION.index(package) + 1]:
                wrong.append(f"line {line}: {name}: precision.{package} stands above it")
            elif inner == "backends" and _strangers(module, rest):
                wrong.append(f"line {line}: {name}: backends do not import each other")
    return wrong


def place(module: Module) -> tuple[str, str]:
    """The folder of a module and, in precision, the package."""
    parts = module.name.split(".")[1:]
    return parts[0], parts[1] if parts[0] == "precision" and len(parts) > 1 else ""


def _strangers(module: Module, target: list[str]) -> bool:
    """Whether a module of a backend imports from another one, or the shared part from any."""
    own, other = (name[2:3] for name in (module.name.split(".")[1:], target))
    return other[0] in BACKENDS and own != other if own and other else False


@pytest.mark.parametrize("module", SOURCES, ids=lambda module: module.name)
def test_a_file_imports_only_what_stands_above_it(module: Module) -> None:
    assert violations(module) == []


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        pytest.param("datasets.x", "from trtune.configs.errors import DataError", 0, id="above"),
        pytest.param("datasets.x", "from trtune.datasets import batches", 0, id="itself"),
        pytest.param("datasets.x", "import trtune.calibrate.table", 1, id="below"),
        pytest.param("configs.x", "from trtune import reports", 1, id="below, from the root"),
        pytest.param("reports.x", "from trtune.cli.commands import main", 1, id="the commands"),
        pytest.param("reports.x", "import trtune", 1, id="the root itself"),
        pytest.param("precision.graph.x", "def f():\n    import trtune.reports", 1, id="inside"),
        pytest.param("precision.graph.x", "from datasets import load_dataset", 1, id="bare name"),
        pytest.param("precision.graph.x", "from . import graph", 1, id="relative"),
        pytest.param("precision.graph.x", "import numpy.random", 0, id="others"),
        pytest.param("precision.plan.x", "from trtune.precision.graph.view import V", 0, id="ok"),
        pytest.param("precision.graph.x", "from trtune.precision.plan import plan", 1, id="order"),
        pytest.param("precision.graph.x", "from trtune.precision import Model", 1, id="the front"),
        pytest.param(
            "precision.backends.trt.x", "import trtune.precision.backends.gpu.memory", 0, id="gpu"
        ),
        pytest.param(
            "precision.backends.trt.x", "import trtune.precision.backends.rtx.log", 1, id="rtx"
        ),
        pytest.param(
            "precision.backends.gpu.x", "import trtune.precision.backends.ort.backend", 1, id="up"
        ),
    ],
)
def test_what_counts_as_a_violation(name: str, source: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(source, encoding="utf-8")
    assert len(violations(Module(f"trtune.{name}", tmp_path / "x.py"))) == count


def test_every_layer_and_package_has_files() -> None:
    assert {place(module)[0] for module in SOURCES} == set(LAYERS[:-1])
    found = {place(module)[1] for module in SOURCES} - {""}
    assert found <= set(PRECISION)


def test_no_modules_import_each_other() -> None:
    assert cycles(import_graph(FOUND)) == []


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [("a", "b")]),
        (
            {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}},
            [("a", "b", "c"), ("d", "e")],
        ),
    ],
)
def test_cycles(graph: dict[str, set[str]], expected: list[tuple[str, ...]]) -> None:
    assert cycles(graph) == expected


def test_folders_hold_neither_too_little_nor_too_much() -> None:
    counts = Counter(m.package for m in FOUND if m.path.name != "__init__.py")
    packages = {module.package for module in FOUND}
    assert {p for p in packages if counts[p] < 4} == set(SMALL)
    assert {p for p in packages if counts[p] > 12} == set()


def test_no_file_repeats_the_name_of_its_folder() -> None:
    found = [
        module.name
        for module in FOUND
        if module.path.stem.startswith(f"{module.path.parent.name.rstrip('s')}_")
    ]
    assert found == []


FIELDS = "fields of a file's format, or of a table's row"
MANY_MEMBERS: Mapping[str, str] = {
    **dict.fromkeys(("DataSet", "LayerRow", "RunRecord", "Variant"), FIELDS),
    "CalibrationTable": "scales of activations, and those of weights and types that a file brought",
    "GraphView": "the index of a graph: each member one lookup that all of precision asks for",
    "PrecisionPlan": "the plan, with what it was made of and every question about a node",
    "Pair": "a Q/DQ pair as it stands in a file: what it reads, holds and gives",
    "RtxBackend": "the members of `Backend`, and the settings that a config has for it",
}
"""Classes with more than 15 public members, and why."""


def test_no_object_has_more_than_fifteen_public_members() -> None:
    found = {
        name: members
        for module in FOUND
        for name, members in module.members()
        if len(members) > 15 and not name.startswith("_")
    }
    assert set(found) == set(MANY_MEMBERS)


SECTION = "the section of the YAML file, and the value or list that is made of it"
COMMAND = "the command, and the function that it calls"
RECORD = (
    "as it is measured, and as it is kept in the run record, whose form may not follow the code"
)
SAME_NAME: Mapping[str, str] = {
    **dict.fromkeys(("Backend", "Latency", "Model", "Preprocess", "Shape", "Size"), SECTION),
    **dict.fromkeys(("build", "calibrate", "compare", "convert", "diff"), COMMAND),
    **dict.fromkeys(("inspect", "lint", "migrate", "report", "run", "strip", "tune"), COMMAND),
    **dict.fromkeys(("DominantPicture", "Outlier"), RECORD),
    "FLOATS": "names of float types here, their numbers in ONNX there",
    "Array": "what NDArray[Any] is called where a line would be too long",
    "main": "the entry of a program",
    **dict.fromkeys(("cosine", "sqnr_db"), "of two arrays, and the metric of a model's outputs"),
}
"""Public names that two modules define, and why."""


def test_no_public_name_is_defined_twice() -> None:
    twice = names_twice(FOUND)
    own = own_constants(twice, FOUND)
    found = {name: places for name, places in twice.items() if name not in own}
    assert {name: places for name, places in found.items() if name not in SAME_NAME} == {}
    assert set(SAME_NAME) - set(found) == set(), "these are no longer defined twice"


def test_the_figures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import structure

    structure.main([str(ROOT)])
    out = capsys.readouterr().out
    assert "import levels: " in out
    assert "names defined twice: " in out
    assert ast.literal_eval(out.split("import cycles: ")[1].split()[0]) == 0
