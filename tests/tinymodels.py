"""Small ONNX models with fixed weights, one for each thing a graph can do to this package.

`MODELS` maps a name to the function that makes it; `feeds` makes inputs, `run` is onnxruntime.
Pictures are N x 3 x 8 x 8 unless the docstring says otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[int | str | None]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
PICTURE: Dims = ("N", 3, 8, 8)


class Net:
    """Collects nodes and initializers; every method returns the name of the tensor it made."""

    def __init__(self, *, opset: int = 17, seed: int = 0) -> None:
        self.opset, self.seed = opset, seed
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Dims = PICTURE, dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Normal values of standard deviation 1/sqrt(fan in), the same for the same name."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
        return self.const(name, rng.standard_normal(shape) / np.sqrt(fan_in))

    def op(self, op: str, *inputs: str, out: str, name: str | None = None, **attrs: Any) -> str:
        self.nodes.append(
            helper.make_node(op, inputs, [out], name=f"n_{out}" if name is None else name, **attrs)
        )
        return out

    def conv(
        self, x: str, out: str, cin: int, cout: int, k: int = 3, *, group: int = 1, stride: int = 1
    ) -> str:
        w = self.weight(f"{out}_w", cout, cin // group, k, k)
        b = self.weight(f"{out}_b", cout)
        return self.op(
            "Conv", x, w, b, out=out, kernel_shape=[k, k], pads=[k // 2] * 4,
            group=group, strides=[stride, stride],
        )  # fmt: skip

    def linear(self, x: str, out: str, cin: int, cout: int) -> str:
        w, b = self.weight(f"{out}_w", cout, cin), self.weight(f"{out}_b", cout)
        return self.op("Gemm", x, w, b, out=out, transB=1)

    def head(self, x: str, channels: int, classes: int = 10) -> onnx.ModelProto:
        """Global average pool and a linear layer to `logits`."""
        pooled = self.op("GlobalAveragePool", x, out="pooled")
        flat = self.op("Flatten", pooled, out="flat")
        self.linear(flat, "logits", channels, classes)
        return self.model({"logits": ("N", classes)})

    def model(self, outputs: Mapping[str, Dims | tuple[Dims, int]]) -> onnx.ModelProto:
        infos = []
        for name, shape in outputs.items():
            typed = len(shape) == 2 and isinstance(shape[0], (tuple, list))
            dims, dtype = shape if typed else (shape, FLOAT)
            infos.append(helper.make_tensor_value_info(name, dtype, dims))
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 8 if self.opset < 19 else 10
        return model


def conv_relu() -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, pool, linear."""
    net = Net()
    x = net.input("input")
    x = net.op("Relu", net.conv(x, "conv1", 3, 16), out="relu1")
    x = net.op("Relu", net.conv(x, "conv2", 16, 32, stride=2), out="relu2")
    return net.head(x, 32)


def depthwise() -> onnx.ModelProto:
    """A MobileNetV2 block: expand, depthwise, project, with Clip 0..6."""
    net = Net()
    x = net.input("input")
    low, high = net.const("zero", 0.0), net.const("six", 6.0)
    x = net.op("Clip", net.conv(x, "expand", 3, 32, 1), low, high, out="clip1")
    x = net.op("Clip", net.conv(x, "dw", 32, 32, group=32), low, high, out="clip2")
    return net.head(net.conv(x, "project", 32, 16, 1), 16)


def residual() -> onnx.ModelProto:
    """A ResNet block: relu(conv(relu(conv(x))) + x)."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="stem_relu")
    y = net.op("Relu", net.conv(x, "conv1", 16, 16), out="relu1")
    y = net.op("Add", net.conv(y, "conv2", 16, 16), x, out="sum")
    return net.head(net.op("Relu", y, out="sum_relu"), 16)


def concat() -> onnx.ModelProto:
    """A SqueezeNet fire module: two convs of one tensor, concatenated, max-pooled, conv."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "squeeze", 3, 16), out="squeeze_relu")
    left = net.op("Relu", net.conv(x, "left", 16, 16, 1), out="left_relu")
    right = net.op("Relu", net.conv(x, "right", 16, 16), out="right_relu")
    x = net.op("Concat", left, right, out="cat", axis=1)
    x = net.op("MaxPool", x, out="max", kernel_shape=[2, 2], strides=[2, 2])
    return net.head(net.conv(x, "mix", 32, 16), 16)


def silu_se() -> onnx.ModelProto:
    """An EfficientNet block: SiLU, depthwise, squeeze-excite whose ReduceMean feeds convs."""
    net = Net()
    x = net.conv(net.input("input"), "stem", 3, 16)
    x = net.op("Mul", x, net.op("Sigmoid", x, out="stem_sig"), out="stem_silu")
    x = net.conv(x, "dw", 16, 16, group=16)
    x = net.op("Mul", x, net.op("Sigmoid", x, out="dw_sig"), out="dw_silu")
    s = net.op("ReduceMean", x, out="se_mean", axes=[2, 3], keepdims=1)
    s = net.op("Relu", net.conv(s, "se_down", 16, 8, 1), out="se_relu")
    s = net.op("Sigmoid", net.conv(s, "se_up", 8, 16, 1), out="se_gate")
    return net.head(net.op("Mul", x, s, out="se"), 16)


def mlp() -> onnx.ModelProto:
    """Rows of 16 features through Gemm, Relu, MatMul + Add."""
    net = Net()
    x = net.op("Relu", net.linear(net.input("input", ("N", 16)), "fc1", 16, 32), out="relu1")
    x = net.op("MatMul", x, net.weight("fc2_w", 32, 10), out="fc2")
    net.op("Add", x, net.weight("fc2_b", 10), out="logits")
    return net.model({"logits": ("N", 10)})


def attention() -> onnx.ModelProto:
    """One attention head with LayerNormalization over N x 6 x 16 tokens, all MatMuls."""
    net = Net()
    x = net.input("input", ("N", 6, 16))
    scale, bias = net.const("ln_scale", np.ones(16)), net.const("ln_bias", np.zeros(16))
    h = net.op("LayerNormalization", x, scale, bias, out="ln", axis=-1)
    q, k, v = (net.op("MatMul", h, net.weight(f"{n}_w", 16, 16), out=n) for n in "qkv")
    kt = net.op("Transpose", k, out="kt", perm=[0, 2, 1])
    scores = net.op("MatMul", q, kt, out="scores")
    scores = net.op("Div", scores, net.const("root", 4.0), out="scaled")
    probs = net.op("Softmax", scores, out="probs", axis=-1)
    mixed = net.op("MatMul", probs, v, out="mixed")
    mixed = net.op("MatMul", mixed, net.weight("proj_w", 16, 16), out="proj")
    net.op("Add", x, mixed, out="output")
    return net.model({"output": ("N", 6, 16)})


def dynamic_reshape() -> onnx.ModelProto:
    """A reshape whose target is computed from Shape, as torch exports `x.view(x.size(0), -1)`."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "conv", 3, 4, stride=2), out="relu")
    shape = net.op("Shape", x, out="shape")
    index, axis = net.const("index", 0, np.int64), net.const("axis", [0], np.int64)
    size = net.op("Gather", shape, index, out="size", axis=0)
    size = net.op("Unsqueeze", size, axis, out="size1")
    target = net.op("Concat", size, net.const("rest", [-1], np.int64), out="target", axis=0)
    net.linear(net.op("Reshape", x, target, out="flat"), "logits", 64, 10)
    return net.model({"logits": ("N", 10)})


def resize() -> onnx.ModelProto:
    """A Resize whose float scales are computed from the input's shape, behind a ConvTranspose."""
    net = Net()
    x = net.conv(net.input("input"), "conv", 3, 16)
    w = net.weight("up_w", 16, 8, 2, 2)
    x = net.op("ConvTranspose", x, w, out="up", kernel_shape=[2, 2], strides=[2, 2])
    rank = net.op("Shape", net.op("Shape", x, out="shape"), out="rank")
    ones = net.op("Cast", net.op("Div", rank, rank, out="one"), out="one_f", to=FLOAT)
    edge = net.op("Mul", ones, net.const("two", [2.0]), out="edge")
    scales = net.op("Concat", ones, ones, edge, edge, out="scales", axis=0)
    x = net.op("Resize", x, "", scales, out="big", mode="nearest")
    net.conv(x, "output", 8, 4)
    return net.model({"output": ("N", 4, 32, 32)})


def two_inputs() -> onnx.ModelProto:
    """A picture `image` and a row of 4 numbers `meta`, joined before the head."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("image"), "conv", 3, 16), out="relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, out="pooled"), out="flat")
    m = net.linear(net.input("meta", ("N", 4)), "meta_fc", 4, 16)
    net.linear(net.op("Concat", x, m, out="joined", axis=1), "logits", 32, 10)
    return net.model({"logits": ("N", 10)})


def int64_input() -> onnx.ModelProto:
    """Token numbers N x 6 (int64, 0..19) through an embedding and a MatMul."""
    net = Net()
    ids = net.input("ids", ("N", 6), INT64)
    x = net.op("Gather", net.weight("table", 20, 16), ids, out="embedded", axis=0)
    x = net.op("MatMul", x, net.weight("fc_w", 16, 10), out="fc")
    net.op("ReduceMean", x, out="logits", axes=[1], keepdims=0)
    return net.model({"logits": ("N", 10)})


def fixed_batch() -> onnx.ModelProto:
    """`conv_relu` with batch 1 written into the model."""
    model = conv_relu()
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def opset11() -> onnx.ModelProto:
    """Opset 11 with what changed in 13: Squeeze, Unsqueeze, ReduceSum axes, Softmax over 2-D."""
    net = Net(opset=11)
    x = net.op("Relu", net.conv(net.input("input"), "conv", 3, 16), out="relu")
    x = net.op("ReduceSum", x, out="summed", axes=[2, 3], keepdims=1)
    x = net.op("Squeeze", x, out="squeezed", axes=[2, 3])
    x = net.op("Softmax", net.linear(x, "fc", 16, 10), out="soft")
    net.op("Unsqueeze", x, out="probs", axes=[1])
    return net.model({"probs": ("N", 1, 10)})


def unnamed_nodes() -> onnx.ModelProto:
    """`conv_relu` whose nodes have no names."""
    model = conv_relu()
    for node in model.graph.node:
        node.name = ""
    return model


def duplicate_names() -> onnx.ModelProto:
    """`conv_relu` whose nodes are called by their operator, so that names repeat."""
    model = conv_relu()
    for node in model.graph.node:
        node.name = node.op_type
    return model


def constant_nodes() -> onnx.ModelProto:
    """Weights from Constant nodes and an Identity of one; Constants of scalar attributes."""
    net = Net()
    x = net.input("input")
    rng = np.random.default_rng(5)
    w = numpy_helper.from_array(rng.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5)
    weight = net.op("Constant", out="w0", value=w)
    weight = net.op("Identity", net.op("Identity", weight, out="w1"), out="w2")
    x = net.op("Conv", x, weight, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    low = net.op("Constant", out="low", value_float=0.0)
    high = net.op("Constant", out="high", value_float=6.0)
    x = net.op("Clip", x, low, high, out="clip")
    shape = net.op("Constant", out="target", value_ints=[0, -1])
    net.linear(net.op("Reshape", x, shape, out="flat"), "logits", 1024, 10)
    return net.model({"logits": ("N", 10)})


def initializer_inputs() -> onnx.ModelProto:
    """`conv_relu` as IR version 3 had it: every initializer is an input too."""
    model = conv_relu()
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    return model


def unsorted_nodes() -> onnx.ModelProto:
    """`residual` with its nodes in reverse order."""
    model = residual()
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def shared_weight() -> onnx.ModelProto:
    """Two convs, 16 channels to 16, with the same weight and bias."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="stem_relu")
    x = net.op("Relu", net.conv(x, "conv1", 16, 16), out="relu1")
    x = net.op("Conv", x, "conv1_w", "conv1_b", out="conv2", kernel_shape=[3, 3], pads=[1] * 4)
    return net.head(x, 16)


def dynamic_weight() -> onnx.ModelProto:
    """A Conv whose weight `kernel` is an input of the model."""
    net = Net()
    x = net.conv(net.input("input"), "conv", 3, 16)
    w = net.input("kernel", (4, 16, 3, 3))
    net.op("Conv", x, w, out="output", kernel_shape=[3, 3], pads=[1] * 4)
    return net.model({"output": ("N", 4, 8, 8)})


def branches() -> onnx.ModelProto:
    """An If on the sum of the input, whose branches read tensors of the outer graph."""
    net = Net()
    x = net.conv(net.input("input"), "conv", 3, 16)
    other = net.op("Relu", x, out="relu")
    total = net.op("ReduceSum", x, out="total", keepdims=0)
    positive = net.op("Greater", total, net.const("zero", 0.0), out="positive")
    bodies = []
    for name, op, source in (("yes", "Neg", x), ("no", "Identity", other)):
        made = helper.make_tensor_value_info(f"{name}_out", FLOAT, ("N", 16, 8, 8))
        node = helper.make_node(op, [source], [f"{name}_out"], name=f"{name}_node")
        bodies.append(helper.make_graph([node], name, [], [made]))
    x = net.op("If", positive, out="chosen", then_branch=bodies[0], else_branch=bodies[1])
    return net.head(x, 16)


def two_outputs() -> onnx.ModelProto:
    """`logits`, and the inner tensor `features` (N x 16 x 8 x 8) which is read further on too."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "conv", 3, 16), out="features")
    model = net.head(x, 16)
    model.graph.output.append(helper.make_tensor_value_info("features", FLOAT, ("N", 16, 8, 8)))
    return model


def nothing_quantizable() -> onnx.ModelProto:
    """Elementwise functions only: no node has weights."""
    net = Net()
    x = net.op("Sigmoid", net.input("input"), out="sig")
    net.op("Tanh", net.op("Exp", x, out="exp"), out="output")
    return net.model({"output": PICTURE})


def quantized() -> onnx.ModelProto:
    """A conv with int8 Q/DQ on its input (scale 0.05) and per-channel int8 weights."""
    net = Net()
    x, zero = net.input("input"), net.const("zp", 0, np.int8)
    scale = net.const("x_scale", 0.05)
    x = net.op("QuantizeLinear", x, scale, zero, out="x_q")
    x = net.op("DequantizeLinear", x, scale, zero, out="x_dq")
    rng = np.random.default_rng(9)
    wq = net.const("w_q", rng.integers(-127, 128, (16, 3, 3, 3)), np.int8)
    ws, wz = net.const("w_scale", np.full(16, 0.002)), net.const("w_zp", np.zeros(16), np.int8)
    w = net.op("DequantizeLinear", wq, ws, wz, out="w", axis=0)
    x = net.op("Conv", x, w, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    return net.head(net.op("Relu", x, out="relu"), 16)


def half_weights() -> onnx.ModelProto:
    """A float16 conv between Casts, as a mixed-precision export has it."""
    net = Net()
    x = net.op("Cast", net.input("input"), out="half", to=TensorProto.FLOAT16)
    w = net.const("w", np.random.default_rng(3).standard_normal((16, 3, 3, 3)) / 5, np.float16)
    x = net.op("Conv", x, w, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    return net.head(net.op("Cast", x, out="full", to=FLOAT), 16)


def in_half(proto: onnx.ModelProto, kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """`proto` as torch's `model.half()` exports it: every float of it, also in bodies, is half."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    _in_half(made.graph, kind, dtype)
    return made


def _in_half(graph: onnx.GraphProto, kind: int, dtype: np.dtype[Any]) -> None:
    def halved(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == FLOAT:
            value = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    for tensor in graph.initializer:
        halved(tensor)
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == FLOAT:
            info.type.tensor_type.elem_type = kind
    for node in graph.node:
        for entry in node.attribute:
            if entry.name in ("to", "dtype") and entry.i == FLOAT:
                entry.i = kind
            if entry.HasField("t"):
                halved(entry.t)
            if entry.HasField("g"):
                _in_half(entry.g, kind, dtype)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    make.__name__: make
    for make in (
        conv_relu, depthwise, residual, concat, silu_se, mlp, attention, dynamic_reshape, resize,
        two_inputs, int64_input, fixed_batch, opset11, unnamed_nodes, duplicate_names,
        constant_nodes, initializer_inputs, unsorted_nodes, shared_weight, dynamic_weight, branches,
        two_outputs, nothing_quantizable, quantized, half_weights,
    )
}  # fmt: skip


def feeds(model: onnx.ModelProto, *, batch: int = 2, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Normal floats, or integers 0..19, for every input; free dimensions become `batch`."""
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    made: dict[str, NDArray[Any]] = {}
    for info in model.graph.input:
        if info.name in constants:
            continue
        kind = info.type.tensor_type
        shape = [d.dim_value or batch for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        whole = np.issubdtype(dtype, np.integer)
        values = rng.integers(0, 20, shape) if whole else rng.standard_normal(shape)
        made[info.name] = values.astype(dtype)
    return made


def run(
    model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """The model's outputs by name, from onnxruntime on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, dict(feeds(model) if inputs is None else inputs))
    return dict(zip(names, values, strict=True))
