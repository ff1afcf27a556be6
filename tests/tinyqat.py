"""Small models that are quantized already, each in another exporter's manner.

`QatNet` adds pairs to a `tinymodels.Net`; `torch_residual` and `tensorflow_block` are whole models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tinymodels
from numpy.typing import NDArray
from onnx import numpy_helper
from tinymodels import Net
from tinyquant import outputs

from trtune.precision.graph.view import model_from_proto
from trtune.precision.quantized.importing import Imported, import_model


class QatNet(Net):
    """A `Net` whose tensors can be quantized: every method returns the tensor to be read."""

    def pair(
        self, x: str, scale: Any = 0.05, zero: Any = 0, dtype: Any = np.int8, *,
        out: str | None = None, **attrs: Any,
    ) -> str:  # fmt: skip
        """QuantizeLinear and DequantizeLinear behind `x`; no zero point if `zero` is None."""
        out = out or f"{x}_dq"
        parameters = self._parameters(out, scale, zero, dtype)
        codes = self.op("QuantizeLinear", x, *parameters, out=f"{out}_codes", **attrs)
        return self.op("DequantizeLinear", codes, *parameters, out=out, **attrs)

    def stored(
        self, name: str, codes: Any, scale: Any, zero: Any = 0, dtype: Any = np.int8, **attrs: Any
    ) -> str:
        """Stored codes behind a DequantizeLinear."""
        held = self.const(f"{name}_codes", codes, dtype)
        return self.op(
            "DequantizeLinear", held, *self._parameters(name, scale, zero, dtype), out=name, **attrs
        )

    def _parameters(self, out: str, scale: Any, zero: Any, dtype: Any) -> list[str]:
        scale = np.asarray(scale)
        kind = np.float32 if scale.dtype == np.float64 else np.result_type(scale.dtype, np.float16)
        names = [self.const(f"{out}_scale", scale, kind)]
        if zero is not None:
            shape = scale.shape
            points = np.broadcast_to(np.asarray(zero), shape).astype(dtype)
            names.append(self.const(f"{out}_zero", points, dtype))
        return names

    def qconv(
        self, x: str, out: str, cin: int, cout: int, k: int = 3, *, bias: bool = True, **attrs: Any
    ) -> str:
        """A Conv of `x` with per-channel weights behind Q and DQ, as torch exports it."""
        weight = self.weight(f"{out}_w", cout, cin, k, k)
        scales = channel_scales(self.value(weight), 0)
        read = self.pair(weight, scales, axis=0)
        inputs = [x, read, *([self.weight(f"{out}_b", cout)] if bias else [])]
        return self.op("Conv", *inputs, out=out, kernel_shape=[k, k], pads=[k // 2] * 4, **attrs)

    def value(self, name: str) -> NDArray[Any]:
        (found,) = (t for t in self.initializers if t.name == name)
        return numpy_helper.to_array(found)


def channel_scales(weights: NDArray[Any], axis: int, steps: float = 127) -> NDArray[np.float32]:
    """max|w| / steps of each channel along `axis`."""
    rest = tuple(k for k in range(weights.ndim) if k != axis)
    scales: NDArray[np.float32] = (np.abs(weights).max(axis=rest) / steps).astype(np.float32)
    return scales


def torch_residual() -> onnx.ModelProto:
    """As torch's fake quantization exports: float weights behind Q/DQ, int8, the skip quantized by
    the pair that the next conv reads, a Gemm at the end."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    x = net.op("Relu", net.qconv(x, "stem", 3, 16), out="stem_relu")
    x = net.pair(x, 0.02)
    y = net.op("Relu", net.qconv(x, "conv1", 16, 16), out="relu1")
    y = net.qconv(net.pair(y, 0.015), "conv2", 16, 16)
    x = net.op("Relu", net.op("Add", y, x, out="sum"), out="sum_relu")
    x = net.op("GlobalAveragePool", x, out="pooled")
    x = net.pair(net.op("Flatten", x, out="flat"), 0.01)
    weight = net.weight("fc_w", 10, 16)
    read = net.pair(weight, channel_scales(net.value(weight), 0), axis=0)
    net.op("Gemm", x, read, net.weight("fc_b", 10), out="logits", transB=1)
    return net.model({"logits": ("N", 10)})


def tensorflow_block() -> onnx.ModelProto:
    """As TensorFlow's quantization-aware training: uint8, asymmetric, weights too, int32 biases,
    pairs on every edge, softmax at the end."""
    net = QatNet(opset=13)
    rng = np.random.default_rng(4)
    low, high = net.const("zero", 0.0), net.const("six", 6.0)
    x = net.pair(net.input("input"), 0.03, 128, np.uint8)
    steps = 0.03
    for name, cin, cout, scale, zero in (("a", 3, 8, 6 / 255, 0), ("b", 8, 8, 0.05, 131)):
        w = net.stored(f"{name}_w", rng.integers(0, 256, (cout, cin, 3, 3)), 0.001, 120, np.uint8)
        bias = rng.integers(-900, 900, cout)
        b = net.stored(f"{name}_b", bias, np.float32(steps) * np.float32(0.001), 0, np.int32)
        y = net.op("Conv", x, w, b, out=name, kernel_shape=[3, 3], pads=[1] * 4)
        y = net.op("Clip", y, low, high, out=f"{name}_clip") if name == "a" else y
        y = net.pair(y, scale, zero, np.uint8)
        x = y if name == "a" else net.op("Add", x, y, out="sum")
        steps = scale
    x = net.pair(x, 0.06, 120, np.uint8)
    x = net.op("GlobalAveragePool", x, out="pooled")
    x = net.pair(net.op("Flatten", x, out="flat"), 0.02, 100, np.uint8)
    net.op("Softmax", x, out="output", axis=1)
    return net.model({"output": ("N", 8)})


def dequantize_then_transpose() -> onnx.ModelProto:
    """A linear layer as pytorch-quantization exports it: Q, DQ, Transpose, MatMul, Add."""
    net = QatNet()
    x = net.pair(net.input("input", ("N", 16)), 0.03)
    weight = net.weight("fc_w", 10, 16)
    read = net.pair(weight, channel_scales(net.value(weight), 0, 127.5), axis=0)
    read = net.op("Transpose", read, out="fc_wt", perm=[1, 0])
    net.op("Add", net.op("MatMul", x, read, out="fc"), net.weight("fc_b", 10), out="logits")
    return net.model({"logits": ("N", 10)})


def codes_transposed() -> onnx.ModelProto:
    """A linear layer whose weights are transposed as codes: Q, Transpose, DQ, MatMul."""
    net = QatNet()
    x = net.pair(net.input("input", ("N", 16)), 0.03)
    weight = net.weight("fc_w", 10, 16)
    scale = net.const("s", channel_scales(net.value(weight), 0))
    zero = net.const("z", np.zeros(10), np.int8)
    codes = net.op("QuantizeLinear", weight, scale, zero, out="codes", axis=0)
    codes = net.op("Transpose", codes, out="codes_t", perm=[1, 0])
    read = net.op("DequantizeLinear", codes, scale, zero, out="read", axis=1)
    net.op("MatMul", x, read, out="logits")
    return net.model({"logits": ("N", 10)})


def two_scales() -> onnx.ModelProto:
    """One tensor quantized twice with different scales, and a quantized tensor quantized again."""
    net = QatNet()
    x = net.input("input")
    left = net.qconv(net.pair(x, 0.03, out="left_in"), "left", 3, 16)
    right = net.qconv(net.pair(x, 0.07, out="right_in"), "right", 3, 16)
    x = net.op("Relu", net.op("Add", left, right, out="sum"), out="relu")
    x = net.pair(net.pair(x, 0.02, out="once"), 0.05, out="twice")
    return net.head(net.qconv(x, "last", 16, 16), 16)


def quantized_output() -> onnx.ModelProto:
    """The last pair makes the model's output, and a conv's output goes through a max pool."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    x = net.op("MaxPool", net.pair(x, 0.02), out="pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.qconv(x, "last", 16, 4)
    net.pair(x, 0.04, out="output")
    return net.model({"output": ("N", 4, 4, 4)})


def codes_pooled() -> onnx.ModelProto:
    """The max pool works on the codes: Q, MaxPool, DQ, Conv."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    scale, zero = net.const("s", 0.02), net.const("z", 0, np.int8)
    x = net.op("QuantizeLinear", x, scale, zero, out="codes")
    x = net.op("MaxPool", x, out="pooled_codes", kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("DequantizeLinear", x, scale, zero, out="pooled_dq")
    return net.head(net.qconv(x, "last", 16, 16), 16)


def partly_quantized() -> onnx.ModelProto:
    """One conv quantized, one with quantized weights only, one with quantized data only."""
    net = QatNet()
    x = net.op("Relu", net.qconv(net.pair(net.input("input"), 0.03), "both", 3, 16), out="relu1")
    x = net.op("Relu", net.qconv(x, "weights_only", 16, 16), out="relu2")
    x = net.conv(net.pair(x, 0.02), "data_only", 16, 16)
    return net.head(x, 16)


def codes_at_the_edge() -> onnx.ModelProto:
    """Weights whose step is max|w| / 127.5, so that -128 is a code, per tensor."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    codes = np.random.default_rng(2).integers(-128, 128, (16, 3, 3, 3))
    w = net.stored("w", codes, 0.01)
    x = net.op("Conv", x, w, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    return net.head(x, 16)


def quantized_attention() -> onnx.ModelProto:
    """Products of two computed tensors, both quantized, and of a weight shared by two nodes."""
    net = QatNet()
    x = net.pair(net.input("input", ("N", 6, 16)), 0.03)
    weight = net.weight("w", 16, 16)
    read = net.pair(weight, channel_scales(net.value(weight), 1), axis=1)
    q, k = (net.op("MatMul", x, read, out=name) for name in "qk")
    kt = net.op("Transpose", net.pair(k, 0.04), out="kt", perm=[0, 2, 1])
    scores = net.op("MatMul", net.pair(q, 0.02), kt, out="scores")
    net.op("Softmax", scores, out="output", axis=-1)
    return net.model({"output": ("N", 6, 6)})


def captured() -> onnx.ModelProto:
    """An If whose branches read a quantized tensor of the outer graph."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    read = net.pair(x, 0.02)
    total = net.op("ReduceSum", x, out="total", keepdims=0)
    positive = net.op("Greater", total, net.const("zero", 0.0), out="positive")
    bodies = []
    for name, op in (("yes", "Neg"), ("no", "Identity")):
        made = onnx.helper.make_tensor_value_info(f"{name}_out", 1, ("N", 16, 8, 8))
        node = onnx.helper.make_node(op, [read], [f"{name}_out"], name=f"{name}_node")
        bodies.append(onnx.helper.make_graph([node], name, [], [made]))
    x = net.op("If", positive, out="chosen", then_branch=bodies[0], else_branch=bodies[1])
    return net.head(x, 16)


def concatenated() -> onnx.ModelProto:
    """Two quantized tensors of different scales concatenated, then a conv."""
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    left = net.pair(net.qconv(x, "left", 3, 16), 0.02)
    right = net.pair(net.qconv(x, "right", 3, 16), 0.05)
    x = net.op("Concat", left, right, out="cat", axis=1)
    return net.head(net.qconv(x, "last", 32, 16), 16)


EXACT = {
    make.__name__: make
    for make in (
        torch_residual, dequantize_then_transpose, two_scales, quantized_output, codes_pooled,
        partly_quantized, codes_at_the_edge, tinymodels.quantized,
        quantized_attention, captured, concatenated, codes_transposed,
    )
}  # fmt: skip
"""Models that are symmetric int8: what is taken apart and put together gives the same bits."""


def imported(proto: onnx.ModelProto, **options: Any) -> Imported:
    """`import_model` of a model in memory."""
    return import_model(model_from_proto(proto), **options)


def assert_same_bits(
    a: onnx.ModelProto,
    b: onnx.ModelProto,
    feeds: Mapping[str, Any],
    *,
    levels: Sequence[str] = ("none", "all"),
) -> None:
    """Fail unless both models give the same outputs, optimized by onnxruntime or not."""
    for optimize in levels:
        first, second = (outputs(proto, feeds, optimize=optimize) for proto in (a, b))
        assert first.keys() == second.keys()
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name])
