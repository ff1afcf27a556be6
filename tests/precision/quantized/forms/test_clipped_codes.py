"""Codes that are cut to fewer bits: a Clip of the floats in front gives the same codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from tinyqat import QatNet, assert_same_bits, imported

from trtune.precision.quantized.importing import insert_quantization


def narrow(
    low: int | None, high: int | None, dtype: Any = np.int8, zero: int = 0
) -> onnx.ModelProto:
    net = QatNet()
    x = net.input("input")
    parameters = [net.const("s", 0.03, np.float32), net.const("z", zero, dtype)]
    bounds = [
        "" if value is None else net.const(name, value, dtype)
        for name, value in (("low", low), ("high", high))
    ]
    codes = net.op("QuantizeLinear", x, *parameters, out="codes")
    codes = net.op("Clip", codes, *bounds, out="cut")
    x = net.op("DequantizeLinear", codes, *parameters, out="read")
    return net.head(net.op("Relu", net.qconv(x, "conv", 3, 16), out="relu"), 16)


@pytest.mark.parametrize(
    ("low", "high", "bounds"),
    [(-63, 63, 2), (-8, 7, 2), (None, 63, 1), (-128, 31, 1), (-128, 127, 0)],
)
def test_the_same_bits(low: int | None, high: int | None, bounds: int) -> None:
    proto = narrow(low, high)
    found = imported(proto)
    assert [row.kind for row in found.findings] == ["clipped-codes"]
    assert found.plan.int8_nodes == ("n_conv",)
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=4))
    clips = [node for node in found.model.proto.graph.node if node.op_type == "Clip"]
    assert len(clips) == (bounds > 0)
    assert all(sum(map(bool, node.input)) == 1 + bounds for node in clips)


def test_seven_bits_around_a_zero_point() -> None:
    """torch's x86 settings: uint8 codes up to 127, made int8 by a shift."""
    found = imported(narrow(0, 127, np.uint8, 56), allow_requantize=True)
    assert found.plan.int8_nodes == ("n_conv",)
    assert {row.kind for row in found.findings} == {"clipped-codes", "uint8"}
    (change,) = found.changes
    assert change.shift == pytest.approx(72 * 0.03)


def test_a_clip_that_others_read_stays() -> None:
    proto = narrow(-63, 63)
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("cut", onnx.TensorProto.INT8, None)
    )
    found = {node.op_type for node in proto.graph.node}
    assert "Clip" in found
    with pytest.raises(Exception, match="quantize-alone"):
        imported(proto)


def test_weights_of_fewer_bits() -> None:
    net = QatNet()
    x = net.pair(net.input("input"), 0.03)
    parameters = [net.const("s", 0.05, np.float32), net.const("z", 0, np.int8)]
    codes = net.op("QuantizeLinear", net.weight("w", 16, 3, 3, 3), *parameters, out="codes")
    bounds = [net.const("low", -8, np.int8), net.const("high", 7, np.int8)]
    codes = net.op("Clip", codes, *bounds, out="cut")
    read = net.op("DequantizeLinear", codes, *parameters, out="read")
    x = net.op("Conv", x, read, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    proto = net.head(x, 16)
    found = imported(proto)
    assert found.plan.int8_nodes == ("n_conv",)
    again = insert_quantization(found.model, found.table)
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=4))
