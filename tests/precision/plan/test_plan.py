"""What is quantizable and why not, pins, fusion groups, and the plan as a value."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto
from tinymodels import Net

import trtune.precision
from trtune.configs.errors import ConfigError
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.fusion import fusion_groups
from trtune.precision.plan.pins import match_pin
from trtune.precision.plan.plan import ORIGINS, TUNER, Assignment, PrecisionPlan
from trtune.precision.plan.rules import make_plan, refusal_of, weight_axis


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto, fold="none"))


def view(name: str) -> GraphView:
    return view_of(tinymodels.MODELS[name]())


# What is quantizable


def product(kind: str) -> onnx.ModelProto:
    """A model with one compute node, `n`, of the kind that the tests name."""
    net = Net()
    x = net.input("x", ("N", 16))
    if kind == "conv":
        net.op("Conv", net.input("p"), net.weight("w", 4, 3, 1, 1), out="y", name="n")
    elif kind == "conv transpose":
        net.op("ConvTranspose", net.input("p"), net.weight("w", 3, 4, 2, 2), out="y", name="n")
    elif kind == "gemm":
        net.op("Gemm", x, net.weight("w", 16, 4), out="y", name="n")
    elif kind == "gemm, transposed data":
        net.op("Gemm", net.input("t", (16, "N")), net.weight("w", 16, 4), out="y", name="n",
               transA=1)  # fmt: skip
    elif kind == "matmul":
        net.op("MatMul", x, net.weight("w", 16, 4), out="y", name="n")
    elif kind == "constant data":
        net.op("Conv", net.weight("c", 1, 3, 8, 8), net.input("w", (4, 3, 1, 1)), out="y", name="n")
    elif kind == "integers":
        w = net.const("w", np.ones((16, 4)), np.int32)
        net.op("MatMul", net.input("i", ("N", 16), TensorProto.INT32), w, out="y", name="n")
    elif kind == "float16":
        half = net.op("Cast", x, out="half", to=TensorProto.FLOAT16)
        net.op("MatMul", half, net.const("w", np.ones((16, 4)), np.float16), out="y", name="n")
    elif kind == "dynamic weights":
        net.op("MatMul", x, net.input("w", (16, 4)), out="y", name="n")
    elif kind == "computed weights":
        w = net.op("Sqrt", net.const("w", np.ones((16, 4))), out="root")
        net.op("MatMul", x, w, out="y", name="n")
    elif kind == "three dimensions":
        net.op("MatMul", net.input("b", (5, "N", 16)), net.weight("w", 5, 16, 4), out="y", name="n")
    elif kind == "a vector":
        net.op("MatMul", x, net.weight("w", 16), out="y", name="n")
    shapes = {"integers": ("N", 4), "a vector": ("N",), "three dimensions": (5, "N", 4)}
    is_conv = kind in ("conv", "conv transpose", "constant data")
    shape = (None, 4, None, None) if is_conv else shapes.get(kind, ("N", 4))
    dtypes = {"integers": TensorProto.INT32, "float16": TensorProto.FLOAT16}
    return net.model({"y": (shape, dtypes.get(kind, TensorProto.FLOAT))})


@pytest.mark.parametrize("kind", ["conv", "conv transpose", "gemm", "matmul"])
def test_products_with_constant_weights_are_quantizable(kind: str) -> None:
    plan = make_plan(view_of(product(kind)))
    assert plan.nodes["n"] == Assignment("int8", "default", "compute", origin="default")
    assert plan.int8_nodes == ("n",)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("constant data", "its data input is a constant"),
        ("float16", "its data input is float16"),
        ("dynamic weights", "its weights are computed at run time (attention pattern)"),
        ("computed weights", "its weights are the result of other nodes"),
        ("three dimensions", "its weights have 3 dimensions"),
        ("a vector", "its weights have 1 dimension"),
        ("gemm, transposed data", "its data input is transposed (transA)"),
    ],
)
def test_why_a_product_is_not_quantizable(kind: str, reason: str) -> None:
    graph = view_of(product(kind))
    assert refusal_of(graph, graph.by_name["n"]) == reason
    plan = make_plan(graph, fallback="fp16")
    assert plan.nodes["n"] == Assignment("fp16", reason, "compute")
    assert plan.int8_nodes == ()
    assert plan.compute_nodes == ("n",)


def test_a_product_of_integers_is_no_data() -> None:
    graph = view_of(product("integers"))
    assert refusal_of(graph, graph.by_name["n"]) == "its data input is int32"
    assert make_plan(graph).nodes["n"] == Assignment("fp32", "shape computation", "shape")


def test_the_other_nodes_follow_or_compute_shapes() -> None:
    plan = make_plan(view("dynamic_reshape"))
    assert plan.nodes["n_relu"] == Assignment(
        "fp32", "follows its neighbours", "follows", origin="default"
    )
    assert plan.nodes["n_shape"] == Assignment("fp32", "shape computation", "shape")
    assert plan.compute_nodes == ("n_conv", "n_logits")
    assert not plan.is_int8("n_relu")


def test_another_default_needs_no_quantizable_nodes() -> None:
    plan = make_plan(view_of(product("dynamic weights")), default="fp32")
    assert plan.nodes["n"] == Assignment("fp32", "default", "compute", origin="default")


@pytest.mark.parametrize(
    ("kind", "axis"), [("conv", 0), ("conv transpose", 1), ("gemm", 1), ("matmul", 1)]
)
def test_weight_axis(kind: str, axis: int) -> None:
    assert weight_axis(view_of(product(kind)).by_name["n"]) == axis


def test_weight_axis_of_a_gemm_with_trans_b() -> None:
    assert weight_axis(view("conv_relu").by_name["n_logits"]) == 0


# Pins


@pytest.mark.parametrize(
    ("pins", "float_nodes"),
    [
        pytest.param({"n_conv1": "fp32"}, ["n_conv1"], id="by name"),
        pytest.param({"op:Gemm": "fp32"}, ["n_logits"], id="by operator"),
        pytest.param({"re:n_conv.": "fp32"}, ["n_conv1", "n_conv2"], id="by expression"),
        pytest.param({"re:n_.*1": "fp32"}, ["n_conv1"], id="an expression matches the whole name"),
        pytest.param({"n_relu1": "fp32"}, ["n_conv1"], id="a member stands for its group"),
        pytest.param({"op:Add": "fp32"}, ["n_conv2"], id="an Add stands for its conv"),
        pytest.param(
            {"op:Conv": "fp32", "n_conv2": "int8"}, ["n_stem", "n_conv1"], id="the last one wins"
        ),
        pytest.param(
            {"n_conv2": "int8", "op:Conv": "fp32"},
            ["n_stem", "n_conv1", "n_conv2"],
            id="the last one wins, the other way round",
        ),
    ],
)
def test_pins(pins: dict[str, str], float_nodes: list[str]) -> None:
    plan = make_plan(view("residual"), pins=pins)
    compute = ["n_stem", "n_conv1", "n_conv2", "n_logits"]
    assert list(plan.int8_nodes) == [name for name in compute if name not in float_nodes]
    assert all(plan.precision(name) == "fp32" for name in float_nodes)


def test_a_pin_holds_for_the_whole_group_and_says_who_asked() -> None:
    plan = make_plan(view("residual"), pins={"n_sum_relu": "fp16"})
    for name in ("n_conv2", "n_sum", "n_sum_relu"):
        assert plan.precision(name) == "fp16"
        assert plan.nodes[name].reason == "pinned by the user: 'n_sum_relu'"
    assert plan.pinned == ("n_conv2",)
    assert plan.nodes["n_relu1"].reason == "follows its neighbours"


def test_a_node_outside_all_groups_can_be_pinned_too() -> None:
    plan = make_plan(view("attention"), fallback="fp16", pins={"op:Softmax": "fp32"})
    assert plan.nodes["n_probs"] == Assignment(
        "fp32", "pinned by the user: 'op:Softmax'", "follows", origin="user"
    )
    assert plan.pinned == ()  # only compute nodes count
    assert plan.int8_nodes == ("n_q", "n_k", "n_v", "n_proj")


@pytest.mark.parametrize(
    ("model", "pin", "node", "why"),
    [
        pytest.param(
            "attention", "n_scores", "n_scores", "attention pattern", id="an unquantizable product"
        ),
        pytest.param("attention", "n_probs", "n_probs", "no integer kernel", id="a Softmax"),
        pytest.param("dynamic_reshape", "n_size", "n_size", "computes shapes", id="a shape"),
    ],
)
def test_an_impossible_int8_pin_changes_nothing_and_is_said(
    model: str, pin: str, node: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "trtune.precision.plan.plan"):
        plan = make_plan(view(model), pins={pin: "int8"})
    assert plan == make_plan(view(model))
    (message,) = caplog.messages
    assert f"{pin!r} is not possible for {node}" in message
    assert why in message


def test_an_unquantizable_node_stays_float_whatever_is_pinned_in_turn() -> None:
    plan = make_plan(view("attention"), pins={"op:MatMul": "fp32", "re:n_.*": "int8"})
    assert plan.int8_nodes == ("n_q", "n_k", "n_v", "n_proj")
    assert plan.precision("n_scores") == "fp32"


def test_many_impossible_pins_make_one_short_message(caplog: pytest.LogCaptureFixture) -> None:
    make_plan(view("dynamic_reshape"), pins={"re:n_.*": "int8"})
    (message,) = caplog.messages
    assert message.count("(") == 3
    assert message.endswith(" and 2 more")


def test_int8_pins_choose_what_is_quantized_in_a_float_plan() -> None:
    plan = make_plan(view("residual"), default="fp32", pins={"n_conv1": "int8"})
    assert plan.int8_nodes == ("n_conv1",)
    assert plan.precision("n_relu1") == "int8"  # the whole group


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        pytest.param(
            "n_conv3",
            ["'n_conv3' matches none of the 10 nodes", "'n_conv1'", "'n_conv2'"],
            id="the nearest names",
        ),
        pytest.param("op:conv", ["'op:conv'", "did you mean 'Conv'?"], id="the nearest operator"),
        pytest.param("re:n_conv", ["'re:n_conv'", "did you mean", "'n_conv1'"], id="an expression"),
        pytest.param("zzz", ["'zzz' matches none", "(`trtune inspect"], id="nothing near"),
        pytest.param("re:(", ["'re:('", "is not a regular expression", "missing )"], id="broken"),
    ],
)
def test_a_pin_that_matches_nothing(pattern: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(view("residual"), pins={pattern: "fp32"})
    message = str(caught.value)
    assert message.startswith("precision.pin: ")
    assert [word for word in words if word not in message] == []
    assert "None" not in message


def test_match_pin_gives_graph_order() -> None:
    assert match_pin(view("residual"), "re:.*conv.*") == ["n_conv1", "n_conv2"]
    assert match_pin(view("residual"), "op:Relu") == ["n_stem_relu", "n_relu1", "n_sum_relu"]


# Half types


def test_a_half_default_is_for_every_node() -> None:
    plan = make_plan(view("residual"), default="fp16")
    assert {a.precision for a in plan.nodes.values()} == {"fp16"}
    assert plan.nodes["n_stem"] == Assignment("fp16", "default", "compute", origin="default")
    assert plan.nodes["n_sum"] == Assignment(
        "fp16", "follows its neighbours", "follows", origin="default"
    )
    assert plan.halves == ("fp16",)
    assert plan.counts() == {"int8": 0, "fp16": 4, "fp32": 0}


def test_a_half_fallback_is_for_what_is_not_quantized() -> None:
    plan = make_plan(view("attention"), fallback="fp16")
    assert plan.int8_nodes == ("n_q", "n_k", "n_v", "n_proj")
    assert plan.precision("n_scores") == plan.precision("n_probs") == "fp16"
    assert {plan.float_type(name) for name in plan.nodes} == {"fp16"}


def test_shapes_stay_out_of_it() -> None:
    plan = make_plan(view("dynamic_reshape"), default="bf16")
    assert plan.nodes["n_shape"] == Assignment("fp32", "shape computation", "shape")
    assert plan.precision("n_flat") == "bf16"
    assert plan.halves == ("bf16",)


def test_what_has_no_half_type_says_why() -> None:
    plan = make_plan(view("branches"), default="fp16")
    assert plan.nodes["n_chosen"] == Assignment("fp32", "its body stays float32", "follows")
    assert plan.precision("n_relu") == "fp16"


def double_product() -> onnx.ModelProto:
    net = Net()
    x = net.op("Cast", net.input("x", ("N", 16)), out="d", to=TensorProto.DOUBLE)
    net.op("MatMul", x, net.const("w", np.ones((16, 4)), np.float64), out="y", name="n")
    return net.model({"y": (("N", 4), TensorProto.DOUBLE)})


def test_a_product_of_doubles_is_neither_int8_nor_half() -> None:
    graph = view_of(double_product())
    assert make_plan(graph, fallback="fp16").nodes["n"] == Assignment(
        "fp32", "its data input is float64; it computes no float32", "compute"
    )
    assert make_plan(graph, default="fp16").nodes["n"] == Assignment(
        "fp32", "it computes no float32", "compute"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"fallback": "fp16"}, "fp16", id="the fallback of an int8 plan"),
        pytest.param(
            {"default": "bf16", "fallback": "fp32", "pins": {"n_conv1": "int8"}}, "bf16",
            id="the default of a half plan",
        ),
        pytest.param({"fallback": "fp32"}, "fp32", id="float32"),
    ],
)  # fmt: skip
def test_the_floats_around_an_int8_node(options: dict[str, Any], expected: str) -> None:
    plan = make_plan(view("residual"), **options)
    assert plan.is_int8("n_conv1")
    assert plan.float_type("n_conv1") == plan.float_type("n_relu1") == expected
    assert plan.precision("n_stem") == ("bf16" if expected == "bf16" else "int8")


def test_one_int8_node_can_have_other_floats_around_it() -> None:
    plan = make_plan(view("residual"), fallback="fp16")
    wide = dataclasses.replace(plan.nodes["n_conv2"], around="fp32")
    plan = dataclasses.replace(plan, nodes={**plan.nodes, "n_conv2": wide})
    assert (plan.float_type("n_conv1"), plan.float_type("n_conv2")) == ("fp16", "fp32")
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    written = json.loads(plan.to_json())["nodes"]
    assert "around" not in written["n_conv1"]
    assert written["n_conv2"]["around"] == "fp32"


def test_pins_in_a_half_plan() -> None:
    plan = make_plan(view("attention"), default="fp16", pins={"op:Softmax": "fp32"})
    assert plan.nodes["n_probs"].reason == "pinned by the user: 'op:Softmax'"
    assert plan.precision("n_scores") == "fp16"


def test_a_pin_to_half_of_what_has_none_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trtune.precision.plan.plan"):
        plan = make_plan(view("branches"), pins={"n_chosen": "fp16"})
    assert plan.precision("n_chosen") == "fp32"
    (message,) = caplog.messages
    assert message.endswith("is not possible for n_chosen (its body stays float32)")


# Fusion groups


def groups_net(kind: str) -> onnx.ModelProto:
    """stem conv -> x; conv `c` of x; then what the tests name."""
    net = Net()
    x = net.conv(net.input("input"), "stem", 3, 16)
    x = net.op("Tanh", net.op("Exp", x, out="exp"), out="x")
    y = net.conv(x, "c", 16, 16)
    low, high = net.const("low", 0.0), net.const("high", 6.0)
    if kind == "relu":
        y = net.op("Relu", y, out="a")
    elif kind == "clip":
        y = net.op("Clip", y, low, high, out="a")
    elif kind == "silu":
        y = net.op("Mul", y, net.op("Sigmoid", y, out="g"), out="a")
    elif kind == "hard swish":
        y = net.op("Mul", net.op("HardSigmoid", y, out="g"), y, out="a")
    elif kind == "batch norm":
        stats = [net.const(f"s{i}", np.ones(16)) for i in range(4)]
        y = net.op("BatchNormalization", y, *stats, out="b")
        y = net.op("Relu", y, out="a")
    elif kind == "scale and shift":
        y = net.op("Mul", net.const("k", 2.0), y, out="m")
        y = net.op("Add", y, net.const("s", 1.0), out="a")
    elif kind == "residual":
        y = net.op("Relu", net.op("Add", y, x, out="sum"), out="a")
    elif kind == "second residual":
        y = net.op("Add", y, x, out="sum")
        y = net.op("Add", y, net.op("Exp", x, out="e"), out="a")
    elif kind == "two convs":
        d = net.op("Relu", net.conv(x, "d", 16, 16), out="dr")
        y = net.op("Relu", net.op("Add", y, d, out="sum"), out="a")
    elif kind == "branch":
        left, right = net.op("Relu", y, out="l"), net.op("Tanh", y, out="r")
        y = net.op("Concat", left, right, out="a", axis=1)
        return net.head(y, 32)
    elif kind == "sigmoid read elsewhere":
        gate = net.op("Sigmoid", y, out="g")
        y = net.op("Concat", net.op("Mul", y, gate, out="m"), gate, out="a", axis=1)
        return net.head(y, 32)
    elif kind == "square":
        y = net.op("Mul", y, y, out="a")
    elif kind == "output":
        y = net.op("Relu", y, out="a")
        model = net.head(y, 16)
        shape = ("N", 16, 8, 8)
        model.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, shape))
        return model
    return net.head(y, 16)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("relu", {"n_c": ("n_a",)}),
        ("clip", {"n_c": ("n_a",)}),
        ("silu", {"n_c": ("n_g", "n_a")}),
        ("hard swish", {"n_c": ("n_g", "n_a")}),
        ("batch norm", {"n_c": ("n_b", "n_a")}),
        ("scale and shift", {"n_c": ("n_m", "n_a")}),
        ("residual", {"n_c": ("n_sum", "n_a")}),
        pytest.param("second residual", {"n_c": ("n_sum",)}, id="one residual Add a group"),
        pytest.param(
            "two convs", {"n_c": (), "n_d": ("n_dr", "n_sum", "n_a")}, id="two convs: the later one"
        ),
        pytest.param("branch", {"n_c": ()}, id="two readers end the group"),
        pytest.param("sigmoid read elsewhere", {"n_c": ()}, id="a gate with another reader"),
        pytest.param("square", {"n_c": ()}, id="a product of computed tensors"),
        pytest.param("output", {"n_c": ()}, id="an output of the model ends the group"),
    ],
)
def test_fusion_groups(kind: str, expected: dict[str, tuple[str, ...]]) -> None:
    found = fusion_groups(view_of(groups_net(kind)))
    assert {name: found.get(name, ()) for name in expected} == expected
    assert found.get("n_stem", ()) == ()  # Exp is no activation that is fused


def test_no_node_is_in_two_groups_and_leaders_stand_in_graph_order() -> None:
    for name in tinymodels.MODELS:
        graph = view(name)
        groups = fusion_groups(graph)
        members = [member for group in groups.values() for member in group]
        assert len(members) == len(set(members))
        assert not set(members) & set(groups)
        order = [node.name for node in graph.nodes]
        assert list(groups) == sorted(groups, key=order.index)


# The plan as a value


def test_counts_are_of_compute_nodes() -> None:
    plan = make_plan(view("residual"), pins={"n_stem": "bf16", "n_logits": "fp32"})
    assert plan.counts() == {"int8": 2, "fp16": 0, "fp32": 1, "bf16": 1}


def test_pinning_gives_a_new_plan() -> None:
    plan = make_plan(view("residual"))
    pinned = plan.pin(["n_conv2"], "fp32", "pinned by the tuner: it hurts")
    assert plan.precision("n_conv2") == "int8"
    assert pinned.precision("n_sum") == "fp32"
    assert pinned.nodes["n_sum_relu"].reason == "pinned by the tuner: it hurts"
    assert pinned.pin([], "fp32", "pinned") == pinned
    with pytest.raises(KeyError, match="nowhere"):
        plan.pin(["nowhere"], "fp32", "pinned")


def test_a_plan_cannot_be_changed() -> None:
    plan = make_plan(view("residual"))
    with pytest.raises(TypeError):
        plan.nodes["n_stem"] = Assignment("fp32", "")  # type: ignore[index]
    with pytest.raises(TypeError):
        plan.groups["n_stem"] = ()  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.default = "fp32"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["residual", "attention", "dynamic_reshape"])
def test_json_round_trip(name: str) -> None:
    plan = make_plan(view(name), fallback="fp16", pins={"re:n_.*": "fp32"})
    again = PrecisionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert list(again.nodes) == list(plan.nodes)
    assert json.loads(plan.to_json())["fallback"] == "fp16"


def test_the_words_of_a_reason_decide_nothing() -> None:
    plan = make_plan(view("residual"))
    one = plan.pin(["n_conv2"], "fp32", "pinned by the tuner: it hurts", origin=TUNER)
    other = plan.pin(["n_conv2"], "fp32", "its result was poor", origin=TUNER)
    assert one.pinned == other.pinned == ("n_conv2",)
    assert one.decisions == other.decisions != plan.decisions
    worded = replace(plan.nodes["n_conv2"], reason="pinned by nobody")
    assert replace(plan, nodes={**plan.nodes, "n_conv2": worded}).pinned == ()


def test_a_plan_of_before_there_were_origins_is_not_read() -> None:
    value = json.loads(make_plan(view("residual")).to_json())
    assert {a["origin"] for a in value["nodes"].values()} <= set(ORIGINS)
    for assignment in value["nodes"].values():
        del assignment["origin"]
    with pytest.raises(ValueError, match=r"no `origin`.*run it again"):
        PrecisionPlan.from_json(json.dumps(value))


# The package


def test_the_package_names_its_public_values() -> None:
    assert sorted(trtune.precision.__all__) == sorted(set(trtune.precision.__all__))
    assert dir(trtune.precision) == sorted(dir(trtune.precision))
    for name in trtune.precision.__all__:
        assert getattr(trtune.precision, name) is not None
    assert trtune.precision.make_plan is make_plan
    with pytest.raises(AttributeError, match="no attribute 'make_plam'"):
        trtune.precision.make_plam  # noqa: B018


def test_importing_the_package_imports_no_runtime() -> None:
    code = (
        "import sys, trtune.precision; "
        "print(sorted({'onnx', 'onnxruntime', 'numba', 'polygraphy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
