"""Softmax and normalisation written as elementary nodes, and how many terms a node sums."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from trtune.precision.graph.proto import attribute, default_opset
from trtune.precision.graph.view import GraphView, elements

STATISTICS = {
    *("ReduceMean", "ReduceSum", "ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceMax"),
    "GlobalAveragePool",
}
SUMS = STATISTICS - {"ReduceMax"} | {"AveragePool", "CumSum", "LpPool", "GlobalLpPool"}

BELOW = {"Sqrt", "Reciprocal", "Pow", "Clip", "Expand", "Cast"}
"""What may stand between a statistic and the division by it, beside constants that are added or
multiplied."""

OWN_STATISTICS = {
    *("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization"),
    *("LpNormalization", "MeanVarianceNormalization", "LRN"),
}
AFFINE = {"Mul": "scale", "Add": "shift", "Sub": "shift"}
"""What a normalisation may end with, once each: its gamma and its beta."""
BETWEEN = {"Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
"""What may stand in between: a group normalisation reshapes before it scales."""


def internals(view: GraphView) -> dict[str, str]:
    """The nodes of a softmax or normalisation that is written as elementary nodes -> the reason.

    Those are the nodes between the data and the division by a statistic of the same data: mean and
    variance of a layer normalisation, the sum of exponentials of a softmax, an L2 norm. A
    normalisation goes on to what scales and shifts its result: runtimes make one kernel of all of
    it, and onnxruntime one whose types have to agree. The operators that are one node are not among
    them, only what scales and shifts behind those that would take their statistics in half.
    """
    opset = default_opset(view.proto) or 0
    found: dict[str, str] = {}
    for node in view.nodes:
        for divided, denominator in _divisions(view, node):
            names = _inside(view, divided, denominator)
            if names:
                ops = {view.by_name[name].op_type for name in names}
                what = "softmax" if "Exp" in ops else "normalisation"
                core = [*names, node.name]
                ending = _affine(view, node, set(core)) if what == "normalisation" else []
                reason = f"inside a {what} (it ends at {(ending or core)[-1]!r})"
                for name in (*core, *ending):
                    found.setdefault(name, reason)
        if node.op_type in OWN_STATISTICS and not float32_statistics(node, opset):
            for name in _affine(view, node, {node.name}):
                found.setdefault(name, f"the scale and shift of normalisation {node.name!r}")
    return found


def _affine(view: GraphView, node: onnx.NodeProto, core: set[str]) -> list[str]:
    """The nodes that scale and shift what `node`, the end of the normalisation `core`, gives.

    Gamma and beta are constants, vectors given to the model, or made of the normalisation's own
    mean and variance (`x * inv + (beta - mean * inv)`).
    """
    found: list[str] = []
    waiting: list[str] = []
    missing = set(AFFINE.values())
    while True:
        readers = view.consumers.get(node.output[0], ())
        if len(readers) != 1 or node.output[0] in view.graph_outputs:
            return found
        name, index = readers[0]
        node = view.by_name[name]
        part = AFFINE.get(node.op_type, "")
        if node.op_type in BETWEEN and index == 0:
            waiting.append(name)
        elif part in missing and len(node.input) == 2:
            beside = _made_of(view, node.input[1 - index], core, depth=SIDE)
            if beside is None:
                return found
            missing.discard(part)
            found += [*waiting, *beside, name]
            waiting = []
        else:
            return found


SIDE = 6
"""How many nodes deep gamma and beta are looked into."""


def _made_of(view: GraphView, tensor: str, core: set[str], *, depth: int) -> list[str] | None:
    """The nodes that make `tensor` of constants, inputs and what `core` gives; None if it is made
    of anything else."""
    node = _maker(view, tensor)
    if view.is_constant(tensor) or (node is not None and node.name in core):
        return []
    if node is None:
        return [] if len(view.shapes.get(tensor, ())) == 1 else None
    if depth == 0 or not (node.op_type in BETWEEN or node.op_type in AFFINE):
        return None
    found: list[str] = []
    for name in node.input[:1] if node.op_type in BETWEEN else node.input:
        part = _made_of(view, name, core, depth=depth - 1)
        if part is None:
            return None
        found += part
    return [*found, node.name]


def _divisions(view: GraphView, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """(what is divided, by what): of a Div, or a Mul by a reciprocal."""
    if node.op_type == "Div":
        yield node.input[0], node.input[1]
    elif node.op_type == "Mul":
        first, second = node.input
        for divided, factor in ((first, second), (second, first)):
            maker = _maker(view, factor)
            if maker is not None and _inverts(view, maker):
                yield divided, factor


def _maker(view: GraphView, tensor: str) -> onnx.NodeProto | None:
    return view.by_name.get(view.producer.get(tensor, ""))


def _inverts(view: GraphView, node: onnx.NodeProto) -> bool:
    if node.op_type == "Pow" and view.is_constant(node.input[1]):
        return bool((view.constant(node.input[1]) < 0).all())
    if node.op_type == "Mul":  # gamma / sqrt(variance), multiplied out
        makers = [_maker(view, t) for t in node.input if not view.is_constant(t)]
        return len(makers) == 1 and makers[0] is not None and _inverts(view, makers[0])
    divides = node.op_type == "Div" and view.is_constant(node.input[0])
    return divides or node.op_type == "Reciprocal"


def _inside(view: GraphView, divided: str, denominator: str) -> list[str]:
    """The nodes between the data and the division; none if the divisor is no statistic of it."""
    path: list[str] = []
    node = _maker(view, denominator)
    while node is not None and node.op_type not in STATISTICS:
        others = [t for t in node.input[1:] if not view.is_constant(t)]
        if node.op_type in ("Add", "Max", "Mul"):
            below = [tensor for tensor in node.input if not view.is_constant(tensor)]
            onward = below[0] if len(below) == 1 else None
        elif node.op_type in BELOW and (not others or node.op_type == "Expand"):
            onward = node.input[0]
        else:
            onward = node.input[1] if _inverts(view, node) else None
        if onward is None:
            return []
        path.append(node.name)
        node = _maker(view, onward)
    if node is None or node.op_type == "ReduceMax":
        return []
    above = dict(_to_data(view, node.input[0]))
    over = dict(_to_data(view, divided))
    common = next((tensor for tensor in over if tensor in above), None)
    if common is None:
        return []
    names = dict.fromkeys([node.name, *path])
    for names_of in above.values():
        names.update(dict.fromkeys(names_of))
    for tensor, names_of in over.items():
        if tensor == common:
            break
        names.update(dict.fromkeys(names_of))
    return list(names)


def _to_data(view: GraphView, tensor: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """From a statistic's input back to the data, each tensor with the nodes that made it so.

    Past a square, exponential or magnitude, and past the subtraction of another statistic; the
    data itself comes last, without nodes.
    """
    steps = {"Pow", "Abs", "Exp", "Mul"}
    while (node := _maker(view, tensor)) is not None:
        names: tuple[str, ...] = (node.name,)
        if node.op_type == "Sub":
            statistic = _maker(view, node.input[1])
            if statistic is None or statistic.op_type not in STATISTICS:
                break
            names, steps = (node.name, statistic.name), set()
        elif node.op_type in steps and (node.op_type != "Mul" or len(set(node.input)) == 1):
            steps = set()
        elif node.op_type != "Cast":
            break
        yield tensor, names
        if node.op_type == "Sub":
            tensor = node.input[0]
            break
        tensor = node.input[0]
    yield tensor, ()


def summands(view: GraphView, node: onnx.NodeProto) -> int:
    """How many terms each output value of a sum, average or product has; 0 for other nodes.

    Dimensions that are not known count as 1.
    """
    op, shape = node.op_type, view.shapes.get(node.input[0] if node.input else "", ())
    if op in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        return _product_length(view, node)
    if op in ("GlobalAveragePool", "GlobalLpPool"):
        return elements(shape[2:])
    if op in ("AveragePool", "LpPool"):
        return math.prod(attribute(node, "kernel_shape", [1]))
    if op not in SUMS:
        return 0
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and view.is_constant(node.input[1]):
        axes = view.constant(node.input[1]).reshape(-1).tolist()
    if axes is None or not len(axes):
        return (
            1 if op == "CumSum" or attribute(node, "noop_with_empty_axes", 0) else elements(shape)
        )
    return elements(tuple(shape[axis] for axis in axes if -len(shape) <= axis < len(shape)))


def _product_length(view: GraphView, node: onnx.NodeProto) -> int:
    data, weight = (view.shapes.get(tensor, ()) for tensor in node.input[:2])
    if node.op_type == "Conv":
        return elements(weight[1:])
    if node.op_type == "ConvTranspose":
        return elements(weight[:1] + weight[2:]) // max(int(attribute(node, "group", 1)), 1)
    if node.op_type == "Gemm":
        return elements(weight[1:] if attribute(node, "transB", 0) else weight[:1])
    return max(elements(data[-1:]), elements(weight[-2:][:1]))


def float32_statistics(node: onnx.NodeProto, opset: int) -> bool:
    """Whether the definition of a normalisation puts its statistics into float32 (`stash_type`)."""
    since = {"LayerNormalization": 17, "GroupNormalization": 21, "RMSNormalization": 23}
    if opset < since.get(node.op_type, math.inf):
        return False
    return bool(attribute(node, "stash_type", 1) == onnx.TensorProto.FLOAT)
