"""A Resize or Pad of codes, written as one of floats with the codes made behind it.

onnxruntime resizes the codes themselves, and pads them with the zero point. Taking nearest values,
putting zeros around and rounding commute, so floats that are resized or padded and then quantized
have the same codes, and what reads them stays int8.
"""

from __future__ import annotations

import onnx
from onnx import helper

from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    copy_model,
    copy_of,
    names_in,
    replace_field,
)
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import is_move
from trtune.precision.quantized.find import DEQUANTIZE, QUANTIZE, quantize_before
from trtune.precision.quantized.findings import EXACT, Finding, finding

RESIZES = ("Resize", "Upsample")


def with_floats_resized(
    proto: onnx.ModelProto, view: GraphView
) -> tuple[onnx.ModelProto, tuple[Finding, ...]]:
    """A copy of `proto` in which floats are resized and padded in the place of codes, and what was
    found of it; `proto` itself if none are, or their QuantizeLinear is not found.

    TensorRT takes both, but for a code to pad with that is stored.
    """
    found = {
        node.name: quantize
        for node in view.nodes
        if (node.op_type in RESIZES and is_move(node, 0)) or node.op_type == "Pad"
        for quantize in [_one_scale_before(view, node.input[0])]
        if quantize is not None and (node.op_type != "Pad" or _with_zeros(view, node, quantize))
    }
    if not found:
        return proto, ()
    rows = tuple(
        finding(
            name,
            "computed-codes",
            f"it pads codes with the stored code {view.by_name[name].input[2]!r}",
            "floats padded with 0, and the codes made behind",
            EXACT,
        )
        for name in found
        if view.by_name[name].op_type == "Pad" and any(view.by_name[name].input[2:3])
    )
    model = copy_model(proto)
    names = FreshNames(names_in(model.graph))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made = copy_of(node)
        quantize = found.get(node.name)
        if quantize is None:
            nodes.append(made)
            continue
        parameters, output = list(quantize.input[1:]), node.output[0]
        if node.input[0] == quantize.output[0]:
            made.input[0] = quantize.input[0]
        else:
            made.input[0] = names.new(f"{node.input[0]}/floats")
            inputs = [node.input[0], *parameters]
            name = names.new(f"{node.name}/{DEQUANTIZE}")
            nodes.append(helper.make_node(DEQUANTIZE, inputs, [made.input[0]], name))
        if made.op_type == "Pad" and len(made.input) > 2:
            made.input[2] = ""  # 0
        made.output[0] = names.new(f"{output}/floats")
        name = names.new(f"{node.name}/{QUANTIZE}")
        again = helper.make_node(QUANTIZE, [made.output[0], *parameters], [output], name)
        again.attribute.extend(quantize.attribute)
        nodes += [made, again]
    replace_field(model.graph.node, _read(nodes, model.graph, {q.name for q in found.values()}))
    del model.graph.value_info[:]
    return model, rows


def _one_scale_before(view: GraphView, codes: str) -> onnx.NodeProto | None:
    """The QuantizeLinear with one scale that made all of `codes`, also moved about since."""
    found = quantize_before(view, codes)
    if found is None or any(node.op_type == "Concat" for node in found[1]):
        return None
    scale = found[0].input[1]
    return found[0] if view.is_constant(scale) and view.constant(scale).size == 1 else None


def _with_zeros(view: GraphView, pad: onnx.NodeProto, quantize: onnx.NodeProto) -> bool:
    """Whether `pad` puts the code of 0 around those of `quantize`, or codes that are there."""
    if attribute(pad, "mode", b"constant") != b"constant":
        return True
    value = _code(view, pad, 2)
    return value is not None and value == _code(view, quantize, 2)


def _code(view: GraphView, node: onnx.NodeProto, index: int) -> int | None:
    """The one code at an input, 0 where there is none; None if it is computed."""
    name = node.input[index] if len(node.input) > index else ""
    if not name:
        return 0
    return int(view.constant(name).reshape(-1)[0]) if view.is_constant(name) else None


def _read(
    nodes: list[onnx.NodeProto], graph: onnx.GraphProto, quantizers: set[str]
) -> list[onnx.NodeProto]:
    """`nodes` less those of `quantizers` that nothing reads any more."""
    read = {name for node in nodes for name in node.input} | {info.name for info in graph.output}
    return [n for n in nodes if n.name not in quantizers or read.intersection(n.output)]
