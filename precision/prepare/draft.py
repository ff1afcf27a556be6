"""A copy of a model on which rewrites work: nodes, constants, who makes and who reads a tensor."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trtune.precision.graph.proto import (
    FreshNames,
    captured,
    copy_of,
    names_in,
    used_tensors,
    without_graph,
)
from trtune.precision.graph.view import GraphView, Model

if TYPE_CHECKING:
    from trtune.precision.plan.placement import Edge

Array = NDArray[Any]


class Draft:
    """Edits on a copy of `model`; `finish` gives it. Weights are copied only where they change."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.view = GraphView.of(model)
        self._nodes = [copy_of(node) for node in self.view.nodes]
        self._by_name = {node.name: node for node in self._nodes}
        self._values: dict[str, Array] = {}
        self._fresh = FreshNames(names_in(model.proto.graph)).new
        self._outputs = {output.name for output in model.proto.graph.output}
        self.changed = False

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self._model.opset

    def node(self, name: str) -> onnx.NodeProto:
        """The copy of a node, to be changed in place."""
        return self._by_name[name]

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that makes `tensor`, or None for inputs and initializers."""
        return next((node for node in self._nodes if tensor in node.output), None)

    def consumers(self, tensor: str) -> list[Edge]:
        """The (node, input) pairs that read `tensor`; a subgraph's reading counts as input -1.

        Nodes that only ask for its shape are not among them.
        """
        found = []
        for node in self._nodes:
            if node.op_type in ("Shape", "Size"):
                continue
            found += [(node.name, k) for k, name in enumerate(node.input) if name == tensor]
            if tensor in captured(node):
                found.append((node.name, -1))
        return found

    def is_output(self, tensor: str) -> bool:
        """Whether `tensor` is an output of the model."""
        return tensor in self._outputs

    def is_constant(self, tensor: str) -> bool:
        """Whether `tensor` is a float initializer, or one made here."""
        if tensor in self._values:
            return True
        held = self.view.initializers.get(tensor)
        return held is not None and held.data_type == onnx.TensorProto.FLOAT

    def constant(self, tensor: str) -> Array:
        """The value of an initializer."""
        return self._values[tensor] if tensor in self._values else self.view.constant(tensor)

    def set_constant(self, edge: Edge, value: Array) -> None:
        """Let a node read `value` at an input that is, or gets, a constant; float32."""
        node, index = self._by_name[edge[0]], edge[1]
        value = np.ascontiguousarray(value, np.float32)
        while len(node.input) <= index:
            node.input.append("")
        name = node.input[index]
        if not name:
            name = self._fresh(f"{node.name}/input{index}")
        elif self.consumers(name) != [edge] or self.is_output(name):
            name = self._fresh(f"{name}/prepared")
        node.input[index] = name
        self._values[name] = value
        self.changed = True

    def insert_behind(
        self, tensor: str, op: str, value: Array, what: str, edges: list[Edge]
    ) -> str:
        """A binary node of `tensor` and a constant, which `edges` read from now on; its result."""
        name = self._fresh(f"{tensor}/{what}")
        constant = self._fresh(f"{tensor}/{what}_by")
        self._values[constant] = np.ascontiguousarray(value, np.float32)
        node = onnx.helper.make_node(
            op, [tensor, constant], [name], name=self._fresh(f"{name}/{op}")
        )
        made = self.producer(tensor)
        place = 0 if made is None else self._nodes.index(made) + 1
        self._nodes.insert(place, node)
        self._by_name[node.name] = node
        for reader, index in edges:
            self._by_name[reader].input[index] = name
        self.changed = True
        return name

    def pad_behind(self, tensor: str, pads: list[int], value: float, edges: list[Edge]) -> str:
        """A Pad of `tensor` with `value`, which `edges` read from now on; its result. `pads` are
        ONNX's: what is put before each axis, then what is put behind each."""
        name = self._fresh(f"{tensor}/padded")
        sizes, constant = self._fresh(f"{name}/pads"), self._fresh(f"{name}/value")
        self._values[sizes] = np.array(pads, np.int64)
        self._values[constant] = np.array(value, np.float32)
        node = onnx.helper.make_node(
            "Pad", [tensor, sizes, constant], [name], name=self._fresh(f"{name}/Pad")
        )
        made = self.producer(tensor)
        self._nodes.insert(0 if made is None else self._nodes.index(made) + 1, node)
        self._by_name[node.name] = node
        for reader, index in edges:
            self._by_name[reader].input[index] = name
        self.changed = True
        return name

    def to_clip(self, name: str, low: float | None, high: float | None) -> None:
        """Make a Relu or Clip node a Clip with these bounds."""
        node = self._by_name[name]
        node.op_type = "Clip"
        del node.attribute[:]
        del node.input[1:]
        for bound, word in ((low, "low"), (high, "high")):
            key = ""
            if bound is not None:
                key = self._fresh(f"{name}/{word}")
                self._values[key] = np.array(bound, np.float32)
            node.input.append(key)
        while node.input and not node.input[-1]:
            del node.input[-1]
        self.changed = True

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return len(self._nodes)

    def finish(self) -> Model:
        """The rewritten model; the same one if nothing changed."""
        if not self.changed:
            return self._model
        proto = without_graph(self._model.proto)
        proto.graph.node.extend(self._nodes)
        used = used_tensors(proto.graph)
        source = self._model.proto.graph
        kept = (t for t in source.initializer if t.name in used and t.name not in self._values)
        proto.graph.initializer.extend(kept)
        proto.graph.initializer.extend(
            numpy_helper.from_array(value, name)
            for name, value in self._values.items()
            if name in used
        )
        made = {name for node in self._nodes for name in node.output}
        proto.graph.value_info.extend(info for info in source.value_info if info.name in made)
        digest = hashlib.sha256(self._model.sha256.encode())
        for node in self._nodes:
            digest.update(node.SerializeToString(deterministic=True))
        for name in sorted(self._values):
            digest.update(name.encode() + self._values[name].tobytes())
        return replace(self._model, proto=proto, sha256=digest.hexdigest())
