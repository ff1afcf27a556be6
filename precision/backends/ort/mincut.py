"""The cheapest cut of a small directed graph, by Dinic's algorithm (1970)."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable


class CutGraph:
    """Vertices are any hashable values, capacities whole numbers.

    >>> graph = CutGraph()
    >>> graph.join("s", "a", 3); graph.join("a", "t", 2); graph.join("s", "t", 1)
    >>> sorted(graph.source_side("s", "t"))
    ['a', 's']
    """

    def __init__(self) -> None:
        self._index: dict[Hashable, int] = {}
        self._edges: list[list[int]] = []
        self._head: list[int] = []
        self._room: list[int] = []

    def join(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """An edge from `start` to `end`; several between the same two add up."""
        for tail, head, room in ((start, end, capacity), (end, start, 0)):
            self._edges[self._vertex(tail)].append(len(self._head))
            self._head.append(self._vertex(head))
            self._room.append(room)

    def source_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """The vertices on the side of `source` of the cheapest cut, as few as there can be."""
        first, last = self._vertex(source), self._vertex(sink)
        while (level := self._levels(first))[last] >= 0:
            following = [0] * len(self._edges)
            while self._push(first, last, level, following):
                pass
        return {name for name, vertex in self._index.items() if level[vertex] >= 0}

    def _vertex(self, name: Hashable) -> int:
        if name not in self._index:
            self._index[name] = len(self._edges)
            self._edges.append([])
        return self._index[name]

    def _levels(self, first: int) -> list[int]:
        """How many edges with room lead to each vertex; -1 where none do."""
        level = [-1] * len(self._edges)
        level[first], waiting = 0, deque([first])
        while waiting:
            vertex = waiting.popleft()
            for edge in self._edges[vertex]:
                head = self._head[edge]
                if self._room[edge] > 0 and level[head] < 0:
                    level[head] = level[vertex] + 1
                    waiting.append(head)
        return level

    def _push(self, first: int, last: int, level: list[int], following: list[int]) -> bool:
        """Fill one path that climbs the levels; whether there was one."""
        path: list[int] = []
        vertex = first
        while vertex != last:
            edges = self._edges[vertex]
            while following[vertex] < len(edges):
                edge = edges[following[vertex]]
                if self._room[edge] > 0 and level[self._head[edge]] == level[vertex] + 1:
                    break
                following[vertex] += 1
            else:
                if not path:
                    return False
                vertex = self._head[path.pop() ^ 1]
                following[vertex] += 1
                continue
            path.append(edge)
            vertex = self._head[edge]
        filled = min(self._room[edge] for edge in path)
        for edge in path:
            self._room[edge] -= filled
            self._room[edge ^ 1] += filled
        return True
