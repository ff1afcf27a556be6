"""Weights to codes, and edits on a copy of a model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import numpy_helper
from tinyquant import Case, fake_weight, initializer, maker, named, op_counts, outputs

from trtune.configs.errors import ModelError
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.rewrite import Rewrite, quantize_weights, weight_scales

# Weights


@pytest.mark.parametrize(
    ("weights", "axis", "expected"),
    [
        pytest.param([[127.0, -1.0], [0.0, 254.0]], 0, [1.0, 2.0], id="rows"),
        pytest.param([[127.0, -1.0], [0.0, 254.0]], 1, [1.0, 2.0], id="columns"),
        pytest.param([[-127.0, 5.0]], 0, [1.0], id="the magnitude counts"),
        pytest.param([[0.0, 0.0], [0.0, 127.0]], 0, [1.0, 1.0], id="a channel of zeros: 1"),
        pytest.param([[1e-40, 0.0], [0.0, 127.0]], 0, [1.0, 1.0], id="a subnormal channel: 1"),
        pytest.param([[[127.0], [254.0]]], 1, [1.0, 2.0], id="the axis in the middle"),
    ],
)
def test_weight_scales(weights: list[object], axis: int, expected: list[float]) -> None:
    found = weight_scales(np.float32(weights), axis)
    assert found.dtype == np.float32
    assert found.tolist() == expected


def test_weight_scales_are_not_below_the_least() -> None:
    weights = np.float32([[127.0], [254.0], [0.0], [0.0]])
    least = np.array([3.0, 0.5, 0.25, 0.0])
    assert weight_scales(weights, 0, least=least).tolist() == [3.0, 2.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.5, 0), (1.5, 2), (2.5, 2), (-1.5, -2), (126.6, 127), (400.0, 127), (-400.0, -127)],
)
def test_weight_codes_round_half_to_even_within_127(value: float, code: int) -> None:
    found = quantize_weights(np.float32([[value]]), np.ones(1, np.float32), 0)
    assert found.dtype == np.int8
    assert found.tolist() == [[code]]


def test_weight_codes_times_scales_are_the_plain_computation() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 4, 3, 3)).astype(np.float32)
    for axis in range(2):
        scales = weight_scales(weights, axis)
        shape = [1] * 4
        shape[axis] = -1
        values = quantize_weights(weights, scales, axis) * scales.reshape(shape)
        np.testing.assert_array_equal(values, fake_weight(weights, axis))


def test_weights_take_the_scales_that_are_given_and_then_minus_128_is_a_code() -> None:
    prepared = named("conv_relu")
    value = prepared.view.constant("conv1_w")
    given = (np.abs(value).max(axis=(1, 2, 3)) / 128).astype(np.float32)
    scales = {"conv1_w": tuple(given.tolist()), "conv2_w": (0.01,)}
    rewrite = Rewrite(prepared.model, prepared.view, scales)
    np.testing.assert_array_equal(rewrite.weight_scales("conv1_w", 0), given)
    np.testing.assert_array_equal(rewrite.weight_scales("conv2_w", 0), np.float32([0.01] * 32))
    rewrite.reconnect(("n_conv1", 1), rewrite.quantized_weight("conv1_w", 0))
    codes = numpy_helper.to_array(initializer(rewrite.finish(), "conv1_w/int8"))
    assert codes.min() == -128
    assert codes.max() == 127


def test_a_wrong_number_of_given_weight_scales_is_refused() -> None:
    prepared = named("conv_relu")
    rewrite = Rewrite(prepared.model, prepared.view, {"conv1_w": (0.1, 0.2)})
    with pytest.raises(
        ModelError, match="2 scales for the weights 'conv1_w', which have 16 output"
    ):
        rewrite.quantized_weight("conv1_w", 0)


# Edits


def rewrite_of(name: str) -> tuple[Case, Rewrite]:
    prepared = named(name)
    return prepared, Rewrite(prepared.model, prepared.view)


def test_without_edits_the_graph_stays_what_it_was() -> None:
    for name in tinymodels.MODELS:
        model = model_from_proto(tinymodels.MODELS[name]())
        before = model.proto.SerializeToString(deterministic=True)
        found = Rewrite(model, GraphView.of(model)).finish()
        assert list(found.graph.node) == list(model.proto.graph.node)
        assert list(found.graph.input) == list(model.proto.graph.input)
        assert list(found.graph.output) == list(model.proto.graph.output)
        assert list(found.graph.value_info) == list(model.proto.graph.value_info)
        assert found.opset_import == model.proto.opset_import
        assert model.proto.SerializeToString(deterministic=True) == before


def test_what_describes_the_model_is_kept() -> None:
    proto = tinymodels.conv_relu()
    proto.domain, proto.model_version, proto.doc_string = "com.example", 7, "A net."
    proto.graph.doc_string = "Layers."
    proto.metadata_props.add(key="classes", value="10")
    model = model_from_proto(proto)
    found = Rewrite(model, GraphView.of(model)).finish()
    assert (found.domain, found.model_version, found.doc_string) == ("com.example", 7, "A net.")
    assert found.graph.doc_string == "Layers."
    assert found.metadata_props[0].value == "10"
    assert found.producer_name == "trtune"
    assert found.ir_version == model.proto.ir_version


def test_a_pair_is_made_once_right_behind_its_tensor() -> None:
    prepared, rewrite = rewrite_of("conv_relu")
    first = rewrite.quantize_pair("relu1", 0.5, 0, np.int8)
    assert rewrite.quantize_pair("relu1", 0.5, 0, np.int8) == first
    assert rewrite.is_dequantized(first)
    assert not rewrite.is_dequantized("relu1")
    rewrite.reconnect(("n_conv2", 0), first)
    found = rewrite.finish()
    names = [node.op_type for node in found.graph.node]
    at = names.index("QuantizeLinear")
    assert names[at - 1 : at + 3] == ["Relu", "QuantizeLinear", "DequantizeLinear", "Conv"]
    assert op_counts(found)["QuantizeLinear"] == 1
    assert maker(found, "conv2").input[0] == first
    assert prepared.view.by_name["n_conv2"].input[0] == "relu1"  # only the copy was changed
    onnx.checker.check_model(found, full_check=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_above_zero_is_a_bug(scale: float) -> None:
    _, rewrite = rewrite_of("conv_relu")
    with pytest.raises(ValueError, match="scale of 'relu1' is"):
        rewrite.quantize_pair("relu1", scale, 0, np.int8)


def test_a_weight_is_stored_once_for_each_axis_and_scales() -> None:
    _, rewrite = rewrite_of("mlp")
    first = rewrite.quantized_weight("fc1_w", 0)
    assert rewrite.quantized_weight("fc1_w", 0) == first
    other = rewrite.quantized_weight("fc1_w", 1)
    wider = rewrite.quantized_weight("fc1_w", 0, np.full(32, 0.5, np.float32))
    assert len({first, other, wider}) == 3
    for name in (first, other, wider):
        rewrite.reconnect(("n_fc1", 1), name)
        node = maker(rewrite.finish(), name)
        axis = node.attribute[0].i
        assert axis == (1 if name == other else 0)
        scales = numpy_helper.to_array(initializer(rewrite.finish(), node.input[1]))
        assert scales.shape == ((16,) if name == other else (32,))


def test_unused_weights_are_left_out() -> None:
    _, rewrite = rewrite_of("mlp")
    rewrite.reconnect(("n_fc1", 1), rewrite.quantized_weight("fc1_w", 0))
    rewrite.constant("nobody", np.zeros(3, np.float32))
    names = {tensor.name for tensor in rewrite.finish().graph.initializer}
    assert "fc1_w" not in names
    assert "nobody" not in names
    assert {"fc1_w/int8", "fc1_w/scale", "fc1_w/zero_point", "fc1_b"} <= names


def test_initializers_that_only_a_subgraph_reads_stay() -> None:
    proto = tinymodels.branches()
    chosen = maker(proto, "chosen")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(3), "inside"))
    body = next(a.g for a in chosen.attribute if a.name == "then_branch")
    body.node[0].op_type = "Mul"
    body.node[0].input.append("inside")
    model = model_from_proto(proto)
    found = Rewrite(model, GraphView.of(model)).finish()
    assert initializer(found, "inside")
    feeds = tinymodels.feeds(proto)
    np.testing.assert_array_equal(
        outputs(found, feeds)["logits"], outputs(model.proto, feeds)["logits"]
    )


def test_a_name_that_the_model_has_already_gets_a_number() -> None:
    proto = tinymodels.conv_relu()
    for node in proto.graph.node:  # a tensor called as the new one would be
        node.input[:] = [name.replace("relu2", "relu1/dequantized") for name in node.input]
        node.output[:] = [name.replace("relu2", "relu1/dequantized") for name in node.output]
    model = model_from_proto(proto)
    rewrite = Rewrite(model, GraphView.of(model))
    assert rewrite.quantize_pair("relu1", 0.5, 0, np.int8) == "relu1/dequantized_2"
    rewrite.reconnect(("n_conv2", 0), "relu1/dequantized_2")
    onnx.checker.check_model(rewrite.finish(), full_check=True)


def test_names_inside_subgraphs_count_as_taken() -> None:
    model = model_from_proto(tinymodels.branches())
    rewrite = Rewrite(model, GraphView.of(model))
    assert rewrite.constant("yes_out", np.zeros(1, np.float32)) == "yes_out_2"


def test_a_removed_node_leaves_no_types_of_tensors_behind() -> None:
    _, rewrite = rewrite_of("conv_relu")
    rewrite.node("n_conv1").output[0] = "relu1"
    rewrite.remove("n_relu1")
    found = rewrite.finish()
    assert "n_relu1" not in [node.name for node in found.graph.node]
    assert "conv1" not in [info.name for info in found.graph.value_info]
    assert "relu1" in [info.name for info in found.graph.value_info]
    onnx.checker.check_model(found, full_check=True)


def test_a_shield_changes_nothing() -> None:
    prepared, rewrite = rewrite_of("residual")
    rewrite.shield("n_sum", 0)
    rewrite.shield("n_sum", 1)
    found = rewrite.finish()
    assert [maker(found, name).op_type for name in maker(found, "sum").input] == ["Max", "Max"]
    onnx.checker.check_model(found, full_check=True)
    np.testing.assert_array_equal(
        outputs(found, prepared.feeds, optimize="none")["logits"],
        outputs(prepared.model.proto, prepared.feeds, optimize="none")["logits"],
    )


def test_a_constant_behind_a_dequantize_linear() -> None:
    prepared, rewrite = rewrite_of("conv_relu")
    bias = prepared.view.constant("conv1_b")
    scales = np.full(16, 2.0**-20, np.float32)
    codes = np.rint(bias / scales).astype(np.int32)
    rewrite.reconnect(("n_conv1", 2), rewrite.dequantized_constant("n_conv1/bias", codes, scales))
    found = rewrite.finish()
    onnx.checker.check_model(found, full_check=True)
    assert initializer(found, "n_conv1/bias/codes").data_type == onnx.TensorProto.INT32
    np.testing.assert_allclose(
        outputs(found, prepared.feeds)["logits"],
        outputs(prepared.model.proto, prepared.feeds)["logits"],
        atol=1e-4,
    )
