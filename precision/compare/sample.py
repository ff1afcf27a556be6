"""Which nodes stand for all, where asking every one would take too long.

Asking a node what it does alone runs the network behind it, so asking all of them grows with the
square of their number. Layers of one shape behave alike: some of each, from all over the network,
show where the error comes from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import TypeVar

from trtune.precision.graph.view import GraphView, Shape
from trtune.precision.plan.placement import Edge, Placement, edges_of
from trtune.precision.plan.plan import PrecisionPlan

Value = TypeVar("Value")
_Kind = tuple[str, tuple[Shape | None, ...]]

LARGEST_SAMPLE = 256
"""Nodes that are asked, at most."""


def sampled(view: GraphView, nodes: Iterable[str], most: int = LARGEST_SAMPLE) -> list[str]:
    """At most `most` of `nodes` in the order to ask them: all kinds in turn, each kind spread out.

    Of a kind are the nodes with one operator and the same shapes of what they compute with.
    """
    kinds: dict[_Kind, list[str]] = defaultdict(list)
    for name in nodes:
        kinds[_kind(view, name)].append(name)
    turns = zip_longest(*(spread_out(members) for members in kinds.values()))
    return [name for name in chain.from_iterable(turns) if name is not None][:most]


def _kind(view: GraphView, name: str) -> _Kind:
    node = view.by_name[name]
    return node.op_type, tuple(view.shapes.get(tensor) for tensor in node.input[:2])


def spread_out(members: Sequence[str]) -> list[str]:
    """`members` so that the first few come from all over: the ends, the middle, the quarters.

    >>> spread_out("abcdefghi")
    ['a', 'i', 'e', 'c', 'g', 'b', 'd', 'f', 'h']
    """
    order = dict.fromkeys([*members[:1], *members[-1:]])
    gaps = [(0, len(members) - 1)]
    while gaps:
        inside: list[tuple[int, int]] = []
        for low, high in gaps:
            middle = (low + high) // 2
            if high - low > 1:
                order[members[middle]] = None
                inside += [(low, middle), (middle, high)]
        gaps = inside
    return list(order)


def by_nearest(
    view: GraphView, nodes: Sequence[str], measured: Mapping[str, Value]
) -> dict[str, Value]:
    """For each of `nodes`, in graph order, its own value, or that of the nearest one of its kind.

    Of any kind where none of its own is in `measured`; nothing if that is empty.
    """
    known = [(place, name) for place, name in enumerate(nodes) if name in measured]
    kinds: dict[_Kind, list[tuple[int, str]]] = defaultdict(list)
    for entry in known:
        kinds[_kind(view, entry[1])].append(entry)
    found = {}
    for place, name in enumerate(nodes):
        like = kinds.get(_kind(view, name), known)
        if like:
            found[name] = measured[min(like, key=lambda entry: abs(entry[0] - place))[1]]
    return found


def placement_of(
    view: GraphView, plan: PrecisionPlan, placement: Placement, nodes: Iterable[str]
) -> Placement:
    """The part of `placement` that belongs to some of the int8 or fp8 `nodes` of `plan`."""
    kept: set[Edge] = set()
    for name in nodes:
        kept.update(edges_of(view, plan, view.by_name[name]))
    activations = {
        tensor: tuple(edge for edge in edges if edge in kept)
        for tensor, edges in placement.activations.items()
    }
    return Placement(
        {tensor: edges for tensor, edges in activations.items() if edges}, placement.weights
    )
