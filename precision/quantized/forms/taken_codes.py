"""Codes that are taken from a stored table and dequantized behind that, as embeddings are.

onnxruntime gathers rows of codes. TensorRT takes stored codes in front of a DequantizeLinear alone,
so the table is dequantized and floats are taken from it; the same pair behind gives the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import helper

from trtune.precision.graph.proto import FreshNames, copy_model, copy_of, names_in, replace_field
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import moves_codes
from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE
from trtune.precision.quantized.findings import EXACT, Finding, finding

CODES = ("int8", "uint8")


@dataclass(frozen=True, slots=True)
class _Taken:
    """The DequantizeLinears `ends`, all with one scale, of what `nodes` take from the stored codes
    `table`."""

    table: str
    nodes: tuple[str, ...]
    ends: tuple[onnx.NodeProto, ...]


def with_tables_dequantized(
    proto: onnx.ModelProto, view: GraphView
) -> tuple[onnx.ModelProto, tuple[Finding, ...]]:
    """A copy of `proto` in which floats are taken from tables in the place of codes, and what was
    found of it; `proto` itself if there is nothing to do."""
    taken = list(_taken(view))
    if not taken:
        return proto, ()
    rows = tuple(
        finding(
            end.name,
            "computed-codes",
            f"its codes are taken from the constant {found.table!r} by {found.nodes[0]}",
            "the constant dequantized, and the pair behind what takes from it",
            EXACT,
        )
        for found in taken
        for end in found.ends
    )
    model = copy_model(proto)
    names = FreshNames(names_in(model.graph))
    first = {found.nodes[0]: found for found in taken}
    inside = {name: found.table for found in taken for name in found.nodes}
    ends = {end.name for found in taken for end in found.ends}
    tables: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made = copy_of(node)
        if node.name in first:
            end = first[node.name].ends[0]
            tables[inside[node.name]] = names.new(f"{inside[node.name]}/floats")
            inputs = [inside[node.name], *end.input[1:]]
            new = helper.make_node(
                DEQUANTIZE, inputs, [tables[inside[node.name]]], names.new(f"{end.name}/table")
            )
            nodes.append(new)
        if node.name in inside and made.input[0] == inside[node.name]:
            made.input[0] = tables[inside[node.name]]
        if node.name in ends:
            codes = names.new(f"{node.output[0]}/codes")
            quantize = helper.make_node(
                QUANTIZE, list(node.input), [codes], names.new(f"{node.name}/{QUANTIZE}")
            )
            nodes.append(quantize)
            made.input[0] = codes
        nodes.append(made)
    replace_field(model.graph.node, nodes)
    del model.graph.value_info[:]
    return model, rows


def _taken(view: GraphView) -> Iterator[_Taken]:
    for table, edges in view.consumers.items():
        if table not in view.initializers or view.dtypes.get(table) not in CODES:
            continue
        starts = [name for name, index in edges if index == 0]
        movers = [n for n in starts if moves_codes(view.by_name[n], 0)]
        movers = [n for n in movers if not view.is_constant(view.by_name[n].output[0])]
        if movers and len(movers) == len(edges):
            found = _followed(view, table, movers)
            if found is not None:
                yield found


def _followed(view: GraphView, table: str, movers: list[str]) -> _Taken | None:
    """Where the codes go from `movers`; None if not to DequantizeLinears of one scale alone."""
    nodes, ends, waiting = dict.fromkeys(movers), dict[str, onnx.NodeProto](), list(movers)
    while waiting:
        for output in view.by_name[waiting.pop(0)].output:
            if output in view.graph_outputs:
                return None
            for name, index in view.consumers.get(output, ()):
                reader = view.by_name[name]
                if index == 0 and reader.op_type == DEQUANTIZE:
                    ends[name] = reader
                elif index == 0 and moves_codes(reader, 0) and reader.op_type != "Concat":
                    if name not in nodes:
                        nodes[name] = None
                        waiting.append(name)
                else:
                    return None
    same = {tuple(_parameter(view, end, k) for k in (1, 2)) for end in ends.values()}
    known = len(same) == 1 and None not in next(iter(same))
    order = [node.name for node in view.nodes if node.name in nodes]
    return _Taken(table, tuple(order), tuple(ends.values())) if known else None


def _parameter(view: GraphView, node: onnx.NodeProto, index: int) -> tuple[str, float] | None:
    """Scale or zero point of a DequantizeLinear, if that is one constant; type and value."""
    name = node.input[index] if len(node.input) > index else ""
    if not name:
        return "", 0.0
    value = view.constant(name) if view.is_constant(name) else None
    return None if value is None or value.size != 1 else (value.dtype.name, float(value.item()))
