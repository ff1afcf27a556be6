"""Strong typing: every node in the float type that its plan names, and Casts only at the borders.

A tensor keeps its name in the type that its producer gives it, except where the outside sees it:
outputs of the model, and tensors that the body of an If or Loop reads, are float32 under their own
name. Each tensor is cast at most once to each type, always from what its producer made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.configs.errors import ModelError, TrtuneError
from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.proto import (
    FreshNames,
    attribute,
    captured,
    copy_model,
    copy_of,
    default_opset,
    names_in,
    replace_field,
    used_tensors,
    without_graph,
    without_weights,
)
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan import float8
from trtune.precision.plan.half_types import HALVES, QDQ, Half, Slots, half_slots, to_half
from trtune.precision.plan.plan import PrecisionPlan

QDQ_HALF_OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear have half scales."""
ANY_TYPE = {"Shape", "Size", "Cast", "ArgMax", "ArgMin", "IsNaN", "NonZero"}
"""Operators that give the same for a half as for the float32 it stands for."""

READS_ANY = ANY_TYPE | {"QuantizeLinear"}

TENSOR_TYPES = {"fp32": onnx.TensorProto.FLOAT} | {k: h.tensor_type for k, h in HALVES.items()}
WORDS = {"fp32": "float32"} | {k: h.word for k, h in HALVES.items()}


def needed_opset(view: GraphView, plan: PrecisionPlan) -> int:
    """The lowest opset, at least that of the model, in which `plan` can be written."""
    opset = default_opset(view.proto)
    assert opset is not None
    halves = plan.halves
    quantized = bool(plan.quantized_nodes) or any(node.op_type in QDQ for node in view.nodes)
    least = [HALVES[name].opset for name in halves] + [QDQ_HALF_OPSET] * bool(halves and quantized)
    least += [float8.OPSET] * bool(plan.fp8_nodes)
    return max([opset, *least])


def raise_opset(model: Model, opset: int) -> Model:
    """`model` in `opset`, with the same nodes under the same names; itself if it is there already.

    Raises ModelError if onnx's converter cannot do it.
    """
    if model.opset >= opset:
        return model
    light = without_weights(model.proto)
    light.ir_version = max(
        light.ir_version, helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    )
    try:
        converted = onnx.version_converter.convert_version(light, opset)
        proto = _with_weights(converted, model.proto)
        raised = model_from_proto(
            proto,
            model.path,
            sha256=model.sha256,
            external_dir=model.external_dir,
            fold="none",
        )
        names = {node.name for node in raised.proto.graph.node}
        changed = {node.name for node in model.proto.graph.node} ^ names
        if changed:
            raise ValueError(f"it puts others in the place of some nodes ({min(changed)!r})")
    except (RuntimeError, ValueError, IndexError, ModelError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{model.path} uses opset {model.opset}, and these precisions need {opset}; converting "
            f"it failed: {reason[:300]}. Export it again with `opset_version={opset}` or later"
        ) from error
    return replace(raised, inputs=model.inputs, outputs=model.outputs)


def _with_weights(light: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """`light`, which came from `source` without its heavy weights, with those again."""
    full = copy_model(light)
    kept = {tensor.name for tensor in light.graph.initializer}
    full.graph.initializer.extend(t for t in source.graph.initializer if t.name not in kept)
    for part in ("input", "output"):
        replace_field(getattr(full.graph, part), getattr(source.graph, part))
    return full


def insert_casts(
    proto: onnx.ModelProto, types: Mapping[str, str], *, external_dir: Path | None = None
) -> onnx.ModelProto:
    """A copy of `proto` in which each node computes in the float type that `types` names.

    `types` maps node names to fp32, fp16 or bf16; those that it lacks stay float32. Constants are
    converted for the nodes that read them in half. QuantizeLinear reads what there is, and
    DequantizeLinear gives what its readers want, each with scales of that type. Inputs and outputs
    keep name, type and shape.

    Raises ModelError if a constant exceeds the range of its type, TrtuneError if a node cannot
    take the type named for it.
    """
    return _Typing(proto, types, external_dir).finish()


class _Typing:
    def __init__(
        self, proto: onnx.ModelProto, types: Mapping[str, str], external_dir: Path | None
    ) -> None:
        self._proto = proto
        self._view = GraphView(proto, external_dir)
        self._types = types
        opset = default_opset(proto)
        assert opset is not None
        self._opset = opset
        self._dtypes = _all_dtypes(self._view)
        self._outside = set(self._view.graph_outputs)
        for node in self._view.nodes:
            self._outside.update(captured(node))
        self._fresh = FreshNames(names_in(proto.graph)).new
        self._names: dict[tuple[str, str], str] = {}  # (tensor, type) -> its name in that type
        self._native: dict[str, str] = {}  # tensor -> the type that its producer gives it
        self._changed: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._slots = {node.name: self._slots_of(node) for node in self._view.nodes}
        self._wanted = self._wanted_types()

    def finish(self) -> onnx.ModelProto:
        """The typed model."""
        for name in self._view.graph_inputs:
            self._native[name] = "fp32"
            self._names[name, "fp32"] = name
        for node in self._view.nodes:
            self._add(node)
        return self._assembled()

    def _slots_of(self, node: onnx.NodeProto) -> Slots:
        """Which inputs and outputs of `node` are to be half."""
        wanted = self._types.get(node.name, "fp32")
        if wanted not in HALVES or node.op_type in QDQ:
            return Slots()
        slots = half_slots(node, self._dtypes, self._opset, HALVES[wanted])
        if slots.refusal:
            raise TrtuneError(
                f"node {node.name!r} is planned in {wanted}, but {slots.refusal}; "
                "make the plan again for this model"
            )
        return slots

    def _wanted_types(self) -> dict[str, list[str]]:
        """The types in which each tensor has to be there for its readers; float32 first."""
        wanted: dict[str, set[str]] = {name: {"fp32"} for name in self._outside}
        for node in self._view.nodes:
            for index, name in enumerate(node.input):
                if name and node.op_type not in READS_ANY:
                    wanted.setdefault(name, set()).add(self._read_type(node, index))
        return {name: [t for t in TENSOR_TYPES if t in types] for name, types in wanted.items()}

    def _read_type(self, node: onnx.NodeProto, index: int) -> str:
        if index in self._slots[node.name].inputs:
            return self._types[node.name]
        return "fp32"

    def _add(self, node: onnx.NodeProto) -> None:
        if node.op_type == "DequantizeLinear" and self._dtypes[node.output[0]] == "float32":
            self._dequantize(node)
            return
        made = copy_of(node)
        for index, name in enumerate(node.input):
            if self._dtypes.get(name) == "float32":
                made.input[index] = self._read(node, index, name)
        self._set_type(made)
        self._nodes.append(made)
        for index, name in enumerate(node.output):
            if self._dtypes.get(name) == "float32":
                half = index in self._slots[node.name].outputs
                self._made(made, index, self._types[node.name] if half else "fp32")

    def _read(self, node: onnx.NodeProto, index: int, name: str) -> str:
        """The name under which `node` reads the float tensor `name`."""
        if node.op_type == "QuantizeLinear" and self._opset >= QDQ_HALF_OPSET:
            return self._as_type(name, self._native.get(node.input[0], "fp32"))
        if node.op_type in ANY_TYPE and name in self._native:
            return self._as_type(name, self._native[name])
        return self._as_type(name, self._read_type(node, index))

    def _made(self, made: onnx.NodeProto, index: int, kind: str) -> None:
        """Note that `made` gives its output in the type `kind`."""
        name = made.output[index]
        self._native[name] = kind
        if kind != "fp32" and name in self._outside:
            made.output[index] = self._fresh(f"{name}/{WORDS[kind]}")
            self._names[name, kind] = made.output[index]
            self._cast(made.output[index], name, name, "fp32")
        else:
            self._names[name, kind] = name
        if kind != "fp32":
            self._changed[made.output[index]] = TENSOR_TYPES[kind]

    def _as_type(self, name: str, kind: str) -> str:
        """The name of the tensor `name` in the type `kind`; made here if there is none yet."""
        if (name, kind) not in self._names:
            if name not in self._native:  # an initializer, or what a body's node does not show
                self._names[name, kind] = self._constant(name, kind)
            else:
                target = self._fresh(f"{name}/{WORDS[kind]}")
                self._cast(self._names[name, self._native[name]], target, name, kind)
        return self._names[name, kind]

    def _cast(self, source: str, target: str, tensor: str, kind: str) -> None:
        shielded = kind == "fp32" and self._is_normalised(tensor)
        made = self._fresh(f"{target}/unshielded") if shielded else target
        node = helper.make_node(
            "Cast", [source], [made], name=self._fresh(f"{tensor}/Cast"), to=TENSOR_TYPES[kind]
        )
        self._nodes.append(node)
        if shielded:
            name = self._fresh(f"{tensor}/Shield")
            self._nodes.append(helper.make_node("Max", [made], [target], name=name))
        self._names[tensor, kind] = target

    def _is_normalised(self, tensor: str) -> bool:
        """Whether a mean is taken of `tensor` and subtracted from it.

        onnxruntime makes one node of a layer normalisation in float32 and of the Cast before it,
        whose data and scale then have different types: it cannot load that. A Max of one tensor
        keeps them apart; TensorRT drops it.
        """
        edges = self._view.consumers.get(tensor, ())
        readers = {self._view.by_name[name].op_type for name, _ in edges}
        return {"ReduceMean", "Sub"} <= readers

    def _dequantize(self, node: onnx.NodeProto) -> None:
        """`node` once for each type that its result is read in; a Cast behind it would keep
        TensorRT from fusing it with what reads it."""
        tensor = node.output[0]
        kinds = self._wanted.get(tensor, []) if self._opset >= QDQ_HALF_OPSET else []
        for index, kind in enumerate(kinds or ["fp32"]):
            made = copy_of(node)
            made.input[1] = self._as_type(node.input[1], kind)
            if index:
                made.name = self._fresh(f"{tensor}/DequantizeLinear")
                made.output[0] = self._fresh(f"{tensor}/{WORDS[kind]}")
            for entry in made.attribute:
                if entry.name == "output_dtype" and entry.i:
                    entry.i = TENSOR_TYPES[kind]
            self._nodes.append(made)
            self._names[tensor, kind] = made.output[0]
            self._changed[made.output[0]] = TENSOR_TYPES[kind]
            self._native.setdefault(tensor, kind)

    def _set_type(self, made: onnx.NodeProto) -> None:
        """Change the attribute that says what a Cast or ConstantOfShape gives."""
        if not self._slots[made.name].outputs:
            return
        half = HALVES[self._types[made.name]]
        for entry in made.attribute:
            if made.op_type == "Cast" and entry.name == "to":
                entry.i = half.tensor_type
            elif made.op_type == "ConstantOfShape" and entry.name == "value":
                value = numpy_helper.to_array(entry.t)
                entry.t.CopyFrom(numpy_helper.from_array(_converted(value, half, made.name)))
        if made.op_type == "ConstantOfShape" and attribute(made, "value") is None:
            zero = numpy_helper.from_array(np.zeros(1, half.dtype))
            made.attribute.append(helper.make_attribute("value", zero))

    def _constant(self, name: str, kind: str) -> str:
        """The initializer `name`, or its copy in a half type."""
        if kind == "fp32" or name not in self._view.initializers:
            return name
        half = HALVES[kind]
        copy = self._fresh(f"{name}/{half.word}")
        value = _converted(self._view.constant(name), half, name)
        self._constants.append(numpy_helper.from_array(value, copy))
        return copy

    def _assembled(self) -> onnx.ModelProto:
        model = without_graph(self._proto)
        graph, old = model.graph, self._proto.graph
        graph.node.extend(self._nodes)
        made = {name for node in self._nodes for name in node.output}
        for info in old.value_info:
            if info.name in made:
                kept = graph.value_info.add()
                kept.CopyFrom(info)
                if info.name in self._changed:
                    kept.type.tensor_type.elem_type = self._changed[info.name]
        used = used_tensors(graph)
        entries = [*old.initializer, *self._constants]
        graph.initializer.extend(entry for entry in entries if entry.name in used)
        return model


def _all_dtypes(view: GraphView) -> dict[str, str]:
    """NumPy type names, also of what Q/DQ pairs make, which have no value_info."""
    dtypes = dict(view.dtypes)
    for node in view.nodes:
        if node.op_type in QDQ and node.output[0] not in dtypes:
            source = node.input[1] if node.op_type == "DequantizeLinear" else (*node.input, "")[2]
            dtypes[node.output[0]] = dtypes.get(source, "uint8")
    return dtypes


def _converted(value: NDArray[Any], half: Half, name: str) -> NDArray[Any]:
    """`value` in a half type; raises ModelError if that makes a finite number infinite."""
    found = to_half(value, half)
    if np.isinf(found).sum() > np.isinf(value).sum():
        raise ModelError(
            f"constant {name!r} reaches {np.abs(value[np.isfinite(value)]).max():g}, and "
            f"{half.word} ends at {half.max:g}: the nodes that read it have to stay fp32 "
            "(`precision.pin`)"
        )
    return found
