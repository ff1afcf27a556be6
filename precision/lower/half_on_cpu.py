"""Half precision on a CPU: the same numbers in float32.

onnxruntime's CPU provider computes most half operators in float32 and leaves out the rounding
between them, so that a tensor beyond 65504 stays finite there and is infinite on a GPU. Here every
tensor that a half operator makes is rounded to the half type explicitly; sums inside an operator
are in float32, as in TensorRT.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtune.configs.errors import ModelError
from trtune.precision.graph.operators import MOVES
from trtune.precision.graph.proto import (
    FreshNames,
    captured,
    copy_model,
    copy_of,
    infer_shapes,
    names_in,
    subgraphs,
    without_graph,
)
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_types import HALF_WORDS, HALVES

UNROUNDED = MOVES | {
    *("Relu", "Clip", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Max", "Min"),
    *("Where", "Neg", "Abs", "GlobalMaxPool", "ReduceMax", "ReduceMin", "TopK", "Pad", "Trilu"),
    *("DequantizeLinear", "Shape", "ConstantOfShape", "Cast", "Compress", "Floor", "Ceil", "Round"),
}
"""Operators that give halves for halves without rounding.

And DequantizeLinear: what reads it computes with its codes.
"""

TYPES = {half.word: half.tensor_type for half in HALVES.values()}


def has_halves(proto: onnx.ModelProto) -> bool:
    """Whether an input or constant of `proto` has a half type, or a Cast gives one."""
    kinds, graph = set(TYPES.values()), proto.graph
    if any(info.type.tensor_type.elem_type in kinds for info in graph.input):
        return True
    if any(tensor.data_type in kinds for tensor in graph.initializer):
        return True
    return any(
        entry.name == "to" and entry.i in kinds for node in graph.node for entry in node.attribute
    )


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the typed model `proto` that gives a GPU's numbers on a CPU, in float32 throughout.

    Nodes and tensors keep their names; a tensor that was half holds the same values as float32, but
    inputs and outputs of the model stay what they are. Without half types the result is `proto`
    itself. Raises ModelError if an input or output is bfloat16, which NumPy has not, or the body of
    an If or Loop has a half type or reads a half input or output.
    """
    if not has_halves(proto):
        return proto
    typed = copy_model(proto)
    infer_shapes(typed)
    return _Rounding(typed).finish()


class _Rounding:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        view = GraphView(proto)
        self._dtypes = view.dtypes
        self._fresh = FreshNames(names_in(proto.graph)).new
        self._nodes: list[onnx.NodeProto] = []
        self._ends: dict[str, str] = {}
        for name in (*view.graph_inputs, *view.graph_outputs):
            if self._dtypes.get(name) == HALVES["bf16"].word:
                raise ModelError(f"{name!r} is bfloat16; inputs and outputs have to be float32 or "
                                 "float16 here")  # fmt: skip
            if self._dtypes.get(name) in HALF_WORDS:
                self._ends[name] = self._fresh(f"{name}/float32")
        for name in view.graph_inputs:
            if name in self._ends:
                self._cast(name, self._ends[name], name, onnx.TensorProto.FLOAT)
        self._outputs = [name for name in view.graph_outputs if name in view.producer]

    def finish(self) -> onnx.ModelProto:
        """The model in float32."""
        for node in self._proto.graph.node:
            self._add(node)
        for name in self._outputs:
            if name in self._ends:
                self._cast(self._ends[name], name, name, TYPES[self._dtypes[name]])
        model = without_graph(self._proto)
        graph, old = model.graph, self._proto.graph
        graph.node.extend(self._nodes)
        graph.initializer.extend(_widened(tensor) for tensor in old.initializer)
        for info in old.value_info:
            kept = graph.value_info.add()
            kept.CopyFrom(info)
            if info.type.tensor_type.elem_type in TYPES.values() and info.name not in self._ends:
                kept.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        return model

    def _add(self, source: onnx.NodeProto) -> None:
        node = copy_of(source)
        if any(has_halves(onnx.ModelProto(graph=body)) for body in subgraphs(node)):
            raise ModelError(f"the body of {node.name!r} has half types")
        if not self._ends.keys().isdisjoint(set(captured(node)).difference(node.input)):
            raise ModelError(f"the body of {node.name!r} reads a half input or output of the model")
        for index, tensor in enumerate(node.input):
            node.input[index] = self._ends.get(tensor, tensor)
        self._nodes.append(node)
        for entry in node.attribute:
            if entry.name == "value" and entry.t.data_type in TYPES.values():
                entry.t.CopyFrom(_widened(entry.t))
            elif entry.name == "output_dtype" and entry.i in TYPES.values():
                entry.i = onnx.TensorProto.FLOAT
        rounding = node.op_type not in UNROUNDED
        for index, tensor in enumerate(node.output):
            word = self._dtypes.get(tensor)
            if word not in HALF_WORDS:
                continue
            float32 = self._ends.get(tensor, tensor)
            node.output[index] = float32
            if node.op_type == "Cast":
                node.output[index] = self._fresh(f"{tensor}/rounded")
                self._cast(node.output[index], float32, tensor, onnx.TensorProto.FLOAT)
            elif rounding:
                node.output[index] = self._fresh(f"{tensor}/exact")
                rounded = self._fresh(f"{tensor}/rounded")
                self._cast(node.output[index], rounded, tensor, TYPES[word])
                self._cast(rounded, float32, tensor, onnx.TensorProto.FLOAT)

    def _cast(self, source: str, target: str, tensor: str, kind: int) -> None:
        name = self._fresh(f"{tensor}/Round")
        self._nodes.append(helper.make_node("Cast", [source], [target], name=name, to=kind))


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """`tensor`, as float32 if it is half."""
    if tensor.data_type not in TYPES.values():
        return tensor
    value = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(value, tensor.name)
