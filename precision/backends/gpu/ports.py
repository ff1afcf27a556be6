"""Inputs and outputs of a TensorRT engine: what fits them, and their memory on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, TrtuneError, did_you_mean
from trtune.datasets.batches import InputSpec
from trtune.precision.backends.gpu.memory import DeviceBuffer, PinnedBuffer

NUMPY_OF = MappingProxyType(
    {
        "FLOAT": "float32",
        "HALF": "float16",
        "BF16": "bfloat16",
        "INT8": "int8",
        "UINT8": "uint8",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
        "FP8": "float8_e4m3fn",
    }
)
"""TensorRT's names of types as NumPy has them, the last ones through ml_dtypes."""

Dims = tuple[int, ...]


def numpy_type(kind: str) -> np.dtype[Any] | None:
    """The NumPy type of TensorRT's type called `kind`; None for those that NumPy lacks.

    >>> numpy_type("HALF"), numpy_type("FP4")
    (dtype('float16'), None)
    """
    try:
        return np.dtype(NUMPY_OF[kind])
    except (KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: its free dimensions are -1 in `shape`, `low` and `high` bound an input.

    `on_host` says that TensorRT reads or writes it in the CPU's memory (a shape it computes with).
    """

    name: str
    dtype: np.dtype[Any]
    shape: Dims
    low: Dims
    high: Dims
    is_input: bool
    on_host: bool

    @property
    def spec(self) -> InputSpec:
        """The same three facts that a model's input has."""
        shape = tuple(None if dim < 0 else dim for dim in self.shape)
        return InputSpec(self.name, shape, self.dtype.name)


class Buffers:
    """The memory of one input or output on both sides; it grows, and never shrinks."""

    def __init__(self, nbytes: int, *, on_host: bool) -> None:
        self.on_host = on_host
        self.host = PinnedBuffer(nbytes)
        try:
            self.device = None if on_host else DeviceBuffer(nbytes)
        except TrtuneError:
            self.host.free()
            raise

    @property
    def nbytes(self) -> int:
        """What fits."""
        return self.host.nbytes

    @property
    def address(self) -> int:
        """What TensorRT is given."""
        return self.host.pointer if self.device is None else self.device.pointer

    def free(self) -> None:
        """Give both back. Raises CudaError."""
        try:
            if self.device is not None:
                self.device.free()
        finally:
            self.host.free()


def nbytes_of(shape: Dims, dtype: np.dtype[Any]) -> int:
    """Bytes of a dense tensor.

    >>> nbytes_of((2, 3), np.dtype("float16"))
    12
    """
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def fitting(port: Port, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The array of `feeds` for an input. Raises DataError if it is missing or does not fit."""
    array = feeds.get(port.name)
    if array is None:
        raise DataError(
            f"the engine's input {port.name!r} is missing from the batch, which has "
            f"{', '.join(map(repr, feeds)) or 'nothing'}{did_you_mean(port.name, feeds)}"
        )
    if array.dtype != port.dtype:
        raise DataError(
            f"input {port.name!r} must be {port.dtype.name}; the batch has {array.dtype}"
        )
    if len(array.shape) != len(port.shape) or not all(
        low <= got <= high for low, got, high in zip(port.low, array.shape, port.high, strict=True)
    ):
        raise DataError(_misfit(port, array.shape))
    return array


def _misfit(port: Port, shape: Dims) -> str:
    said = f"input {port.name!r} has shape {list(shape)} in the batch"
    if port.low == port.high:
        return f"{said}; the engine was built for {list(port.shape)} alone: change data.*.batch"
    return (
        f"{said}; the engine's profile goes from {list(port.low)} to {list(port.high)}: change "
        f"data.*.batch, or model.shapes.{port.name} and build again"
    )
