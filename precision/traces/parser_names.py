"""Tensors and layers that TensorRT's ONNX parser adds, explained from the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import onnx

from trtune.precision.graph.view import GraphView
from trtune.precision.traces.engine_names import UNNAMED

BROADCASTS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "MatMul", "PRelu"}
)

ADDED: Mapping[str, str] = {
    r"ONNXTRT_Broadcast(?:_\d+)?": "an operand that the ONNX parser gave the rank of the other",
    r"ONNXTRT_(?:ShapeShuffle|shapeShuffle)(?:_\d+)?": "a reshape that the ONNX parser added",
    r"ONNXTRT_flattenTensor(?:_\d+)?": "a flattening that the ONNX parser added",
    r"ONNXTRT_(?:unsqueezeTensor|squeezeTensor)(?:_\d+)?": "axes that the ONNX parser added",
    r"ONNXTRT_\w+": "a layer that the ONNX parser added",
    r"tmp_refittable_weight(?:_\d+)?": "a constant of the network that could be refitted",
}  # fmt: skip
"""What the parser calls its own layers -> what they are. A tensor has `_output` behind."""


def explain_parser_name(name: str) -> str:
    """What a name of the parser's own stands for; empty if it is none.

    >>> explain_parser_name("ONNXTRT_Broadcast_236_output")
    'an operand that the ONNX parser gave the rank of the other'
    """
    bare = re.sub(r"(_output|_\d+__output)$", "", name)
    return next((what for form, what in ADDED.items() if re.fullmatch(form, bare)), "")


def is_parser_name(name: str) -> bool:
    """Whether TensorRT's parser made `name` up: it need not stand in the model."""
    return bool(UNNAMED.match(name)) or bool(explain_parser_name(name))


def explain_tensor(name: str, view: GraphView) -> str:
    """What an entry of a calibration cache that is no tensor of the model stands for.

    Empty if it is none of the parser's names. `<initializer>_output` is a constant.
    """
    stem = name.removesuffix("_output")
    if stem != name and view.is_constant(stem):
        return _constant(stem, view)
    unnamed = UNNAMED.match(name)
    if unnamed:
        number, kind = unnamed[1], unnamed[2]
        return (
            f"layer {number} of TensorRT's own count, a {kind} that its ONNX parser added or whose "
            f"node has no name{_candidates(view, UNNAMED_KINDS.get(kind))}"
        )
    told = explain_parser_name(name)
    if "Broadcast" in name or "unsqueeze" in name:
        told += _candidates(view, _differs_in_rank)
    elif "huffle" in name or "flatten" in name:
        told += _candidates(view, _reshapes)
    elif told and "refittable" in name:
        told += _candidates(view, _reads_constant)
    return told


def _constant(stem: str, view: GraphView) -> str:
    readers = [node for node, _ in view.consumers.get(stem, ())]
    return f"the constant {stem!r}, read by {', '.join(readers[:3]) or 'nothing any more'}"


def _candidates(view: GraphView, fits: Callable[[GraphView, onnx.NodeProto], bool] | None) -> str:
    if fits is None:
        return ""
    found = [node.name for node in view.nodes if fits(view, node)]
    if not found:
        return "; this model has no node that would need one"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; here at {', '.join(found[:3])}{more}"


def _differs_in_rank(view: GraphView, node: onnx.NodeProto) -> bool:
    if node.op_type not in BROADCASTS:
        return False
    ranks = {len(view.shapes[t]) for t in node.input if t in view.shapes}
    return len(ranks) > 1


def _reshapes(view: GraphView, node: onnx.NodeProto) -> bool:
    return node.op_type in ("Gemm", "Reshape", "Flatten", "Gather", "Softmax", "Unsqueeze")


def _reads_constant(view: GraphView, node: onnx.NodeProto) -> bool:
    return any(view.is_constant(t) for t in node.input if t)


UNNAMED_KINDS: Mapping[str, Callable[[GraphView, onnx.NodeProto], bool]] = {
    "Constant": _reads_constant,
    "Shuffle": _differs_in_rank,
}
