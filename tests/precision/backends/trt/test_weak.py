"""A plan in TensorRT 10's weakly typed words: flags, and which layers are held to a precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import tinymodels
from tinymodels import Net
from tinyquant import Case, case, named
from trtdouble import double
from trtstrict import new

from trtune.precision.backends.trt.weak import (
    constrainable_outputs,
    constrained_nodes,
    deprecated_on_purpose,
    enabled_precisions,
    nodes_of_layers,
    pin_layers,
    set_flags,
    trtexec_constraints,
)
from trtune.precision.graph.view import GraphView, save_model
from trtune.precision.plan.plan import Assignment, PrecisionPlan
from trtune.precision.plan.rules import make_plan


def plan_of(name: str, **options: Any) -> PrecisionPlan:
    prepared = named(name)
    return make_plan(GraphView.of(prepared.model), **options)


@pytest.mark.parametrize(
    ("options", "enabled", "constrained"),
    [
        pytest.param({}, ("int8",), {}, id="all int8: TensorRT is free"),
        pytest.param(
            {"pins": {"n_conv2": "fp32"}}, ("int8",), {"n_conv2": "fp32", "n_relu2": "fp32"},
            id="a pin takes its whole group along",
        ),
        pytest.param(
            {"pins": {"n_conv2": "fp32"}, "fallback": "fp16"}, ("int8", "fp16"),
            {"n_conv2": "fp32", "n_relu2": "fp32"}, id="the rest may be fp16",
        ),
        pytest.param(
            {"pins": {"n_conv2": "fp16"}}, ("int8", "fp16"),
            {"n_conv2": "fp16", "n_relu2": "fp16"}, id="a pin to fp16 enables it",
        ),
        pytest.param(
            {"pins": {"op:Flatten": "fp32"}}, ("int8",), {"n_flat": "fp32"},
            id="a pinned node that only follows",
        ),
        pytest.param(
            {"default": "fp32", "pins": {"n_conv1": "int8"}}, ("int8",),
            {"n_conv2": "fp32", "n_relu2": "fp32", "n_logits": "fp32"},
            id="int8 for one node alone",
        ),
        pytest.param(
            {"default": "fp16", "pins": {"n_conv1": "fp32"}}, ("fp16",),
            {"n_conv1": "fp32", "n_relu1": "fp32"}, id="fp16 with an fp32 pin",
        ),
        pytest.param({"default": "fp32"}, (), {}, id="fp32: nothing to enable or hold"),
    ],
)  # fmt: skip
def test_flags_and_constraints_of_a_plan(
    options: dict[str, Any], enabled: tuple[str, ...], constrained: dict[str, str]
) -> None:
    plan = plan_of("conv_relu", **options)
    assert enabled_precisions(plan) == enabled
    assert constrained_nodes(plan) == constrained


def test_shape_computation_is_never_constrained() -> None:
    plan = plan_of("dynamic_reshape", default="fp16")
    nodes = dict(plan.nodes)
    nodes["n_shape"] = Assignment("fp32", "pinned by hand", "shape")
    changed = PrecisionPlan(plan.default, plan.fallback, nodes, plan.groups)
    assert constrained_nodes(changed) == {}


def network_of(major: int, prepared: Case, folder: Path) -> tuple[Any, Any, Any]:
    """The module, a complete network of the model's floats, and a config."""
    trt = double(major)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, msg: str) -> None:
            return None

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    save_model(prepared.model.proto, folder / "model.onnx")
    assert trt.OnnxParser(network, logger).parse_from_file(str(folder / "model.onnx"))
    return trt, network, builder.create_builder_config()


def makers_of(prepared: Case) -> dict[str, str]:
    return {t: n.name for n in prepared.model.proto.graph.node for t in n.output}


def pinned_layers(network: Any) -> dict[str, list[int]]:
    """Name of each held layer -> the outputs whose type is set."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {layer.name: sorted(layer._types) for layer in layers if layer._precision is not None}


@pytest.mark.parametrize(
    ("pins", "constraints", "flags"),
    [
        ({}, "obey", ["INT8"]),
        ({"n_conv1": "fp32"}, "obey", ["INT8", "OBEY_PRECISION_CONSTRAINTS"]),
        ({"n_conv1": "fp16"}, "prefer", ["INT8", "FP16", "PREFER_PRECISION_CONSTRAINTS"]),
        ({"n_conv1": "bf16"}, "obey", ["INT8", "BF16", "OBEY_PRECISION_CONSTRAINTS"]),
    ],
)
def test_the_flags_are_set(
    tmp_path: Path, pins: dict[str, str], constraints: str, flags: list[str]
) -> None:
    prepared = named("conv_relu", pins=pins)
    trt, _, config = network_of(10, prepared, tmp_path)
    assert set_flags(trt, config, prepared.plan, constraints=constraints) == flags
    assert all(config.get_flag(getattr(trt.BuilderFlag, name)) for name in flags)


def test_a_pin_sets_the_precision_and_the_type_of_the_outputs(tmp_path: Path) -> None:
    prepared = named("conv_relu", pins={"n_conv2": "fp32", "n_logits": "fp16"})
    trt, network, _ = network_of(10, prepared, tmp_path)
    pins = pin_layers(trt, network, constrained_nodes(prepared.plan), makers_of(prepared))
    bias = next(name for name in pins.layers["n_logits"] if name.startswith("(Unnamed"))
    assert pins.layers == {
        "n_conv2": ("n_conv2",),
        "n_relu2": ("n_relu2",),
        "n_logits": ("n_logits", bias),
    }
    assert bias.endswith("[Elementwise]")
    assert pins.without == ()
    assert pinned_layers(network) == {"n_conv2": [0], "n_relu2": [0], "n_logits": [0], bias: [0]}
    layers = {network.get_layer(i).name: network.get_layer(i) for i in range(network.num_layers)}
    assert layers["n_conv2"]._precision == trt.DataType.FLOAT
    assert layers["n_logits"]._types == {0: trt.DataType.HALF}


def test_pinning_gives_no_warning(tmp_path: Path) -> None:
    prepared = named("conv_relu", pins={"n_conv2": "fp32"})
    trt, network, _ = network_of(10, prepared, tmp_path)
    pin_layers(trt, network, {"n_conv2": "fp32"}, makers_of(prepared))  # a warning is an error
    with deprecated_on_purpose():
        network.get_layer(0).precision = trt.DataType.FLOAT


def topk() -> onnx.ModelProto:
    """Values and indices of the largest 2 of a linear layer's outputs."""
    net = Net()
    net.linear(net.input("input", ("N", 16)), "fc", 16, 10)
    k = net.const("k", [2], "int64")
    net.nodes.append(onnx.helper.make_node("TopK", ["fc", k], ["values", "indices"], name="n_top"))
    int64 = onnx.TensorProto.INT64
    return net.model({"values": ("N", 2), "indices": (("N", 2), int64)})


def cast() -> onnx.ModelProto:
    """A Cast to fp16 and back between two linear layers."""
    net = Net()
    x = net.linear(net.input("input", ("N", 16)), "fc1", 16, 16)
    x = net.op("Cast", x, out="half", to=onnx.TensorProto.FLOAT16)
    x = net.op("Cast", net.op("Relu", x, out="relu"), out="float", to=onnx.TensorProto.FLOAT)
    net.linear(x, "logits", 16, 10)
    return net.model({"logits": ("N", 10)})


def outputs_that_may_be_held(prepared: Case, folder: Path) -> dict[str, list[int]]:
    trt, network, _ = network_of(10, prepared, folder)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {layer.name: constrainable_outputs(trt, layer) for layer in layers}


def test_constants_and_the_indices_of_topk_are_left_alone(tmp_path: Path) -> None:
    found = outputs_that_may_be_held(case(topk()), tmp_path)
    assert found["n_top"] == [0]
    assert found["n_fc"] == [0]
    constants = [name for name in found if name.endswith("[Constant]")]
    assert constants
    assert all(found[name] == [] for name in constants)


def test_casts_are_left_alone(tmp_path: Path) -> None:
    found = outputs_that_may_be_held(case(cast()), tmp_path)
    assert [found[name] for name in ("n_half", "n_relu", "n_float")] == [[], [0], []]


@pytest.mark.parametrize(
    ("name", "left_alone", "held"),
    [
        ("dynamic_reshape", ("n_shape", "n_size", "n_size1", "n_target"), ("n_conv", "n_flat")),
        ("int64_input", (), ("n_embedded", "n_fc")),
        ("resize", ("n_shape", "n_rank"), ("n_conv", "n_up", "n_big")),
    ],
)
def test_shape_computation_is_left_alone(
    tmp_path: Path, name: str, left_alone: tuple[str, ...], held: tuple[str, ...]
) -> None:
    found = outputs_that_may_be_held(named(name), tmp_path)
    assert {node: found[node] for node in left_alone} == {node: [] for node in left_alone}
    assert {node: found[node] for node in held} == {node: [0] for node in held}


def test_before_the_network_is_complete_shape_tensors_look_like_others(tmp_path: Path) -> None:
    prepared = named("dynamic_reshape")
    _, network, _ = network_of(10, prepared, tmp_path)
    shape = next(
        network.get_layer(i).get_output(0)
        for i in range(network.num_layers)
        if network.get_layer(i).name == "n_shape"
    )
    assert shape.is_shape_tensor
    object.__setattr__(network, "_complete", False)
    assert not shape.is_shape_tensor


def test_a_node_without_a_layer_to_hold_is_reported(tmp_path: Path) -> None:
    prepared = named("dynamic_reshape")
    trt, network, _ = network_of(10, prepared, tmp_path)
    pins = pin_layers(trt, network, {"n_shape": "fp32", "n_conv": "fp32"}, makers_of(prepared))
    assert pins.layers == {"n_conv": ("n_conv",)}
    assert pins.without == ("n_shape",)


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "by name alone"])
@pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
def test_every_layer_belongs_to_a_node(tmp_path: Path, name: str, metadata: bool) -> None:
    prepared = case(tinymodels.MODELS[name]())
    _, network, _ = network_of(10, prepared, tmp_path)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    expected = [layer._node for layer in layers]
    if not metadata:
        for layer in layers:
            layer.metadata = ""
    found = nodes_of_layers(network, makers_of(prepared))
    assert all(found)
    assert [(f, e) for f, e in zip(found, expected, strict=True) if e and f != e] == []


def test_layers_that_the_parser_adds_belong_to_their_node(tmp_path: Path) -> None:
    prepared = named("mlp")
    _, network, _ = network_of(10, prepared, tmp_path)
    found = nodes_of_layers(network, makers_of(prepared))
    names = [network.get_layer(index).name for index in range(network.num_layers)]
    by_node = [
        (name.partition("[")[2] or name, node) for name, node in zip(names, found, strict=True)
    ]
    assert by_node == [
        ("Constant]", "n_fc1"),
        ("Constant]", "n_fc1"),
        ("n_fc1", "n_fc1"),
        ("Elementwise]", "n_fc1"),  # the bias: it makes the node's own output
        ("n_relu1", "n_relu1"),
        ("Constant]", "n_fc2"),
        ("n_fc2", "n_fc2"),
        ("Constant]", "n_logits"),
        ("n_logits", "n_logits"),
    ]


PARSED = (
    ("tmp_weight", "CONSTANT", "", "", "tmp_weight_output"),
    ("n_conv1", "CONVOLUTION", "[ONNX Layer: n_conv1]", "input", "conv1"),
    ("n_pooled", "REDUCE", "[ONNX Layer: n_pooled]", "conv1", "pooled"),
    ("ONNXTRT_ShapeTensor", "SHAPE", "", "pooled", "ONNXTRT_ShapeTensor_output"),
    ("ONNXTRT_castHelper", "CAST", "", "ONNXTRT_ShapeTensor_output", "ONNXTRT_castHelper_output"),
    ("n_flat", "SHUFFLE", "[ONNX Layer: n_flat]", "pooled ONNXTRT_castHelper_output", "flat"),
    ("n_logits", "MATRIX_MULTIPLY", "[ONNX Layer: n_logits]", "flat", "n_logits_output"),
    ("logits_b", "CONSTANT", "", "", "logits_b_output"),
    ("ONNXTRT_Broadcast", "SHUFFLE", "", "logits_b_output", "ONNXTRT_Broadcast_output"),
    ("n_logits_9", "ELEMENTWISE", "[ONNX Layer: n_logits]",
     "n_logits_output ONNXTRT_Broadcast_output", "logits"),
    ("tmp_unread", "CONSTANT", "", "", "tmp_unread_output"),
)  # fmt: skip
"""Layers (name, type, metadata, inputs, output) as the parser of TensorRT-RTX 1.7.1 made them."""


def test_the_names_of_a_real_parser_are_understood() -> None:
    trt = double(10)
    tensors: dict[str, Any] = {}
    layers = []
    for name, kind, metadata, inputs, output in PARSED:
        ins, (out,) = (
            [tensors.setdefault(t, new(trt.ITensor, name=t)) for t in names.split()]
            for names in (inputs, output)
        )
        layers.append(
            new(trt.ILayer, name=name, type=getattr(trt.LayerType, kind), metadata=metadata,
                ins=ins, outs=[out])
        )  # fmt: skip
    network = new(trt.INetworkDefinition, layers=layers)
    makers = {"conv1": "n_conv1", "pooled": "n_pooled", "flat": "n_flat", "logits": "n_logits"}
    assert nodes_of_layers(network, makers) == [
        None, "n_conv1", "n_pooled", "n_flat", "n_flat", "n_flat",
        "n_logits", "n_logits", "n_logits", "n_logits", None,
    ]  # fmt: skip


def test_names_that_trtexec_cannot_take_are_left_out() -> None:
    names = {"a/b": "fp32", "(Unnamed Layer* 3) [Shuffle]": "fp16", "x,y": "fp32", "c": "bf16"}
    text, left_out = trtexec_constraints(names)
    assert text == "a/b:fp32,c:bf16"
    assert left_out == ("(Unnamed Layer* 3) [Shuffle]", "x,y")
