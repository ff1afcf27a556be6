"""What operators do with their inputs: which of them move values, and which inputs are indices."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MOVES = {
    *("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Identity"),
    *("Expand", "DepthToSpace", "SpaceToDepth", "Tile", "Dropout"),
}
"""Operators that pass values on unchanged. Not Slice, Split and Gather: the part that they pass on
may be far smaller than what they leave out, which its range would clip."""
SELECTS = {"Split", "Slice", "Gather", "GatherElements", "GatherND"}
"""Operators that pass on a part of the values of their first input, unchanged."""
KEEPS = {"GlobalMaxPool", "ReduceMax", "ReduceMin", "Neg", "Abs"}
"""Operators whose results are values of their input, or those with another sign."""


SHAPE_SOURCES = {"Shape", "Size"}
"""Operators that read the shape of a tensor, and nothing of its values."""

_BY_SLOT: dict[tuple[int, ...], str] = {
    (0,): "BlackmanWindow ConstantOfShape HammingWindow HannWindow If Where",
    (1,): """AffineGrid CenterCropPad CumSum Expand Gather GatherElements GatherND Reshape
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare ScatterElements ScatterND Split Squeeze Tile TopK Trilu
        Unsqueeze Upsample""",
    (0, 1): "Loop OneHot",
    (1, 2): "Col2Im MaxUnpool",
    (1, 3): "Pad",
    (0, 1, 2): "Range",
    (1, 2, 3): "Resize",
    (2, 3, 4): "NonMaxSuppression",
    (1, 2, 3, 4): "Slice",
}

SHAPE_SLOTS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {op: slots for slots, ops in _BY_SLOT.items() for op in ops.split()}
)
"""Inputs that say where or how large, never how much."""
