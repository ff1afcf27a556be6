from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from trtune.precision.graph.file import load_model, model_from_proto
from trtune.precision.graph.fold import Folded


def stats(net: tinymodels.Net, name: str, channels: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng([seed, channels])
    values = {
        "scale": rng.normal(1, 0.5, channels),
        "shift": rng.normal(0, 1, channels),
        "mean": rng.normal(0, 1, channels),
        "var": rng.uniform(0.01, 4, channels),
    }
    return [net.const(f"{name}_{part}", value) for part, value in values.items()]


def convolved(
    op: str, rank: int, group: int, bias: bool, epsilon: float, seed: int
) -> onnx.ModelProto:
    net = tinymodels.Net(seed=seed)
    x = net.input("x", ("N", 4, *[6] * rank))
    out, inner = 6, 4 // group
    shape = (out, inner) if op == "Conv" else (4, out // group)
    inputs = [x, net.weight("w", *shape, *[3] * rank)]
    if bias:
        inputs.append(net.weight("b", out))
    y = net.op(op, *inputs, out="c", group=group)
    y = net.op("BatchNormalization", y, *stats(net, "bn", out, seed), out="n", epsilon=epsilon)
    net.op("Relu", y, out="y")
    return net.model({"y": [None] * (rank + 2)})


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["Conv", "ConvTranspose"]),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from([1e-5, 1e-3]),
    st.integers(0, 99),
)
def test_folding_gives_the_same_in_fp32(
    op: str, rank: int, group: int, bias: bool, epsilon: float, seed: int
) -> None:
    proto = convolved(op, rank, group, bias, epsilon, seed)
    model = model_from_proto(proto)
    assert [node.op_type for node in model.proto.graph.node] == [op, "Relu"]
    assert len(model.proto.graph.initializer) == 2
    feed = np.random.default_rng(seed).standard_normal((2, 4, *[6] * rank)).astype(np.float32)
    expected, found = (tinymodels.run(p, {"x": feed})["y"] for p in (proto, model.proto))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_node_is_remembered_with_where_it_went() -> None:
    model = model_from_proto(convolved("Conv", 2, 1, True, 1e-5, 0))
    assert model.folded == {"n_n": Folded("BatchNormalization", "n_c")}
    assert model.notes == ("1 batch normalizations folded into the convolution before",)
    onnx.checker.check_model(model.proto, full_check=True)


@pytest.mark.parametrize("fold", ["constants", "none"])
def test_it_can_be_left_as_it_is(fold: str) -> None:
    proto = convolved("Conv", 2, 1, True, 1e-5, 0)
    model = model_from_proto(proto, fold=fold)  # type: ignore[arg-type]
    assert [node.op_type for node in model.proto.graph.node][1] == "BatchNormalization"


@pytest.mark.parametrize(
    "kind", ["second reader", "output", "training", "no variance", "float16", "computed weight"]
)
def test_where_it_stays(kind: str) -> None:
    net = tinymodels.Net()
    dtype, code = (np.float16, TensorProto.FLOAT16) if kind == "float16" else (np.float32, 1)
    x = net.input("x", dtype=code)
    w = net.const("w", np.ones((8, 3, 3, 3)), dtype)
    if kind == "computed weight":
        w = net.op("Add", w, net.input("dw", (8, 3, 3, 3)), out="sum")
    y = net.op("Conv", x, w, out="c", pads=[1, 1, 1, 1])
    parts = [net.const(f"p{k}", np.full(8, k + 1.0), dtype) for k in range(4)]
    if kind == "no variance":
        parts[3] = net.const("zero", np.zeros(8))
    attributes = {"training_mode": 1} if kind == "training" else {}
    if kind == "no variance":
        attributes["epsilon"] = 0.0
    out = net.op("BatchNormalization", y, *parts, out="n", **attributes)
    outputs: dict[str, object] = {"n": ((None, 8, 8, 8), code)}
    if kind == "training":
        net.nodes[-1].output.extend(["m", "v"])
    if kind == "second reader":
        outputs = {net.op("Add", out, y, out="sum"): (None, 8, 8, 8)}
    if kind == "output":
        outputs["c"] = (None, 8, 8, 8)
    model = model_from_proto(net.model(outputs))
    assert "BatchNormalization" in [node.op_type for node in model.proto.graph.node]


def test_a_shared_weight_is_kept_for_the_other() -> None:
    net = tinymodels.Net()
    x, w = net.input("x"), net.weight("w", 8, 3, 3, 3)
    left = net.op("Conv", x, w, out="left")
    left = net.op("BatchNormalization", left, *stats(net, "bn", 8), out="normed")
    net.op("Add", left, net.op("Conv", x, w, out="right"), out="y")
    proto = net.model({"y": (None, 8, 6, 6)})
    model = model_from_proto(proto)
    assert [node.op_type for node in model.proto.graph.node] == ["Conv", "Conv", "Add"]
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model.proto, inputs)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-4, atol=1e-5)


def test_two_in_a_row_both_go() -> None:
    net = tinymodels.Net()
    y = net.op("Conv", net.input("x"), net.weight("w", 8, 3, 1, 1), out="c")
    for k in range(2):
        y = net.op("BatchNormalization", y, *stats(net, f"bn{k}", 8, k), out=f"n{k}")
    proto = net.model({"n1": (None, 8, 8, 8)})
    model = model_from_proto(proto)
    assert [node.op_type for node in model.proto.graph.node] == ["Conv"]
    assert [o.name for o in model.proto.graph.output] == ["n1"]
    assert set(model.folded.values()) == {Folded("BatchNormalization", "n_c")}
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model.proto, inputs)
    np.testing.assert_allclose(found["n1"], expected["n1"], rtol=1e-4, atol=1e-5)


def test_external_weights_are_read(tmp_path: Path) -> None:
    proto = convolved("Conv", 2, 1, True, 1e-5, 0)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    expected = tinymodels.run(proto, feed)["y"]
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    model = load_model(tmp_path / "m.onnx", load_limit=0)
    assert model.external_dir is not None
    assert [node.op_type for node in model.proto.graph.node] == ["Conv", "Relu"]
    found = tinymodels.run(model.proto, feed)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_values_are_rounded_once() -> None:
    net = tinymodels.Net()
    y = net.op("Conv", net.input("x", ("N", 1, 1)), net.const("w", [[[3.0]]]), out="c")
    parts = [net.const(n, [v]) for n, v in zip("sbmv", (2.0, 1.0, 0.5, 4.0), strict=True)]
    net.op("BatchNormalization", y, *parts, out="y", epsilon=0.0)
    graph = model_from_proto(net.model({"y": (None, 1, 1)})).proto.graph
    weight, bias = (onnx.numpy_helper.to_array(t) for t in graph.initializer)
    assert (weight.item(), bias.item()) == (3.0, 0.5)
    assert helper.tensor_dtype_to_np_dtype(graph.initializer[0].data_type) == np.float32
