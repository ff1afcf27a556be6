"""Quantizers that ONNX does not have, told by what they stand for."""

from __future__ import annotations

import pytest
from onnx import helper

from trtune.precision.quantized.forms.foreign_ops import foreign_kind


@pytest.mark.parametrize(
    ("domain", "op", "kind"),
    [
        ("trt", "TRT_FP8QuantizeLinear", "fp8"),
        ("trt", "TRT_FP8DequantizeLinear", "fp8"),
        ("trt", "TRT_MXFP8DynamicQuantize", "mxfp8"),
        ("trt", "TRT_INT4DequantizeLinear", "int4"),
        ("trt", "TRT_FP4DynamicQuantize", "fp4"),
        ("qonnx.custom_op.general", "Quant", "foreign-quantizer"),
        ("org.openvinotoolkit", "FakeQuantize", "foreign-quantizer"),
        ("", "QuantizeLinear", ""),
        ("com.microsoft", "QuantizeLinear", ""),
        ("TRT", "EfficientNMS_TRT", ""),
        ("trt", "TRT_Something", ""),
    ],
)
def test_kinds(domain: str, op: str, kind: str) -> None:
    assert foreign_kind(helper.make_node(op, ["x"], ["y"], domain=domain)) == kind
