"""Networks put together at random, pairs and weights in many manners: what is imported gives the
bits of the file, and strip and insert give it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from tinyqat import QatNet, assert_same_bits, channel_scales, imported
from tinyquant import outputs

from trtune.precision.quantized.importing import insert_file, insert_quantization, strip_file

SHAPE = (2, 16, 8, 8)
SCALES = (0.02, 0.03, 0.05)


class RandomNet(QatNet):
    """Steps that keep a tensor's shape, each with the choices of `rng`."""

    def __init__(self, seed: int) -> None:
        super().__init__(opset=(13, 17, 19, 21)[seed % 4])
        self.rng = np.random.default_rng(seed)
        self.made = 0

    def new(self, word: str) -> str:
        self.made += 1
        return f"{word}{self.made}"

    def quantized(self, x: str) -> str:
        return self.pair(x, float(self.rng.choice(SCALES)), out=self.new("read"))

    def read_weight(self, *shape: int) -> str:
        kind = int(self.rng.integers(5))
        if kind == 0:
            codes = self.rng.integers(-127, 128, shape)
            return self.stored(self.new("stored"), codes, np.full(shape[0], 0.004), axis=0)
        weight = self.weight(self.new("w"), *shape)
        if kind == 1:
            return weight
        if kind == 2:
            return self.pair(weight, 0.01)
        axis = 0 if kind == 3 else -len(shape)
        return self.pair(weight, channel_scales(self.value(weight), 0), axis=axis)

    def convolved(self, x: str) -> str:
        k, group = int(self.rng.choice([1, 3])), int(self.rng.choice([1, 1, 4, 16]))
        weight = self.read_weight(16, 16 // group, k, k)
        return self.op(
            "Conv", x, weight, out=self.new("conv"), kernel_shape=[k, k], pads=[k // 2] * 4,
            group=group,
        )  # fmt: skip

    def split(self, x: str) -> str:
        parts = [self.new("part"), self.new("part")]
        sizes = self.const(self.new("sizes"), [4, 12], np.int64)
        node = helper.make_node("Split", [x, sizes], parts, name=self.new("n_split"), axis=1)
        self.nodes.append(node)
        return self.op("Concat", *reversed(parts), out=self.new("joined"), axis=1)

    def resized(self, x: str) -> str:
        factors = self.const(self.new("factors"), [1, 1, 2, 2])
        large = self.op("Resize", x, "", factors, out=self.new("large"), mode="nearest")
        return self.op("MaxPool", large, out=self.new("pool"), kernel_shape=[2, 2], strides=[2, 2])

    def padded(self, x: str) -> str:
        pads = self.const(self.new("pads"), [0, 0, 1, 1, 0, 0, 1, 1], np.int64)
        wide = self.op("Pad", x, pads, out=self.new("wide"))
        return self.op("MaxPool", wide, out=self.new("pool"), kernel_shape=[3, 3])


def steps(net: RandomNet, known: list[str]) -> list[Callable[[str], str]]:
    def other() -> str:
        return known[int(net.rng.integers(len(known)))]

    def unary(op: str, **attributes: object) -> Callable[[str], str]:
        return lambda x: net.op(op, x, out=net.new(op.lower()), **attributes)

    def binary(op: str) -> Callable[[str], str]:
        return lambda x: net.op(op, x, other(), out=net.new(op.lower()))

    return [
        *(3 * [net.convolved]), *(4 * [net.quantized]), net.split, net.resized, net.padded,
        lambda x: net.quantized(net.quantized(x)),
        unary("Relu"), unary("Neg"), unary("Identity"), unary("Sigmoid"),
        unary("Transpose", perm=[0, 1, 3, 2]),
        unary("MaxPool", kernel_shape=[3, 3], pads=[1] * 4),
        unary("AveragePool", kernel_shape=[3, 3], pads=[1] * 4),
        binary("Add"), binary("Mul"), binary("Max"),
    ]  # fmt: skip


def network(seed: int) -> onnx.ModelProto:
    net = RandomNet(seed)
    known = [net.quantized(net.input("input", SHAPE))]
    choices = steps(net, known)
    for _ in range(int(net.rng.integers(3, 10))):
        known.append(choices[int(net.rng.integers(len(choices)))](known[-1]))
    net.op("Identity", known[-1], out="output")
    return net.model({"output": SHAPE})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_imports_are_exact(seed: int) -> None:
    proto = network(seed)
    found = imported(proto)
    assert found.changes == ()
    again = insert_quantization(found.model, found.table, found.plan)
    feeds = tinymodels.feeds(proto, batch=2)
    for name, value in outputs(proto, feeds, optimize="none").items():
        np.testing.assert_array_equal(value, outputs(again, feeds, optimize="none")[name])


def test_strip_and_insert_give_it_again(tmp_path: Path) -> None:
    for seed in range(12):
        proto = network(seed)
        direct = imported(proto)
        if not direct.table.reads:
            continue  # nothing in it reads quantized data
        paths = [
            tmp_path / f"{seed}.{word}" for word in ("qat.onnx", "onnx", "cache", "again.onnx")
        ]
        onnx.save(proto, paths[0])
        strip_file(*paths[:3])
        insert_file(*paths[1:])
        expected = insert_quantization(direct.model, direct.table)
        assert_same_bits(expected, onnx.load(paths[3]), tinymodels.feeds(proto, batch=2))
