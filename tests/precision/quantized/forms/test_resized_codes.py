"""A Resize between codes and their DequantizeLinear, as onnxruntime writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from tinyqat import QatNet, assert_same_bits, imported

from trtune.configs.errors import ModelError
from trtune.precision.quantized.importing import insert_quantization


def network(
    zero: int = 0, dtype: Any = np.int8, *, moved: bool = False, read: bool = False
) -> onnx.ModelProto:
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "one", 3, 16)
    parameters = [net.const("s", 0.03), net.const("z", zero, dtype)]
    codes = first = net.op("QuantizeLinear", x, *parameters, out="codes")
    if moved:
        codes = net.op("Transpose", codes, out="turned", perm=[0, 1, 3, 2])
    codes = net.op("Resize", codes, "", net.const("f", [1, 1, 2, 2]), out="large", mode="nearest")
    back = net.op("DequantizeLinear", codes, *parameters, out="back")
    y = net.op("GlobalAveragePool", net.qconv(back, "two", 16, 16), out="mean")
    if read:
        other = net.op("DequantizeLinear", first, *parameters, out="other")
        y = net.op("Add", y, net.qconv(other, "three", 16, 16), out="sum")
    return net.head(y, 16)


@pytest.mark.parametrize(
    "proto",
    [network(), network(moved=True), network(read=True), network(128, np.uint8)],
    ids=["alone", "moved before", "codes read too", "uint8 around 128"],
)
def test_the_same_bits_and_int8_behind(proto: onnx.ModelProto) -> None:
    found = imported(proto)
    assert found.plan.is_int8("n_two")
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=2))


def padded(value: int | None, zero: int = 0, dtype: Any = np.int8) -> onnx.ModelProto:
    """Codes padded with `value`, as QLinear models have them."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "one", 3, 16)
    parameters = [net.const("s", 0.03), net.const("z", zero, dtype)]
    codes = net.op("QuantizeLinear", x, *parameters, out="codes")
    pads = [net.const("p", [0, 0, 1, 1, 0, 0, 1, 1], np.int64)]
    if value is not None:
        pads.append(net.const("v", value, dtype))
    wide = net.op("Pad", codes, *pads, out="wide")
    back = net.op("DequantizeLinear", wide, *parameters, out="back")
    return net.head(net.qconv(back, "two", 16, 16), 16)


@pytest.mark.parametrize(
    "proto", [padded(None), padded(0), padded(128, 128, np.uint8)], ids=["none", "0", "uint8"]
)
def test_padding_with_the_code_of_zero(proto: onnx.ModelProto) -> None:
    found = imported(proto)
    assert found.plan.is_int8("n_two")
    told = [row.found for row in found.findings if row.kind == "computed-codes"]
    stored = any(tensor.name == "v" for tensor in proto.graph.initializer)
    assert told == (["it pads codes with the stored code 'v'"] if stored else [])
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=2))


def test_padding_with_another_code_is_no_padding_with_zero() -> None:
    with pytest.raises(ModelError, match="quantize-alone"):
        imported(padded(5))
