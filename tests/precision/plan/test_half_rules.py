"""Which nodes of a half-precision plan stay FP32, and the reasons that they give."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto
from tinymodels import Net
from tinyquant import Array, case, initializer, inner_values, outputs, set_weight

from trtune.calibrate.histogram import Histogram
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ModelError
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.half_rules import (
    Flushed,
    flushed_weights,
    keep_fp32,
    refuse_half_model,
    tensors_for_ranges,
)
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto))


def kept(
    proto: onnx.ModelProto,
    ranges: Mapping[str, float] | None = None,
    *,
    default: str = "fp16",
    fallback: str = "fp32",
    pins: Mapping[str, str] | None = None,
    other: float = 1.0,
) -> tuple[PrecisionPlan, dict[str, str]]:
    """The plan, and the reasons of the nodes that changed; unnamed ranges are `other`."""
    view = view_of(proto)
    plan = make_plan(view, default=default, fallback=fallback, pins=pins)
    measured = {**dict.fromkeys(tensors_for_ranges(view), other), **(ranges or {})}
    found = keep_fp32(view, plan, measured)
    changed = {n: a.reason for n, a in found.nodes.items() if a != plan.nodes[n]}
    return found, changed


# Ranges


@pytest.mark.parametrize(
    ("largest", "default", "expected"),
    [
        pytest.param(32752.0, "fp16", {}, id="half of 65504 is fine"),
        pytest.param(
            40000.0, "fp16",
            {
                "n_conv1": "its output 'conv1' reaches 40000, and float16 ends at 65504 "
                "(half of it is kept free for other data)",
                "n_relu1": "its input 'conv1' reaches 40000, and float16 ends at 65504 "
                "(half of it is kept free for other data)",
                "n_conv2": "its input 'relu1' reaches 40000, and float16 ends at 65504 "
                "(half of it is kept free for other data)",
                "n_relu2": "fused with 'n_conv2', which stays fp32",
            },
            id="more: what makes it and what reads it",
        ),
        pytest.param(1e9, "bf16", {}, id="bfloat16 goes on"),
        pytest.param(
            2e-5, "fp16",
            {
                "n_conv1": "its output 'conv1' stays below 2e-05, where float16 has lost its "
                "precision",
                "n_relu1": "its input 'conv1' stays below 2e-05, where float16 has lost its "
                "precision",
                "n_conv2": "its input 'relu1' stays below 2e-05, where float16 has lost its "
                "precision",
                "n_relu2": "fused with 'n_conv2', which stays fp32",
            },
            id="never a normal number",
        ),
        pytest.param(0.0, "fp16", {}, id="zero is exact"),
    ],
)  # fmt: skip
def test_ranges(largest: float, default: str, expected: dict[str, str]) -> None:
    plan, changed = kept(tinymodels.conv_relu(), {"conv1": largest}, default=default)
    assert changed == expected
    assert all(plan.precision(name) == "fp32" for name in expected)
    assert plan.precision("n_logits") == default


def test_a_histogram_is_a_range() -> None:
    view = view_of(tinymodels.conv_relu())
    ranges = dict.fromkeys(tensors_for_ranges(view), Histogram.of(np.float32([1, 2])))
    ranges["logits"] = Histogram.of(np.float32([1, 2]), np.float32([5e4]))
    found = keep_fp32(view, make_plan(view, default="fp16"), ranges)
    assert [n for n in found.nodes if found.precision(n) == "fp32"] == ["n_logits"]


def test_a_pin_stays_whatever_its_range() -> None:
    plan, changed = kept(tinymodels.conv_relu(), {"conv2": 5e4}, pins={"n_conv2": "fp16"})
    assert plan.precision("n_conv2") == plan.precision("n_relu2") == "fp16"
    assert set(changed) == {"n_pooled"}


def test_an_int8_node_gives_its_result_in_fp32() -> None:
    plan, changed = kept(tinymodels.conv_relu(), {"conv2": 5e4}, default="int8", fallback="fp16")
    assert plan.int8_nodes == ("n_conv1", "n_conv2", "n_logits")
    assert [plan.float_type(n) for n in plan.int8_nodes] == ["fp16", "fp32", "fp16"]
    assert changed["n_conv2"].startswith("default; its result in fp32: its output 'conv2' reaches")
    assert plan.precision("n_relu2") == plan.precision("n_pooled") == "fp32"


def test_what_has_no_range_is_not_judged_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    view = view_of(tinymodels.conv_relu())
    plan = make_plan(view, default="fp16")
    with caplog.at_level(logging.WARNING, "trtune.precision.plan.half_rules"):
        assert keep_fp32(view, plan, {"conv2": 1.0}) == plan
    assert caplog.messages == ["4 tensors have no measured range, such as input"]


@pytest.mark.parametrize("default", ["int8", "fp32"])
def test_a_plan_without_half_types_stays(default: str) -> None:
    view = view_of(tinymodels.conv_relu())
    plan = make_plan(view, default=default)
    assert keep_fp32(view, plan, {"conv1": 1e6}) is plan


# Precision


def scores(op: str = "Softmax") -> onnx.ModelProto:
    """op((x w)^T / 8) between products."""
    net = Net()
    x = net.op("MatMul", net.input("x", (4, 4)), net.weight("u", 4, 4), out="before")
    x = net.op("MatMul", x, net.weight("w", 4, 4), out="m")
    x = net.op("Transpose", x, out="t", perm=[1, 0])
    x = net.op("Mul", x, net.const("scale", 0.125), out="scaled")
    net.op("MatMul", net.op(op, x, out="y"), net.weight("v", 4, 4), out="z")
    return net.model({"z": (4, 4)})


@pytest.mark.parametrize(
    ("op", "largest", "default", "expected"),
    [
        pytest.param("Softmax", 4096.0, "fp16", set(), id="512 at the softmax is fine"),
        pytest.param(
            "Softmax", 5000.0, "fp16", {"n_m", "n_t", "n_scaled", "n_y"},
            id="beyond 512: from the product on that computes its input",
        ),
        pytest.param(
            "Softmax", 600.0, "bf16", {"n_m", "n_t", "n_scaled", "n_y"}, id="beyond 64 in bfloat16"
        ),
        pytest.param("Sigmoid", 30000.0, "fp16", set(), id="a Sigmoid is flat there"),
        pytest.param("Relu", 30000.0, "fp16", set(), id="rounding is relative"),
    ],
)  # fmt: skip
def test_absolute_precision(op: str, largest: float, default: str, expected: set[str]) -> None:
    _, changed = kept(scores(op), {"m": largest}, default=default)
    assert set(changed) == expected
    for name, reason in changed.items():
        assert reason.startswith("before Softmax 'n_y' at" if name != "n_y" else "Softmax 'n_y' at")
        assert "where " in reason
        assert reason.endswith("has steps of 0.5")


@pytest.mark.parametrize(
    ("result", "default", "stays"),
    [
        pytest.param(2.0, "fp16", False, id="64 times smaller: 5 bits are left"),
        pytest.param(1.9, "fp16", True, id="more than that"),
        pytest.param(16.0, "bf16", False, id="8 times in bfloat16"),
        pytest.param(15.9, "bf16", True, id="more than 8 times in bfloat16"),
    ],
)
def test_a_small_difference_of_large_numbers(result: float, default: str, stays: bool) -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", ("N", 4)), net.weight("w", 4, 4), out="m")
    small = net.op("MatMul", "x", net.weight("u", 4, 4), out="small")
    y = net.op("Sub", x, small, out="y")
    net.op("MatMul", y, net.weight("v", 4, 4), out="z")
    proto = net.model({"z": ("N", 4)})
    _, changed = kept(proto, {"m": 128.0, "y": result}, default=default)
    assert set(changed) == ({"n_m", "n_y"} if stays else set())
    if stays:
        assert changed["n_y"] == f"difference 'n_y' of 128 that is at most {result:g}"


# What a node does


@pytest.mark.parametrize(
    ("size", "reason"),
    [(1024, None), (1025, "it sums 1025 values")],
)
def test_long_sums(size: int, reason: str | None) -> None:
    net = Net()
    x = net.op("ReduceSum", net.input("x", (2, size)), net.const("a", [1], np.int64), out="s")
    net.op("MatMul", x, net.weight("w", 1, 4), out="y")
    assert kept(net.model({"y": (2, 4)}))[1].get("n_s") == reason


@pytest.mark.parametrize(
    ("length", "reason"),
    [(32768, None), (32769, "it sums 32769 values")],
)
def test_long_products(length: int, reason: str | None) -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", (2, length)), net.weight("w", length, 1), out="m")
    net.op("MatMul", x, net.weight("v", 1, 4), out="y")
    proto = net.model({"y": (2, 4)})
    assert kept(proto)[1].get("n_m") == reason
    assert kept(proto, default="int8", fallback="fp16")[1] == {}  # int32 sums them exactly


def test_an_average_whose_sum_overflows() -> None:
    _, changed = kept(tinymodels.conv_relu(), {"pooled": 3000.0})
    assert changed["n_pooled"] == "the sum that it divides by 16 reaches 48000"


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("InstanceNormalization",
         "InstanceNormalization computes its statistics in the type of its input"),
        ("ReduceLogSumExp", "it sums exponentials or takes the logarithm of a sum"),
        ("LayerNormalization", None),
        ("Softmax", None),
    ],
)  # fmt: skip
def test_normalisation_operators(op: str, reason: str | None) -> None:
    net = Net()
    x = net.conv(net.input("input"), "conv", 3, 4)
    ones = net.const("ones", np.ones(4 if op == "InstanceNormalization" else 8))
    if op == "InstanceNormalization":
        y = net.op(op, x, ones, ones, out="y")
    elif op == "LayerNormalization":
        y = net.op(op, x, ones, out="y")
    else:
        y = net.op(op, x, out="y", **({"axes": [1]} if op.startswith("Reduce") else {}))
    net.conv(y, "last", 1 if op.startswith("Reduce") else 4, 4)
    assert kept(net.model({"last": ("N", 4, 8, 8)}))[1].get("n_y") == reason


def test_the_inside_of_a_softmax_stays() -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", ("N", 8)), net.weight("w", 8, 8), out="m")
    powers = net.op("Exp", x, out="powers")
    total = net.op("ReduceSum", powers, net.const("axes", [1], np.int64), out="total")
    y = net.op("Div", powers, total, out="y")
    net.op("MatMul", y, net.weight("v", 8, 8), out="z")
    plan, changed = kept(net.model({"z": ("N", 8)}))
    assert changed == dict.fromkeys(
        ["n_powers", "n_total", "n_y"], "inside a softmax (it ends at 'n_y')"
    )
    assert plan.precision("n_m") == plan.precision("n_z") == "fp16"


# Constants


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param(1e5, "its constant 'c' reaches 100000, float16 65504", id="too large"),
        pytest.param(1e-9, "its constant 'c' (1e-09) would become zero", id="becomes zero"),
        pytest.param(1e-6, None, id="subnormal"),
        pytest.param(0.0, None, id="zero"),
        pytest.param(-np.inf, None, id="an infinite mask"),
    ],
)
def test_constants(value: float, reason: str | None) -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", ("N", 4)), net.weight("w", 4, 4), out="m")
    y = net.op("Max", x, net.const("c", value), out="y")
    net.op("MatMul", y, net.weight("v", 4, 4), out="z")
    _, changed = kept(net.model({"z": ("N", 4)}), {"y": 1.0})
    assert changed == ({"n_y": reason} if reason else {})


def test_a_weight_beyond_the_range() -> None:
    proto = tinymodels.conv_relu()
    weight = np.zeros((32, 16, 3, 3))
    weight[3, 2, 1, 0] = -7e4
    set_weight(proto, "conv2_w", weight)
    _, changed = kept(proto)
    assert changed == {
        "n_conv2": "its constant 'conv2_w' reaches 70000, float16 65504",
        "n_relu2": "fused with 'n_conv2', which stays fp32",
    }


def test_flushed_weights_are_counted() -> None:
    proto = tinymodels.conv_relu()
    weight = np.ones((16, 3, 3, 3))
    weight[0, 0] = [[0, 1e-9, -2e-8], [3e-8, 5e-5, -6e-5], [7e-5, 1, 2]]
    set_weight(proto, "conv1_w", weight)
    set_weight(proto, "conv1_b", [1e-30] + [1] * 15)
    set_weight(proto, "conv2_w", np.ones((32, 16, 3, 3)))
    view = view_of(proto)
    # 2.98e-8 is half of the smallest subnormal, 6.1e-5 the smallest normal number.
    assert flushed_weights(view, make_plan(view, default="fp16")) == {
        "n_conv1": Flushed(zeroed=3, subnormal=3, total=16 * 27 - 1 + 16)
    }
    assert flushed_weights(view, make_plan(view, fallback="fp16")) == {
        "n_conv1": Flushed(zeroed=1, subnormal=0, total=16)
    }
    assert flushed_weights(view, make_plan(view, default="bf16")) == {}
    assert flushed_weights(view, make_plan(view, default="fp32")) == {}


# Islands


def overflowing() -> onnx.ModelProto:
    """`big` reaches 2e5 on inputs of about 1; everything else is about 1."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "conv1", 3, 8), out="relu1")
    x = net.conv(x, "big", 8, 8)
    x = net.op("Reshape", x, net.const("shape", [0, 8, 64], np.int64), out="flat3")
    x = net.op("Mul", x, net.const("small", 1e-5), out="back")
    x = net.op("Reshape", x, net.const("shape4", [0, 8, 8, 8], np.int64), out="picture")
    x = net.op("Relu", net.conv(x, "conv2", 8, 8), out="relu2")
    model = net.head(x, 8)
    weight = onnx.numpy_helper.to_array(initializer(model, "big_w"))
    set_weight(model, "big_w", weight * 6e4)  # the weights themselves stay below 65504
    return model


def lowered(
    proto: onnx.ModelProto, *, keep: bool
) -> tuple[PrecisionPlan, dict[str, Array], dict[str, Array]]:
    """The plan, and the outputs in half precision and in float32."""
    prepared = case(proto)
    view, plan = prepared.view, make_plan(prepared.view, default="fp16")
    if keep:
        ranges = inner_values(prepared.model, tensors_for_ranges(view), prepared.feeds)
        plan = keep_fp32(view, plan, {t: float(np.abs(v).max()) for t, v in ranges.items()})
    typed = lower_emulate(prepared.model, plan, CalibrationTable({}))
    onnx.checker.check_model(typed, full_check=True)
    return plan, outputs(in_float32(typed), prepared.feeds), outputs(proto, prepared.feeds)


def test_an_overflow_becomes_a_small_island_and_no_nan() -> None:
    proto = overflowing()
    plan, found, exact = lowered(proto, keep=True)
    island = [name for name, a in plan.nodes.items() if a.precision == "fp32"]
    assert island == ["n_big", "n_flat3", "n_back"]
    assert np.isfinite(found["logits"]).all()
    np.testing.assert_allclose(found["logits"], exact["logits"], atol=5e-3)


def test_without_the_island_it_would_overflow() -> None:
    _, found, _ = lowered(overflowing(), keep=False)
    assert not np.isfinite(found["logits"]).all()


def test_what_stands_between_fp32_nodes_only_stays_too() -> None:
    proto = tinymodels.concat()
    _, changed = kept(proto, pins={"n_left": "fp32", "n_right": "fp32", "n_mix": "fp32"})
    reason = "there are only fp32 nodes around it"
    assert changed == {"n_cat": reason, "n_max": reason}
    _, changed = kept(proto, pins={"n_left": "fp32", "n_right": "fp32"})
    assert changed == {}


def test_the_outside_alone_makes_no_node_fp32() -> None:
    assert kept(tinymodels.nothing_quantizable())[1] == {}


# What cannot be done


def test_nothing_left_in_half_is_an_error() -> None:
    with pytest.raises(ModelError) as caught:
        kept(tinymodels.conv_relu(), other=1e5)
    message = str(caught.value)
    assert message.startswith("nothing in this model can run in fp16: n_conv1 (its input 'input'")
    assert "and 4 more; use precision.default fp32" in message


def test_an_int8_plan_goes_on_without_half_nodes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trtune.precision.plan.half_rules"):
        plan, _ = kept(tinymodels.conv_relu(), default="int8", fallback="fp16", other=1e5)
    assert plan.halves == ()
    assert plan.int8_nodes == ("n_conv1", "n_conv2", "n_logits")
    (message,) = caplog.messages
    assert message.startswith("nothing in this model can run in fp16: n_conv1 (default; its result")
    assert message.endswith(" and 4 more; what is not int8 runs in fp32")


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        pytest.param(
            (TensorProto.FLOAT16, TensorProto.FLOAT16),
            "the model computes in float16 already: so is its input 'a'; it could not be raised",
            id="half inputs",
        ),
        pytest.param(
            (TensorProto.FLOAT, TensorProto.FLOAT16),
            "the model computes in float16 already: so is its input 'b'; it could not be raised",
            id="mixed inputs",
        ),
    ],
)
def test_half_inputs_that_are_computed_with_are_refused(kinds: tuple[int, int], words: str) -> None:
    net = Net()
    for name, kind in zip("ab", kinds, strict=True):
        x = net.input(name, ("N", 4), kind)
        net.op("Relu", x, out=f"{name}_y")
    proto = net.model({f"{n}_y": (("N", 4), k) for n, k in zip("ab", kinds, strict=True)})
    with pytest.raises(ModelError, match=words):
        refuse_half_model(view_of(proto))


def test_half_weights_behind_float32_inputs_are_refused() -> None:
    view = view_of(tinymodels.half_weights())
    words = "the model is float16 already: 432 of 602 weights are, such as 'w'; it could"
    with pytest.raises(ModelError, match=words):
        keep_fp32(view, make_plan(view, fallback="fp16"), {})


@pytest.mark.parametrize("name", [n for n in tinymodels.MODELS if n != "half_weights"])
def test_float32_models_are_not_refused(name: str) -> None:
    refuse_half_model(view_of(tinymodels.MODELS[name]()))


def test_few_half_nodes_are_left_as_they_are() -> None:
    net = Net()
    half = net.op("Cast", net.input("x", ("N", 16)), out="half", to=TensorProto.FLOAT16)
    half = net.op("MatMul", half, net.const("w", np.eye(16), np.float16), out="m")
    x = net.op("Cast", half, out="full", to=TensorProto.FLOAT)
    net.op("Gemm", x, net.weight("v", 16, 64), out="y")
    plan, changed = kept(net.model({"y": ("N", 64)}))
    assert changed == {}
    assert plan.precision("n_y") == "fp16"
