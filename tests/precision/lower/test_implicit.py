"""Which tensors TensorRT 10 asks a scale for."""

from __future__ import annotations

import onnx
import pytest
import realdata
import tinymodels
from onnx import helper
from tinyquant import named

from trtune.precision.graph.file import load_model, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.implicit import (
    constant_scales,
    implicit_tensors,
    left_in_float,
    with_clamped,
    with_moves,
)
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan


def view_of(name: str) -> GraphView:
    return GraphView.of(model_from_proto(getattr(tinymodels, name)()))


def test_every_float_tensor_of_a_chain() -> None:
    view = view_of("conv_relu")
    expected = ["input", "conv1", "relu1", "conv2", "relu2", "pooled", "flat", "logits"]
    assert implicit_tensors(view, make_plan(view)) == expected


def test_nothing_without_int8() -> None:
    view = view_of("conv_relu")
    assert implicit_tensors(view, make_plan(view, default="fp32")) == []
    assert constant_scales(view, make_plan(view, default="fp32")) == {}


def test_shape_computations_and_constants_have_none() -> None:
    view = named("attention").view
    found = implicit_tensors(view, make_plan(view))
    assert not [tensor for tensor in found if view.is_constant(tensor)]
    made = {t for name in view.shape_nodes for t in view.by_name[name].output}
    assert not made & set(found)


def test_weights_of_products_are_layers_of_their_own_and_those_of_convolutions_are_not() -> None:
    view = view_of("conv_relu")
    gemm = next(node for node in view.nodes if node.op_type == "Gemm")
    found = constant_scales(view, make_plan(view))
    assert set(found) == {f"{tensor}_output" for tensor in gemm.input[1:]}
    largest = abs(view.constant(gemm.input[1])).max()
    assert found[f"{gemm.input[1]}_output"] == pytest.approx(largest / 127, rel=1e-6)


@pytest.mark.parametrize(
    ("drop", "left"),
    [
        pytest.param((), {}, id="complete"),
        pytest.param(("relu1",), {"n_conv2": "relu1"}, id="an input"),
        pytest.param(("conv1",), {}, id="what is fused"),
        pytest.param(("conv1", "relu1"), {"n_conv1": "conv1", "n_conv2": "relu1"}, id="an output"),
        pytest.param(("logits",), {"n_logits": "logits"}, id="an output of the network"),
    ],
)
def test_nodes_that_stay_in_float(drop: tuple[str, ...], left: dict[str, str]) -> None:
    view = view_of("conv_relu")
    plan = make_plan(view)
    scales = {t: 0.1 for t in implicit_tensors(view, plan) if t not in drop}
    assert left_in_float(view, plan, scales) == left


def test_a_scale_of_zero_is_none() -> None:
    view = view_of("conv_relu")
    plan = make_plan(view)
    scales = {t: 0.1 for t in implicit_tensors(view, plan)} | {"input": 0.0}
    assert left_in_float(view, plan, scales) == {"n_conv1": "input"}


def test_moving_operators_share_a_scale() -> None:
    view = view_of("conv_relu")
    found = with_moves(view, {"flat": 0.5})
    assert found == {"flat": 0.5, "pooled": 0.5}


@realdata.needs_data
@pytest.mark.parametrize(
    ("name", "planned", "pairs_alone"),
    [
        ("efficientnet_b0_cifar10", 82, 34),
        ("mobilenetv2_cifar10", 53, 2),
        ("mobilenetv2_imagenet", 53, 2),
        ("resnet20_cifar10", 22, 2),
        ("squeezenet1.1_imagenet", 26, 18),
        ("vit_cifar10", 34, 34),
        ("yolox_nano_coco", 113, 30),
    ],
)
def test_no_planned_node_of_the_shared_models_is_left(
    name: str, planned: int, pairs_alone: int
) -> None:
    """With the scales of pairs alone some stay in float; with all that are asked for none does."""
    view = GraphView.of(load_model(realdata.data_dir() / "models" / f"{name}.onnx"))
    plan = make_plan(view)
    pairs = dict.fromkeys(place(view, plan).activations, 1.0)
    assert len(plan.int8_nodes) == planned
    assert len(left_in_float(view, plan, pairs)) == pairs_alone
    assert left_in_float(view, plan, dict.fromkeys(implicit_tensors(view, plan), 1.0)) == {}


@pytest.mark.parametrize(
    ("made", "kept", "op", "expected"),
    [
        pytest.param("y", (), "Relu", {"x": 0.5, "y": 0.5}, id="a Relu"),
        pytest.param("y", (), "Clip", {"x": 0.5, "y": 0.5}, id="a Clip"),
        pytest.param("y", ("x",), "Relu", {"y": 0.5}, id="what is an output is read as it is"),
        pytest.param("y", (), "Sigmoid", {"y": 0.5}, id="what is no clamp needs what it reads"),
        pytest.param("z", (), "Relu", {"x": 0.5, "y": 0.5, "z": 0.5}, id="behind a move"),
    ],
)
def test_what_only_a_clamp_reads_has_its_outputs_scale(
    made: str, kept: tuple[str, ...], op: str, expected: dict[str, float]
) -> None:
    limits = ["low", "high"] if op == "Clip" else []
    nodes = [
        helper.make_node("Abs", ["input"], ["x"], "abs"),
        helper.make_node(op, ["x", *limits], ["y"], "clamp"),
        helper.make_node("Flatten", ["y"], ["z"], "move"),
    ]
    info = helper.make_tensor_value_info
    outputs = [info(name, onnx.TensorProto.FLOAT, None) for name in ("z", *kept)]
    graph = helper.make_graph(
        nodes, "g", [info("input", onnx.TensorProto.FLOAT, [1, 4])], outputs,
        [helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value])
         for name, value in (("low", 0.0), ("high", 6.0))],
    )  # fmt: skip
    view = GraphView.of(model_from_proto(helper.make_model(graph)))
    found = with_clamped(view, {made: 0.5})
    assert {t: found[t] for t in ("x", "y", "z") if t in found} == expected | {"z": 0.5}
