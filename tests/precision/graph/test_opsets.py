from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper

from trtune.configs.errors import ModelError
from trtune.precision.graph import opsets
from trtune.precision.graph.normalise import normalise
from trtune.precision.graph.opsets import (
    KNOWN_OPSET,
    lowered_opset,
    newest_opset,
    runnable_opset,
)


@pytest.mark.parametrize("opset", range(7, newest_opset() + 1))
def test_every_opset_computes_the_same(opset: int) -> None:
    net = tinymodels.Net(opset=opset)
    x = net.op("Relu", net.conv(net.input("input"), "conv", 3, 64), out="relu")
    x = net.op("MaxPool", x, out="pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("GlobalAveragePool", x, out="gap")
    net.op("Softmax", net.op("Flatten", x, out="flat"), out="probs", axis=1)
    proto = net.model({"probs": ("N", 64)})
    model, notes = normalise(proto)
    assert model.opset_import[0].version == min(max(opset, 13), KNOWN_OPSET)
    assert len(notes) == (opset < 13 or opset > KNOWN_OPSET)
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs)["probs"], tinymodels.run(model, inputs)["probs"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_newer_opset_stays_where_an_operator_has_changed() -> None:
    if newest_opset() < 24:
        pytest.skip("no newer opset is installed")
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)
    swish = helper.make_node("Swish", ["x"], ["y"])
    relu = helper.make_node("Relu", ["x"], ["y"])
    assert lowered_opset([relu], newest_opset()) == KNOWN_OPSET
    assert lowered_opset([cast], 24) == 24, "it has got an attribute round_mode"
    assert lowered_opset([relu, swish], 24) == 24, "it came with opset 24"
    assert lowered_opset([relu], 17) == 17
    mod = helper.make_node("Mod", ["x", "y"], ["z"])
    if newest_opset() >= 28:
        assert lowered_opset([mod], 28) == 28, "the same inputs, but floats take another sign"


def test_an_opset_that_onnx_alone_has_is_lowered_if_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newest = onnx.defs.onnx_opset_version()
    monkeypatch.setattr(opsets, "newest_opset", lambda: KNOWN_OPSET)
    relu = helper.make_node("Relu", ["x"], ["y"])
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)
    assert runnable_opset([relu], newest) == KNOWN_OPSET
    assert runnable_opset([relu], newest + 1) == newest + 1, "nobody knows what changed there"
    assert runnable_opset([relu], 17) == 17
    if newest >= 24:
        assert runnable_opset([cast], newest) == newest, "it has got an attribute"


def test_a_type_that_came_later_keeps_the_opset() -> None:
    if newest_opset() < 24:
        pytest.skip("no newer opset is installed")
    net = tinymodels.Net(opset=24)
    x = net.input("x", ("N", 4), TensorProto.FLOAT8E8M0)
    net.op("Reshape", x, net.const("shape", [-1], np.int64), out="y")
    model, notes = normalise(net.model({"y": (("N",), TensorProto.FLOAT8E8M0)}))
    assert model.opset_import[0].version == 24
    assert notes == ()


OPERATORS = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power,
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(OPERATORS))
@pytest.mark.parametrize(("shape", "axis"), [((3,), 1), ((3, 4), 1), ((4, 5), 2), ((5,), -1)])
@pytest.mark.parametrize("opset", [1, 5, 6])
def test_old_operators_broadcast_along_their_axis(
    op: str, shape: tuple[int, ...], axis: int, opset: int
) -> None:
    net = tinymodels.Net(opset=opset)
    values = np.linspace(0.5, 2.0, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    x = net.op("Abs", net.input("x", ("N", 3, 4, 5)), out="a")
    net.op(op, x, net.const("b", values), out="y", broadcast=1, axis=axis)
    model, notes = normalise(net.model({"y": ("N", 3, 4, 5)}))
    assert notes[0] == f"opset {opset} upgraded to 13"
    feed = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    behind = 4 - (axis % 4) - len(shape)
    expected = OPERATORS[op](np.abs(feed), values.reshape(*shape, *[1] * behind))
    found = tinymodels.run(model, {"x": feed})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_slope_of_an_old_prelu_is_a_channel() -> None:
    net = tinymodels.Net(opset=6)
    net.op("PRelu", net.input("x"), net.const("slope", [0.1, 0.2, 0.3]), out="y")
    model, _ = normalise(net.model({"y": tinymodels.PICTURE}))
    feed = np.full((2, 3, 8, 8), -1.0, np.float32)
    found = tinymodels.run(model, {"x": feed})["y"]
    np.testing.assert_allclose(found[0, :, 0, 0], [-0.1, -0.2, -0.3], rtol=1e-6)


def test_attributes_of_training_are_dropped() -> None:
    net = tinymodels.Net(opset=6)
    parts = [net.const(n, np.full(3, v)) for n, v in zip("sbmv", (1.5, 0.5, 0.1, 2), strict=True)]
    x = net.op("BatchNormalization", net.input("x"), *parts, out="bn", is_test=1)
    net.op("Dropout", x, out="y", is_test=1)
    model, _ = normalise(net.model({"y": tinymodels.PICTURE}))
    feed = np.ones((1, 3, 8, 8), np.float32)
    expected = (1 - 0.1) / np.sqrt(2 + 1e-5) * 1.5 + 0.5
    found = tinymodels.run(model, {"x": feed})["y"]
    np.testing.assert_allclose(found, np.full_like(feed, expected), rtol=1e-5)


def scan(lengths: bool = False) -> onnx.ModelProto:
    """Running sums of N x 5 x 2, backwards, in opset 8."""

    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])

    body = helper.make_graph(
        [helper.make_node("Add", ["s", "v"], ["t"]), helper.make_node("Identity", ["t"], ["o"])],
        "body",
        [info("s"), info("v")],
        [info("t"), info("o")],
    )
    net = tinymodels.Net(opset=8)
    first = net.const("lengths", [5, 5], np.int64) if lengths else ""
    start, rows = net.input("start", ("N", 2)), net.input("rows", ("N", 5, 2))
    net.op("Scan", first, start, rows, out="end", num_scan_inputs=1, body=body, directions=[1])
    net.nodes[-1].output.append("sums")
    return net.model({"end": ("N", 2), "sums": ("N", 5, 2)})


def test_a_scan_of_opset_8_runs_for_each_sample() -> None:
    proto = scan()
    inputs = tinymodels.feeds(proto, batch=3)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(normalise(proto)[0], inputs)
    for name in ("end", "sums"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_scan_whose_samples_have_lengths_is_refused() -> None:
    with pytest.raises(ModelError, match="n_end has a length for each sample"):
        normalise(scan(lengths=True))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("opset", "scale"),
    [(7, 2.0), (7, 3.0), (9, 1.5), (9, 3.0), (10, 3.0), (10, 1.5), (10, 0.5), (10, 0.6)],
)
def test_old_resizes_sample_where_they_did(opset: int, mode: str, scale: float) -> None:
    net = tinymodels.Net(opset=opset)
    x = net.input("input")
    if opset == 7:
        net.op("Upsample", x, out="output", mode=mode, scales=[1.0, 1.0, scale, scale])
    else:
        scales = net.const("scales", [1, 1, scale, scale])
        net.op("Resize" if opset == 10 else "Upsample", x, scales, out="output", mode=mode)
    proto = net.model({"output": ("N", 3, int(8 * scale), int(8 * scale))})
    inputs = tinymodels.feeds(proto)
    expected = tinymodels.run(proto, inputs)["output"]
    found = tinymodels.run(normalise(proto)[0], inputs)["output"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_old_resizes_inside_a_branch_too() -> None:
    def branch(name: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        scales = [1.0, 1.0, 2.0, 2.0]
        node = helper.make_node("Upsample", ["input"], [name], scales=scales, mode="linear")
        return helper.make_graph([node], name, [], [made])

    net = tinymodels.Net(opset=8)
    net.input("input")
    yes = net.const("yes", True, bool)
    net.op("If", yes, out="output", then_branch=branch("a"), else_branch=branch("b"))
    proto = net.model({"output": ("N", 3, 16, 16)})
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(normalise(proto)[0], inputs)
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-4, atol=1e-5)
