from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
import tinymodels
from onnx import TensorProto, helper, numpy_helper

from trtune.configs.errors import ModelError
from trtune.precision.graph import fold as folding
from trtune.precision.graph.file import Model, load_model, model_from_proto
from trtune.precision.graph.fold import Folded, fold
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
LARGE_MODELS = {"light_bvlc_alexnet", "light_vgg19", "light_zfnet512"}


def behind(kind: str) -> onnx.ModelProto:
    """A product of N x 4 x 16 with a weight of 16 x 8 that is behind what `kind` names."""
    net = tinymodels.Net()
    x = net.input("x", ("N", 4, 16))
    rows = np.random.default_rng(3).standard_normal((16, 8)).astype(np.float32)
    if kind == "Transpose":
        w = net.op("Transpose", net.const("c", rows.T), out="w")
    elif kind == "Reshape":
        w = net.op(
            "Reshape", net.const("c", rows.ravel()), net.const("s", [16, 8], np.int64), out="w"
        )
    elif kind == "Cast":
        w = net.op("Cast", net.const("c", rows, np.float16), out="w", to=TensorProto.FLOAT)
    elif kind == "Cast of bfloat16":
        stored = helper.make_tensor("c", TensorProto.BFLOAT16, rows.shape, rows.ravel())
        net.initializers.append(stored)
        w = net.op("Cast", "c", out="w", to=TensorProto.FLOAT)
    elif kind == "Mul":
        w = net.op("Mul", net.const("c", rows), net.const("k", 0.25), out="w")
    elif kind == "Unsqueeze and Squeeze":
        axes = net.const("axes", [0], np.int64)
        w = net.op("Unsqueeze", net.const("c", rows), axes, out="u")
        w = net.op("Squeeze", w, axes, out="w")
    elif kind == "ConstantOfShape":
        value = numpy_helper.from_array(np.array([0.5], np.float32))
        w = net.op("ConstantOfShape", net.const("s", [16, 8], np.int64), out="w", value=value)
    elif kind == "Identity":
        w = net.op("Identity", net.op("Identity", net.const("c", rows), out="i"), out="w")
    elif kind == "integers with a scale":
        whole = net.op("Cast", net.const("c", rows * 20, np.int8), out="f", to=TensorProto.FLOAT)
        w = net.op("Mul", whole, net.const("k", np.full(8, 0.05)), out="w")
    else:
        parts = [net.const(f"c{k}", rows[k * 8 : k * 8 + 8]) for k in range(2)]
        w = net.op("Concat", *parts, out="w", axis=0)
    net.op("MatMul", x, w, out="y")
    return net.model({"y": ("N", 4, 8)})


KINDS = (
    *("Transpose", "Reshape", "Cast", "Cast of bfloat16", "Mul", "Unsqueeze and Squeeze"),
    *("ConstantOfShape", "Identity", "integers with a scale", "Concat"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_behind_constants_is_stored_and_quantized(kind: str) -> None:
    proto = behind(kind)
    model = model_from_proto(proto)
    assert [node.op_type for node in model.proto.graph.node] == ["MatMul"]
    assert len(model.proto.graph.initializer) == 1, "what it was computed from is no longer read"
    assert make_plan(GraphView.of(model)).int8_nodes == ("n_y",)
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model.proto, inputs)
    np.testing.assert_array_equal(found["y"], expected["y"])


def test_what_was_folded_is_named() -> None:
    model = model_from_proto(behind("Cast"))
    assert model.folded == {"n_w": Folded("Cast")}
    assert model.notes == ("1 nodes that compute with constants alone became constants",)
    assert model_from_proto(behind("Cast"), fold="none").folded == {}


@pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
def test_folding_keeps_every_value(name: str) -> None:
    if name == "duplicate_names":
        pytest.skip("onnxruntime refuses it as it is")
    proto = tinymodels.MODELS[name]()
    model = model_from_proto(proto)
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model.proto, inputs)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv_relu", "residual", "silu_se", "attention", "branches"])
def test_where_nothing_is_to_be_folded_nothing_changes(name: str) -> None:
    proto = tinymodels.MODELS[name]()
    assert model_from_proto(proto).proto == model_from_proto(proto, fold="none").proto


def test_tied_heads_share_what_is_stored() -> None:
    net = tinymodels.Net()
    table = net.weight("table", 32, 16)
    x = net.op("Gather", table, net.input("ids", ("N", 5), TensorProto.INT64), out="rows")
    for head in ("a", "b"):
        net.op("MatMul", x, net.op("Transpose", table, out=f"t{head}"), out=head)
    proto = net.model({"a": ("N", 5, 32), "b": ("N", 5, 32)})
    model = model_from_proto(proto)
    assert [node.op_type for node in model.proto.graph.node] == ["Gather", "MatMul", "MatMul"]
    assert "table" in {tensor.name for tensor in model.proto.graph.initializer}
    inputs = {"ids": np.arange(10).reshape(2, 5)}
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model.proto, inputs)
    np.testing.assert_array_equal(found["b"], expected["b"])


@pytest.mark.parametrize("kind", ["random", "output", "quantized", "in a branch", "of strings"])
def test_what_stays(kind: str) -> None:
    net = tinymodels.Net()
    x = net.input("x", ("N", 3))
    outputs: dict[str, object] = {"y": ("N", 3)}
    if kind == "random":
        other = net.op("RandomNormalLike", net.const("c", [1, 2, 3]), out="r")
    elif kind == "output":
        other = net.op("Neg", net.const("c", [1, 2, 3]), out="r")
        outputs["r"] = (3,)
    elif kind == "quantized":
        codes, scale = net.const("c", [1, 2, 3], np.int8), net.const("s", 0.5)
        other = net.op("DequantizeLinear", codes, scale, out="r")
    elif kind == "of strings":
        words = net.const("c", np.array(["a", "b", "c"], object), object)
        other = net.op("Cast", net.op("StringConcat", words, words, out="r"), out="f", to=1)
        net.opset = 20
    else:
        made = helper.make_tensor_value_info("b", TensorProto.FLOAT, [3])
        body = helper.make_graph([helper.make_node("Neg", ["c"], ["b"], "neg")], "g", [], [made])
        net.const("c", [1, 2, 3])
        other = net.op(
            "If", net.input("t", (), TensorProto.BOOL), out="r", then_branch=body, else_branch=body
        )
    net.op("Add", x, other, out="y")
    proto = net.model(outputs)
    model = model_from_proto(proto)
    assert model.folded == {}
    assert [node.op_type for node in model.proto.graph.node] == [node.op_type for node in net.nodes]


def large(kind: str, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(folding, "LARGE", 1024)
    net = tinymodels.Net()
    x = net.input("x", ("N", 64))
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    shape = net.const("s", [64, 16], np.int64)
    c = net.op("ConstantOfShape", shape, out="c", value=value)
    if kind == "a weight":
        net.op("MatMul", x, net.op("Neg", c, out="w"), out="y")
        return model_from_proto(net.model({"y": ("N", 16)}))
    net.op("Add", net.op("Unsqueeze", x, net.const("one", [2], np.int64), out="u"), c, out="y")
    return model_from_proto(net.model({"y": ("N", 64, 16)}))


@pytest.mark.parametrize(("kind", "kept"), [("a weight", 1), ("a table", 3)])
def test_a_large_result_is_folded_only_as_a_weight(
    kind: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(large(kind, monkeypatch).proto.graph.node) == kept


def test_no_more_than_fits_a_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "TOTAL", 1000)
    model = model_from_proto(behind("Transpose"))
    assert [node.op_type for node in model.proto.graph.node] == ["Transpose", "MatMul"]


def test_many_weights_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "PART", 600)
    net = tinymodels.Net()
    x = net.input("x", ("N", 8))
    for k in range(7):
        w = net.op("Transpose", net.weight(f"c{k}", 8, 8), out=f"w{k}")
        x = net.op("MatMul", x, w, out=f"y{k}")
    proto = net.model({x: ("N", 8)})
    model = model_from_proto(proto)
    assert len(model.proto.graph.node) == 7
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model.proto, inputs)
    np.testing.assert_array_equal(found[x], expected[x])


def test_one_that_cannot_be_computed_leaves_the_others() -> None:
    net = tinymodels.Net()
    x = net.input("x", ("N", 4))
    bad = net.op("Reshape", net.const("c", np.ones(5)), net.const("s", [2, 2], np.int64), out="bad")
    good = net.op("Neg", net.const("d", np.ones((4, 4))), out="good")
    net.op(
        "Add",
        net.op("MatMul", x, good, out="m"),
        net.op("ReduceSum", bad, out="sum", keepdims=0),
        out="y",
    )
    proto = net.model({"y": (None, 4)})
    assert set(model_from_proto(proto).folded) == {"n_good"}


def test_external_weights_are_folded_too(tmp_path: Path) -> None:
    proto = behind("Transpose")
    inputs = tinymodels.feeds(proto)
    expected = tinymodels.run(proto, inputs)["y"]
    path = tmp_path / "m.onnx"
    onnx.save(
        proto, path, save_as_external_data=True, location="w.bin", size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    for limit in (0, 1 << 20):
        model = load_model(path, load_limit=limit)
        assert len(model.proto.graph.node) == 1
        np.testing.assert_array_equal(tinymodels.run(model.proto, inputs)["y"], expected)


def test_folding_twice_is_folding_once() -> None:
    model = model_from_proto(behind("integers with a scale"))
    again = onnx.ModelProto()
    again.CopyFrom(model.proto)
    assert fold(again).notes == ()
    assert again == model.proto


def test_a_constant_without_a_value_is_said() -> None:
    net = tinymodels.Net()
    net.op("Constant", out="c")
    net.op("Add", net.input("x", ("N", 3)), "c", out="y")
    with pytest.raises(ModelError, match="not valid ONNX: Constant node 'n_c' has no value"):
        model_from_proto(net.model({"y": ("N", 3)}))


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_the_light_models_of_onnx_are_int8_throughout(path: Path) -> None:
    if path.stem in LARGE_MODELS:
        pytest.skip("hundreds of megabytes; the slow test has it")
    plan = make_plan(GraphView.of(load_model(path)))
    assert plan.compute_nodes == plan.int8_nodes
    assert plan.int8_nodes


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LARGE_MODELS))
def test_the_large_light_models_too(name: str) -> None:
    plan = make_plan(GraphView.of(load_model(LIGHT / f"{name}.onnx")))
    assert plan.compute_nodes == plan.int8_nodes
    assert plan.int8_nodes


@pytest.mark.parametrize(
    ("data", "weight", "flat"),
    [
        pytest.param(("N", 6, 16), (1, 16, 8), True, id="as many dimensions"),
        pytest.param(("N", 2, 6, 16), (1, 1, 16, 8), True, id="four"),
        pytest.param(("N", 2, 6, 16), (1, 16, 8), True, id="fewer than the data"),
        pytest.param((6, 16), (1, 16, 8), False, id="more than the data"),
        pytest.param(("N", 2, 6, 16), (2, 16, 8), False, id="a weight for each"),
    ],
)
def test_weights_lose_leading_dimensions_of_one(
    data: tuple[int | str, ...], weight: tuple[int, ...], flat: bool
) -> None:
    net = tinymodels.Net()
    values = np.random.default_rng(0).normal(size=weight)
    net.op("MatMul", net.input("x", data), net.const("w", values), out="y")
    proto = net.model({"y": ("N", *["d"] * (max(len(data), len(weight)) - 1))})
    model = model_from_proto(proto)
    assert (list(model.proto.graph.initializer[0].dims) == [16, 8]) is flat
    assert bool(make_plan(GraphView.of(model)).int8_nodes) is flat
    feeds = tinymodels.feeds(proto, batch=3, seed=0)
    found, expected = (tinymodels.run(p, feeds)["y"] for p in (model.proto, proto))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_something_else_reads_keeps_its_dimensions() -> None:
    net = tinymodels.Net()
    w = net.const("w", np.random.default_rng(0).normal(size=(1, 16, 16)))
    y = net.op("MatMul", net.input("x", ("N", 16, 16)), w, out="m")
    net.op("Add", y, w, out="y")
    model = model_from_proto(net.model({"y": ("N", 16, 16)}))
    assert list(model.proto.graph.initializer[0].dims) == [1, 16, 16]
