"""What the source looks like from outside: sizes, levels of imports, names that stand twice.

    python -m tests.structure [ROOT]

prints it for the checkout at ROOT (default: this one). `tests/test_layering.py` holds what matters.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LAYERS = ("configs", "datasets", "calibrate", "precision", "reports", "trtune")
"""The folders, each of which imports only what stands before it."""


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name, as it is imported, and what stands in it."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def package(self) -> str:
        """The dotted name of the folder that it stands in."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @cached_property
    def public_names(self) -> frozenset[str]:
        """Functions, classes and assigned names at the top level, without an underscore before."""
        found: set[str] = set()
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Assign):
                targets = [name for target in node.targets for name in ast.walk(target)]
                found.update(name.id for name in targets if isinstance(name, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
        return frozenset(name for name in found if not name.startswith("_"))

    def functions(self) -> Iterator[tuple[str, int]]:
        """(name, lines) of every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1

    def members(self) -> Iterator[tuple[str, frozenset[str]]]:
        """(name, public members) of every class: fields, properties and methods of its own."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                found = {name for part in node.body for name in _named(part)}
                yield node.name, frozenset(name for name in found if not name.startswith("_"))

    def imports(self, *, at_import: bool = False) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of what is imported; `from a import b` counts as a.b.

        `at_import`: only what happens when the module itself is imported, so nothing inside
        functions or below `if TYPE_CHECKING`. A relative import is ".".
        """
        for node in _statements(self.tree) if at_import else ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = "." if node.level else node.module
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _named(part: ast.stmt) -> Iterator[str]:
    """What a statement in a class defines; of `__init__` what it sets on the object."""
    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
        yield part.target.id
    elif isinstance(part, ast.Assign):
        yield from (target.id for target in part.targets if isinstance(target, ast.Name))
    elif isinstance(part, ast.FunctionDef):
        yield part.name
        if part.name == "__init__":
            for node in ast.walk(part):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    yield node.attr


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for other in node.orelse for inner in (other, *_statements(other)))
            continue
        yield node
        yield from _statements(node)


def modules(root: Path) -> list[Module]:
    """Every module of the checkout at `root`, `__init__` files included, by name."""
    found = []
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if any(parent.is_symlink() for parent in path.parents if parent != root):
                continue
            dotted = [part for part in parts if part != "__init__"]
            found.append(
                Module(".".join(dotted if layer == "trtune" else ["trtune", *dotted]), path)
            )
    return found


def import_graph(found: Iterable[Module], *, at_import: bool = True) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports (by default: when it is imported itself)."""
    known = {module.name for module in found}
    graph: dict[str, set[str]] = {}
    for module in found:
        names = {name for _, name in module.imports(at_import=at_import)}
        targets = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[module.name] = (targets & known) - {module.name}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """The sets of modules that import each other, directly or round a circle (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How deep each module stands: 1 for what imports nothing of ours, else one above the deepest.

    A circle counts as far as it is walked once.
    """
    known: dict[str, int] = {}

    def level(name: str, above: frozenset[str]) -> int:
        if name not in known:
            below = [level(n, above | {name}) for n in sorted(graph[name] - above)]
            known[name] = 1 + max(below, default=0)
        return known[name]

    for name in sorted(graph):
        level(name, frozenset({name}))
    return known


def names_twice(found: Iterable[Module]) -> dict[str, list[str]]:
    """Public name -> the modules that define it, where there are several; `log` is everyone's."""
    where: dict[str, list[str]] = defaultdict(list)
    for module in found:
        for name in module.public_names - {"log"}:
            where[name].append(module.name)
    return {name: sorted(places) for name, places in sorted(where.items()) if len(places) > 1}


def own_constants(twice: Mapping[str, list[str]], found: Iterable[Module]) -> set[str]:
    """Those of names defined `twice` that are constants which no other module imports."""
    imported = {name for module in found for _, name in module.imports()}
    return {
        name
        for name, places in twice.items()
        if name.isupper() and not any(f"{place}.{name}" in imported for place in places)
    }


def main(arguments: list[str]) -> None:
    """Print the figures."""
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    found = modules(root.resolve())
    packages: dict[str, list[Module]] = defaultdict(list)
    for module in found:
        packages[module.package].append(module)
    print(f"{'package':40} modules  lines  longest module")
    for package, inside in sorted(packages.items()):
        real = [module for module in inside if module.path.name != "__init__.py"]
        longest = max(inside, key=lambda module: module.lines)
        total = sum(module.lines for module in inside)
        print(f"{package:40} {len(real):7} {total:6}  {longest.path.name} {longest.lines}")
    print(f"{'all':40} {len(found):7} {sum(module.lines for module in found):6}")
    graph = import_graph(found)
    depth = levels(graph)
    deepest = max(depth, key=lambda name: depth[name])
    print(f"\nimport levels: {depth[deepest]} (down to {deepest})")
    print(f"import cycles: {len(cycles(graph))}")
    for group in cycles(graph):
        print(f"  {', '.join(group)}")
    twice = names_twice(found)
    own = own_constants(twice, found)
    print(f"names defined twice: {len(twice)} ({len(own)} of them constants of one module's own)")
    for name, places in twice.items():
        print(f"  {name}: {', '.join(places)}")
    sizes = sorted(
        (n, f"{module.name}.{name}") for module in found for name, n in module.functions()
    )
    print(f"functions: {len(sizes)}, longest {sizes[-1][0]} lines ({sizes[-1][1]}), "
          f"95th percentile {sizes[int(0.95 * (len(sizes) - 1))][0]}, "
          f"median {sizes[len(sizes) // 2][0]}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
