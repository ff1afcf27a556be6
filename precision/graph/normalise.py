"""An ONNX graph in the one form that the rest of the package reads: names, order, constants, opset.

Every step changes the proto it is given and returns a sentence for the report, or None when there
was nothing to do. `normalise` runs them all on a copy.
"""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np
import onnx
import onnx.inliner
from onnx import numpy_helper

from trtune.configs.errors import ModelError
from trtune.precision.graph.proto import (
    DEFAULT_DOMAINS,
    captured,
    copy_model,
    default_opset,
    is_external,
    is_heavy,
    replace_field,
    subgraphs,
    without_weights,
)

OLDEST_OPSET = 7
"""Older operators have shapes and broadcasting of their own, which nothing here knows."""
NEWEST_OPSET = 23
QDQ_OPSET = 13
"""The first opset whose QuantizeLinear has one scale a channel."""
RESIZE_OPSET = 11
"""The first opset whose Resize says where it samples."""


def normalise(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A copy of `proto` in normal form, and what was changed.

    Nodes are sorted and uniquely named; constants are initializers, and no initializer is an
    input; the default opset is between 13 and 23; `value_info` holds what shape inference could
    find. Inputs and outputs keep names, types, shapes and order; the values computed stay the
    same. Tensors stored in external files stay there.

    Raises ModelError if the graph is invalid, or its opset cannot be handled.
    """
    model = copy_model(proto)
    shorten_domains(model)
    notes = [
        inline_functions(model),
        drop_initializer_inputs(model),
        sort_nodes(model),
    ]
    check(model)
    notes += [
        upgrade_opset(model),
        fold_constants(model),
        name_nodes(model),
        infer_shapes(model),
    ]
    return model, tuple(note for note in notes if note)


def shorten_domains(model: onnx.ModelProto) -> None:
    """Write the default operator set's domain as "", which the checker alone understands."""
    for entry in (*model.opset_import, *model.graph.node):
        if entry.domain in DEFAULT_DOMAINS:
            entry.domain = ""


def check(model: onnx.ModelProto) -> None:
    """Raise ModelError with the checker's own words if `model` is not valid ONNX."""
    opset = default_opset(model)
    if opset is None:
        raise ModelError("the model imports no default operator set, so its nodes have no meaning")
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(
            f"the model uses opset {opset}; {OLDEST_OPSET} to {NEWEST_OPSET} can be handled. "
            "Export it again with an `opset_version` in that range"
        )
    try:
        _check_structure(without_weights(model))
        for tensor in model.graph.initializer:
            if is_heavy(tensor) and not is_external(tensor):
                onnx.checker.check_tensor(tensor)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the model is not valid ONNX: {reason[:500]}") from error


def _check_structure(light: onnx.ModelProto) -> None:
    """The checker, but outputs need no shape: runtimes do not ask for one, inference finds it."""
    for info in (*light.graph.input, *light.graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(light)


def inline_functions(model: onnx.ModelProto) -> str | None:
    """Replace calls of the model's own functions by their nodes."""
    count = len(model.functions)
    if not count:
        return None
    weights = [tensor for tensor in model.graph.initializer if is_heavy(tensor)]
    light = without_weights(model)
    light.functions.extend(model.functions)
    inlined = onnx.inliner.inline_local_functions(light)
    _restore(model, inlined, weights)
    del model.functions[:]
    return f"{count} model-local functions inlined"


def _restore(
    model: onnx.ModelProto, light: onnx.ModelProto, weights: list[onnx.TensorProto]
) -> None:
    """Give `model` the nodes of the changed copy `light`; inputs and outputs stay."""
    graph = model.graph
    replace_field(graph.node, light.graph.node)
    replace_field(graph.value_info, light.graph.value_info)
    replace_field(graph.initializer, [*light.graph.initializer, *weights])
    replace_field(model.opset_import, light.opset_import)


def drop_initializer_inputs(model: onnx.ModelProto) -> str | None:
    """Take initializers out of the graph's inputs, as IR version 4 allows."""
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = [i for i in model.graph.input if i.name not in constants]
    dropped = len(model.graph.input) - len(kept)
    model.ir_version = max(model.ir_version, 4)
    if not dropped:
        return None
    replace_field(model.graph.input, kept)
    return f"{dropped} initializers were also inputs; now they are constants"


def sort_nodes(model: onnx.ModelProto) -> str | None:
    """Put every node behind the nodes it reads from, otherwise keeping the order.

    Raises ModelError if the graph has a cycle.
    """
    nodes = list(model.graph.node)
    producer = {out: k for k, node in enumerate(nodes) for out in node.output if out}
    waiting = [0] * len(nodes)
    users: list[list[int]] = [[] for _ in nodes]
    for k, node in enumerate(nodes):
        sources = {producer[n] for n in (*node.input, *captured(node)) if n in producer}
        waiting[k] = len(sources)
        for source in sources:
            users[source].append(k)
    ready = [k for k, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for user in users[k]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, user)
    if len(order) < len(nodes):
        stuck = sorted(set(range(len(nodes))) - set(order))[:3]
        names = ", ".join(nodes[k].name or f"{nodes[k].op_type}" for k in stuck)
        raise ModelError(f"the graph has a cycle (see {names}), so it can never run")
    if order == list(range(len(nodes))):
        return None
    replace_field(model.graph.node, [nodes[k] for k in order])
    return "nodes sorted, so that each stands behind those it reads from"


def upgrade_opset(model: onnx.ModelProto) -> str | None:
    """Convert an opset below 13 to 13, the lowest whose Q/DQ have one scale a channel."""
    opset = default_opset(model)
    assert opset is not None
    if opset >= QDQ_OPSET:
        return None
    weights = [tensor for tensor in model.graph.initializer if is_heavy(tensor)]
    light = without_weights(model)
    light.ir_version = max(light.ir_version, 7)
    try:
        converted = onnx.version_converter.convert_version(light, QDQ_OPSET)
        _check_structure(converted)
    except (RuntimeError, ValueError, IndexError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the model uses opset {opset}, and quantization needs {QDQ_OPSET}; converting it "
            f"failed: {reason[:300]}. Export it again with `opset_version={QDQ_OPSET}` or later"
        ) from error
    _restore(model, converted, weights)
    model.ir_version = max(model.ir_version, 7)
    if opset < RESIZE_OPSET:
        _keep_resize_rule(model.graph)
    sort_nodes(model)
    return f"opset {opset} upgraded to {QDQ_OPSET}"


def _keep_resize_rule(graph: onnx.GraphProto) -> None:
    """Make every Resize sample where Upsample and the first Resize did.

    The converter leaves it at opset 11's default, half_pixel, which shifts the picture. Nearest
    neighbours are rounded down when enlarging and up when shrinking, as onnxruntime does.
    """
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" else None
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


def fold_constants(model: onnx.ModelProto) -> str | None:
    """Turn Constant nodes, and Identity nodes of constants, into initializers.

    Those whose value is an output of the graph stay, and so do those inside subgraphs.
    """
    graph = model.graph
    outputs = {output.name for output in graph.output}
    constants = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    counts: Counter[str] = Counter()
    kept = []
    for node in graph.node:
        tensor = None
        if node.domain == "" and node.output and node.output[0] not in outputs:
            if node.op_type == "Constant":
                tensor = _constant_tensor(node)
            elif node.op_type == "Identity":
                source = renamed.get(node.input[0], node.input[0])
                if source in constants:
                    renamed[node.output[0]] = source
                    counts["Identity"] += 1
                    continue
        if tensor is None:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        constants.add(tensor.name)
        graph.initializer.append(tensor)
        counts["Constant"] += 1
    if not counts:
        return None
    for node in kept:
        _rename_inputs(node, renamed)
    replace_field(graph.node, kept)
    parts = [f"{count} {op}" for op, count in sorted(counts.items())]
    return f"{' and '.join(parts)} nodes became initializers"


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node, or None if it is sparse."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
        return tensor
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.asarray(value, np.float32))
    if attribute.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.asarray(value, np.int64))
    if attribute.name in ("value_string", "value_strings"):
        return numpy_helper.from_array(np.asarray(value, object))
    return None


def _rename_inputs(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for k, name in enumerate(node.input):
        if name in renamed:
            node.input[k] = renamed[name]
    for body in subgraphs(node):
        for child in body.node:
            _rename_inputs(child, renamed)


def name_nodes(model: onnx.ModelProto) -> str | None:
    """Give every node a name of its own: TensorRT and the user's pins speak of nodes by name."""
    nodes = model.graph.node
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    unnamed = repeated = 0
    for node in nodes:
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        unnamed += not node.name
        repeated += bool(node.name)
        output = next((name for name in node.output if name), "")
        stem = node.name or f"{node.op_type}_{output}"
        name, k = stem, 0
        while name in taken:
            k += 1
            name = f"{stem}_{k}"
        node.name = name
        taken.add(name)
        seen.add(name)
    parts = [f"{unnamed} unnamed"] * bool(unnamed) + [f"{repeated} repeated"] * bool(repeated)
    return f"node names made unique: {', '.join(parts)}" if parts else None


def infer_shapes(model: onnx.ModelProto) -> str | None:
    """Fill `value_info` with every type and shape that can be known without running the model."""
    graph = model.graph
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"shape inference failed, so some shapes are unknown: {reason[:200]}"
    known = {info.name: info for info in inferred.value_info}
    outputs = {output.name for output in graph.output}
    inner = [name for node in graph.node for name in node.output if name not in outputs]
    replace_field(graph.value_info, [known[name] for name in inner if name in known])
    for output, found in zip(graph.output, inferred.output, strict=True):
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(found)
    return None
