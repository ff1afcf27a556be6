"""Averages over whole pictures in integers: which they are, and that the kernel takes them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tinymodels import Net
from tinyquant import Case, case, op_counts, outputs

from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.lower.pools import Average, average_behind, averages_places
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.runtime.session import make_session, optimized_graph

KERNEL = "QLinearGlobalAveragePool"


def averaged(*nodes: tuple[str, dict[str, object]], last: str = "flat") -> Net:
    """A convolution with Relu, and these nodes behind each other, which make `t0`, `t1` and so on,
    and the last of them `last`."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "c", 3, 16), out="relu")
    for number, (op, attributes) in enumerate(nodes):
        out = last if number == len(nodes) - 1 else f"t{number}"
        x = net.op(op, x, out=out, **attributes)
    return net


def classifier(net: Net) -> onnx.ModelProto:
    net.linear("flat", "logits", 16, 10)
    return net.model({"logits": ("N", 10)})


MEAN = ("ReduceMean", {"axes": [2, 3], "keepdims": 0})
KEPT = ("ReduceMean", {"axes": [-1, -2], "keepdims": 1})
POOL = ("GlobalAveragePool", {})
FLATTEN = ("Flatten", {})


def lowered(prepared: Case) -> onnx.ModelProto:
    found = lower_deploy(prepared.model, prepared.plan, prepared.table)
    onnx.checker.check_model(found, full_check=True)
    return found


def with_axes_as_input(opset: int) -> onnx.ModelProto:
    net = Net(opset=opset)
    x = net.op("Relu", net.conv(net.input("input"), "c", 3, 16), out="relu")
    net.const("axes", [2, 3], np.int64)
    net.op("ReduceMean", x, "axes", out="flat", keepdims=0)
    return classifier(net)


def kernels(proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    path = tmp_path_factory.mktemp("pools") / "model.onnx"
    onnx.save(proto, path)
    return dict(op_counts(optimized_graph(path)))


@pytest.mark.parametrize(
    "proto",
    [
        pytest.param(classifier(averaged(POOL, FLATTEN)), id="a pool and a Flatten"),
        pytest.param(classifier(averaged(MEAN)), id="a mean without kept dimensions"),
        pytest.param(classifier(averaged(KEPT, FLATTEN)), id="a mean with kept dimensions"),
        pytest.param(with_axes_as_input(18), id="axes as an input"),
    ],
)
def test_one_kernel_averages_codes(
    proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prepared = case(proto)
    found = lowered(prepared)
    counts = kernels(found, tmp_path_factory)
    assert counts[KERNEL] == 1
    assert counts["QuantizeLinear"] == 1  # the input's
    assert "DequantizeLinear" not in counts
    said = outputs(found, prepared.feeds)["logits"]
    done = outputs(found, prepared.feeds, integer_kernels=True)["logits"]
    assert done.shape == said.shape
    assert sqnr_db(said, done) > 35  # a code of the average may be the one beside
    exact = make_session(prepared.model.proto).run(None, dict(prepared.feeds))[0]
    assert sqnr_db(exact, done) > 25


def test_each_average_of_a_squeeze_and_excitation_block(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    net = averaged(KEPT, last="mean")
    gate = net.op("Sigmoid", net.conv("mean", "squeeze", 16, 16, 1), out="gate")
    x = net.conv(net.op("Mul", "relu", gate, out="scaled"), "last", 16, 16)
    prepared = case(net.head(x, 16))
    counts = kernels(lowered(prepared), tmp_path_factory)
    assert counts[KERNEL] == 2
    assert counts["QLinearMul"] == counts["QLinearSigmoid"] == 1
    assert "ReduceMean" not in counts


@pytest.mark.parametrize(
    ("net", "tensor", "expected"),
    [
        pytest.param(averaged(POOL), "flat", Average("n_flat"), id="the pool itself"),
        pytest.param(
            averaged(POOL, FLATTEN), "flat", Average("n_t0", ("n_flat", 0)), id="through a Flatten"
        ),
        pytest.param(
            averaged(POOL, ("Identity", {}), FLATTEN),
            "flat",
            Average("n_t0", ("n_t1", 0)),
            id="the first node behind it reads it",
        ),
        pytest.param(averaged(POOL, ("Relu", {})), "flat", None, id="through a Relu"),
        pytest.param(averaged(POOL), "relu", None, id="no average"),
        pytest.param(averaged(POOL), "input", None, id="an input"),
    ],
)
def test_average_behind(net: Net, tensor: str, expected: Average | None) -> None:
    view = GraphView.of(model_from_proto(classifier(net)))
    assert average_behind(view, make_plan(view), tensor) == expected


def test_none_behind_a_pin_a_second_reader_or_an_output() -> None:
    def found(proto: onnx.ModelProto, **pins: str) -> Average | None:
        view = GraphView.of(model_from_proto(proto))
        return average_behind(view, make_plan(view, pins=pins), "flat")

    assert found(classifier(averaged(POOL, FLATTEN))) is not None
    for pin in ("n_t0", "n_flat"):
        assert found(classifier(averaged(POOL, FLATTEN)), **{pin: "fp32"}) is None
    net = averaged(POOL, FLATTEN)
    net.linear(net.op("Mul", "flat", net.op("Flatten", "t0", out="again"), out="m"), "more", 16, 4)
    net.linear("flat", "logits", 16, 10)
    assert found(net.model({"logits": ("N", 10), "more": ("N", 4)})) is None
    net = averaged(POOL, FLATTEN)
    net.linear("flat", "logits", 16, 10)
    assert found(net.model({"logits": ("N", 10), "flat": ("N", 16)})) is None


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ([2, 3], True),
        ([3, 2], True),
        ([-2, -1], True),
        ([1, 2, 3], False),
        ([2], False),
        ([0, 2], False),
        ([1], False),
    ],
)
def test_only_a_mean_over_all_places_is_one(axes: list[int], expected: bool) -> None:
    net = averaged(("ReduceMean", {"axes": axes, "keepdims": 1}))
    view = GraphView.of(model_from_proto(net.model({"flat": ("N", None, None, None)})))
    assert averages_places(view, view.by_name["n_flat"]) is expected


def test_an_average_of_floats_stays_one() -> None:
    net = averaged(MEAN)
    prepared = case(classifier(net), pins={"n_c": "fp32"})
    found = lowered(prepared)
    assert op_counts(found)["ReduceMean"] == 1
    assert op_counts(found)["GlobalAveragePool"] == 0
