"""Which operator sets can be handled, and how a model is brought into one of them.

Old opsets are raised to 13, the first whose Q/DQ have one scale a channel. Newer ones than the
rest of this package knows are lowered, in number alone, where no operator that the model uses has
changed in between; where one has, they stay if onnxruntime runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.defs import OpSchema, SchemaError, get_schema
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from trtune.precision.graph.proto import (
    all_nodes,
    constant_value,
    default_opset,
    replace_field,
    subgraphs,
)

OLDEST_OPSET = 1
"""Where onnx's converter begins."""
KNOWN_OPSET = 23
"""Up to here this package knows every operator; a newer number is lowered to it if it can be."""
QDQ_OPSET = 13
"""The first opset whose QuantizeLinear has one scale a channel."""
RESIZE_OPSET = 11
"""The first opset whose Resize says where it samples."""
WIDENED = frozenset(
    {
        *("Constant", "ConstantOfShape", "Flatten", "Identity", "If", "Loop", "Pad", "Reshape"),
        *("Scan", "Shape", "Size", "SplitToSequence", "Squeeze", "TopK", "Transpose", "Unsqueeze"),
    }
)
"""Operators whose later versions only take more types; Mod of opset 28 shows that the same inputs
and attributes can mean something else."""
BROADCAST_OPSET = 7
"""The first opset whose operators broadcast as NumPy does."""
BATCH_SCAN_OPSET = 8
"""The one opset whose Scan has a batch of its own."""
WITHIN = frozenset({"CPUExecutionProvider", "AzureExecutionProvider"})
"""onnxruntime's providers that are part of it, and need no libraries of their own."""
UNGATED_OPSET = 6
"""The first opset that onnxruntime still runs as it is."""


@cache
def newest_opset() -> int:
    """The newest default operator set that the installed onnx and onnxruntime both have."""
    schemas = ort_state.get_all_operator_schema()
    runtime = max(schema.since_version for schema in schemas if schema.domain == "")
    return int(min(max(runtime, KNOWN_OPSET), onnx.defs.onnx_opset_version()))


@cache
def runtime_operators() -> frozenset[tuple[str, str]]:
    """(domain, operator) of all that ONNX defines and that onnxruntime has a kernel for.

    A definition in onnxruntime alone says nothing: it has those of TensorRT's plugins too, in the
    default domain. To list its kernels, though, onnxruntime loads every provider that it was built
    with, and a process ends where the libraries of one (TensorRT's) are missing; a build with
    others than the CPU's is therefore asked for the definitions in its own domains.
    """
    if WITHIN.issuperset(ort_state.get_available_providers()):
        kernels = {(kernel.domain, kernel.op_name) for kernel in ort_state.get_all_opkernel_def()}
    else:
        kernels = {(schema.domain, schema.name) for schema in ort_state.get_all_operator_schema()}
    standard = {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()}
    return frozenset(standard.union(found for found in kernels if found[0]))


def lowered_opset(nodes: Iterable[onnx.NodeProto], opset: int) -> int:
    """The number that a model of `opset` can declare without changing any operator.

    That is `KNOWN_OPSET` if every operator among `nodes` has there the same inputs, outputs and
    attributes as in `opset` (only more types came since), else `opset` itself.
    """
    found = {(node.op_type, node.domain) for node in all_nodes(nodes)}
    standard = [op for op, domain in found if domain == ""]
    if opset > KNOWN_OPSET and all(_same_operator(op, opset) for op in standard):
        return KNOWN_OPSET
    return opset


def runnable_opset(nodes: Iterable[onnx.NodeProto], opset: int) -> int:
    """`opset`, or what it is lowered to where onnx has it and onnxruntime does not."""
    known = newest_opset() < opset <= onnx.defs.onnx_opset_version()
    return lowered_opset(nodes, opset) if known else opset


@cache
def _same_operator(op: str, opset: int) -> bool:
    try:
        new, old = get_schema(op, opset), get_schema(op, KNOWN_OPSET)
    except SchemaError:
        return False
    if new.since_version == old.since_version:
        return True
    return op in WIDENED and _signature(new) == _signature(old)


def _signature(schema: OpSchema) -> tuple[object, ...]:
    attributes = sorted(
        (a.name, str(a.type), a.required, a.default_value.SerializeToString())
        for a in schema.attributes.values()
    )
    ports = [
        [(p.name, str(p.option), p.is_homogeneous, p.min_arity) for p in side]
        for side in (schema.inputs, schema.outputs)
    ]
    return (attributes, ports, schema.min_input, schema.max_input)


def converted(light: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """`light` in the default opset `target`, which is newer than its own; it is changed.

    onnx's own converter, but for what that gets wrong or refuses with a free batch: operators that
    broadcast along an axis (before opset 7), and Scan with a batch (opset 8).
    Raises RuntimeError, ValueError or IndexError as the converter does.
    """
    opset = default_opset(light)
    assert opset is not None
    if opset < BROADCAST_OPSET:
        if opset < BROADCAST_OPSET - 1:
            light = onnx.version_converter.convert_version(light, BROADCAST_OPSET - 1)
        _align_broadcasts(light)
        _drop_old_attributes(light)
        declare_opset(light, BROADCAST_OPSET)
    if opset <= BATCH_SCAN_OPSET < target and _scans(light.graph):
        if opset < BATCH_SCAN_OPSET:
            light = onnx.version_converter.convert_version(light, BATCH_SCAN_OPSET)
        _scan_over_samples(light.graph)
        light.opset_import.append(helper.make_opsetid(_ASIDE, 1))
        light = onnx.version_converter.convert_version(light, BATCH_SCAN_OPSET + 1)
        for node in _scans(light.graph):
            node.domain = ""
        kept = [entry for entry in light.opset_import if entry.domain != _ASIDE]
        replace_field(light.opset_import, kept)
    found = onnx.version_converter.convert_version(light, target)
    if opset < RESIZE_OPSET <= target:
        _keep_resize_rule(found.graph)
    return found


def declare_opset(model: onnx.ModelProto, opset: int) -> None:
    """Change the number of the default opset alone."""
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = opset


_ASIDE = "trtune.aside"
"""The domain of nodes that the converter shall not see."""


def _align_broadcasts(model: onnx.ModelProto) -> None:
    """Give the second input of a node that broadcasts along `axis` the dimensions behind it."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        if info.type.tensor_type.HasField("shape"):
            ranks[info.name] = len(info.type.tensor_type.shape.dim)
    nodes = []
    for node in graph.node:
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), None)
        names = {entry.name for entry in node.attribute}
        behind = 0
        if node.op_type == "PRelu" and len(node.input) == 2 and ranks.get(node.input[1]) == 1:
            behind = ranks.get(node.input[0], 0) - 2
        elif "broadcast" in names and axis is not None:
            left, right = (ranks.get(name) for name in node.input)
            if left is None or right is None:
                raise ValueError(
                    f"{node.name or node.op_type} broadcasts along an axis of unknown place"
                )
            behind = left - (axis + left if axis < 0 else axis) - right
            replace_field(node.attribute, [e for e in node.attribute if e.name != "axis"])
        if behind > 0:
            rank, source = ranks[node.input[1]], node.input[1]
            axes = list(range(rank, rank + behind))
            made = f"{node.output[0]}/aligned"
            nodes.append(helper.make_node("Unsqueeze", [source], [made], f"{made}_", axes=axes))
            node.input[1] = made
        nodes.append(node)
    replace_field(graph.node, nodes)


def _drop_old_attributes(model: onnx.ModelProto) -> None:
    """Take away the attributes that opset 7 has no longer; inference does not depend on them."""
    for node in all_nodes(model.graph.node):
        if node.domain or not onnx.defs.has(node.op_type, BROADCAST_OPSET, ""):
            continue
        values = {entry.name: entry for entry in node.attribute}
        if node.op_type == "Upsample" and "height_scale" in values:
            scales = [1.0, 1.0, values["height_scale"].f, values["width_scale"].f]
            node.attribute.append(helper.make_attribute("scales", scales))
        known = get_schema(node.op_type, BROADCAST_OPSET, "").attributes
        replace_field(node.attribute, [entry for entry in node.attribute if entry.name in known])


def _keep_resize_rule(graph: onnx.GraphProto) -> None:
    """Make every Resize sample where Upsample and the first Resize did.

    The converter leaves it at opset 11's default, half_pixel, which shifts the picture. Nearest
    neighbours are rounded down when enlarging and up when shrinking, as onnxruntime does.
    """
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        tensor = constant_value(node) if node.op_type == "Constant" else None
        if tensor is not None:
            known[node.output[0]] = numpy_helper.to_array(tensor)
        if node.op_type == "Resize" and node.domain == "":
            scales = known.get(node.input[2], np.ones(1)) if len(node.input) > 2 else np.ones(1)
            rules = {
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "ceil" if np.any(scales < 1) else "floor",
            }
            kept = [entry for entry in node.attribute if entry.name not in rules]
            made = [onnx.helper.make_attribute(name, rule) for name, rule in rules.items()]
            replace_field(node.attribute, [*kept, *made])
        for body in subgraphs(node):
            _keep_resize_rule(body)


def _scans(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Every Scan in `graph` and the graphs inside it, outer ones first."""
    return [node for node in all_nodes(graph.node) if node.op_type == "Scan"]


def _scan_over_samples(graph: onnx.GraphProto) -> None:
    """Write every Scan of opset 8 as one over the batch with one over the sequence in it.

    Both are put aside from the converter. Raises ValueError for one whose samples have lengths of
    their own.
    """
    for node in reversed(_scans(graph)):
        if node.input[0]:
            raise ValueError(f"{node.name or 'a Scan'} has a length for each sample")
        node.CopyFrom(_one_a_sample(node))


def _one_a_sample(node: onnx.NodeProto) -> onnx.NodeProto:
    values = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    body, scanned = values["body"], values["num_scan_inputs"]
    states = len(node.input) - 1 - scanned
    inner = helper.make_node(
        "Scan",
        [f"{info.name}/sample" for info in body.input],
        [f"{info.name}/sample" for info in body.output],
        f"{node.name}/sample",
        domain=_ASIDE,
        body=body,
        num_scan_inputs=scanned,
        scan_input_directions=values.get("directions", [0] * scanned),
    )
    samples = helper.make_graph(
        [inner],
        f"{body.name}/samples",
        [_outside(info, k >= states) for k, info in enumerate(body.input)],
        [_outside(info, k >= states) for k, info in enumerate(body.output)],
    )
    return helper.make_node(
        "Scan",
        list(node.input[1:]),
        list(node.output),
        node.name,
        domain=_ASIDE,
        body=samples,
        num_scan_inputs=len(node.input) - 1,
    )


def _outside(info: onnx.ValueInfoProto, sequence: bool) -> onnx.ValueInfoProto:
    """What the tensor `info` of a Scan's body is outside it: with an axis in front if scanned."""
    made = onnx.ValueInfoProto(name=f"{info.name}/sample")
    made.type.tensor_type.elem_type = info.type.tensor_type.elem_type
    if info.type.tensor_type.HasField("shape"):
        shape = made.type.tensor_type.shape
        if sequence:
            shape.dim.add()
        shape.dim.extend(info.type.tensor_type.shape.dim)
    return made
