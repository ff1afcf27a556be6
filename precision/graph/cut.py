"""Cutting a model where onnxruntime lacks an operator, or where the user says that it ends.

TensorRT's plugins (EfficientNMS_TRT, a user's own) are nodes of an ONNX file that no other runtime
knows. What stands before them is calibrated, compared and tuned; the nodes themselves, and all
that depends on them, are kept as they are and put back into what is written for TensorRT.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from trtune.configs.errors import ModelError, did_you_mean
from trtune.precision.graph.opsets import converted, runtime_operators
from trtune.precision.graph.proto import (
    FreshNames,
    all_nodes,
    copy_of,
    default_opset,
    inputs_of,
    names_in,
    replace_field,
    used_tensors,
    without_weights,
)

ASIDE = "trtune.plugin"
"""The domain of default-domain nodes that ONNX does not know, until they are written again."""
SHOWN = 3
TYPO = 0.85
"""Likeness above which an unknown operator is taken for a misspelt one of ONNX."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What stands behind the cut.

    `nodes` and the `initializers` they read are those of the file (in the normalised model's
    opset), `reads` the tensors at the border, `inputs` and `outputs` all those of the file, in its
    order. `operators` are the ones that onnxruntime lacks.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    opsets: tuple[onnx.OperatorSetIdProto, ...]
    reads: tuple[str, ...]
    operators: tuple[str, ...]

    @property
    def note(self) -> str:
        """One sentence for reports."""
        what = ", ".join(self.operators[:SHOWN]) + (", ..." if len(self.operators) > SHOWN else "")
        return (
            f"cut before {what}, which onnxruntime does not have: calibrated, compared and tuned "
            f"up to {', '.join(self.reads)}; the {len(self.nodes)} nodes behind are put back into "
            "what is written for TensorRT"
        )


def set_plugins_aside(model: onnx.ModelProto) -> None:
    """Move default-domain nodes that ONNX does not know into a domain of their own, in place.

    Every domain that a node uses is imported then, as the checker asks. A name that is nearly
    that of an ONNX operator stays where it is: it is a mistake, and the checker says so.
    """
    known = {name for domain, name in runtime_operators() if domain == ""}
    imported = {entry.domain for entry in model.opset_import}
    functions = {(function.domain, function.name) for function in model.functions}
    for node in all_nodes(model.graph.node):
        own = ("", node.op_type) in functions
        if node.domain == "" and node.op_type not in known and not own and _is_plugin(node, known):
            node.domain = ASIDE
        if node.domain not in imported and node.domain:
            model.opset_import.append(helper.make_opsetid(node.domain, 1))
            imported.add(node.domain)


def _is_plugin(node: onnx.NodeProto, known: Iterable[str]) -> bool:
    if any(entry.name in ("plugin_version", "plugin_namespace") for entry in node.attribute):
        return True
    near = difflib.get_close_matches(node.op_type, known, n=1, cutoff=TYPO)
    return not near or abs(len(near[0]) - len(node.op_type)) > 1


def without_kernel(nodes: Iterable[onnx.NodeProto]) -> dict[str, str]:
    """Node -> operator, for the nodes that onnxruntime cannot run, or that hold such a one."""
    known = runtime_operators()
    found = {}
    for node in nodes:
        for inner in all_nodes([node]):
            if (inner.domain, inner.op_type) not in known:
                found[node.name] = inner.op_type
    return found


def cut_plugins(model: onnx.ModelProto, *, strict: bool = True) -> Tail | None:
    """Take everything from the operators on that onnxruntime lacks out of the normalised `model`.

    In place; its outputs are then those that do not depend on them, and what they read. If
    nothing is left, raises ModelError, or with `strict` False leaves the model whole.
    """
    graph = model.graph
    missing = without_kernel(graph.node)
    if not missing:
        return None
    behind = _behind(graph, missing)
    made = {name for node in behind for name in node.output}
    reads = _border(graph, behind, made)
    outputs, inputs = list(graph.output), list(graph.input)
    kept = [info for info in outputs if info.name not in made]
    present = {info.name for info in kept}
    infos = {info.name: info for info in graph.value_info}
    new = [
        infos.get(name) or onnx.ValueInfoProto(name=name) for name in reads if name not in present
    ]
    operators = tuple(dict.fromkeys(missing.values()))
    if not kept and not new and not strict:
        replace_field(graph.node, [_written(node) for node in graph.node])
        replace_field(model.opset_import, [e for e in model.opset_import if e.domain != ASIDE])
        return None
    if not kept and not new:
        raise ModelError(
            f"{', '.join(missing)} ({', '.join(operators)}) stands right behind the inputs, and "
            "onnxruntime does not have it: nothing is left that could be calibrated"
        )
    tail = Tail(
        nodes=tuple(_written(node) for node in behind),
        initializers=_constants(graph, behind),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        opsets=tuple(entry for entry in model.opset_import if entry.domain != ASIDE),
        reads=tuple(reads),
        operators=operators,
    )
    _keep_only(model, [*kept, *new])
    return tail


def _behind(graph: onnx.GraphProto, missing: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes named, and all that depend on them, in order."""
    wanted, made, found = set(missing), set[str](), []
    for node in graph.node:
        if node.name in wanted or not made.isdisjoint(inputs_of(node)):
            found.append(node)
            made.update(name for name in node.output if name)
    return found


def _border(
    graph: onnx.GraphProto, behind: Sequence[onnx.NodeProto], made: Iterable[str]
) -> list[str]:
    """What the nodes behind the cut read of the nodes before it."""
    computed = {name for node in graph.node for name in node.output if name}.difference(made)
    return list(dict.fromkeys(n for node in behind for n in inputs_of(node) if n in computed))


def _constants(
    graph: onnx.GraphProto, behind: Sequence[onnx.NodeProto]
) -> tuple[onnx.TensorProto, ...]:
    used = {name for node in behind for name in inputs_of(node)}
    return tuple(tensor for tensor in graph.initializer if tensor.name in used)


def _written(node: onnx.NodeProto) -> onnx.NodeProto:
    """`node` as it is in a file."""
    copy = copy_of(node)
    for inner in all_nodes([copy]):
        if inner.domain == ASIDE:
            inner.domain = ""
    return copy


def _keep_only(model: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto]) -> None:
    """Leave of `model` what `outputs` need; onnx-graphsurgeon says which nodes those are."""
    graph = model.graph
    surgeon = gs.import_onnx(without_weights(model))
    tensors = surgeon.tensors()
    surgeon.outputs = [tensors[info.name] for info in outputs]
    surgeon.cleanup(remove_unused_graph_inputs=True)
    names = {node.name for node in surgeon.nodes}
    replace_field(graph.node, [node for node in graph.node if node.name in names])
    replace_field(graph.output, outputs)
    used = used_tensors(graph)
    made = {name for node in graph.node for name in node.output}
    ends = {info.name for info in outputs}
    replace_field(graph.input, [info for info in graph.input if info.name in used])
    replace_field(graph.initializer, [t for t in graph.initializer if t.name in used])
    replace_field(
        graph.value_info, [i for i in graph.value_info if i.name in made and i.name not in ends]
    )
    domains = {node.domain for node in all_nodes(graph.node)} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in domains]
    replace_field(model.opset_import, kept)


def end_at(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make the tensors `names` the outputs of the normalised `model`, in that order, in place.

    What only other outputs need is left out. Raises ModelError for a name that no node makes, and
    for a tensor behind an operator that onnxruntime lacks.
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output if name}
    infos = {info.name: info for info in (*graph.value_info, *graph.output)}
    for name in names:
        if name not in made:
            raise ModelError(
                f"model.outputs: no node makes a tensor {name!r}{did_you_mean(name, made)} "
                "(`trtune inspect MODEL --json` lists the nodes)"
            )
    _keep_only(model, [infos.get(name) or onnx.ValueInfoProto(name=name) for name in names])


def whole(lowered: onnx.ModelProto, tail: Tail) -> onnx.ModelProto:
    """`lowered`, which was made of the cut model, with the nodes behind the cut put back.

    Inputs and outputs are those of the file again; names that the lowering has taken in between
    are changed in the tail. Raises ValueError if the tail has no form in the lowered opset.
    """
    opset = default_opset(lowered)
    nodes, initializers, opsets = _in_opset(tail, opset or 0)
    model = onnx.ModelProto()
    model.CopyFrom(lowered)
    graph = model.graph
    taken = names_in(graph)
    fixed = {info.name for info in (*tail.outputs, *tail.inputs)}.union(tail.reads)
    fixed.update(tensor.name for tensor in initializers)
    names = FreshNames(taken | fixed)
    renamed: dict[str, str] = {}
    for node in nodes:
        for name in node.output:
            if name in taken and name not in fixed:
                renamed[name] = names.new(name)
        if node.name in taken:
            node.name = names.new(node.name)
    for node in nodes:
        for field in (node.input, node.output):
            replace_field(field, [renamed.get(name, name) for name in field])
    present = {tensor.name for tensor in graph.initializer}
    graph.node.extend(nodes)
    graph.initializer.extend(t for t in initializers if t.name not in present)
    replace_field(graph.input, tail.inputs)
    replace_field(graph.output, tail.outputs)
    domains = {entry.domain for entry in model.opset_import}
    model.opset_import.extend(entry for entry in opsets if entry.domain not in domains)
    return model


def _in_opset(
    tail: Tail, opset: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[onnx.OperatorSetIdProto]]:
    """Copies of the tail's nodes and constants in the default opset `opset`."""
    nodes, opsets = [copy_of(node) for node in tail.nodes], list(tail.opsets)
    before = next((entry.version for entry in opsets if entry.domain == ""), opset)
    if before == opset or not any((n.domain, n.op_type) in runtime_operators() for n in nodes):
        return nodes, list(tail.initializers), opsets
    for node in nodes:
        if (node.domain, node.op_type) not in runtime_operators() and not node.domain:
            node.domain = ASIDE
    reads = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tail.reads
    ]
    graph = helper.make_graph(
        nodes, "tail", [*reads, *tail.inputs], tail.outputs, tail.initializers
    )
    opsets.append(helper.make_opsetid(ASIDE, 1))
    model = helper.make_model(graph, opset_imports=opsets)
    found = converted(model, opset)
    made = [_written(node) for node in found.graph.node]
    kept = [entry for entry in found.opset_import if entry.domain != ASIDE]
    return made, list(found.graph.initializer), kept


def ending_at(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of the file `proto` as it is, ended at the tensors `names`: to compare with."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    made = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    wanted: set[int] = set()
    waiting = list(names)
    while waiting:
        place = made.get(waiting.pop())
        if place is not None and place not in wanted:
            wanted.add(place)
            waiting.extend(inputs_of(graph.node[place]))
    replace_field(graph.node, [node for k, node in enumerate(graph.node) if k in wanted])
    replace_field(graph.output, [onnx.ValueInfoProto(name=name) for name in names])
    used = used_tensors(graph)
    replace_field(graph.input, [info for info in graph.input if info.name in used])
    replace_field(graph.initializer, [t for t in graph.initializer if t.name in used])
    return model
