"""What every later step asks of an ONNX graph: who makes a tensor, who reads it, what it is.

`GraphView` is an index over the protobuf, not a representation of its own: nodes are the
`onnx.NodeProto` of the model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trtune.calibrate.sessions import open_session
from trtune.precision.graph.file import Model, load_model, model_from_proto, save_model, tensor_spec
from trtune.precision.graph.fold import Folded
from trtune.precision.graph.operators import SHAPE_SLOTS, SHAPE_SOURCES
from trtune.precision.graph.proto import RANDOM_OPS, attribute, captured, is_external

__all__ = ["GraphView", "Model", "attribute", "load_model", "model_from_proto", "save_model"]

Shape = tuple[int | str | None, ...]

INTEGER_COMPUTE = {
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("QuantizeLinear", "DynamicQuantizeLinear"),
}
FINITE_DTYPES = {"float16", "float32", "float64"}
"""Types that can hold what is not finite, and that NumPy looks at."""
COLLECTIONS = {"sequence_type": "sequence", "optional_type": "optional", "map_type": "map"}
"""What a name can stand for besides a tensor."""
INDEX_DTYPES = {"bool", "int16", "int32", "int64", "uint16", "uint32", "uint64"}


class GraphView:
    """A read-only index over `proto`, whose nodes must be sorted and uniquely named.

    `producer` maps a tensor to the name of its node; `consumers` to (node, input index) pairs in
    graph order. A tensor that only a node's subgraphs read counts as read by that node, with an
    index past its last input. `shapes` and `dtypes` (numpy names) hold what is known: a
    free dimension is its name or None, a tensor of unknown rank is missing. `external_dir` is
    where external initializers are (`Model.external_dir`), `folded` the nodes of the file that are
    no longer there (`Model.folded`).
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        external_dir: Path | None = None,
        folded: Mapping[str, Folded] = MappingProxyType({}),
    ) -> None:
        self.proto = proto
        self.folded = folded
        self._external_dir = external_dir
        graph = proto.graph
        self.nodes: tuple[onnx.NodeProto, ...] = tuple(graph.node)
        self.by_name: Mapping[str, onnx.NodeProto] = {node.name: node for node in self.nodes}
        if len(self.by_name) != len(self.nodes) or "" in self.by_name:
            raise ValueError("node names are not unique; GraphView needs a normalised model")
        self.initializers: Mapping[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.graph_inputs = tuple(i.name for i in graph.input if i.name not in self.initializers)
        self.graph_outputs = tuple(o.name for o in graph.output)
        self.producer: Mapping[str, str] = {}
        self.consumers: Mapping[str, tuple[tuple[str, int], ...]] = {}
        self._index()
        self._constants: dict[str, NDArray[Any]] = {}
        self._finite: dict[str, bool] = {}

    @classmethod
    def of(cls, model: Model) -> GraphView:
        """The view of a loaded model."""
        return cls(model.proto, model.external_dir, model.folded)

    def _index(self) -> None:
        producer: dict[str, str] = {}
        consumers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        reads: dict[str, tuple[str, ...]] = {}
        for node in self.nodes:
            name, inputs = node.name, tuple(node.input)
            for k, tensor in enumerate(inputs):
                if tensor:
                    consumers[tensor].append((name, k))
            inner = tuple(t for t in captured(node) if t not in inputs) if node.attribute else ()
            for k, tensor in enumerate(inner, start=len(inputs)):
                consumers[tensor].append((name, k))
            reads[name] = (*(t for t in inputs if t), *inner)
            for tensor in node.output:
                if tensor:
                    producer[tensor] = name
        self.producer = producer
        self.consumers = {tensor: tuple(users) for tensor, users in consumers.items()}
        self._reads = reads

    @cached_property
    def _specs(self) -> tuple[dict[str, Shape], dict[str, str]]:
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, str] = {}
        names = {
            kind: onnx.helper.tensor_dtype_to_np_dtype(kind).name
            for kind in {t.data_type for t in self.initializers.values()}
        }
        for name, tensor in self.initializers.items():
            shapes[name], dtypes[name] = tuple(tensor.dims), names[tensor.data_type]
        graph = self.proto.graph
        for info in (*graph.value_info, *graph.output, *graph.input):
            spec = tensor_spec(info)
            if spec is not None:
                shapes[spec.name], dtypes[spec.name] = spec.shape, spec.dtype
            elif info.type.tensor_type.elem_type:
                kind = info.type.tensor_type.elem_type
                dtypes[info.name] = onnx.helper.tensor_dtype_to_np_dtype(kind).name
            elif info.type.WhichOneof("value") in COLLECTIONS:
                dtypes[info.name] = COLLECTIONS[info.type.WhichOneof("value")]
        return shapes, dtypes

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Tensor -> dimensions, for the tensors whose rank is known."""
        return self._specs[0]

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Tensor -> numpy dtype name, for the tensors whose type is known; of what is no tensor,
        its kind (`COLLECTIONS`)."""
        return self._specs[1]

    @cached_property
    def _computed_constants(self) -> frozenset[str]:
        """Outputs of nodes that read nothing but constants."""
        constant = set(self.initializers)
        for node in self.nodes:
            reads = self._reads[node.name]
            if node.op_type in RANDOM_OPS or not (reads or node.op_type == "Constant"):
                continue
            if constant.issuperset(reads):
                constant.update(t for t in node.output if t)
        return frozenset(constant.difference(self.initializers))

    def is_finite(self, tensor: str) -> bool:
        """Whether the initializer `tensor` has neither NaN nor infinite values, as far as is known:
        what was too large to be read in is not looked at."""
        if tensor not in self._finite:
            stored = self.initializers[tensor]
            known = not is_external(stored) and self.dtypes[tensor] in FINITE_DTYPES
            self._finite[tensor] = not known or bool(np.isfinite(self.constant(tensor)).all())
        return self._finite[tensor]

    def is_constant(self, tensor: str) -> bool:
        """Whether `tensor` is an initializer, or computed from initializers alone."""
        return tensor in self.initializers or tensor in self._computed_constants

    def constant(self, tensor: str) -> NDArray[Any]:
        """The value of a constant tensor (read-only, cached); computed by onnxruntime if need be.

        Raises ValueError if `tensor` is not constant.
        """
        if tensor not in self._constants:
            if tensor in self.initializers:
                value = numpy_helper.to_array(
                    self.initializers[tensor], str(self._external_dir or "")
                )
            elif self.is_constant(tensor):
                value = self._compute(tensor)
            else:
                raise ValueError(f"tensor {tensor!r} is not constant")
            value.flags.writeable = False
            self._constants[tensor] = value
        return self._constants[tensor]

    def _compute(self, tensor: str) -> NDArray[Any]:
        wanted = self.ancestors([tensor])
        nodes = [node for node in self.nodes if node.name in wanted]
        used = dict.fromkeys(t for node in nodes for t in self._reads[node.name])
        weights = [
            numpy_helper.from_array(self.constant(t), t) for t in used if t in self.initializers
        ]
        dtype = self.dtypes.get(tensor)
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) if dtype else 0
        output = onnx.helper.make_tensor_value_info(tensor, kind, None) if kind else None
        graph = onnx.helper.make_graph(
            nodes, "constant", [], [output or onnx.ValueInfoProto(name=tensor)], weights
        )
        model = onnx.helper.make_model(graph, opset_imports=list(self.proto.opset_import))
        model.ir_version = self.proto.ir_version
        session = open_session(model.SerializeToString())
        (value,) = session.run([tensor], {})
        return np.asarray(value)

    @cached_property
    def shape_nodes(self) -> frozenset[str]:
        """Nodes that compute shapes, indices or conditions, and so never run in INT8 or FP16.

        Those are the nodes whose outputs are all integer or boolean (but not the integer
        convolutions), and the float ones that depend on no input's values and end only there, such
        as the scales of a Resize.
        """
        from_data = self._data_tensors()
        found: set[str] = set()
        outputs = set(self.graph_outputs)
        for node in reversed(self.nodes):
            names = [t for t in node.output if t]
            kinds = [self.dtypes.get(t) for t in names]
            if kinds and all(kind in INDEX_DTYPES for kind in kinds):
                if node.op_type not in INTEGER_COMPUTE:
                    found.add(node.name)
            elif not from_data.intersection(names) and not outputs.intersection(names):
                uses = [use for t in names for use in self.consumers.get(t, ())]
                if uses and all(self._is_shape_use(use, found) for use in uses):
                    found.add(node.name)
        return frozenset(found)

    def _is_shape_use(self, use: tuple[str, int], shape_nodes: set[str]) -> bool:
        name, index = use
        return name in shape_nodes or index in SHAPE_SLOTS.get(self.by_name[name].op_type, ())

    def _data_tensors(self) -> set[str]:
        """Tensors whose values depend on the values, and not just the shapes, of the inputs."""
        data = set(self.graph_inputs)
        for node in self.nodes:
            if node.op_type in RANDOM_OPS or (
                node.op_type not in SHAPE_SOURCES and not data.isdisjoint(self._reads[node.name])
            ):
                data.update(t for t in node.output if t)
        return data

    def producers_of(self, node: str) -> tuple[str, ...]:
        """The nodes whose outputs `node` reads, in the order of its inputs, each once."""
        made = (self.producer[tensor] for tensor in self._reads[node] if tensor in self.producer)
        return tuple(dict.fromkeys(made))

    def ancestors(self, tensors: Iterable[str]) -> frozenset[str]:
        """Names of the nodes that the values of `tensors` depend on, their producers included."""
        return self._walk(tensors, self._makers, self._reads)

    def descendants(self, tensors: Iterable[str]) -> frozenset[str]:
        """Names of the nodes whose values depend on `tensors`."""
        return self._walk(tensors, self._readers, self._writes)

    def reads(self, name: str) -> tuple[str, ...]:
        """The tensors that a node reads, those that only its subgraphs read included."""
        return self._reads[name]

    @cached_property
    def _writes(self) -> Mapping[str, tuple[str, ...]]:
        return {node.name: tuple(t for t in node.output if t) for node in self.nodes}

    def _makers(self, tensor: str) -> tuple[str, ...]:
        return (self.producer[tensor],) if tensor in self.producer else ()

    def _readers(self, tensor: str) -> tuple[str, ...]:
        return tuple(name for name, _ in self.consumers.get(tensor, ()))

    @staticmethod
    def _walk(
        tensors: Iterable[str],
        nodes_of: Callable[[str], tuple[str, ...]],
        tensors_of: Mapping[str, tuple[str, ...]],
    ) -> frozenset[str]:
        found: set[str] = set()
        waiting = list(tensors)
        while waiting:
            for name in nodes_of(waiting.pop()):
                if name not in found:
                    found.add(name)
                    waiting.extend(tensors_of[name])
        return frozenset(found)


def elements(shape: Shape) -> int:
    """Product of the dimensions; those that are not known count as 1.

    >>> elements(("N", 3, 4))
    12
    """
    return math.prod(dim for dim in shape if isinstance(dim, int))
