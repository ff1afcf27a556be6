"""An ONNX graph in the one form that the rest of the package reads: names, order, constants, opset.

Every step changes the proto it is given and returns a sentence for the report, or None when there
was nothing to do. `normalise` runs them all on a copy.
"""

from __future__ import annotations

import heapq
from collections import Counter

import onnx
import onnx.inliner
from onnx import numpy_helper

from trtune.configs.errors import ModelError
from trtune.precision.graph.cut import set_plugins_aside
from trtune.precision.graph.fold import fold_constants
from trtune.precision.graph.opsets import (
    OLDEST_OPSET,
    QDQ_OPSET,
    converted,
    declare_opset,
    lowered_opset,
    newest_opset,
    runnable_opset,
)
from trtune.precision.graph.proto import (
    DEFAULT_DOMAINS,
    all_nodes,
    all_tensors,
    captured,
    copy_model,
    default_opset,
    infer_shapes,
    is_external,
    is_heavy,
    replace_field,
    subgraphs,
    tensor_bytes,
    without_weights,
)

TYPES = frozenset(onnx.TensorProto.DataType.values())


def normalise(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A copy of `proto` in normal form, and what was changed.

    Nodes are sorted and uniquely named; constants are initializers, and no initializer is an
    input; the default opset is 13 or newer, and 23 at most where no operator has changed since;
    `value_info` holds what shape inference could find; a dimension is above 0 or free. Inputs and
    outputs keep names, types and order; the values computed stay the same. Tensors stored in
    external files stay there.

    Raises ModelError if the graph is invalid, or its opset cannot be handled.
    """
    model = copy_model(proto)
    check_words(model.graph)
    shorten_domains(model)
    name_graphs(model.graph)
    set_plugins_aside(model)
    notes = [
        free_dimensions(model),
        inline_functions(model),
        drop_initializer_inputs(model),
        sort_nodes(model),
    ]
    check(model)
    notes += [
        settle_opset(model),
        fold_constants(model),
        name_nodes(model),
        infer_shapes(model),
    ]
    return model, tuple(note for note in notes if note)


def check_words(graph: onnx.GraphProto) -> None:
    """Raise ModelError for names that are no text, types that there are not, and small constants
    whose values are not as many as their shape says: the checker passes over them."""
    for node in all_nodes(graph.node):
        words = (node.name, node.op_type, node.domain, *node.input, *node.output)
        wrong = next((word for word in words if not isinstance(word, str)), None)
        if wrong is not None:
            raise ModelError(f"the model is not valid ONNX: a name is not UTF-8: {wrong!r}")
    for info in (*graph.input, *graph.output, *graph.value_info):
        kind = info.type.tensor_type.elem_type
        if kind not in TYPES or not isinstance(info.name, str):
            raise ModelError(f"the model is not valid ONNX: {info.name!r} has the type {kind}")
    for tensor in all_tensors(graph):
        if tensor.data_type not in TYPES or not tensor.data_type:
            raise ModelError(
                f"the model is not valid ONNX: constant {tensor.name!r} has the type "
                f"{tensor.data_type}"
            )
        _check_values(tensor)


def shorten_domains(model: onnx.ModelProto) -> None:
    """Write the default operator set's domain as "", which the checker alone understands."""
    for entry in (*model.opset_import, *model.graph.node):
        if entry.domain in DEFAULT_DOMAINS:
            entry.domain = ""


def name_graphs(graph: onnx.GraphProto) -> None:
    """Give `graph`, and those inside it, a name: the checker asks for one, runtimes do not."""
    graph.name = graph.name or "graph"
    for node in graph.node:
        for body in subgraphs(node):
            name_graphs(body)


def free_dimensions(model: onnx.ModelProto) -> str | None:
    """Leave dimensions of inputs and outputs open that are -1 or 0, as PaddlePaddle writes them."""
    graph = model.graph
    count = 0
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 1:
                dim.ClearField("dim_value")
                count += 1
    return f"{count} dimensions that were -1 or 0 are free" if count else None


def check(model: onnx.ModelProto) -> None:
    """Raise ModelError with the checker's own words if `model` is not valid ONNX."""
    opset = default_opset(model)
    if opset is None:
        raise ModelError("the model imports no default operator set, so its nodes have no meaning")
    if not OLDEST_OPSET <= runnable_opset(model.graph.node, opset) <= newest_opset():
        raise ModelError(
            f"the model uses opset {opset}; {OLDEST_OPSET} to {newest_opset()} can be handled. "
            "Export it again with an `opset_version` in that range"
        )
    for node in all_nodes(model.graph.node):
        if node.op_type == "Constant" and not node.domain and not node.attribute:
            raise ModelError(
                f"the model is not valid ONNX: Constant node {node.name!r} has no value"
            )
    try:
        _check_structure(without_weights(model))
        for tensor in model.graph.initializer:
            if is_heavy(tensor) and not is_external(tensor):
                onnx.checker.check_tensor(tensor)
                _check_length(tensor)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the model is not valid ONNX: {reason[:500]}") from error


def _check_length(tensor: onnx.TensorProto) -> None:
    """Raise ValueError if raw data is not as long as the shape says; older checkers do not look."""
    needed = tensor_bytes(tensor)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
        raise ValueError(f"tensor {tensor.name!r} has {len(tensor.raw_data)} bytes, not {needed}")


def _check_values(tensor: onnx.TensorProto) -> None:
    """Raise ModelError if the values of a small `tensor` are not as many as its shape says."""
    if is_heavy(tensor):
        return
    try:
        numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the model is not valid ONNX: constant {tensor.name!r} of shape "
            f"{list(tensor.dims)}: {reason[:200]}"
        ) from error


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


def settle_opset(model: onnx.ModelProto) -> str | None:
    """Bring the default opset to 13, the lowest whose Q/DQ have one scale a channel, if it is
    older; to the newest that is known here if it is newer and no operator has changed since."""
    opset = default_opset(model)
    assert opset is not None
    if opset >= QDQ_OPSET:
        return _declare_lower(model, opset)
    weights = [tensor for tensor in model.graph.initializer if is_heavy(tensor)]
    light = without_weights(model)
    light.ir_version = max(light.ir_version, 7)
    try:
        found = converted(light, QDQ_OPSET)
        _check_structure(found)
    except (RuntimeError, ValueError, IndexError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the model uses opset {opset}, and quantization needs {QDQ_OPSET}; converting it "
            f"failed: {reason[:300]}. Export it again with `opset_version={QDQ_OPSET}` or later"
        ) from error
    _restore(model, found, weights)
    model.ir_version = max(model.ir_version, 7)
    sort_nodes(model)
    return f"opset {opset} upgraded to {QDQ_OPSET}"


def _declare_lower(model: onnx.ModelProto, opset: int) -> str | None:
    lower = lowered_opset(model.graph.node, opset)
    if lower == opset:
        return None
    light = without_weights(model)
    declare_opset(light, lower)
    try:
        _check_structure(light)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError):
        return None  # a type that came after it
    declare_opset(model, lower)
    return f"opset {opset} declared as {lower}: no operator of the model has changed in between"


def name_nodes(model: onnx.ModelProto) -> str | None:
    """Give every node a name of its own: TensorRT and the user's pins speak of nodes by name."""
    _name_bodies(model.graph)
    nodes = model.graph.node
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    numbers: Counter[str] = Counter()  # names are only ever taken, so no number comes free again
    unnamed = repeated = 0
    for node in nodes:
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        unnamed += not node.name
        repeated += bool(node.name)
        output = next((name for name in node.output if name), "")
        stem = node.name or f"{node.op_type}_{output}"
        name = stem
        while name in taken:
            numbers[stem] += 1
            name = f"{stem}_{numbers[stem]}"
        node.name = name
        taken.add(name)
        seen.add(name)
    parts = [f"{unnamed} unnamed"] * bool(unnamed) + [f"{repeated} repeated"] * bool(repeated)
    return f"node names made unique: {', '.join(parts)}" if parts else None


def _name_bodies(graph: onnx.GraphProto) -> None:
    """Let no two nodes of a body have one name: onnxruntime refuses such a graph, nobody else
    speaks of them."""
    for node in graph.node:
        for body in subgraphs(node):
            counts = Counter(child.name for child in body.node if child.name)
            for child in body.node:
                if counts[child.name] > 1:
                    child.ClearField("name")
            _name_bodies(body)
