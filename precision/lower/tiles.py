"""Weights in the form for which onnxruntime takes the matrix units of a CPU (Intel's AMX).

Its kernel for convolutions with int8 weights of zero point 0 uses vectors (VNNI) on every CPU. Any
other zero point sends a convolution to the matrix product, which has a kernel for AMX: a copy of
every window and a pass over its int32 sums more, but up to 1.8 times as fast where an output value
has many products. Codes that are one less, with zero point -1, are the same weights, and the
results the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from trtune.precision.graph.view import Shape
from trtune.precision.lower.convolutions import (
    Constants,
    IntegerConvolution,
    integer_convolutions,
)

LEAST_PRODUCTS, LEAST_GATHERED = 512, 1024
"""Products of an output value for which the matrix units were faster: of one place, and of a window
of several, which is copied first."""
LEAST_MADE, LEAST_PLACES = 64, 16
"""... and output channels, and places of a picture, below which they are not worth their set-up."""
OUTPUTS = 16
"""Their number has to be a multiple of this: of 24 or 88 the matrix product of onnxruntime 1.23 got
a few values of the last ones wrong on AMX."""
LEAST_CODE = -127
"""Codes of one less have to be int8 as well."""


def use_matrix_units(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
    """Give those convolutions of the lowered `model`, in place, that gain by it such weights.

    `shapes` has dimensions by tensor, as far as they are known.
    """
    made = Constants(model.graph)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for one in integer_convolutions(model.graph):
        stored = constants.get(one.weight.input[2])
        if stored is None or not _gains(one, shapes):
            continue
        zero_point, codes = numpy_helper.to_array(stored), numpy_helper.to_array(one.codes)
        if not zero_point.any() and codes.min(initial=0) >= LEAST_CODE:
            made.reweight(one, "less_one", codes - np.int8(1), zero_point - np.int8(1))
    made.finish()


def _gains(one: IntegerConvolution, shapes: Mapping[str, Shape]) -> bool:
    outputs, channels, *window = one.codes.dims
    size = math.prod(window)
    places = [dim for dim in shapes.get(one.node.output[0], ())[2:] if isinstance(dim, int)]
    known = len(places) == len(window)
    large = channels * size >= (LEAST_PRODUCTS if size == 1 else LEAST_GATHERED)
    fits = outputs >= LEAST_MADE and outputs % OUTPUTS == 0
    return large and fits and (not known or math.prod(places) >= LEAST_PLACES)
