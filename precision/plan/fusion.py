"""What TensorRT fuses behind a convolution or product, and what therefore shares its precision."""

from __future__ import annotations

import onnx

from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import COMPUTE_OPS

ACTIVATIONS = {
    *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
    *("Elu", "Selu", "Softplus", "Mish", "Gelu", "BatchNormalization"),
}


def fusion_groups(view: GraphView) -> dict[str, tuple[str, ...]]:
    """Compute node -> the nodes fused behind it: bias Add, activation (SiLU too), residual Add.

    The walk goes on as long as a tensor has one reader (two for x * sigmoid(x)); an Add of two
    convolutions belongs to the later one.
    """
    groups: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for node in reversed(view.nodes):
        if node.op_type not in COMPUTE_OPS or node.name in view.shape_nodes:
            continue
        members = _followers(view, node, taken)
        taken.update(members)
        groups[node.name] = members
    return {name: groups[name] for name in (n.name for n in view.nodes) if groups.get(name)}


def _followers(view: GraphView, node: onnx.NodeProto, taken: set[str]) -> tuple[str, ...]:
    members: list[str] = []
    tensor, added = node.output[0], False
    while tensor not in view.graph_outputs:
        readers = list(dict.fromkeys(name for name, _ in view.consumers.get(tensor, ())))
        following = _gated(view, tensor, readers) or (readers if len(readers) == 1 else [])
        last = view.by_name[following[-1]] if following else None
        if last is None or taken & set(following) or not _joins(view, last, len(following), added):
            break
        added = added or _is_residual(view, last)
        members.extend(following)
        tensor = last.output[0]
    return tuple(members)


def _gated(view: GraphView, tensor: str, readers: list[str]) -> list[str]:
    """[Sigmoid, Mul] if the readers of `tensor` are x * sigmoid(x)."""
    if len(readers) != 2:
        return []
    gates = [r for r in readers if view.by_name[r].op_type in ("Sigmoid", "HardSigmoid")]
    products = [r for r in readers if view.by_name[r].op_type == "Mul"]
    if len(gates) != 1 or len(products) != 1:
        return []
    gate, product = view.by_name[gates[0]], view.by_name[products[0]]
    only = [name for name, _ in view.consumers.get(gate.output[0], ())] == [product.name]
    return [gate.name, product.name] if only and gate.output[0] in product.input else []


def _joins(view: GraphView, node: onnx.NodeProto, length: int, added: bool) -> bool:
    if length == 2 or node.op_type in ACTIVATIONS:
        return True
    if node.op_type == "Add":
        return not (added and _is_residual(view, node))
    constant = any(view.is_constant(name) for name in node.input)
    return node.op_type in ("Mul", "Sub", "Div") and constant and len(node.input) == 2


def _is_residual(view: GraphView, node: onnx.NodeProto) -> bool:
    """An Add of two computed tensors."""
    return node.op_type == "Add" and not any(view.is_constant(name) for name in node.input)
