"""Cuts a graph into pieces whose tapped tensors fit a cache, and packs their buffers.

A tensor is cheapest to count while it is still in a cache, and a picture's tapped tensors together
are often larger than all of them. So a graph is run piece by piece, and each piece's tensors are
counted before the next piece runs; their memory is then used again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx


def cut(
    model: onnx.ModelProto, tapped: Collection[str], sizes: Mapping[str, int], limit: int
) -> list[onnx.ModelProto]:
    """`model`, whose nodes are sorted, as models to be run one after the other.

    A piece ends with the node that brings its `tapped` tensors to `limit` bytes (`sizes`: bytes
    a tensor). Its inputs are what it needs of the model's inputs and of earlier pieces; its
    outputs are the tapped tensors it makes and what later pieces need. Neither declares a type
    unless the model's input does. Nodes that no tapped tensor depends on are left out.

    Empty if the graph cannot be cut: a node holds a graph of its own (which may read any outer
    tensor), weights are sparse, or a tapped tensor is not the output of a node.
    """
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    if holds_graphs(graph) or graph.sparse_initializer or not set(tapped) <= made:
        return []
    groups = _groups(_needed(graph.node, tapped), tapped, sizes, limit)
    pieces = []
    later: set[str] = set(tapped)
    for nodes in reversed(groups):
        pieces.append(_piece(model, nodes, later))
        later |= {name for node in nodes for name in node.input}
    return pieces[::-1]


def holds_graphs(graph: onnx.GraphProto) -> bool:
    """Whether a node (If, Loop, Scan) has a graph of its own."""
    return any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute)


def _needed(nodes: Sequence[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes, in order, that any of `wanted` depends on."""
    open_names = set(wanted)
    kept = []
    for node in reversed(nodes):
        if not open_names.isdisjoint(node.output):
            kept.append(node)
            open_names.update(node.input)
    return kept[::-1]


def _groups(
    nodes: Iterable[onnx.NodeProto], tapped: Collection[str], sizes: Mapping[str, int], limit: int
) -> list[list[onnx.NodeProto]]:
    groups: list[list[onnx.NodeProto]] = []
    filled = limit
    for node in nodes:
        if filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(node)
        filled += sum(sizes.get(name, 0) for name in node.output if name in tapped)
    return groups


def _piece(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], later: Collection[str]
) -> onnx.ModelProto:
    made = {name for node in nodes for name in node.output if name}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    given = {info.name: info for info in model.graph.input}
    inputs = [name for name in read if name not in made and name not in constants]
    return onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        functions=model.functions,
        graph=onnx.GraphProto(
            name=model.graph.name,
            node=nodes,
            initializer=[constants[name] for name in read if name in constants],
            input=[given.get(name, onnx.ValueInfoProto(name=name)) for name in inputs],
            output=[
                onnx.ValueInfoProto(name=name)
                for node in nodes
                for name in node.output
                if name and name in later
            ],
        ),
    )


def pack(
    sizes: Mapping[str, int], lives: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, int], int]:
    """Offsets of buffers in one block, and the size of the block.

    `lives` says from which step to which (inclusive) each buffer holds something; two that never
    do at the same time may overlap. Largest first, each at the lowest offset that is free.

    >>> pack({"a": 4, "b": 8, "c": 4}, {"a": (0, 1), "b": (1, 1), "c": (2, 2)})
    ({'b': 0, 'a': 8, 'c': 0}, 12)
    """
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        first, last = lives[name]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= last and first <= lives[other][1]
        )
        offset = 0
        for start, stop in taken:
            if start - offset >= sizes[name]:
                break
            offset = max(offset, stop)
        offsets[name] = offset
        end = max(end, offset + sizes[name])
    return offsets, end
