"""Everything that is wrong with the quantization that a model carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import onnx

from trtune.precision.graph.proto import subgraphs
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import COMPUTE_OPS
from trtune.precision.quantized.find import (
    ACTIVATION,
    DEQUANTIZE,
    FLOAT8,
    QUANTIZE,
    Found,
    carried_by,
    has_one_scale,
    multiplies_codes,
    reads_stray,
)
from trtune.precision.quantized.findings import EXACT, Finding, finding
from trtune.precision.quantized.lint_pairs import INTEGER_TYPES, PAIR_RULES, listed


def lint(view: GraphView, found: Found) -> tuple[Finding, ...]:
    """Everything to say about the quantization of a graph, in graph order."""
    order = {node.name: k for k, node in enumerate(view.nodes)}
    rows = [row for pair in found.pairs for rule in PAIR_RULES for row in rule(view, found, pair)]
    rows += [row for rule in GRAPH_RULES for row in rule(view, found)]
    once = dict.fromkeys(rows)  # two DequantizeLinears of one QuantizeLinear say the same
    return tuple(sorted(once, key=lambda row: order.get(row.node, -1)))


def _strays(view: GraphView, found: Found) -> Iterator[Finding]:
    for name in found.strays:
        node = view.by_name[name]
        if node.op_type == QUANTIZE:
            readers = [f"{r} ({view.by_name[r].op_type})" for r, _ in _uses(view, node)]
            where = f"its codes go to {listed(readers)}" if readers else "nothing dequantizes it"
            if node.output[0] in view.graph_outputs:
                where = f"its codes are the model's output {node.output[0]!r}"
            yield finding(
                name, "quantize-alone", where, "export with a DequantizeLinear behind each"
            )
        else:
            yield finding(
                name,
                "dequantize-alone",
                f"it reads {node.input[0]!r}, which no QuantizeLinear makes",
                "export with float inputs and a QuantizeLinear",
            )


def _uses(view: GraphView, node: onnx.NodeProto) -> list[tuple[str, int]]:
    return [edge for output in node.output for edge in view.consumers.get(output, ())]


def _half_quantized(view: GraphView, found: Found) -> Iterator[Finding]:
    carried = {pair.result: pair for pair in found.of_role(ACTIVATION)}
    passed = set(found.passed)
    for node in view.nodes:
        if node.op_type not in COMPUTE_OPS or node.name in found.int8:
            continue
        if reads_stray(view, found, node.input[0]):
            continue  # quantized, by codes that come from outside
        weights = (node.name, 1) in found.weights
        pairs = carried_by(view, node.input[0], carried, passed)
        data = bool(pairs)
        if weights and data and not has_one_scale(pairs):
            yield finding(
                node.name,
                "unequal-scales",
                f"its data come from {listed(p.node for p in pairs)}, with different scales",
                "float weights with the values that they have; it stays float",
                EXACT,
            )
        elif (
            weights
            and not data
            and found.weights[(node.name, 1)].pair.dtype in (*INTEGER_TYPES, FLOAT8)
        ):
            yield finding(
                node.name,
                "weights-alone",
                "its weights are quantized, its data are not",
                "float weights with the values that they have; it stays float",
                EXACT,
            )
        elif data and not weights and view.is_constant(node.input[1]):
            yield finding(
                node.name,
                "activation-alone",
                "its data are quantized, its weights are not",
                "the pair stays, the node is float",
                EXACT,
            )


def _residual(view: GraphView, found: Found) -> Iterator[Finding]:
    carried = {pair.result: pair for pair in found.of_role(ACTIVATION)}
    passed, int8 = set(found.passed), set(found.int8)
    for node in view.nodes:
        if node.op_type != "Add" or any(view.is_constant(name) for name in node.input):
            continue
        inputs = list(node.input)
        main = [view.producer.get(name, "") in int8 for name in inputs]
        free = [not carried_by(view, name, carried, passed) for name in inputs]
        if any(main[k] and free[1 - k] for k in (0, 1)):
            yield finding(
                node.name,
                "residual",
                "it adds to a convolution's output something that is not quantized",
                "left as it is: quantizing it would change the values",
            )


def _nothing(view: GraphView, found: Found) -> Iterator[Finding]:
    """A model that carries pairs, none of which makes a product run in int8."""
    if not found.pairs or found.int8 or found.products or found.strays:
        return
    products = [node for node in view.nodes if node.op_type in COMPUTE_OPS]
    if not products or any(multiplies_codes(view, found, node) for node in products):
        return
    weights = sum((node.name, 1) in found.weights for node in products)
    data = len({pair.source for pair in found.of_role(ACTIVATION)})
    yield finding(
        products[0].name,
        "nothing-int8",
        f"none of {len(products)} products has int8 data and int8 weights: {weights} have "
        f"quantized weights, and {data} tensors of data are quantized",
        "export with pairs on the data as well, or give the float model with `default: int8`",
    )


def _in_subgraphs(view: GraphView, found: Found) -> Iterator[Finding]:
    """Quantization in the bodies of If, Loop and Scan, at any depth: nothing takes it out."""
    for node in view.nodes:
        inner = [name for body in subgraphs(node) for name in _quantizers(body)]
        if inner:
            yield finding(
                node.name,
                "inside-subgraph",
                f"{len(inner)} quantizing nodes stand inside it: {listed(inner)}",
                "left as it is, also by strip and import: export without control flow to move it",
            )


def _quantizers(body: onnx.GraphProto) -> Iterator[str]:
    for node in body.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            yield node.name or node.output[0]
        for inner in subgraphs(node):
            yield from _quantizers(inner)


GRAPH_RULES: tuple[Callable[[GraphView, Found], Iterable[Finding]], ...] = (
    _strays,
    _half_quantized,
    _residual,
    _nothing,
    _in_subgraphs,
)
