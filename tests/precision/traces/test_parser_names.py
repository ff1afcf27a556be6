from __future__ import annotations

import pytest
import tinymodels

from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.traces.parser_names import explain_tensor, is_parser_name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ONNXTRT_Broadcast_236_output", "rank of the other"),
        ("ONNXTRT_ShapeShuffle_600_output", "a reshape"),
        ("ONNXTRT_flattenTensor_output", "a flattening"),
        ("ONNXTRT_unsqueezeTensor_output", "axes"),
        ("tmp_refittable_weight_0_output", "refitted; here at n_conv1"),
        ("(Unnamed Layer* 4) [Constant]_output", "layer 4 of TensorRT's own count"),
        ("conv1_w_output", "the constant 'conv1_w', read by n_conv1"),
        ("relu_9", ""),
        ("conv1", ""),
    ],
)
def test_names_that_are_no_tensors_of_the_model(name: str, told: str) -> None:
    view = GraphView.of(model_from_proto(tinymodels.conv_relu()))
    found = explain_tensor(name, view)
    assert told in found
    assert bool(found) == bool(told)


def test_only_the_parsers_own_names_are_its() -> None:
    assert is_parser_name("ONNXTRT_Broadcast_output")
    assert not is_parser_name("conv1_w_output")
