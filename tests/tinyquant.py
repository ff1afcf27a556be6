"""What the tests of quantization share: prepared models, data in memory, and NumPy as an oracle.

`PLACED` says by hand which tensors of the tiny models are read quantized, and by whom.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tinymodels
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.calibrate.table import CalibrationTable
from trtune.datasets.batches import Batch, BatchSource
from trtune.precision.graph.view import GraphView, Model, model_from_proto
from trtune.precision.lower.deploy import deploy_tensors
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.session import make_session

Array = NDArray[Any]
Edges = Mapping[str, tuple[tuple[str, int], ...]]

PLACED: dict[str, Edges] = {
    "conv_relu": {
        "input": (("n_conv1", 0),), "relu1": (("n_conv2", 0),), "flat": (("n_logits", 0),),
    },
    "depthwise": {
        "input": (("n_expand", 0),), "clip1": (("n_dw", 0),), "clip2": (("n_project", 0),),
        "flat": (("n_logits", 0),),
    },
    "residual": {
        "input": (("n_stem", 0),), "stem_relu": (("n_conv1", 0), ("n_sum", 1)),
        "relu1": (("n_conv2", 0),), "flat": (("n_logits", 0),),
    },
    "concat": {
        "input": (("n_squeeze", 0),), "squeeze_relu": (("n_left", 0), ("n_right", 0)),
        "max": (("n_mix", 0),), "flat": (("n_logits", 0),),
    },
    "silu_se": {
        "input": (("n_stem", 0),), "stem_silu": (("n_dw", 0),), "se_mean": (("n_se_down", 0),),
        "se_relu": (("n_se_up", 0),), "flat": (("n_logits", 0),),
    },
    "mlp": {"input": (("n_fc1", 0),), "relu1": (("n_fc2", 0),)},
    "attention": {"ln": (("n_q", 0), ("n_k", 0), ("n_v", 0)), "mixed": (("n_proj", 0),)},
    "dynamic_reshape": {"input": (("n_conv", 0),), "flat": (("n_logits", 0),)},
    "resize": {"input": (("n_conv", 0),), "conv": (("n_up", 0),), "big": (("n_output", 0),)},
    "two_inputs": {
        "image": (("n_conv", 0),), "meta": (("n_meta_fc", 0),), "joined": (("n_logits", 0),),
    },
    "int64_input": {"embedded": (("n_fc", 0),)},
    "fixed_batch": {
        "input": (("n_conv1", 0),), "relu1": (("n_conv2", 0),), "flat": (("n_logits", 0),),
    },
    "opset11": {"input": (("n_conv", 0),), "squeezed": (("n_fc", 0),)},
    "constant_nodes": {"input": (("n_conv", 0),), "flat": (("n_logits", 0),)},
    "shared_weight": {
        "input": (("n_stem", 0),), "stem_relu": (("n_conv1", 0),), "relu1": (("n_conv2", 0),),
        "flat": (("n_logits", 0),),
    },
    "dynamic_weight": {"input": (("n_conv", 0),)},
    "branches": {"input": (("n_conv", 0),), "flat": (("n_logits", 0),)},
    "two_outputs": {"input": (("n_conv", 0),), "flat": (("n_logits", 0),)},
    "nothing_quantizable": {},
    "quantized": {"flat": (("n_logits", 0),)},
    "half_weights": {"flat": (("n_logits", 0),)},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with its plan, inputs, and a table of the largest magnitudes on those inputs."""

    model: Model
    view: GraphView
    plan: PrecisionPlan
    table: CalibrationTable
    feeds: Mapping[str, Array]


def case(
    proto: onnx.ModelProto,
    *,
    pins: Mapping[str, str] | None = None,
    batch: int = 4,
    seed: int = 0,
    amax: Mapping[str, float] | None = None,
) -> Case:
    """`proto` ready to be lowered; `amax` replaces some of the measured ones."""
    model = model_from_proto(proto)
    view = GraphView.of(model)
    feeds = tinymodels.feeds(model.proto, batch=batch, seed=seed)
    tensors = deploy_tensors(view, make_plan(view))
    values = inner_values(model, tensors, feeds)
    found = {tensor: float(np.abs(values[tensor]).max()) for tensor in tensors}
    table = CalibrationTable.from_amax({**found, **(amax or {})})
    return Case(model, view, make_plan(view, pins=pins), table, feeds)


def named(name: str, **options: Any) -> Case:
    """The `case` of one of `tinymodels.MODELS`."""
    return case(tinymodels.MODELS[name](), **options)


def inner_values(
    model: Model, tensors: Sequence[str], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """Values of `tensors` in the float model."""
    inner = [tensor for tensor in tensors if tensor not in feeds]
    return {**outputs(model.proto, feeds, outputs=inner), **feeds}


def outputs(proto: onnx.ModelProto, feeds: Mapping[str, Array], **options: Any) -> dict[str, Array]:
    """Outputs by name, from onnxruntime."""
    session = make_session(proto, **options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def op_counts(proto: onnx.ModelProto) -> Counter[str]:
    """How often each operator stands in a graph."""
    return Counter(node.op_type for node in proto.graph.node)


def maker(proto: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """The node that makes `tensor`."""
    (found,) = (node for node in proto.graph.node if tensor in node.output)
    return found


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The initializer called `name`."""
    (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    return found


def set_weight(proto: onnx.ModelProto, name: str, value: Any) -> None:
    """Put `value` in the place of an initializer, in float32."""
    tensor = numpy_helper.from_array(np.asarray(value, np.float32), name)
    initializer(proto, name).CopyFrom(tensor)


def uneven(model: onnx.ModelProto, *, spread: float = 1.2) -> onnx.ModelProto:
    """`model` itself, its convolutions' channels of very different size, as training makes them.

    `spread` is the standard deviation of the logarithm of the factors.
    """
    rng = np.random.default_rng(7)
    for tensor in list(model.graph.initializer):
        value = numpy_helper.to_array(tensor)
        if value.ndim == 4:
            factors = np.exp(rng.normal(0, spread, len(value))).astype(np.float32)
            set_weight(model, tensor.name, value * factors[:, None, None, None])
    return model


def read_edges(proto: onnx.ModelProto) -> dict[str, tuple[tuple[str, int], ...]]:
    """What a lowered model reads through a pair: tensor -> (node, input index) in graph order.

    A Pad of codes within a pair is part of it.
    """
    pairs = {n.output[0]: n for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    quantized = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    pads = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Pad"}
    quantized |= {made: quantized[read] for made, read in pads.items() if read in quantized}
    found: dict[str, list[tuple[str, int]]] = {}
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            source = quantized.get(pairs[name].input[0]) if name in pairs else None
            if source is not None:
                found.setdefault(source, []).append((node.name, index))
    return {tensor: tuple(edges) for tensor, edges in found.items()}


@dataclass(frozen=True)
class Rows:
    """A `BatchSource` over arrays in memory; `order` names the rows that it yields."""

    feeds: Mapping[str, Array]
    order: Sequence[int]
    batch: int = 8
    known: bool = True
    skipped: tuple[str, ...] = ()
    passes: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, feeds: Mapping[str, Array], **options: Any) -> Rows:
        return cls(feeds, range(len(next(iter(feeds.values())))), **options)

    def __iter__(self) -> Iterator[Batch]:
        self.passes.append(1)
        for start in range(0, len(self.order), self.batch):
            rows = list(self.order[start : start + self.batch])
            arrays = {name: array[rows] for name, array in self.feeds.items()}
            yield Batch(arrays, tuple(f"p{row}" for row in rows))

    @property
    def count(self) -> int | None:
        return len(self.order) if self.known else None

    @property
    def identity(self) -> str:
        return hashlib.sha256(str(sorted(self.order)).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """What a source gave, held in memory: pictures that several passes read are decoded once."""

    batches: tuple[Batch, ...]
    identity: str
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: BatchSource) -> Kept:
        return cls(tuple(source), source.identity, tuple(source.skipped))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def count(self) -> int | None:
        return sum(len(batch.items) for batch in self.batches)


# NumPy, written plainly


def fake(values: Array, scale: float) -> Array:
    """int8 and back: round half to even, clamp to -128..127."""
    codes = np.clip(np.round(values.astype(np.float32) / np.float32(scale)), -128, 127)
    quantized: Array = codes.astype(np.float32) * np.float32(scale)
    return quantized


def fake_weight(weight: Array, axis: int) -> Array:
    """Each channel along `axis` by itself: scale max|w| / 127."""
    channels = []
    for channel in np.moveaxis(weight, axis, 0):
        largest = np.abs(channel).max()
        channels.append(fake(channel, largest / np.float32(127)) if largest else channel)
    return np.moveaxis(np.stack(channels), 0, axis)


def numpy_outputs(
    proto: onnx.ModelProto,
    feeds: Mapping[str, Array],
    *,
    edges: Edges | None = None,
    scales: Mapping[str, float] | None = None,
    weights: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """The float model in NumPy, with `edges` read through int8 at `scales`.

    `weights` maps nodes whose second input is quantized to its channel axis.
    """
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer} | dict(feeds)
    quantized = {edge: tensor for tensor, readers in (edges or {}).items() for edge in readers}
    for node in proto.graph.node:
        inputs: list[Array | None] = []
        for index, name in enumerate(node.input):
            value = values[name] if name else None
            if (node.name, index) in quantized and value is not None:
                value = fake(value, (scales or {})[name])
            if index == 1 and node.name in (weights or {}) and value is not None:
                value = fake_weight(value, (weights or {})[node.name])
            inputs.append(value)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = OPERATORS[node.op_type](*inputs, **attributes)
    return {output.name: values[output.name] for output in proto.graph.output}


def _conv(
    x: Array, w: Array, b: Array | None = None, *, pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1), group: int = 1, kernel_shape: Any = None,
) -> Array:  # fmt: skip
    x = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    height, width = w.shape[2:]
    rows = (x.shape[2] - height) // strides[0] + 1
    columns = (x.shape[3] - width) // strides[1] + 1
    out = np.zeros((len(x), len(w), rows, columns), np.float64)
    inside, outside = w.shape[1], len(w) // group
    for g in range(group):
        part, kernel = x[:, g * inside : (g + 1) * inside], w[g * outside : (g + 1) * outside]
        for i in range(rows):
            for j in range(columns):
                top, left = i * strides[0], j * strides[1]
                window = part[:, :, top : top + height, left : left + width].astype(np.float64)
                out[:, g * outside : (g + 1) * outside, i, j] = np.einsum(
                    "nchw,ochw->no", window, kernel
                )
    return (out if b is None else out + b[:, None, None]).astype(np.float32)


def _conv_transpose(
    x: Array, w: Array, b: Array | None = None, *, strides: Sequence[int], kernel_shape: Any = None
) -> Array:
    height, width = w.shape[2:]
    shape = ((x.shape[2] - 1) * strides[0] + height, (x.shape[3] - 1) * strides[1] + width)
    out = np.zeros((len(x), w.shape[1], *shape), np.float64)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            top, left = i * strides[0], j * strides[1]
            out[:, :, top : top + height, left : left + width] += np.einsum(
                "nc,cohw->nohw", x[:, :, i, j].astype(np.float64), w
            )
    return (out if b is None else out + b[:, None, None]).astype(np.float32)


def _gemm(
    a: Array, b: Array, c: Array | float = 0.0, *,
    transB: int = 0, alpha: float = 1.0, beta: float = 1.0,
) -> Array:  # fmt: skip
    return (alpha * a @ (b.T if transB else b) + beta * np.asarray(c)).astype(np.float32)


def _max_pool(x: Array, *, kernel_shape: Sequence[int], strides: Sequence[int]) -> Array:
    assert list(kernel_shape) == list(strides)
    k = kernel_shape[0]
    n, c, h, w = x.shape
    pooled: Array = x.reshape(n, c, h // k, k, w // k, k).max(axis=(3, 5))
    return pooled


def _layer_norm(x: Array, scale: Array, bias: Array, *, axis: int) -> Array:
    mean, variance = x.mean(axis=axis, keepdims=True), x.var(axis=axis, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def _softmax(x: Array, *, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


OPERATORS: Mapping[str, Callable[..., Array]] = {
    "Add": np.add,
    "Clip": lambda x, low=None, high=None: np.clip(x, low, high),
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": np.divide,
    "Flatten": lambda x: x.reshape(len(x), -1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(axis=(2, 3), keepdims=True),
    "LayerNormalization": _layer_norm,
    "MatMul": np.matmul,
    "MaxPool": _max_pool,
    "Mul": np.multiply,
    "ReduceMean": lambda x, *, axes, keepdims: x.mean(axis=tuple(axes), keepdims=bool(keepdims)),
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Softmax": _softmax,
    "Transpose": lambda x, *, perm: np.transpose(x, perm),
}
