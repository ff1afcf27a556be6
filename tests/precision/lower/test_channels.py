"""Channels added for the kernels of integer convolutions: where, and that no bit changes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tinymodels import Net
from tinyquant import Array, case, initializer, maker, op_counts, outputs

from trtune.precision.graph.proto import copy_model
from trtune.precision.lower.channels import fill_channels
from trtune.precision.lower.deploy import lower_deploy

RNG_SEED = 5


def convolution(
    read: int,
    made: int,
    window: tuple[int, ...] = (3, 3),
    *,
    group: int = 1,
    quantized: bool = True,
    zero_point: int = 128,
    readers: int = 1,
    stride: int = 1,
) -> onnx.ModelProto:
    """A lowered model: codes of `read` channels, and `readers` convolutions that make `made`."""
    rng = np.random.default_rng(RNG_SEED)
    weight = rng.integers(-64, 65, (made, read // group, *window)).astype(np.int8)
    constants = {
        "s": np.float32(0.02), "z": np.uint8(zero_point), "ys": np.float32(0.3),
        "w": weight, "ws": rng.uniform(0.005, 0.01, made).astype(np.float32),
        "wz": np.zeros(made, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="weight", axis=0),
    ]
    ends = []
    for number in range(readers):
        result = f"y{number}"
        made_here = f"c{number}" if quantized else result
        nodes.append(
            helper.make_node(
                "Conv", ["d", "wd"], [made_here], name=f"conv{number}", group=group,
                pads=[k // 2 for k in window] * 2, strides=[stride] * len(window),
            )
        )  # fmt: skip
        if quantized:
            nodes += [
                helper.make_node("QuantizeLinear", [made_here, "ys", "z"], [f"r{number}"]),
                helper.make_node("DequantizeLinear", [f"r{number}", "ys", "z"], [result]),
            ]
        free = [f"d{i}" for i in range(len(window))]
        ends.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", made, *free]))
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", read, *[9] * len(window)])
    weights = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "filled", [start], ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def filled(model: onnx.ModelProto) -> onnx.ModelProto:
    found = copy_model(model)
    fill_channels(found)
    onnx.checker.check_model(found, full_check=True)
    return found


def feeds_of(model: onnx.ModelProto, batch: int = 2) -> Mapping[str, Array]:
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    values = np.random.default_rng(RNG_SEED).normal(size=(batch, *dims))
    return {"x": values.astype(np.float32)}


def is_filled(model: onnx.ModelProto) -> bool:
    return op_counts(filled(model))["Pad"] > 0


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(convolution(3, 16), True, id="a picture"),
        pytest.param(convolution(1, 16), True, id="one channel"),
        pytest.param(convolution(18, 64, (1, 1)), True, id="1 x 1"),
        pytest.param(convolution(3, 16, (5,)), True, id="a signal"),
        pytest.param(convolution(3, 16, (3, 3, 3)), True, id="a volume"),
        pytest.param(convolution(3, 64, (7, 7)), True, id="7 x 7: 196 products"),
        pytest.param(convolution(3, 64, (9, 9)), False, id="9 x 9: 324 products"),
        pytest.param(convolution(34, 64), False, id="many channels: 324 products"),
        pytest.param(convolution(4, 16), False, id="four channels already"),
        pytest.param(convolution(3, 8), False, id="too few outputs"),
        pytest.param(convolution(3, 18), False, id="outputs that are no multiple of four"),
        pytest.param(convolution(6, 16, group=2), False, id="groups"),
        pytest.param(convolution(3, 16, quantized=False), False, id="an output in float"),
    ],
)
def test_where_channels_are_added(model: onnx.ModelProto, expected: bool) -> None:
    assert is_filled(model) is expected
    if not expected:
        assert filled(model) == model


def test_an_output_that_is_read_in_float_too_runs_in_float() -> None:
    model = convolution(3, 16)
    assert is_filled(model)
    model.graph.output.append(
        helper.make_tensor_value_info("c0", TensorProto.FLOAT, ["N", 16, 9, 9])
    )
    assert not is_filled(model)


def test_the_zeros_are_codes_of_zero_behind_the_given_channels() -> None:
    model = convolution(3, 16, zero_point=7)
    found = filled(model)
    (pad,) = (node for node in found.graph.node if node.op_type == "Pad")
    assert numpy_helper.to_array(initializer(found, pad.input[1])).tolist() == [0] * 5 + [1, 0, 0]
    assert numpy_helper.to_array(initializer(found, pad.input[2])) == 7
    weight = initializer(found, maker(found, maker(found, "c0").input[1]).input[0])
    codes = numpy_helper.to_array(weight)
    assert codes.shape == (16, 4, 3, 3)
    assert not codes[:, 3].any()
    np.testing.assert_array_equal(codes[:, :3], numpy_helper.to_array(initializer(model, "w")))
    assert {t.name for t in found.graph.initializer} >= {"s", "z", "ws", "wz"}
    assert "w" not in {t.name for t in found.graph.initializer}


def test_convolutions_of_one_tensor_and_one_weight_share_what_is_added() -> None:
    counts = op_counts(filled(convolution(3, 16, readers=3)))
    assert counts["Pad"] == 1
    assert counts["DequantizeLinear"] == 1 + 1 + 3  # the codes, the weights, the results


def test_who_else_reads_the_tensor_reads_it_as_it_was() -> None:
    net = Net()
    x = net.input("input")
    both = net.op("Concat", net.conv(x, "a", 3, 16), x, out="both", axis=1)
    prepared = case(net.head(net.conv(both, "b", 19, 16), 16))
    found = lower_deploy(prepared.model, prepared.plan, prepared.table)
    onnx.checker.check_model(found, full_check=True)
    assert op_counts(found)["Pad"] == 1  # 3 channels to 4, not the 19 inside
    said = outputs(found, prepared.feeds)["logits"]
    done = outputs(found, prepared.feeds, integer_kernels=True)["logits"]
    np.testing.assert_allclose(done, said, rtol=0, atol=float(np.abs(said).max()) * 1e-2)


@settings(max_examples=40, deadline=None)
@given(
    read=st.integers(1, 30),
    made=st.sampled_from([16, 32, 48, 64]),
    window=st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (5,), (2, 3, 3)]),
    zero_point=st.sampled_from([0, 3, 128, 255]),
    stride=st.integers(1, 2),
    batch=st.integers(1, 3),
)
def test_results_are_the_same_bits(
    read: int, made: int, window: tuple[int, ...], zero_point: int, stride: int, batch: int
) -> None:
    model = convolution(read, made, window, zero_point=zero_point, stride=stride)
    feeds = feeds_of(model, batch)
    for kernels in (True, False):
        before = outputs(model, feeds, integer_kernels=kernels)["y0"]
        after = outputs(filled(model), feeds, integer_kernels=kernels)["y0"]
        if kernels:
            np.testing.assert_array_equal(after, before)
        else:  # float sums in another order may round to the code beside
            assert np.abs(after - before).max() < 0.31
            assert np.mean(after != before) < 0.01


@pytest.mark.parametrize("made", [20, 24, 88])
def test_what_is_filled_is_right_where_the_matrix_product_of_onnxruntime_1_23_is_not(
    made: int,
) -> None:
    found = filled(convolution(3, made, (1, 1), zero_point=0))
    feeds = feeds_of(found)
    said = outputs(found, feeds)["y0"]
    done = outputs(found, feeds, integer_kernels=True)["y0"]
    assert np.abs(done - said).max() < 0.31
