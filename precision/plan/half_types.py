"""float16 and bfloat16: their limits, and which operators take them where.

What an operator takes is read from ONNX's own schemas: the inputs and outputs that share a type
variable with float32 data change together, and an operator without such a variable stays float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from trtune.precision.graph.operators import SHAPE_SLOTS
from trtune.precision.graph.proto import RANDOM_OPS, subgraphs


@dataclass(frozen=True, slots=True)
class Half:
    """A 16-bit float type: its largest value, smallest normal and smallest subnormal number.

    `word` is its name in ONNX and NumPy. `bits` is the precision, the leading one included; from
    `coarse` on, neighbours are 0.5 or more apart. `opset` is the first whose operators take it
    throughout.
    """

    name: str
    word: str
    tensor_type: int
    max: float
    tiny: float
    smallest: float
    bits: int
    coarse: float
    opset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type."""
        return onnx.helper.tensor_dtype_to_np_dtype(self.tensor_type)


HALVES: Mapping[str, Half] = MappingProxyType(
    {
        "fp16": Half(
            "fp16", "float16", TensorProto.FLOAT16, 65504.0, 2.0**-14, 2.0**-24, 11, 2.0**9, 13
        ),
        "bf16": Half(
            "bf16",
            "bfloat16",
            TensorProto.BFLOAT16,
            (2 - 2.0**-7) * 2.0**127,
            2.0**-126,
            2.0**-133,
            8,
            2.0**6,
            22,
        ),
    }
)
HALF_WORDS = frozenset(half.word for half in HALVES.values())

POSITIONS = {"GridSample", "AffineGrid", "RoiAlign", "MaxRoiPool", "Range"}
"""Operators that compute with coordinates, which 11 bits place no better than 1 in 2048."""
QDQ = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True, slots=True)
class Slots:
    """The inputs and outputs of a node that change from float32 to a half type together.

    `refusal` says why it has to stay float32; both are empty then.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    refusal: str = ""


def half_slots(node: onnx.NodeProto, dtypes: Mapping[str, str], opset: int, half: Half) -> Slots:
    """Where `node` takes `half` in a model of `opset` (raised to `half.opset` if that is higher).

    `dtypes` maps tensors to NumPy type names. Shape inputs (the scales of a Resize) are left out.
    A node whose floats are half types already has no slots and no refusal.
    """
    refusal = _refusal(node)
    if refusal:
        return Slots(refusal=refusal)
    unknown = [name for name in (*node.input, *node.output) if name and name not in dtypes]
    if unknown:
        return Slots(refusal=f"the type of {unknown[0]!r} is not known")
    floats = _float32(node.output, dtypes)
    if node.op_type in ("Cast", "ConstantOfShape"):  # their type is an attribute
        return Slots(outputs=floats) if floats else Slots(refusal="it computes no float32")
    opset = max(opset, half.opset)
    variables = _variables(node.op_type, opset, f"tensor({half.word})")
    if variables is None:
        return Slots(refusal=f"ONNX has no {node.op_type} in opset {opset}")
    return _shared(node, dtypes, variables, floats, f"takes no {half.word} in opset {opset}")


def _refusal(node: onnx.NodeProto) -> str:
    """Why a node stays float32 whatever its types are; empty if nothing is against it."""
    if any(True for _ in subgraphs(node)):
        return "its body stays float32"
    if node.domain:
        return f"{node.domain}::{node.op_type} is no ONNX operator, so its types are not known"
    if node.op_type in POSITIONS:
        return "it computes positions"
    if node.op_type in RANDOM_OPS and node.op_type != "Dropout":
        return "it draws random numbers"
    return ""


def _float32(names: Sequence[str], dtypes: Mapping[str, str]) -> tuple[int, ...]:
    return tuple(k for k, name in enumerate(names) if name and dtypes[name] == "float32")


def _shared(
    node: onnx.NodeProto,
    dtypes: Mapping[str, str],
    variables: _Variables,
    floats: tuple[int, ...],
    takes_none: str,
) -> Slots:
    shape = SHAPE_SLOTS.get(node.op_type, ())
    found = _float32(node.input, dtypes)
    data = tuple(k for k in found if k not in shape)
    used = {variables.of_input(k) for k in data}
    if not data:
        kinds = {dtypes[name] for name in (*node.input, *node.output) if name}
        return Slots(refusal="" if kinds & HALF_WORDS else "it computes no float32")
    if not used <= variables.admitting:
        return Slots(refusal=f"{node.op_type} {takes_none}")
    if any(variables.of_input(k) in used for k in found if k in shape):
        return Slots(refusal="its shape inputs have the type of its data")
    return Slots(data, tuple(k for k in floats if variables.of_output(k) in used))


@dataclass(frozen=True, slots=True)
class _Variables:
    """The type variables of an operator's inputs and outputs, and which of them take a type."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    admitting: frozenset[str]

    def of_input(self, index: int) -> str:
        return self.inputs[min(index, len(self.inputs) - 1)]

    def of_output(self, index: int) -> str:
        return self.outputs[min(index, len(self.outputs) - 1)]


@cache
def _variables(op: str, opset: int, kind: str) -> _Variables | None:
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return _Variables(
        tuple(parameter.type_str for parameter in schema.inputs),
        tuple(parameter.type_str for parameter in schema.outputs),
        frozenset(
            constraint.type_param_str
            for constraint in schema.type_constraints
            if kind in constraint.allowed_type_strs
        ),
    )


def to_half(value: NDArray[Any], half: Half) -> NDArray[Any]:
    """`value` rounded to the nearest half, ties to even; beyond the range it becomes infinite."""
    with np.errstate(over="ignore"):
        rounded: NDArray[Any] = value.astype(half.dtype)
    return rounded


def half_above(value: NDArray[np.float32], half: Half) -> NDArray[np.float32]:
    """The least half that is not below each positive float32 of `value`, as float32.

    >>> half_above(np.float32([1.0, 0.1, 1e-9]), HALVES["fp16"]).tolist()
    [1.0, 0.10003662109375, 5.960464477539063e-08]
    """
    rounded = to_half(value, half)
    below = rounded.astype(np.float32) < value
    up = np.nextafter(rounded, half.dtype.type(np.inf)) if below.any() else rounded
    raised: NDArray[np.float32] = np.where(below, up, rounded).astype(np.float32)
    return raised
