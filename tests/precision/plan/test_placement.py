"""Which edges are read quantized, and which tensors share one range."""

from __future__ import annotations

import onnx
import pytest
import tinymodels
from tinymodels import Net
from tinyquant import PLACED, named

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.placement import (
    is_move,
    place,
    shared_ranges,
    skip_edge,
    with_shared_ranges,
)
from trtune.precision.plan.rules import make_plan


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto))


@pytest.mark.parametrize("name", PLACED)
def test_exactly_these_edges_are_quantized(name: str) -> None:
    view = view_of(tinymodels.MODELS[name]())
    found = place(view, make_plan(view)).activations
    assert dict(found) == PLACED[name]
    assert list(found) == list(PLACED[name])  # in graph order


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "conv_relu",
            {("n_conv1", 1): ("conv1_w", 0), ("n_conv2", 1): ("conv2_w", 0),
             ("n_logits", 1): ("logits_w", 0)},
            id="Conv: axis 0; Gemm with transB: axis 0; biases never",
        ),
        pytest.param(
            "resize",
            {("n_conv", 1): ("conv_w", 0), ("n_up", 1): ("up_w", 1),
             ("n_output", 1): ("output_w", 0)},
            id="ConvTranspose: axis 1",
        ),
        pytest.param(
            "mlp",
            {("n_fc1", 1): ("fc1_w", 0), ("n_fc2", 1): ("fc2_w", 1)},
            id="MatMul: the last axis",
        ),
        pytest.param(
            "shared_weight",
            {("n_stem", 1): ("stem_w", 0), ("n_conv1", 1): ("conv1_w", 0),
             ("n_conv2", 1): ("conv1_w", 0), ("n_logits", 1): ("logits_w", 0)},
            id="a shared weight is quantized in both places",
        ),
        pytest.param(
            "attention",
            {("n_q", 1): ("q_w", 1), ("n_k", 1): ("k_w", 1), ("n_v", 1): ("v_w", 1),
             ("n_proj", 1): ("proj_w", 1)},
            id="not the products of the attention",
        ),
    ],
)  # fmt: skip
def test_weights_with_their_channel_axis(
    name: str, expected: dict[tuple[str, int], tuple[str, int]]
) -> None:
    view = view_of(tinymodels.MODELS[name]())
    assert dict(place(view, make_plan(view)).weights) == expected


def test_gemm_without_trans_b_has_its_channels_on_axis_1() -> None:
    net = Net()
    net.op("Gemm", net.input("x", ("N", 16)), net.weight("w", 16, 8), out="y")
    view = view_of(net.model({"y": ("N", 8)}))
    assert place(view, make_plan(view)).weights == {("n_y", 1): ("w", 1)}


@pytest.mark.parametrize(
    ("pins", "missing"),
    [
        pytest.param({"n_conv1": "fp32"}, [("n_conv1", 0)], id="only its own input"),
        pytest.param(
            {"n_conv2": "fp32"}, [("n_conv2", 0), ("n_sum", 1)], id="its input and its skip input"
        ),
        pytest.param({"n_sum": "fp32"}, [("n_conv2", 0), ("n_sum", 1)], id="by a group member"),
        pytest.param(
            {"op:Conv": "fp32", "op:Gemm": "fp32"},
            [e for edges in PLACED["residual"].values() for e in edges],
            id="everything",
        ),
    ],
)
def test_a_pinned_node_reads_nothing_quantized(
    pins: dict[str, str], missing: list[tuple[str, int]]
) -> None:
    prepared = named("residual", pins=pins)
    placement = place(prepared.view, prepared.plan)
    found = {edge for edges in placement.activations.values() for edge in edges}
    every = {edge for edges in PLACED["residual"].values() for edge in edges}
    assert found == every - set(missing)
    assert set(placement.weights) == {(n, 1) for n, i in found if n != "n_sum" and i == 0}


# The skip input


def skip_net(kind: str) -> onnx.ModelProto:
    """A conv `c` and an Add `sum` behind it, of the kind that the tests name."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="x")
    if kind == "linear":
        flat = net.op("Flatten", net.op("GlobalAveragePool", x, out="pooled"), out="flat")
        y = net.linear(flat, "c", 16, 16)
        net.op("Add", y, flat, out="sum")
        return net.model({"sum": ("N", 16)})
    y = net.conv(x, "c", 16, 16)
    if kind == "first":
        y = net.op("Add", y, x, out="sum")
    elif kind == "second":
        y = net.op("Add", x, y, out="sum")
    elif kind == "itself":
        y = net.op("Add", y, y, out="sum")
    elif kind == "relu before":
        y = net.op("Add", x, net.op("Relu", y, out="r"), out="sum")
    elif kind == "constant":
        y = net.op("Add", y, net.const("k", 1.0), out="sum")
    elif kind == "smaller":
        y = net.op("Add", y, net.op("GlobalAveragePool", x, out="gap"), out="sum")
    elif kind == "two convs":
        y = net.op("Add", net.conv(x, "d", 16, 16), y, out="sum")
    return net.head(y, 16)


@pytest.mark.parametrize(
    ("kind", "node", "expected"),
    [
        pytest.param("first", "n_c", ("n_sum", 1), id="the conv comes first"),
        pytest.param("second", "n_c", ("n_sum", 0), id="the conv comes second"),
        pytest.param("relu before", "n_c", ("n_sum", 0), id="an activation in between"),
        pytest.param("two convs", "n_d", ("n_sum", 1), id="two convs: of the later one"),
        pytest.param("two convs", "n_c", None, id="two convs: not of the earlier one"),
        pytest.param("itself", "n_c", None, id="added to itself"),
        pytest.param("constant", "n_c", None, id="a bias"),
        pytest.param("smaller", "n_c", None, id="another shape: broadcast"),
        pytest.param("linear", "n_c", None, id="behind a Gemm"),
        pytest.param("first", "n_stem", None, id="no Add behind it"),
    ],
)
def test_skip_edge(kind: str, node: str, expected: tuple[str, int] | None) -> None:
    view = view_of(skip_net(kind))
    assert skip_edge(view, make_plan(view), view.by_name[node]) == expected


def test_the_output_of_a_conv_is_quantized_only_as_a_skip_input() -> None:
    view = view_of(skip_net("two convs"))
    placed = place(view, make_plan(view)).activations
    assert placed["c"] == (("n_sum", 1),)
    assert "d" not in placed


# Shared ranges


def test_a_chain_of_moves_takes_the_range_of_its_end() -> None:
    view = view_of(tinymodels.concat())
    found = shared_ranges(view, {"squeeze_relu", "left_relu", "right_relu", "cat", "max", "flat"})
    assert found == {
        "squeeze_relu": "squeeze_relu",
        "left_relu": "max",
        "right_relu": "max",
        "cat": "max",
        "max": "max",
        "flat": "flat",  # an average makes new values
    }


def test_the_chain_leads_through_tensors_that_are_not_asked_for() -> None:
    view = view_of(tinymodels.concat())
    assert shared_ranges(view, {"left_relu", "max"}) == {"left_relu": "max", "max": "max"}
    assert shared_ranges(view, {"left_relu", "right_relu"}) == {
        "left_relu": "left_relu",
        "right_relu": "right_relu",
    }


def moves(op: str, *extra: str, rank: int = 4, **attributes: object) -> onnx.ModelProto:
    """input -> Relu `x` -> the operator, which gives `y` of `rank` -> Relu."""
    net = Net()
    x = net.op("Relu", net.input("input", ("N", 4, 8, 8)), out="x")
    constants = {
        "shape": ([0, -1], "int64"), "axes": ([4], "int64"), "scales": ([1, 1, 2, 2], "float32"),
        "starts": ([0], "int64"), "ends": ([2], "int64"), "index": ([0], "int64"),
        "repeats": ([1, 1, 2, 1], "int64"), "wide": ([1, 4, 8, 8], "int64"),
    }  # fmt: skip
    for name in extra:
        if name:
            net.const(name, *constants[name])
    y = net.op(op, x, *extra, out="y", **attributes)
    net.op("Relu", y, out="z")
    return net.model({"z": [None] * rank})


@pytest.mark.parametrize(
    ("model", "shared"),
    [
        pytest.param(moves("MaxPool", kernel_shape=[2, 2]), True, id="MaxPool"),
        pytest.param(moves("Reshape", "shape", rank=2), True, id="Reshape"),
        pytest.param(moves("Flatten", rank=2), True, id="Flatten"),
        pytest.param(moves("Transpose", perm=[0, 2, 3, 1]), True, id="Transpose"),
        pytest.param(moves("Unsqueeze", "axes", rank=5), True, id="Unsqueeze"),
        pytest.param(moves("Tile", "repeats"), True, id="Tile"),
        pytest.param(moves("Expand", "wide"), True, id="Expand"),
        pytest.param(moves("DepthToSpace", blocksize=2), True, id="DepthToSpace"),
        pytest.param(moves("Resize", "", "scales", mode="nearest"), True, id="Resize, nearest"),
        pytest.param(moves("Resize", "", "scales"), True, id="Resize without a mode"),
        pytest.param(moves("Resize", "", "scales", mode="linear"), False, id="Resize, linear"),
        pytest.param(moves("AveragePool", kernel_shape=[2, 2]), False, id="AveragePool"),
        pytest.param(moves("Slice", "starts", "ends"), False, id="Slice: only a part"),
        pytest.param(moves("Gather", "index", axis=1), False, id="Gather: only a part"),
        pytest.param(moves("Sigmoid"), False, id="Sigmoid"),
    ],
)
def test_what_shares_a_range(model: onnx.ModelProto, shared: bool) -> None:
    found = shared_ranges(view_of(model), {"x", "y"})
    assert found == {"x": "y" if shared else "x", "y": "y"}


def test_only_the_data_input_is_moved() -> None:
    view = view_of(tinymodels.dynamic_reshape())
    node = view.by_name["n_flat"]
    assert is_move(node, 0)
    assert not is_move(node, 1)
    assert is_move(view_of(tinymodels.concat()).by_name["n_cat"], 1)


def test_with_shared_ranges_gives_the_outputs_scale_to_all() -> None:
    view = view_of(tinymodels.concat())
    table = CalibrationTable(
        {"left_relu": 0.25, "right_relu": 0.5, "max": 2.0, "flat": 4.0},
        {"left_relu": "entropy", "max": "mse", "flat": "max"},
        {"model": "m"},
    )
    shared = with_shared_ranges(view, table)
    assert dict(shared.scales) == {"left_relu": 2.0, "right_relu": 2.0, "max": 2.0, "flat": 4.0}
    assert dict(shared.methods) == {"left_relu": "mse", "max": "mse", "flat": "max"}
    assert dict(shared.provenance) == {"model": "m"}
    assert table.scales["left_relu"] == 0.25
