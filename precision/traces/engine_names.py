"""Names of an engine's layers, and which ONNX nodes they speak of.

TensorRT joins the names of what it fuses: `a + b`, horizontally merged products `a || b`,
pointwise operations `PWN(a + b, c)`, and whole regions `{ForeignNode[first...last]}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from trtune.precision.graph.view import GraphView

UNNAMED = re.compile(r"\(Unnamed Layer\* (\d+)\) \[([^\]]*)\]")
FOREIGN = re.compile(r"\{ForeignNode\[(.*?)\.\.\.(.*)\]\}")
REFORMAT = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ to (.*)", re.DOTALL)
JOINED = (" + ", " || ")
OPENING, CLOSING = "([{", ")]}"


def parts_of(layer: str) -> tuple[str, ...]:
    """What was fused into an engine's layer; of a region its first and last part.

    >>> parts_of("conv1.weight + conv1 + PWN(PWN(sig), mul)")
    ('conv1.weight', 'conv1', 'sig', 'mul')
    >>> parts_of("q || k || v")
    ('q', 'k', 'v')
    >>> parts_of("{ForeignNode[/a/Cast.../b/Add]}")
    ('/a/Cast', '/b/Add')
    """
    return tuple(_parts(layer))


def _parts(layer: str) -> Iterator[str]:
    for piece in split_outside(layer, JOINED):
        foreign = FOREIGN.fullmatch(piece)
        if foreign:
            for end in foreign.groups():
                yield from _parts(end)
        elif piece.startswith("PWN(") and piece.endswith(")"):
            for inner in split_outside(piece[4:-1], (", ", *JOINED)):
                yield from _parts(inner)
        elif piece:
            yield piece


def split_outside(text: str, separators: Iterable[str]) -> list[str]:
    """`text` split at the separators that stand in no bracket; the pieces are stripped.

    Where brackets do not match, they count as letters.

    >>> split_outside("a + PWN(b + c), d", [" + "])
    ['a', 'PWN(b + c), d']
    """
    words = tuple(separators)
    balanced = all(text.count(a) == text.count(b) for a, b in zip(OPENING, CLOSING, strict=True))
    pieces, depth, start, at = [], 0, 0, 0
    while at < len(text):
        if balanced:
            depth += (text[at] in OPENING) - (text[at] in CLOSING)
        hit = next((word for word in words if depth <= 0 and text.startswith(word, at)), "")
        if hit:
            pieces.append(text[start:at])
            start = at + len(hit)
        at += len(hit) or 1
    return [piece.strip() for piece in (*pieces, text[start:])]


def nodes_of_layer(layer: str, view: GraphView) -> tuple[str, ...]:
    """The ONNX nodes that a layer of an engine was made from, in graph order.

    A region counts with everything between its ends. Reformats are no nodes: they give none.
    """
    if layer in view.by_name:
        return (layer,)
    if REFORMAT.match(layer):
        return ()
    found: set[str] = set()
    for piece in split_outside(layer, JOINED):
        foreign = FOREIGN.fullmatch(piece)
        if foreign:
            found |= between(view, foreign[1], foreign[2])
        else:
            found.update(part for part in _parts(piece) if part in view.by_name)
    return tuple(node.name for node in view.nodes if node.name in found)


def between(view: GraphView, first: str, last: str) -> frozenset[str]:
    """The nodes on the ways from `first` to `last`, both included; each a node or a tensor.

    Empty if one of them is unknown.
    """
    starts, ends = _nodes_at(view, first), _nodes_at(view, last)
    if not starts or not ends:
        return frozenset()
    onward = view.descendants(t for name in starts for t in view.by_name[name].output if t)
    before = view.ancestors(t for name in ends for t in view.by_name[name].output if t)
    return frozenset(starts | ends | (onward & before))


def _nodes_at(view: GraphView, name: str) -> set[str]:
    if name in view.by_name:
        return {name}
    if name in view.producer:
        return {view.producer[name]}
    return {node for node, _ in view.consumers.get(name, ())}
