from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from trtune.precision.backends.ort.mincut import CutGraph

EDGES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 20)).filter(
        lambda edge: edge[0] != edge[1]
    ),
    max_size=16,
)


def cost(edges: list[tuple[int, int, int]], side: set[int]) -> int:
    return sum(room for start, end, room in edges if start in side and end not in side)


@given(EDGES)
def test_no_other_cut_is_cheaper(edges: list[tuple[int, int, int]]) -> None:
    graph = CutGraph()
    graph.join(0, 5, 0)
    for edge in edges:
        graph.join(*edge)
    side = {vertex for vertex in graph.source_side(0, 5) if isinstance(vertex, int)}
    others = [
        {0, *(v for v, taken in zip(range(1, 5), chosen, strict=True) if taken)}
        for chosen in product([False, True], repeat=4)
    ]
    assert 0 in side
    assert 5 not in side
    assert cost(edges, side) == min(cost(edges, other) for other in others)


def test_a_long_chain_needs_no_deep_recursion() -> None:
    graph = CutGraph()
    for vertex in range(5000):
        graph.join(vertex, vertex + 1, 10 if vertex != 4000 else 3)
    assert len(graph.source_side(0, 5000)) == 4001
