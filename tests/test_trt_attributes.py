"""Every name that our sources read from a `tensorrt` module exists in each version they claim.

Only what is written out is seen here; names put together at run time are the business of the
double, which refuses them in the other tests.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from trtstrict import snapshot

from trtune.calibrate.calibrators import CACHE_ALGORITHMS
from trtune.precision.backends.trt.weak import DATA_TYPES, LEFT_ALONE, REDUCED

ROOT = Path(__file__).parents[1]
API = {major: snapshot(major)["names"] for major in (10, 11)}
CLAIMS = {"calibrate/calibrators.py": (10,), "precision/backends/trt/weak.py": (10,)}
"""Files for one version alone; all others are for both."""
OBJECTS = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition",
    "layer": "ILayer", "parser": "OnnxParser", "runtime": "Runtime", "engine": "ICudaEngine",
    "context": "IExecutionContext", "inspector": "EngineInspector",
}  # fmt: skip
"""What variables of these names hold in the files of `BUILDING`."""
BUILDING = tuple(
    f"precision/backends/trt/{name}.py" for name in ("weak", "build", "backend", "timing_cache")
)


def is_module(node: ast.expr) -> bool:
    """Whether an expression is the module: `trt`, `self._trt`, `work.trt`."""
    if isinstance(node, ast.Name):
        return node.id == "trt"
    return isinstance(node, ast.Attribute) and node.attr in ("trt", "_trt")


def chain(node: ast.expr) -> tuple[ast.expr, tuple[str, ...]]:
    """The expression at the left of `a.b.c`, and the names behind it."""
    names: list[str] = []
    while isinstance(node, ast.Attribute) and not is_module(node):
        names.insert(0, node.attr)
        node = node.value
    return node, tuple(names)


def reads(tree: ast.AST, objects: Mapping[str, str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, names) of each attribute chain on the module, or on one of `objects`.

    `getattr` with a written name counts; `hasattr` asks, and so does not.
    """
    for node in ast.walk(tree):
        extra: tuple[str, ...] = ()
        expression: ast.expr | None = node if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            constant = node.args[1] if len(node.args) > 1 else None
            if node.func.id == "getattr" and isinstance(constant, ast.Constant):
                expression, extra = node.args[0], (str(constant.value),)
        if expression is None:
            continue
        root, names = chain(expression)
        if is_module(root) and (names or extra):
            yield expression.lineno, (*names, *extra)
        elif isinstance(root, ast.Name) and root.id in objects and names:
            yield expression.lineno, (objects[root.id], names[0])


def missing(api: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The part of `names` that is not there; empty if all is."""
    if names[0] == "__version__" or names[0] not in api:
        return "" if names[0] in api else names[0]
    entry = api[names[0]]
    if len(names) == 1 or not isinstance(entry, dict):
        return ""
    while "bases" in entry and not {names[1]} & {*entry["members"], *entry["nested"], "__init__"}:
        entry = api.get(entry["bases"][0], {})
    known = {*entry.get("enum", ()), *entry.get("members", ()), *entry.get("nested", ())}
    return "" if names[1] in {*known, "__init__"} else ".".join(names[:2])


def shifted(tree: ast.AST) -> list[int]:
    """Lines that shift by an enum value itself: its number must be asked for, with `int`."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.LShift)
        and isinstance(node.right, ast.Attribute)
    ]


def sources() -> list[str]:
    """The files of the package that are given a `tensorrt` module."""
    found = []
    for folder in ("calibrate", "precision", "reports", "trtune"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            # TensorRT-RTX has bindings of its own, and builds for real in the tests.
            if path.parent.name != "rtx" and any(True for _ in reads(tree, {})):
                found.append(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("file", sources())
def test_what_is_read_from_tensorrt_exists(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    objects = OBJECTS if file in BUILDING else {}
    wrong = [
        f"line {line}: {name} is not in TensorRT {major}"
        for major in CLAIMS.get(file, (10, 11))
        for line, names in reads(tree, objects)
        if (name := missing(API[major], names))
    ]
    assert wrong == []
    assert shifted(tree) == []


def test_the_files_that_matter_are_looked_at() -> None:
    assert {*CLAIMS, *BUILDING[1:3]} <= set(sources())


@pytest.mark.parametrize("file", CLAIMS)
def test_a_claim_of_one_version_is_needed(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert [names for _, names in reads(tree, OBJECTS) if missing(API[11], names)]


def test_names_from_tables_exist() -> None:
    assert {*REDUCED.values()} <= {*API[10]["BuilderFlag"]["enum"]}
    assert {*DATA_TYPES.values()} <= {*API[10]["DataType"]["enum"]}
    assert {*LEFT_ALONE} <= {*API[10]["LayerType"]["enum"]}
    assert {*CACHE_ALGORITHMS} == {"entropy2", "minmax"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("trt.BuilderFlag.TF32", [], id="in both"),
        pytest.param("trt.BuilderFlag.INT8", ["BuilderFlag.INT8"], id="a flag that is gone"),
        pytest.param("self._trt.CalibrationAlgoType", ["CalibrationAlgoType"], id="a class"),
        pytest.param("work.trt.Builder.platform_has_fast_int8",
                     ["Builder.platform_has_fast_int8"], id="a member"),
        pytest.param("trt.Logger.log", [], id="a member that is inherited"),
        pytest.param("trt.ILogger.Severity.ERROR", [], id="a nested enum"),
        pytest.param("hasattr(trt.BuilderFlag, 'INT8')", [], id="asked for"),
        pytest.param("getattr(trt.BuilderFlag, 'FP16')", ["BuilderFlag.FP16"], id="by name"),
        pytest.param("layer.precision = 1", ["ILayer.precision"], id="on an object"),
        pytest.param("layer.name", [], id="on an object, in both"),
        pytest.param("other.precision", [], id="on something else"),
    ],
)  # fmt: skip
def test_the_check_itself(source: str, expected: list[str]) -> None:
    found = [missing(API[11], names) for _, names in reads(ast.parse(source), OBJECTS)]
    assert [name for name in dict.fromkeys(found) if name] == expected


def test_a_shift_by_an_enum_value_is_seen() -> None:
    assert shifted(ast.parse("1 << trt.BuilderFlag.TF32")) == [1]
    assert shifted(ast.parse("1 << int(trt.BuilderFlag.TF32)")) == []
