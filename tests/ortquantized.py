"""Q/DQ models made by onnxruntime's own quantizer, as an independent example of that form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import tinymodels
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, model: onnx.ModelProto) -> None:
        self.batches = [tinymodels.feeds(model, batch=4, seed=seed) for seed in range(3)]

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return self.batches.pop() if self.batches else None


def quantized(model: onnx.ModelProto, exclude: tuple[str, ...] = ()) -> onnx.ModelProto:
    """`model` in the Q/DQ form that onnxruntime's CPU kernels fuse, by its own quantizer."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Reader(model),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(exclude),
        )
        return onnx.load(target)
