"""Gates, x * sigmoid(y), in integers: what `deploy` quantizes for them beyond the inputs of layers.

SiLU and squeeze-and-excitation are a Sigmoid and a Mul. In float they cost a network with small
layers more than its INT8 convolutions save: values leave the integers after each of these, and go
back before the next. onnxruntime has integer kernels for both (a table of 256 values, and a
product), if the output of the Sigmoid and that of the Mul have pairs too. The range of the first
is known. What puts such products together (Add, Concat, MaxPool, a Resize to nearest values) is
quantized as well, so that nothing leaves the integers on the way to the next layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx

from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import Edge, is_move
from trtune.precision.plan.plan import PrecisionPlan

GATE_SCALE = 1 / 255
"""uint8 codes of what a Sigmoid gives: 0 to 1, without a zero point."""
CARRIERS = frozenset({"Add", "Concat", "MaxPool", "Resize", "Upsample"})


@dataclass(frozen=True, slots=True)
class Gates:
    """`sigmoids` maps the output of a Sigmoid to the edges of the products that read it; `products`
    are the outputs of these, in graph order, and of what carries them on."""

    sigmoids: dict[str, tuple[Edge, ...]] = field(default_factory=dict)
    products: tuple[str, ...] = ()


def find_gates(view: GraphView, plan: PrecisionPlan, quantized: Collection[str]) -> Gates:
    """The gates whose inputs are among the `quantized` tensors, or are such products themselves.

    None of a pinned node, or of one that makes an output of the model.
    """
    known, carried = set(quantized), set[str]()
    open_gates: dict[str, tuple[Edge, ...]] = {}
    products: list[str] = []
    for node in view.nodes:
        output = node.output[0] if node.output else ""
        if output in view.graph_outputs or plan.nodes[node.name].is_pinned:
            continue
        if node.op_type == "Sigmoid" and node.input[0] in known:
            readers = tuple(view.consumers.get(output, ()))
            if readers and all(_is_product(view, plan, name) for name, _ in readers):
                open_gates[output] = readers
        elif _is_gated(node, open_gates, known) or _carries(node, carried, known):
            products.append(output)
            carried.add(output)
            known.add(output)
    whole = {
        gate: readers
        for gate, readers in open_gates.items()
        if all(view.by_name[name].output[0] in carried for name, _ in readers)
    }
    return Gates(whole, tuple(products))


def _is_product(view: GraphView, plan: PrecisionPlan, name: str) -> bool:
    return view.by_name[name].op_type == "Mul" and not plan.nodes[name].is_pinned


def _is_gated(node: onnx.NodeProto, gates: Collection[str], known: Collection[str]) -> bool:
    """Whether `node` is the product of a gate and a quantized tensor, or of two gates."""
    inputs = list(node.input)
    gated = node.op_type == "Mul" and any(name in gates for name in inputs)
    return gated and all(name in gates or name in known for name in inputs)


def _carries(node: onnx.NodeProto, carried: Collection[str], known: Collection[str]) -> bool:
    """Whether `node` passes products on, and everything that it puts together is quantized."""
    if node.op_type not in CARRIERS or len(node.output) != 1:
        return False
    if node.op_type == "Add":
        data = list(node.input)
    else:
        data = [name for index, name in enumerate(node.input) if is_move(node, index)]
    inside = bool(data) and all(name in known for name in data)
    return inside and any(name in carried for name in data)
