"""Files that compute in half precision, raised to float32: against onnxruntime on the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from tinymodels import FLOAT, Net

from trtune.precision.graph import fold, widen
from trtune.precision.graph.cut import whole
from trtune.precision.graph.file import load_model, model_from_proto
from trtune.precision.graph.proto import all_tensors
from trtune.precision.graph.view import GraphView
from trtune.precision.graph.widen import HALF_KINDS, computing_in_half
from trtune.precision.plan.half_rules import refuse_half_model
from trtune.precision.plan.rules import make_plan

HALF, BFLOAT16 = TensorProto.FLOAT16, TensorProto.BFLOAT16
FLOAT16_ERROR = 5e-3


def kinds_of(graph: onnx.GraphProto) -> dict[str, int]:
    infos = (*graph.input, *graph.value_info, *graph.output)
    return {info.name: info.type.tensor_type.elem_type for info in infos}


def run_both(proto: onnx.ModelProto, **feeds: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What onnxruntime makes of the file, and of what it is raised to."""
    raised = model_from_proto(proto, widen=True)
    assert raised.half == "float16"
    ends = [[(i.name, i.type.tensor_type.elem_type) for i in graph.input] for graph in
            (proto.graph, raised.proto.graph)]  # fmt: skip
    assert ends[0] == ends[1]
    return tinymodels.run(proto, feeds), tinymodels.run(raised.proto, feeds)


def assert_near(exact: dict[str, Any], found: dict[str, Any]) -> None:
    assert exact.keys() == found.keys()
    for name, value in exact.items():
        assert found[name].dtype == value.dtype
        error = np.linalg.norm(np.float64(found[name]) - np.float64(value))
        assert error <= FLOAT16_ERROR * np.linalg.norm(np.float64(value))


@pytest.mark.parametrize(
    "name",
    ["conv_relu", "depthwise", "silu_se", "attention", "dynamic_reshape", "two_inputs",
     "int64_input", "branches", "shared_weight"],
)  # fmt: skip
def test_a_half_file_computes_in_float32_what_it_did(name: str) -> None:
    proto = tinymodels.in_half(tinymodels.MODELS[name]())
    feeds = tinymodels.feeds(proto, batch=4, seed=0)
    assert_near(*run_both(proto, **feeds))
    raised = model_from_proto(proto, widen=True)
    assert computing_in_half(raised.proto.graph) == []
    assert not any(t.data_type in HALF_KINDS for t in all_tensors(raised.proto.graph))
    refuse_half_model(GraphView.of(raised))
    float_plan = make_plan(GraphView.of(model_from_proto(tinymodels.MODELS[name]())))
    plan = make_plan(GraphView.of(raised))
    assert plan.int8_nodes == float_plan.int8_nodes
    assert raised.sha256 != model_from_proto(proto).sha256


def test_what_overflows_in_half_does_not_in_float32() -> None:
    net = Net()
    x = net.op("Mul", net.input("x", ("N", 4)), net.const("k", 300.0), out="big")
    x = net.op("Mul", x, x, out="bigger")
    net.op("Div", x, net.const("d", 3e4), out="y")
    proto = tinymodels.in_half(net.model({"y": ("N", 4)}))
    _, full = run_both(proto, x=np.float16([[1.0, 2.0, 3.0, 4.0]]))  # 300^2 is beyond 65504
    np.testing.assert_allclose(full["y"], [[3, 12, 27, 48]], rtol=1e-3)


def test_casts_between_floats_are_gone() -> None:
    """As converters write a model with float32 inputs, and some operators left in float32."""
    net = Net()
    x = net.op("Cast", net.input("x", ("N", 16)), out="x_half", to=HALF)
    x = net.op("MatMul", x, net.const("v", np.eye(16), np.float16), out="m")
    x = net.op("Cast", x, out="m_full", to=FLOAT)
    x = net.op("Softmax", x, out="soft")
    x = net.op("Cast", x, out="soft_half", to=HALF)
    x = net.op("MatMul", x, net.const("w", np.eye(16), np.float16), out="last")
    net.op("Cast", x, out="y", to=FLOAT)
    net.op("Cast", x, out="again", to=FLOAT)
    proto = net.model({"y": ("N", 16), "again": ("N", 16)})
    assert_near(*run_both(proto, x=np.random.default_rng(0).random((3, 16), np.float32)))
    raised = model_from_proto(proto, widen=True)
    ops = [(node.op_type, *node.input[:1], *node.output) for node in raised.proto.graph.node]
    assert ops == [
        ("MatMul", "x", "m"), ("Softmax", "m", "soft"), ("MatMul", "soft", "y"),
        ("Identity", "y", "again"),
    ]  # fmt: skip
    assert raised.folded["n_x_half"].op == "Cast"


def test_attributes_that_name_a_type_do_so_in_float32() -> None:
    net = Net(opset=17)
    x = net.input("x", (4, 4), HALF)
    shape = net.op("Shape", x, out="shape")
    two = numpy_helper.from_array(np.float16([2.0]))
    filled = net.op("ConstantOfShape", shape, out="filled", value=two)
    x = net.op("Add", x, filled, out="moved")
    x = net.op("Add", x, net.op("EyeLike", x, out="eye", dtype=HALF), out="more")
    size = net.op("Cast", net.op("Size", x, out="size"), out="size_half", to=HALF)
    x = net.op("Div", x, size, out="mean")
    window = net.op("HannWindow", net.const("n", 4, np.int64), out="hann", output_datatype=HALF)
    net.op("Mul", x, net.op("CastLike", window, x, out="like"), out="y")
    proto = net.model({"y": ((4, 4), HALF)})
    assert_near(*run_both(proto, x=np.arange(16, dtype=np.float16).reshape(4, 4)))


def test_halves_in_the_body_of_a_loop_are_raised() -> None:
    infos = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", HALF, ["N", 8]),
    ]
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float16(3))),
            helper.make_node("MatMul", ["state", "w"], ["m"]),
            helper.make_node("Add", ["m", "x"], ["shifted"]),
            helper.make_node("Div", ["shifted", "c"], ["next"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body", infos, [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", HALF, ["N", 8]),
        ],
    )  # fmt: skip
    net = Net()
    x = net.input("x", ("N", 8), HALF)
    net.const("w", np.eye(8) * 0.5, np.float16)
    count, go = net.const("count", 3, np.int64), net.const("yes", True, np.bool_)
    net.op("Loop", count, go, x, out="y", body=body)
    proto = net.model({"y": (("N", 8), HALF)})
    assert_near(*run_both(proto, x=np.random.default_rng(1).normal(size=(2, 8)).astype(np.float16)))


def test_outputs_that_are_inputs_or_constants_or_read_again_keep_their_type() -> None:
    net = Net()
    x = net.input("x", ("N", 4), HALF)
    net.input("unused", ("N", 4), HALF)
    c = net.const("c", [1, 2, 3, 4], np.float16)
    y = net.op("Add", x, c, out="y")
    net.op("Relu", y, out="z")
    shapes = {"x": ("N", 4), "c": (4,), "y": ("N", 4), "z": ("N", 4)}
    proto = net.model({name: (dims, HALF) for name, dims in shapes.items()})
    rows = np.float16([[-3, -3, -3, -3], [1, 1, 1, 1]])
    assert_near(*run_both(proto, x=rows, unused=rows))


@pytest.mark.parametrize("kind", ["stored", "behind Transpose", "float32"])
def test_files_that_compute_in_float32_are_left_as_they_are(kind: str) -> None:
    net = Net()
    x = net.input("x", ("N", 16))
    w = np.random.default_rng(0).normal(size=(16, 16))
    if kind == "float32":
        held = net.const("w", w)
    else:
        held = net.const("w16", w, np.float16)
        held = net.op("Transpose", held, out="t", perm=[1, 0]) if "Trans" in kind else held
        held = net.op("Cast", held, out="w", to=FLOAT)
    net.op("MatMul", x, held, out="y")
    proto = net.model({"y": ("N", 16)})
    plain, raised = model_from_proto(proto), model_from_proto(proto, widen=True)
    assert raised.half == ""
    assert raised.sha256 == plain.sha256
    if kind != "behind Transpose":
        assert raised.proto == plain.proto


def test_bfloat16_weights_behind_float32_inputs_are_raised() -> None:
    net = Net(opset=22)
    x = net.op("Cast", net.input("x", ("N", 16)), out="half", to=BFLOAT16)
    dtype = helper.tensor_dtype_to_np_dtype(BFLOAT16)
    x = net.op("MatMul", x, net.const("w", np.full((16, 8), 0.125), dtype), out="m")
    net.op("Cast", x, out="y", to=FLOAT)
    raised = model_from_proto(net.model({"y": ("N", 8)}), widen=True)
    assert raised.half == "bfloat16"
    found = tinymodels.run(raised.proto, {"x": np.ones((2, 16), np.float32)})
    np.testing.assert_array_equal(found["y"], np.full((2, 8), 2.0))


def test_what_cannot_be_raised_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = tinymodels.in_half(tinymodels.mlp(), BFLOAT16)
    model = model_from_proto(proto, widen=True)
    assert model.half == ""
    assert "left so: 'input' is bfloat16, which NumPy does not have" in model.notes[-1]
    for module in (fold, widen):
        monkeypatch.setattr(module, "TOTAL", 2000)
    model = model_from_proto(tinymodels.in_half(tinymodels.mlp()), widen=True)
    assert model.half == ""
    assert "in float32 its weights would have" in model.notes[-1]


def test_external_weights_are_raised(tmp_path: Path) -> None:
    proto = tinymodels.in_half(tinymodels.conv_relu())
    feeds = tinymodels.feeds(proto, batch=2, seed=0)
    exact = tinymodels.run(proto, feeds)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=64)
    for limit in (1 << 30, 0):  # read in, and left outside
        raised = load_model(tmp_path / "m.onnx", load_limit=limit, widen=True)
        assert raised.half == "float16"
        assert_near(exact, tinymodels.run(raised.proto, feeds))


def test_what_stands_behind_a_cut_stays_half() -> None:
    net = Net()
    x = net.input("x", ("N", 16), HALF)
    x = net.op("MatMul", x, net.const("w", np.eye(16), np.float16), out="m")
    net.op("Own_TRT", x, net.const("k", [1.0], np.float16), out="y", plugin_version="1")
    model = model_from_proto(net.model({"y": (("N", 16), HALF)}), widen=True)
    assert model.tail is not None
    assert [(spec.name, spec.dtype) for spec in model.outputs] == [("m", "float16")]
    again = whole(model.proto, model.tail)
    assert [node.op_type for node in again.graph.node] == ["Cast", "MatMul", "Cast", "Own_TRT"]
    assert again.graph.node[-1].input[0] == "m"
    assert {t.name: t.data_type for t in again.graph.initializer} == {"w": FLOAT, "k": HALF}
    assert kinds_of(again.graph)["y"] == HALF


@pytest.mark.slow
def test_operators_of_onnx_give_in_float32_what_they_give_in_half() -> None:
    """ONNX's own tests of single nodes, one in ten, with their floats as halves."""
    raised = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests' own data overflow
        found = [case for case in load_model_tests(kind="node") if case.model is not None]
    for case in found[::10]:
        proto, rows = tinymodels.in_half(case.model), case.data_sets[0][0]
        names = [info.name for info in proto.graph.input]
        plain = all(isinstance(row, (np.ndarray, np.generic)) for row in rows)
        if not plain or not any(entry.domain == "" for entry in proto.opset_import):
            continue
        feeds = {
            name: row.astype(np.float16) if row.dtype == np.float32 else row
            for name, row in zip(names, rows, strict=False)
        }
        try:
            exact = tinymodels.run(proto, feeds)
        except Exception:  # no kernel for halves, or types that the operator does not take
            continue
        model = model_from_proto(proto, widen=True)
        kept = {spec.name: feeds[spec.name] for spec in model.inputs}
        values = tinymodels.run(model.proto, kept) if model.half else exact
        raised += bool(model.half)
        for name, value in exact.items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                assert values[name].dtype == value.dtype, case.name
                assert values[name].shape == value.shape, case.name
                a, b = np.float64(value), np.float64(values[name])
                both = np.isfinite(a) & np.isfinite(b)
                error = np.linalg.norm(a[both] - b[both])
                assert error <= 1e-2 * max(np.linalg.norm(a[both]), 1e-6), case.name
    assert raised > 20
