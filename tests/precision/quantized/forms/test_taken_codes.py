"""Embeddings stored as codes: floats are taken, and quantized as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tinyqat import QatNet, assert_same_bits, channel_scales, imported

from trtune.configs.errors import ModelError
from trtune.precision.quantized.importing import insert_quantization

IDS = {"ids": np.array([[1, 4, 0], [7, 2, 3]], np.int64)}


def network(
    zero: int = 0, dtype: Any = np.int8, *, moved: bool = False, scales: tuple[float, ...] = (0.02,)
) -> onnx.ModelProto:
    """Rows of stored codes taken by `ids`, dequantized with each of `scales`, each multiplied."""
    net = QatNet()
    ids = net.input("ids", (2, 3), TensorProto.INT64)
    low, high = (0, 256) if dtype is np.uint8 else (-128, 128)
    table = net.const("table", np.random.default_rng(1).integers(low, high, (8, 16)), dtype)
    codes = net.op("Gather", table, ids, out="rows")
    if moved:
        codes = net.op("Transpose", codes, out="turned", perm=[1, 0, 2])
    sums = []
    for number, scale in enumerate(scales):
        parameters = [net.const(f"s{number}", scale), net.const(f"z{number}", zero, dtype)]
        read = net.op("DequantizeLinear", codes, *parameters, out=f"read{number}")
        weight = net.weight(f"w{number}", 16, 10)
        held = net.pair(weight, channel_scales(net.value(weight), 1), axis=1)
        sums.append(net.op("MatMul", read, held, out=f"product{number}"))
    net.op("Sum", *sums, out="output")
    return net.model({"output": (3, 2, 10) if moved else (2, 3, 10)})


@pytest.mark.parametrize(
    "proto",
    [network(), network(128, np.uint8), network(moved=True), network(scales=(0.02, 0.02))],
    ids=["int8", "uint8 around 128", "moved", "read twice"],
)
def test_the_same_bits_and_int8_products(proto: onnx.ModelProto) -> None:
    found = imported(proto)
    assert "computed-codes" in {row.kind for row in found.findings}
    assert found.plan.is_int8("n_product0")
    assert_same_bits(proto, insert_quantization(found.model, found.table), IDS)


def test_codes_read_with_two_scales_are_left_and_said() -> None:
    with pytest.raises(ModelError, match="dequantize-alone"):
        imported(network(scales=(0.02, 0.03)))
