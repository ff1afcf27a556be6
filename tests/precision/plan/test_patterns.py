"""Softmax and normalisation as elementary nodes, and how many terms a node sums."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto
from tinymodels import Net

from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.patterns import float32_statistics, internals, summands


def view_of(proto: onnx.ModelProto) -> GraphView:
    return GraphView.of(model_from_proto(proto))


def layer_norm(kind: str) -> onnx.ModelProto:
    """x scaled first, normalised as `kind` says, then scaled and shifted."""
    net = Net()
    x = net.op("Mul", net.input("input", ("N", 8)), net.const("before", 2.0), out="x")
    if kind == "rms":
        centred = x
    else:
        mean = net.op("ReduceMean", x, out="mean", axes=[-1])
        centred = net.op("Sub", x, mean, out="centred")
    if kind == "cast":
        centred = net.op("Cast", centred, out="cast", to=TensorProto.FLOAT)
    if kind == "square":
        power = net.op("Mul", centred, centred, out="power")
    else:
        power = net.op("Pow", centred, net.const("two", 2.0), out="power")
    variance = net.op("ReduceMean", power, out="variance", axes=[-1])
    shifted = net.op("Add", variance, net.const("eps", 1e-5), out="shifted")
    if kind == "power":
        root = net.op("Pow", shifted, net.const("minus", -0.5), out="root")
        y = net.op("Mul", root, centred, out="y")
    else:
        root = net.op("Sqrt", shifted, out="root")
        if kind == "reciprocal":
            y = net.op("Mul", centred, net.op("Reciprocal", root, out="inverse"), out="y")
        elif kind == "one over":
            inverse = net.op("Div", net.const("one", 1.0), root, out="inverse")
            y = net.op("Mul", centred, inverse, out="y")
        else:
            y = net.op("Div", centred, root, out="y")
    y = net.op("Mul", y, net.const("gamma", np.ones(8)), out="scaled")
    net.op("Add", y, net.const("beta", np.zeros(8)), out="output")
    return net.model({"output": ("N", 8)})


CORE = {"n_mean", "n_centred", "n_power", "n_variance", "n_shifted", "n_root", "n_y"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("power of two", CORE),
        ("square", CORE),
        ("power", CORE),
        ("cast", CORE | {"n_cast"}),
        ("reciprocal", CORE | {"n_inverse"}),
        ("one over", CORE | {"n_inverse"}),
        pytest.param("rms", CORE - {"n_mean", "n_centred"}, id="without a mean"),
    ],
)
def test_a_layer_normalisation_of_elementary_nodes(kind: str, expected: set[str]) -> None:
    found = internals(view_of(layer_norm(kind)))
    assert set(found) == expected | {"n_scaled", "n_output"}
    assert set(found.values()) == {"inside a normalisation (it ends at 'n_output')"}


def root_of_variance(net: Net, x: str, *, axes: list[int], square: str) -> tuple[str, str]:
    """x less its mean, and the square root of its variance, as opset 11 and 18 write them."""

    def mean(tensor: str, out: str) -> str:
        if net.opset < 18:
            return net.op("ReduceMean", tensor, out=out, axes=axes)
        return net.op("ReduceMean", tensor, net.const(f"{out}_axes", axes, np.int64), out=out)

    centred = net.op("Sub", x, mean(x, "mean"), out="centred")
    if square == "Mul":
        power = net.op("Mul", centred, centred, out="power")
    else:
        power = net.op("Pow", centred, net.const("two", 2.0), out="power")
    shifted = net.op("Add", mean(power, "variance"), net.const("eps", 1e-5), out="shifted")
    return centred, net.op("Sqrt", shifted, out="root")


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
@pytest.mark.parametrize("square", ["Mul", "Pow"])
def test_a_group_normalisation_is_reshaped_before_it_is_scaled(square: str, opset: int) -> None:
    net = Net(opset=opset)
    x = net.op("Relu", net.input("input", (2, 8, 4, 4)), out="x")
    rows = net.op("Reshape", x, net.const("rows", [2, 4, -1], np.int64), out="grouped")
    centred, root = root_of_variance(net, rows, axes=[-1], square=square)
    y = net.op("Div", centred, root, out="y")
    y = net.op("Reshape", y, net.const("back", [2, 8, 4, 4], np.int64), out="shaped")
    y = net.op("Mul", y, net.const("gamma", np.ones((8, 1, 1))), out="scaled")
    y = net.op("Add", y, net.const("beta", np.zeros((8, 1, 1))), out="moved")
    net.op("Relu", y, out="output")
    found = internals(view_of(net.model({"output": (2, 8, 4, 4)})))
    assert set(found) == CORE | {"n_shaped", "n_scaled", "n_moved"}


def test_a_gamma_that_is_multiplied_out_beforehand() -> None:
    """x * inv + (beta - mean * inv), as TensorFlow writes it."""
    net = Net()
    x = net.op("Relu", net.input("input", ("N", 8)), out="x")
    _, root = root_of_variance(net, x, axes=[-1], square="Mul")
    inverse = net.op("Reciprocal", root, out="inverse")
    inverse = net.op("Mul", inverse, net.const("gamma", np.ones(8)), out="inv")
    y = net.op("Mul", x, inverse, out="y")
    offset = net.op("Mul", "mean", inverse, out="offset")
    beside = net.op("Sub", net.const("beta", np.zeros(8)), offset, out="beside")
    net.op("Add", y, beside, out="output")
    found = internals(view_of(net.model({"output": ("N", 8)})))
    wanted = {"n_inverse", "n_inv", "n_offset", "n_beside", "n_output"}
    assert set(found) == CORE | wanted


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param("residual", set(), id="a residual is no beta"),
        pytest.param("two readers", set(), id="a result that others read too"),
        pytest.param("by the data", set(), id="a gate is no gamma"),
        pytest.param("twice", {"n_scaled"}, id="a second factor is none of it"),
        pytest.param("only beta", {"n_moved"}, id="a beta alone"),
    ],
)
def test_what_scales_and_shifts(kind: str, expected: set[str]) -> None:
    net = Net()
    x = net.op("Relu", net.input("input", ("N", 8)), out="x")
    centred, root = root_of_variance(net, x, axes=[-1], square="Mul")
    y = net.op("Div", centred, root, out="y")
    gamma = net.const("gamma", np.ones(8))
    if kind == "residual":
        y = net.op("Add", y, "input", out="sum")
    elif kind == "two readers":
        y = net.op("Add", net.op("Mul", y, gamma, out="scaled"), y, out="sum")
    elif kind == "by the data":
        y = net.op("Mul", y, net.op("Sigmoid", x, out="gate"), out="gated")
    elif kind == "twice":
        y = net.op("Mul", net.op("Mul", y, gamma, out="scaled"), net.const("k", 2.0), out="again")
    else:
        y = net.op("Add", y, gamma, out="moved")
    net.op("Relu", y, out="output")
    found = internals(view_of(net.model({"output": ("N", 8)})))
    assert set(found) == CORE | expected


def test_an_instance_normalisation_takes_its_scale_along() -> None:
    net = Net()
    x = net.input("input", ("N", 8, 16))
    ones, zeros = net.const("ones", np.ones(8)), net.const("zeros", np.zeros(8))
    y = net.op("InstanceNormalization", x, ones, zeros, out="y")
    y = net.op("Reshape", y, net.const("back", [0, 8, 4, 4], np.int64), out="shaped")
    y = net.op("Mul", y, net.const("gamma", np.ones((8, 1, 1))), out="scaled")
    net.op("Add", y, net.const("beta", np.zeros((8, 1, 1))), out="output")
    found = internals(view_of(net.model({"output": ("N", 8, 4, 4)})))
    assert set(found) == {"n_shaped", "n_scaled", "n_output"}
    assert set(found.values()) == {"the scale and shift of normalisation 'n_y'"}


def test_a_softmax_of_elementary_nodes() -> None:
    net = Net()
    x = net.op("Relu", net.input("input", ("N", 8)), out="x")
    top = net.op("ReduceMax", x, out="top", axes=[-1])
    powers = net.op("Exp", net.op("Sub", x, top, out="below"), out="powers")
    total = net.op("ReduceSum", powers, out="total", keepdims=1)
    net.op("Div", powers, total, out="y")
    found = internals(view_of(net.model({"y": ("N", 8)})))
    assert set(found) == {"n_top", "n_below", "n_powers", "n_total", "n_y"}
    assert set(found.values()) == {"inside a softmax (it ends at 'n_y')"}


def test_a_division_by_a_clipped_and_expanded_norm() -> None:
    net = Net()
    x = net.op("Relu", net.input("input", ("N", 8)), out="x")
    norm = net.op("ReduceL2", x, out="norm", axes=[-1])
    norm = net.op("Clip", norm, net.const("eps", 1e-12), out="clipped")
    shape = net.op("Shape", x, out="shape")
    net.op("Div", x, net.op("Expand", norm, shape, out="wide"), out="y")
    found = internals(view_of(net.model({"y": ("N", 8)})))
    assert set(found) == {"n_norm", "n_clipped", "n_wide", "n_y"}


@pytest.mark.parametrize("name", ["attention", "silu_se", "resize", "depthwise"])
def test_other_models_have_none(name: str) -> None:
    assert internals(view_of(tinymodels.MODELS[name]())) == {}


@pytest.mark.parametrize("kind", ["other data", "largest", "sum of two", "data of another factor"])
def test_other_divisions_are_no_normalisation(kind: str) -> None:
    net = Net()
    x, z = net.input("x", ("N", 8)), net.input("z", ("N", 8))
    if kind == "other data":
        below = net.op("ReduceSum", z, out="below", keepdims=1)
    elif kind == "largest":
        below = net.op("ReduceMax", x, out="below", axes=[-1])
    elif kind == "sum of two":
        below = net.op("Add", net.op("ReduceSum", x, out="s", keepdims=1), z, out="below")
    else:
        below = net.op("Pow", net.op("ReduceSum", x, out="s", keepdims=1), z, out="below")
    net.op("Div", x, below, out="y")
    assert internals(view_of(net.model({"y": ("N", 8)}))) == {}


def summing(op: str, *constants: str, opset: int = 17, **attributes: object) -> GraphView:
    """A node `n_y` on a picture N x 6 x 4 x 5, or on rows N x 120 for a Gemm or MatMul."""
    net = Net(opset=opset)
    flat = op in ("Gemm", "MatMul")
    x = net.input("x", ("N", 120) if flat else ("N", 6, 4, 5))
    net.weight("conv", 4, 3, 3, 3), net.weight("up", 6, 2, 2, 2)
    net.weight("down", 120, 7), net.weight("across", 7, 120)
    net.const("axes", [1, 3], np.int64), net.const("axis", 2, np.int64)
    net.op(op, x, *constants, out="y", **attributes)
    scalar = attributes.get("keepdims") == 0
    return view_of(net.model({"y": [] if scalar else [None] * (2 if flat else 4)}))


@pytest.mark.parametrize(
    ("view", "count"),
    [
        pytest.param(summing("Conv", "conv", group=2), 27, id="Conv"),
        pytest.param(summing("ConvTranspose", "up", group=2), 12, id="ConvTranspose"),
        pytest.param(summing("Gemm", "down"), 120, id="Gemm"),
        pytest.param(summing("Gemm", "across", transB=1), 120, id="Gemm, transB"),
        pytest.param(summing("MatMul", "down"), 120, id="MatMul"),
        pytest.param(summing("ReduceMean", axes=[-1, 2]), 20, id="two axes"),
        pytest.param(summing("ReduceMean", "axes", opset=18), 30, id="axes as an input"),
        pytest.param(summing("ReduceSum", keepdims=0), 120, id="everything"),
        pytest.param(summing("ReduceSum", noop_with_empty_axes=1), 1, id="nothing"),
        pytest.param(summing("ReduceMax", axes=[1]), 0, id="a maximum is no sum"),
        pytest.param(summing("AveragePool", kernel_shape=[3, 2]), 6, id="AveragePool"),
        pytest.param(summing("GlobalAveragePool"), 20, id="GlobalAveragePool"),
        pytest.param(summing("CumSum", "axis"), 4, id="CumSum"),
        pytest.param(summing("Relu"), 0, id="no sum"),
    ],
)
def test_how_many_terms_are_summed(view: GraphView, count: int) -> None:
    assert summands(view, view.by_name["n_y"]) == count


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "expected"),
    [
        ("LayerNormalization", 17, {}, True),
        ("LayerNormalization", 17, {"stash_type": TensorProto.FLOAT16}, False),
        ("GroupNormalization", 18, {}, False),
        ("GroupNormalization", 21, {}, True),
        ("RMSNormalization", 23, {}, True),
        ("InstanceNormalization", 22, {}, False),
    ],
)
def test_where_statistics_are_float32(
    op: str, opset: int, attributes: dict[str, int], expected: bool
) -> None:
    node = onnx.helper.make_node(op, ["x"], ["y"], **attributes)
    assert float32_statistics(node, opset) is expected
