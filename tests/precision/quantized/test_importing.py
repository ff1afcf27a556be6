"""Quantized models taken apart and put together again, with onnxruntime as the judge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyqat
from numpy.typing import NDArray
from realdata import data_dir, needs_data, shared_case
from rtxparts import needs_rtx
from tinyqat import assert_same_bits, imported
from tinyquant import Rows, op_counts, outputs

from trtune.calibrate.cache import load_table, save_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ModelError
from trtune.datasets.batches import Batch
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.graph.view import GraphView, load_model, model_from_proto
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.plan.imported import FLOAT_IN_FILE, IN_FILE, ImportedPlan
from trtune.precision.plan.placement import edges_of, place
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.importing import (
    import_quantized,
    insert_file,
    insert_quantization,
    lint_model,
    quantization_errors,
    strip,
    strip_file,
    with_calibrated,
)
from trtune.precision.quantized.insert import completed, plan_from_table
from trtune.precision.runtime.api import Candidate
from trtune.precision.runtime.session import make_session
from trtune.precision.tune.scales import calibrate_model

QDQ = {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize("make", tinyqat.EXACT.values(), ids=tinyqat.EXACT)
def test_a_symmetric_model_comes_back_bit_for_bit(
    make: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    found = imported(make())
    assert not found.changes
    assert not QDQ & op_counts(found.model.proto).keys()
    feeds = tinymodels.feeds(found.original.proto, batch=3)
    again = insert_quantization(found.model, found.table)
    assert_same_bits(found.original.proto, again, feeds)


@pytest.mark.parametrize("make", tinyqat.EXACT.values(), ids=tinyqat.EXACT)
def test_it_does_so_through_files(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    source, fp32, cache = (tmp_path / name for name in ("qat.onnx", "fp32.onnx", "qat.cache"))
    onnx.save(make(), source)
    found = strip_file(source, fp32, cache)
    assert load_table(cache) == found.table
    model = insert_file(fp32, cache, tmp_path / "again.onnx")
    assert found.table.provenance["model"] == model.sha256
    proto = load_model(source).proto
    feeds = tinymodels.feeds(proto, batch=3)
    assert_same_bits(proto, onnx.load(tmp_path / "again.onnx"), feeds)


@pytest.mark.parametrize("make", tinyqat.EXACT.values(), ids=tinyqat.EXACT)
def test_what_is_written_is_what_tensorrt_takes(make: Callable[[], onnx.ModelProto]) -> None:
    found = imported(make())
    again = insert_quantization(found.model, found.table)
    onnx.checker.check_model(again, full_check=True)
    view = GraphView.of(model_from_proto(again))
    for node in view.nodes:
        if node.op_type in QDQ:
            scale, zero = (view.constant(name) for name in node.input[1:3])
            assert scale.dtype == np.float32
            assert zero.dtype == np.int8
            assert not zero.any()
            assert scale.ndim == 0 or view.is_constant(node.input[0])


def test_the_fp32_model_keeps_the_float_weights_and_names() -> None:
    found = imported(tinyqat.torch_residual())
    assert [(s.name, s.shape) for s in found.model.inputs] == [("input", ("N", 3, 8, 8))]
    assert [s.name for s in found.model.outputs] == ["logits"]
    view = GraphView.of(found.model)
    assert view.by_name["n_stem"].input[1] == "stem_w"
    original = GraphView.of(found.original)
    np.testing.assert_array_equal(view.constant("stem_w"), original.constant("stem_w"))
    assert op_counts(found.model.proto) == {
        "Conv": 3, "Relu": 3, "Add": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip


def test_the_table_has_the_scales_and_readers_of_the_file() -> None:
    found = imported(tinyqat.torch_residual())
    rounded = {tensor: round(scale, 6) for tensor, scale in found.table.scales.items()}
    assert rounded == {"input": 0.03, "stem_relu": 0.02, "relu1": 0.015, "flat": 0.01}
    assert dict(found.table.reads) == {
        "input": (("n_stem", 0),),
        "stem_relu": (("n_conv1", 0), ("n_sum", 1)),
        "relu1": (("n_conv2", 0),),
        "flat": (("n_logits", 0),),
    }
    assert set(found.table.weights) == {"stem_w", "conv1_w", "conv2_w", "fc_w"}
    assert set(found.table.methods.values()) == {"qat"}
    assert found.table.provenance["quantized_model"] == found.original.sha256


def test_the_plan_has_int8_where_data_and_weights_are_quantized() -> None:
    found = imported(tinyqat.partly_quantized())
    plan = found.plan
    assert (plan.default, plan.int8_nodes) == ("qat", ("n_both",))
    assert plan.nodes["n_both"].reason == IN_FILE
    reasons = {
        "n_weights_only": f"{FLOAT_IN_FILE}: its weights are quantized, its data are not",
        "n_data_only": f"{FLOAT_IN_FILE}: its data are quantized, its weights are not",
        "n_logits": FLOAT_IN_FILE,
    }
    assert {name: plan.nodes[name].reason for name in reasons} == reasons
    assert {plan.precision(name) for name in reasons} == {"fp32"}


def test_weights_of_a_float_node_keep_the_values_of_their_codes() -> None:
    found = imported(tinyqat.partly_quantized())
    view, original = GraphView.of(found.model), GraphView.of(found.original)
    kept = view.constant(view.by_name["n_weights_only"].input[1])
    np.testing.assert_array_equal(kept, original.constant("weights_only_w_dq"))
    assert not np.array_equal(kept, original.constant("weights_only_w"))


def test_two_scales_of_one_tensor_are_kept_apart() -> None:
    found = imported(tinyqat.two_scales())
    scales = [round(scale, 6) for scale in found.table.scales.values()]
    assert sorted(scales) == [0.02, 0.03, 0.05, 0.07]
    assert op_counts(found.model.proto)["Identity"] == 2


def test_a_conv_behind_a_pool_has_the_scale_in_front_of_it() -> None:
    found = imported(tinyqat.quantized_output())
    assert found.table.scale("pool") == found.table.scale("conv")
    assert found.plan.int8_nodes == ("n_conv", "n_last")
    assert "pool" not in found.table.reads


def test_a_conv_behind_two_scales_is_float() -> None:
    plan = imported(tinyqat.concatenated()).plan
    assert plan.int8_nodes == ("n_left", "n_right")
    assert plan.nodes["n_last"].reason.endswith(
        "left_dq_codes, n_right_dq_codes, with different scales"
    )


def test_a_pin_takes_the_pairs_of_its_group_and_no_others() -> None:
    pinned = imported(tinyqat.torch_residual(), pins={"n_conv2": "fp32"})
    view = GraphView.of(pinned.model)
    assert pinned.plan.int8_nodes == ("n_stem", "n_conv1", "n_logits")
    again = insert_quantization(pinned.model, pinned.table, pinned.plan)
    reads = {(r.node, r.index) for r in pinned.plan.active_reads}
    assert reads == {("n_stem", 0), ("n_conv1", 0), ("n_logits", 0)}
    by_name = {node.name: node for node in again.graph.node}
    assert by_name["n_conv2"].input[:2] == view.by_name["n_conv2"].input[:2]
    assert by_name["n_sum"].input == view.by_name["n_sum"].input


def test_a_pin_on_a_node_inside_a_group_takes_the_whole_group() -> None:
    plan = imported(tinyqat.torch_residual(), pins={"n_sum_relu": "fp32"}).plan
    assert plan.precision("n_conv2") == "fp32"
    assert plan.nodes["n_conv2"].reason == "pinned by the user: 'n_sum_relu'"


def test_a_pin_to_int8_cannot_make_scales(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = imported(tinyqat.partly_quantized(), pins={"n_data_only": "int8"}).plan
    assert plan.int8_nodes == ("n_both",)
    assert "'n_data_only' is not possible for n_data_only (the QAT model has no" in caplog.text


def test_shape_computation_and_operators_without_half_form_cannot_be_pinned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = tinyqat.QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    net.op("Reshape", x, net.op("Shape", x, out="shape"), out="output")
    model = net.model({"output": ("N", 16, 8, 8)})
    with caplog.at_level(logging.WARNING):
        plan = imported(model, pins={"n_shape": "fp32", "n_conv": "fp16"}).plan
    assert "(it computes shapes)" in caplog.text
    assert plan.precision("n_conv") == "fp16"


def test_a_plan_survives_json() -> None:
    plan = imported(tinyqat.quantized_output()).plan
    assert ImportedPlan.from_json(plan.to_json()) == plan


def test_pinning_keeps_the_reads() -> None:
    plan = imported(tinyqat.torch_residual()).plan
    pinned = plan.pin(["n_stem"], "fp32", "pinned by the tuner: it hurts")
    assert isinstance(pinned, ImportedPlan)
    assert pinned.reads == plan.reads
    assert len(pinned.active_reads) == len(plan.active_reads) - 1
    assert pinned.reads_quantized("n_sum", 1)
    assert not pinned.reads_quantized("n_stem", 0)


# What cannot be taken as it stands


def test_asymmetric_ranges_are_refused_with_what_was_found() -> None:
    with pytest.raises(ModelError) as caught:
        imported(tinyqat.tensorflow_block())
    text = str(caught.value)
    assert "6 findings stand in the way" in text
    assert "uint8, 6 nodes (n_a_w: uint8 with zero point 120 (range -0.12..0.135))" in text
    assert "precision.allow_requantize: true" in text


def test_asymmetric_ranges_are_made_symmetric_when_that_is_allowed() -> None:
    found = imported(tinyqat.tensorflow_block(), allow_requantize=True)
    changed = {change.tensor: change for change in found.changes}
    assert set(changed) == {"a_clip", "b", "sum", "flat", "a_w", "b_w"}
    clip = changed["a_clip"]
    assert clip.step_after == clip.step_before
    assert clip.shift == pytest.approx(128 * 6 / 255)
    assert clip.range_before == clip.range_after == pytest.approx((0, 6))
    assert found.table.scale("input") == np.float32(0.03)
    assert found.table.scale("b") == pytest.approx(0.05 * 131 / 128)
    assert found.table.methods["input"] == "qat"
    assert found.table.methods["a_clip"] == "qat, shifted"
    assert found.table.methods["b"] == "qat, made symmetric"
    assert all(row.repaired for row in found.findings if row.severity == "error")


def test_the_cost_of_making_ranges_symmetric_is_measured() -> None:
    found = imported(tinyqat.tensorflow_block(), allow_requantize=True)
    feeds = tinymodels.feeds(found.model.proto, batch=8)
    sums = quantization_errors(found, [Batch(feeds, tuple("abcdefgh"))])
    assert 15 < sums["output"].sqnr_db < 60


def test_an_exact_import_costs_nothing() -> None:
    found = imported(tinyqat.torch_residual())
    feeds = tinymodels.feeds(found.model.proto, batch=4)
    sums = quantization_errors(found, [Batch(feeds, tuple("abcd"))])
    assert sums["logits"].sqnr_db == float("inf")


def test_pairs_that_serve_no_kernel_are_left_out_once_values_change() -> None:
    found = imported(tinyqat.tensorflow_block(), allow_requantize=True)
    spare = {row.node for row in found.findings if row.kind == "spare-pair"}
    assert spare == {"n_sum", "n_pooled", "n_output"}
    edges = {edge for edges in found.table.reads.values() for edge in edges}
    assert edges == {("n_a", 0), ("n_b", 0), ("n_sum", 0)}


@pytest.mark.parametrize(
    ("high", "op"),
    [
        pytest.param(4.2, "Relu", id="any range from 0 on"),
        pytest.param(6.0, "Clip", id="0 to 6"),
    ],
)
def test_an_activation_that_only_the_range_stood_for_is_put_back(high: float, op: str) -> None:
    net = tinyqat.QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    x = net.pair(x, high / 255, 0, np.uint8)
    x = net.op("MaxPool", x, out="pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.pair(x, high / 255, 0, np.uint8)
    proto = net.head(net.qconv(x, "last", 16, 16), 16)
    found = imported(proto, allow_requantize=True)
    assert op_counts(found.model.proto)[op] == 1  # none behind the pool, which keeps the sign
    feeds = tinymodels.feeds(proto, batch=4)
    sums = quantization_errors(found, [Batch(feeds, tuple("abcd"))])
    assert sums["logits"].sqnr_db > 20
    value = outputs(found.model.proto, feeds, outputs=["conv/cut"])["conv/cut"]
    assert value.min() == 0
    assert value.max() <= (6 if op == "Clip" else 100)


def test_an_activation_that_is_there_is_not_put_twice() -> None:
    found = imported(tinyqat.tensorflow_block(), allow_requantize=True)
    assert op_counts(found.model.proto) == {
        "Conv": 2, "Clip": 1, "Pad": 1, "Add": 1, "GlobalAveragePool": 1, "Flatten": 1,
        "Softmax": 1,
    }  # fmt: skip


def test_calibrated_scales_replace_those_made_symmetric_where_smaller() -> None:
    found = imported(tinyqat.tensorflow_block(), allow_requantize=True)
    given = CalibrationTable({"a_clip": 0.01, "b": 0.01, "input": 0.001}, {"b": "entropy"})
    better = with_calibrated(found, given)
    assert better.table.scale("b") == np.float32(0.01)
    assert better.table.methods["b"] == "qat, made symmetric, entropy"
    for tensor in ("input", "a_clip"):
        assert better.table.scale(tensor) == found.table.scale(tensor)
    assert {c.tensor: c.step_after for c in better.changes}["b"] == pytest.approx(0.01)
    larger = with_calibrated(found, CalibrationTable({"b": 9.0}))
    assert larger.table.scale("b") == found.table.scale("b")


def test_a_float_model_has_nothing_to_import() -> None:
    with pytest.raises(ModelError, match=r"holds no QuantizeLinear.*`precision.default: int8`"):
        imported(tinymodels.conv_relu())


def test_halves_around_a_pair_are_taken_with_their_rounding() -> None:
    net = tinyqat.QatNet(opset=19)
    x = net.op("Cast", net.input("input"), out="half", to=onnx.TensorProto.FLOAT16)
    net.pair(x, np.float16(0.05))
    x = net.op("Cast", "half_dq", out="full", to=onnx.TensorProto.FLOAT)
    found = imported(net.head(net.conv(x, "conv", 3, 16), 16))
    assert [r.kind for r in found.findings if "half" in r.kind] == ["half-rest"]
    feeds = tinymodels.feeds(found.model.proto, batch=4)
    sums = quantization_errors(found, [Batch(feeds, tuple("abcd"))])
    assert [error.noise for error in sums.values()] == [0]


def test_scales_computed_at_run_time_are_refused_by_name() -> None:
    net = tinyqat.QatNet()
    x = net.input("input")
    largest = net.op("ReduceMax", x, out="largest", keepdims=0)
    zero = net.const("z", 0, np.int8)
    codes = net.op("QuantizeLinear", x, largest, zero, out="codes")
    x = net.op("DequantizeLinear", codes, largest, zero, out="read")
    with pytest.raises(ModelError) as caught:
        imported(net.head(net.qconv(x, "conv", 3, 16), 16))
    assert "scale or zero point is computed at run time (largest)" in str(caught.value)
    assert "has to be changed where the model was exported" in str(caught.value)


def test_a_table_of_another_model_is_refused_with_the_nearest_name() -> None:
    table = imported(tinyqat.torch_residual()).table
    other = imported(tinyqat.two_scales()).model
    with pytest.raises(CacheError, match=r"belongs to another model: \d of the 5 inputs"):
        insert_quantization(other, table)


def test_weights_of_another_model_are_refused() -> None:
    found = imported(tinyqat.torch_residual())
    table = replace(found.table, weights={**found.table.weights, "stem_ww": (0.1,)})
    with pytest.raises(CacheError, match=r"1 of its 5 weights .* 'stem_ww'; did you mean 'stem_w'"):
        insert_quantization(found.model, table)


def test_a_wrong_number_of_weight_scales_is_refused() -> None:
    found = imported(tinyqat.torch_residual())
    table = replace(found.table, weights={**found.table.weights, "stem_w": (0.1, 0.2)})
    with pytest.raises(ModelError, match="2 scales for the weights 'stem_w', which have 16"):
        insert_quantization(found.model, table)


def test_a_table_of_another_model_names_its_file(tmp_path: Path) -> None:
    onnx.save(tinyqat.torch_residual(), tmp_path / "qat.onnx")
    strip_file(tmp_path / "qat.onnx", tmp_path / "fp32.onnx", tmp_path / "qat.cache")
    onnx.save(tinymodels.mlp(), tmp_path / "other.onnx")
    with pytest.raises(CacheError, match=r"qat\.cache: the table belongs to another model"):
        insert_file(tmp_path / "other.onnx", tmp_path / "qat.cache", tmp_path / "out.onnx")


def test_a_table_without_reads_is_placed_by_the_rules() -> None:
    model = model_from_proto(tinymodels.conv_relu())
    table = CalibrationTable({"input": 0.05, "relu1": 0.02, "flat": 0.01})
    assert op_counts(insert_quantization(model, table))["QuantizeLinear"] == 3


def test_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "qat.onnx"
    onnx.save(tinyqat.tensorflow_block(), path)
    with caplog.at_level(logging.INFO):
        found = import_quantized(path, allow_requantize=True)
    assert found.model.path == path
    assert "uint8" in caplog.text
    assert strip(path, allow_requantize=True).table == found.table
    rows = lint_model(path)
    assert {row.kind for row in rows} >= {"uint8", "int32-bias", "uint8-zero-point-128"}
    assert [row.repaired for row in rows if row.kind == "uint8"] == [False] * 6


def test_an_axis_in_an_old_opset_is_read_as_opset_13_has_it(tmp_path: Path) -> None:
    proto = tinyqat.torch_residual()
    proto.opset_import[0].version = 11
    for node in proto.graph.node:  # as they were before 13
        kept = [a for a in node.attribute if a.name != "axes"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(proto, tmp_path / "old.onnx")
    found = import_quantized(tmp_path / "old.onnx")
    rows = [row for row in found.findings if row.kind == "axis-before-opset-13"]
    assert len(rows) == 8
    assert all(row.repaired for row in rows)
    feeds = tinymodels.feeds(found.model.proto, batch=2)
    assert_same_bits(tinyqat.torch_residual(), insert_quantization(found.model, found.table), feeds)


def test_a_quantized_model_is_taken_apart_up_to_the_outputs_that_are_named(tmp_path: Path) -> None:
    proto = tinyqat.torch_residual()
    onnx.save(proto, tmp_path / "qat.onnx")
    found = import_quantized(tmp_path / "qat.onnx", outputs=["sum_relu"])
    assert [spec.name for spec in found.model.outputs] == ["sum_relu"]
    assert found.plan.int8_nodes == ("n_stem", "n_conv1", "n_conv2")
    feeds = tinymodels.feeds(found.model.proto, batch=2)
    again = insert_quantization(found.model, found.table)
    expected = outputs(proto, feeds, outputs=["sum_relu"])["sum_relu"]
    np.testing.assert_array_equal(outputs(again, feeds)["sum_relu"], expected)


def test_a_broken_file_keeps_its_own_message(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x08garbage")
    with pytest.raises(ModelError, match="broken"):
        import_quantized(path)
    with pytest.raises(ModelError, match="no such model"):
        import_quantized(tmp_path / "missing.onnx")


# Real models


def cifar(count: int) -> NDArray[np.float32]:
    with np.load(data_dir() / "cifar10_test2000.npz") as arrays:
        pictures = arrays["images"][:count].astype(np.float32) / 255
    mean, std = (np.float32(v) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    return np.ascontiguousarray(((pictures - mean) / std).transpose(0, 3, 1, 2), np.float32)


@needs_data
@pytest.mark.parametrize(
    ("name", "int8"),
    [
        pytest.param("resnet20_cifar10_qat", 22, id="ResNet-20"),
        pytest.param("mobilenetv2_cifar10_qat", 53, id="MobileNetV2"),
    ],
)
def test_real_torch_models_come_back_bit_for_bit(name: str, int8: int) -> None:
    found = import_quantized(data_dir() / "models" / f"{name}.onnx")
    assert found.plan.counts()["int8"] == int8
    assert not found.changes
    feeds = {"input": cifar(16)}
    assert_same_bits(found.original.proto, insert_quantization(found.model, found.table), feeds)


@needs_data
def test_the_real_tensorflow_model_needs_the_users_word() -> None:
    path = data_dir() / "models" / "mobilenetv2_imagenet_qat_uint8.onnx"
    with pytest.raises(ModelError, match="114 findings stand in the way") as caught:
        import_quantized(path)
    assert "uint8 with zero point 122" in str(caught.value)
    found = import_quantized(path, allow_requantize=True)
    assert found.plan.counts() == {"int8": 53, "fp16": 0, "fp32": 0}
    again = insert_quantization(found.model, found.table)
    view = GraphView.of(model_from_proto(again))
    products = [node for node in view.nodes if node.op_type == "Conv"]
    behind = {
        name for node in view.nodes if node.op_type == "DequantizeLinear" for name in node.output
    }
    assert len(products) == 53
    assert all(behind.issuperset(node.input[:2]) for node in products)
    assert make_session(again).get_outputs()[0].shape == ["N", 1001]


ADA = RtxBackend(compute_capabilities=["8.9"])


@needs_rtx
@pytest.mark.parametrize(
    "name",
    ["torch_residual", "two_scales", "quantized_output", "codes_pooled", "concatenated"],
)
def test_tensorrt_runs_in_int8_what_the_plan_says(name: str, tmp_path: Path) -> None:
    found = imported(tinyqat.EXACT[name]())
    info = ADA.build(Candidate(found.model, found.plan, found.table), tmp_path)
    planned = {node: found.plan.precision(node) for node in found.plan.compute_nodes}
    assert {node: info.precisions[node] for node in planned} == planned


@needs_rtx
@needs_data
@pytest.mark.parametrize(
    ("name", "int8"),
    [
        pytest.param("resnet20_cifar10_qat", 22, id="ResNet-20"),
        pytest.param("mobilenetv2_cifar10_qat", 53, id="MobileNetV2"),
        pytest.param("mobilenetv2_imagenet_qat_uint8", 53, id="TensorFlow's, made symmetric"),
    ],
)
def test_tensorrt_runs_every_product_of_the_real_models_in_int8(
    name: str, int8: int, tmp_path: Path
) -> None:
    found = import_quantized(data_dir() / "models" / f"{name}.onnx", allow_requantize=True)
    info = ADA.build(Candidate(found.model, found.plan, found.table), tmp_path)
    ran = [info.precisions[node] for node in found.plan.compute_nodes]
    assert ran == ["int8"] * int8
    assert info.not_honoured == ()


def test_plan_from_table_needs_no_file() -> None:
    found = imported(tinyqat.torch_residual())
    plan = plan_from_table(GraphView.of(found.model), found.table)
    assert plan == found.plan


@pytest.mark.parametrize("make", tinyqat.EXACT.values(), ids=tinyqat.EXACT)
def test_every_pair_is_there_for_a_node_or_for_good(make: Callable[[], onnx.ModelProto]) -> None:
    found = imported(make())
    view = GraphView.of(found.model)
    owned = {
        edge for name in found.plan.int8_nodes
        for edge in edges_of(view, found.plan, view.by_name[name])
    }  # fmt: skip
    free = {(read.node, read.index) for read in found.plan.reads if not read.owners}
    placed = {edge for edges in place(view, found.plan).activations.values() for edge in edges}
    assert owned | free == placed
    for name in found.plan.int8_nodes:
        assert edges_of(view, found.plan, view.by_name[name])


def test_a_cpu_runs_it_with_integer_kernels_once_the_outputs_have_scales() -> None:
    found = imported(tinyqat.torch_residual())
    view, plan = GraphView.of(found.model), found.plan.by_rules()
    feeds = tinymodels.feeds(found.model.proto, batch=8)
    calibrated = calibrate_model(
        found.model, view, plan, Rows.of(feeds), lowerings=("deploy",), method="max"
    )
    table = completed(found.table, calibrated.table)
    assert table.reads == found.table.reads
    assert all(table.scales[t] == s for t, s in found.table.scales.items())
    deployed = lower_deploy(found.model, plan, table)
    assert op_counts(deployed)["Conv"] == 3
    before = tinymodels.run(found.original.proto, feeds)["logits"]
    after = outputs(deployed, feeds, integer_kernels=True)["logits"]
    assert 10 * np.log10((before**2).sum() / ((before - after) ** 2).sum()) > 20


def test_edges_of_a_plan_by_rules_are_data_and_skip() -> None:
    view = GraphView.of(model_from_proto(tinymodels.residual()))
    plan = make_plan(view)
    assert edges_of(view, plan, view.by_name["n_conv2"]) == (("n_conv2", 0), ("n_sum", 1))
    assert edges_of(view, plan, view.by_name["n_conv1"]) == (("n_conv1", 0),)


# ConvTranspose with scales along its input channels


def transposed(outputs: int, *, stored: bool) -> onnx.ModelProto:
    """A ConvTranspose from 16 channels whose scales go along axis 0, between convolutions."""
    net = tinyqat.QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "conv", 3, 16)
    x = net.pair(net.op("Relu", x, out="relu"), 0.02, out="read")
    w = net.weight("w", 16, outputs, 2, 2)
    scales = tinyqat.channel_scales(net.value(w), 0)
    if stored:
        codes = np.rint(net.value(w) / scales.reshape(-1, 1, 1, 1))
        w = net.stored("up_w", codes, scales, 0, np.int8, axis=0)
    else:
        w = net.pair(w, scales, np.zeros(16), axis=0)
    x = net.op("ConvTranspose", x, w, out="up", strides=[2, 2])
    return net.model({"up": ("N", outputs, 16, 16)})


@pytest.mark.parametrize("stored", [False, True], ids=["float weights", "stored codes"])
@pytest.mark.parametrize("channels", [16, 24])
def test_scales_along_the_inputs_of_a_conv_transpose_are_kept(
    channels: int, stored: bool, tmp_path: Path
) -> None:
    proto = transposed(channels, stored=stored)
    found = imported(proto)
    assert "n_up" in found.plan.int8_nodes
    assert list(found.table.axes.values()) == [0]
    assert found.changes == ()
    notes = [row for row in found.findings if row.kind == "transposed-axis"]
    assert [(row.severity, row.blocks) for row in notes] == [("info", False)]
    assert "weight-axis" not in {row.kind for row in found.findings}
    feeds = tinymodels.feeds(found.original.proto)
    assert_same_bits(found.original.proto, insert_quantization(found.model, found.table), feeds)
    assert CalibrationTable.from_json(found.table.to_json()) == found.table
    save_table(tmp_path / "c", found.table)
    assert load_table(tmp_path / "c") == found.table
    again = ImportedPlan.from_json(found.plan.to_json())
    assert again == found.plan
    assert dict(again.axes) == dict(found.plan.axes)


def test_the_case_of_a_conv_transpose_that_was_refused() -> None:
    found = import_quantized(shared_case("convtranspose_axis0.onnx"))
    feeds = dict(np.load(shared_case("convtranspose_axis0.npz")))
    assert set(found.plan.int8_nodes) == {"conv1", "up", "conv2"}
    assert_same_bits(found.original.proto, insert_quantization(found.model, found.table), feeds)


def test_a_cache_of_scales_that_nothing_reads_is_not_written(tmp_path: Path) -> None:
    """All pairs were left out, as nothing runs in int8 because of them."""
    net = tinyqat.QatNet()
    x = net.pair(net.input("input"), 0.03, 117, np.uint8)
    net.op("Sigmoid", x, out="output")
    onnx.save(net.model({"output": ("N", 3, 8, 8)}), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="would be empty"):
        strip_file(tmp_path / "m.onnx", tmp_path / "f.onnx", tmp_path / "c", allow_requantize=True)
