"""What rewrites of a model that stay as nodes cost in TensorRT-RTX, by its own account.

A Mul or Add per channel should be fused into the pointwise kernel that quantizes. Where it is not,
a kernel is added, or a node that was planned in int8 runs in float. The list of kernels shows both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.rtx.log import CONTROL, Kernel, read_kernels
from trtune.precision.graph.view import GraphView
from trtune.precision.runtime.api import LOG_FILE, Candidate


@dataclass(frozen=True, slots=True)
class Listed:
    """What each node of an engine runs in, and its kernels that compute something."""

    precisions: Mapping[str, str]
    kernels: tuple[Kernel, ...]


def kernel_list(candidate: Candidate, backend: RtxBackend, folder: Path) -> Listed:
    """What the compiler lists of a build of `candidate` in `folder`, which must exist.

    Raises TrtuneError if it is not built, or the list cannot be read.
    """
    info = backend.build(candidate, folder)
    kernels = read_kernels((folder / LOG_FILE).read_text(encoding="utf-8", errors="replace"))
    if kernels is None:
        raise TrtuneError(
            f"{backend.name}: the list of kernels in its log is not that of a known version"
        )
    computing = tuple(kernel for kernel in kernels if kernel.kind not in CONTROL)
    return Listed(dict(info.precisions), computing)


def costly_moves(
    before: Listed,
    after: Listed,
    planned: Collection[str],
    around: Mapping[str, Collection[str]],
    known: Collection[str],
) -> dict[str, str]:
    """The tensors whose rewrites cost something, with what.

    `before` is the engine without any rewrite, `after` that with all of them; `planned` are the
    nodes planned in int8. `around` maps each rewritten tensor to the nodes that make and read it,
    those added for it among them; `known` are the nodes that there were before. A rewrite is to
    blame for a node around it that is no longer in int8, and, if there are more kernels than
    before, for one of another make-up that does work around it. Where nobody is found to blame,
    all are.

    >>> one = Kernel("k", "conv", (), (), (), ("a",))
    >>> two = Kernel("m", "kgen", (), (), (), ("mul",))
    >>> costly_moves(Listed({"a": "int8"}, (one,)), Listed({"a": "int8"}, (one, two)),
    ...              ["a"], {"t": ["a", "mul"]}, ["a"])
    {'t': 'kernel m (kgen) is added'}
    """
    found: dict[str, str] = {}
    lost = [
        node
        for node in planned
        if after.precisions.get(node) != "int8" and before.precisions.get(node) == "int8"
    ]
    for node in lost:
        what = f"{node} is in {after.precisions.get(node, 'unknown')} instead of int8"
        found |= {t: what for t, nodes in around.items() if node in nodes and t not in found}
    surplus = len(after.kernels) - len(before.kernels)
    if surplus > 0:
        for kernel in _new(before.kernels, after.kernels, {*known}):
            near = set(kernel.nodes)
            what = f"kernel {kernel.name} ({kernel.kind}) is added"
            found |= {t: what for t, nodes in around.items() if near & {*nodes} and t not in found}
    if found or not (lost or surplus > 0):
        return found
    what = f"{surplus} kernels are added" if surplus > 0 else f"{lost[0]} is not in int8"
    return dict.fromkeys(around, what)


def _new(before: Collection[Kernel], after: Collection[Kernel], known: set[str]) -> list[Kernel]:
    """The kernels that do the work of another set of `known` nodes than any before; if some do
    that of none, those alone."""
    held = Counter(frozenset(kernel.nodes) & known for kernel in before)
    found = []
    for kernel in after:
        nodes = frozenset(kernel.nodes) & known
        if held[nodes] > 0:
            held[nodes] -= 1
        else:
            found.append(kernel)
    return [kernel for kernel in found if not known & {*kernel.nodes}] or found


def around_moves(
    view: GraphView, known: Collection[str], moved: Mapping[str, str]
) -> dict[str, list[str]]:
    """For each rewritten tensor the nodes that make and read it, those added for it among them.

    `view` is of the rewritten model, `known` are the nodes that there were before; `moved` maps a
    tensor to what its readers read now.
    """
    around = {}
    for tensor, name in moved.items():
        nodes, held = [], name
        while held in view.producer:
            nodes.append(view.producer[held])
            if nodes[-1] in known:
                break
            held = view.by_name[nodes[-1]].input[0]
        around[tensor] = [*nodes, *(node for node, _ in view.consumers.get(name, ()))]
    return around
