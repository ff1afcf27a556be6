"""Which layers are worth their integers on a CPU: a cheapest cut through the network.

Every node takes some time in INT8 and some in FP32, and every tensor that goes from one side to the
other is converted. The division with the least time in all is a minimum cut, and is found exactly.
A gate goes with the layer that makes it: onnxruntime fuses both in float, and has integer kernels
for both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import onnx

from trtune.precision.backends.ort.mincut import CutGraph
from trtune.precision.graph.view import GraphView

ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
INTEGERS, FLOATS = ("integers",), ("floats",)
PICOSECONDS = 1e12
FOREVER = 2**62
"""More than any network takes: what must not be cut."""


def slower_in_integers(
    view: GraphView,
    free: Collection[str],
    integer: Mapping[str, float],
    exact: Mapping[str, float],
    conversion: tuple[float, float],
    *,
    batch: int = 1,
) -> tuple[str, ...]:
    """The nodes among `free` that are better left in float, in graph order.

    `free` are the nodes that run in integers now; all others are float. `integer` and `exact` have
    seconds by node (0 where one is not named), `conversion` the seconds a value to quantize and to
    dequantize it. A free dimension counts as `batch`.
    """
    units = _units(view, free)
    graph = CutGraph()
    for node in view.nodes:
        unit = units[node.name]
        if node.name not in free:
            graph.join(unit, FLOATS, FOREVER)
        graph.join(INTEGERS, unit, _whole(exact.get(node.name, 0.0)))
        graph.join(unit, FLOATS, _whole(integer.get(node.name, 0.0)))
    for tensor in dict.fromkeys((*view.consumers, *view.graph_outputs)):
        if view.is_constant(tensor):
            continue
        readers = view.consumers.get(tensor, ())
        maker = units.get(view.producer.get(tensor, ""), FLOATS)
        others = {units[name] for name, _ in readers} - {maker}
        if tensor in view.graph_outputs:
            others.add(FLOATS)
        values = math.prod(
            d if isinstance(d, int) and d > 0 else batch for d in _shape(view, tensor)
        )
        into, out_of = (_whole(seconds * values) for seconds in conversion)
        _convert(graph, tensor, maker, others, into, out_of)
    kept = graph.source_side(INTEGERS, FLOATS)
    return tuple(
        node.name for node in view.nodes if node.name in free and units[node.name] not in kept
    )


def _convert(
    graph: CutGraph,
    tensor: str,
    maker: tuple[str, ...],
    readers: Collection[tuple[str, ...]],
    into: int,
    out_of: int,
) -> None:
    """What it costs if `maker` stands on one side and any of `readers` on the other: once each."""
    back, there = ("dequantized", tensor), ("quantized", tensor)
    graph.join(maker, back, out_of)
    graph.join(there, maker, into)
    for reader in readers:
        graph.join(back, reader, FOREVER)
        graph.join(reader, there, FOREVER)


def _units(view: GraphView, free: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Node -> what it shares its side with: an activation that of what it reads, a product that of
    its gate."""
    units: dict[str, tuple[str, ...]] = {}
    for node in view.nodes:
        leader = node.name
        if node.name in free:
            leader = next((n for n in _before(view, node) if n in free), node.name)
        units[node.name] = units.get(leader, (leader,))
    return units


def _before(view: GraphView, node: onnx.NodeProto) -> list[str]:
    makers = [view.producer.get(name, "") for name in node.input]
    if node.op_type in ACTIVATIONS:
        return makers[:1]
    if node.op_type == "Mul":
        return [name for name in makers if name and view.by_name[name].op_type in ACTIVATIONS]
    return []


def _shape(view: GraphView, tensor: str) -> tuple[object, ...]:
    return tuple(view.shapes.get(tensor, ()) or ())


def _whole(seconds: float) -> int:
    return round(seconds * PICOSECONDS)
