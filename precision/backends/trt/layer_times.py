"""From times of an engine's layers to times of the model's nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from trtune.precision.backends.trt.inspector import EngineLayer


def node_times(
    times: Mapping[str, float], layers: Iterable[EngineLayer], nodes: Collection[str]
) -> tuple[dict[str, float], float]:
    """Milliseconds by node, and those that belong to no node (reformats, copies).

    A layer that several nodes were fused into counts in full for the first of `nodes` among them,
    and not for the others: so the values add up to what the engine took. A node that is in no
    measured layer, or not the first in its layer, is left out.

    >>> layers = [EngineLayer("a + b", "Convolution", "int8", ("b", "a"))]
    >>> node_times({"a + b": 0.5, "Reformatting": 0.1}, layers, ["a", "b"])
    ({'a': 0.5}, 0.1)
    """
    inside = {layer.name: frozenset(layer.nodes) for layer in layers}
    found: dict[str, float] = {}
    rest = 0.0
    for layer, milliseconds in times.items():
        first = next((node for node in nodes if node in inside.get(layer, ())), None)
        if first is None:
            rest += milliseconds
        else:
            found[first] = found.get(first, 0.0) + milliseconds
    return {node: round(found[node], 6) for node in nodes if node in found}, round(rest, 6)
