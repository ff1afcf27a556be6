"""Ifs that constants, fixed dimensions or an input's one value decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtune.configs.errors import ConfigError, ModelError
from trtune.configs.load import load_config
from trtune.precision.graph.branches import switches
from trtune.precision.graph.file import Model, comparable, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.describe import inspect_model
from trtune.precision.runtime.session import make_session
from trtune.run.pipeline import run
from trtune.tools import init_config

RATE = {"sr": 16000}


def branch(name: str, *, seed: int, nested: bool) -> onnx.GraphProto:
    """A convolution with its weight inside, and what a fixed dimension decides behind it."""
    weight = np.random.default_rng(seed).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
        helper.make_node("Conv", ["x", "w"], ["made"], "conv", pads=[1, 1, 1, 1]),
    ]
    last = "made"
    if nested:
        one = numpy_helper.from_array(np.asarray(1, np.int64), "one")
        four = numpy_helper.from_array(np.asarray(4, np.int64), "four")
        ends = [
            helper.make_graph([helper.make_node(op, ["made"], [end])], op, [], [info(end)])
            for op, end in (("Relu", "yes"), ("Neg", "no"))
        ]
        nodes += [
            helper.make_node("Shape", ["made"], ["shape"]),
            helper.make_node("Constant", [], ["one"], value=one),
            helper.make_node("Constant", [], ["four"], value=four),
            helper.make_node("Gather", ["shape", "one"], ["channels"]),
            helper.make_node("Equal", ["channels", "four"], ["are_four"]),
            helper.make_node(
                "If", ["are_four"], ["kept"], then_branch=ends[0], else_branch=ends[1]
            ),
        ]
        last = "kept"
    return helper.make_graph(nodes, name, [], [info(last)])


def info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def by_rate(*, nested: bool = True) -> onnx.ModelProto:
    """A network whose layers lie in the branches of an If over the input `sr`."""
    rate = numpy_helper.from_array(np.asarray(16000, np.int64), "rate")
    nodes = [
        helper.make_node("Equal", ["sr", "rate"], ["is_16k"], "equal"),
        helper.make_node(
            "If", ["is_16k"], ["chosen"], "by_rate",
            then_branch=branch("wide", seed=1, nested=nested),
            else_branch=branch("narrow", seed=2, nested=nested),
        ),
        helper.make_node("Relu", ["chosen"], ["y"], "relu"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8]),
            helper.make_tensor_value_info("sr", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [rate],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return proto


def values(model: Model | onnx.ModelProto, feed: dict[str, object]) -> np.ndarray:
    proto = model.proto if isinstance(model, Model) else model
    return np.asarray(make_session(proto).run(["y"], feed)[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rate", [16000, 8000])
def test_the_branch_of_one_value_is_quantized_and_computes_the_same(
    rate: int, nested: bool
) -> None:
    proto = by_rate(nested=nested)
    model = model_from_proto(proto, constants={"sr": rate})
    assert [spec.name for spec in model.inputs] == ["x"]
    assert "If" not in {node.op_type for node in model.proto.graph.node}
    assert make_plan(GraphView.of(model)).int8_nodes == ("conv",)
    assert any("sr" in note for note in model.notes)
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        values(model, {"x": x}), values(proto, {"x": x, "sr": np.asarray(rate)})
    )


def test_an_input_that_decides_is_named_with_a_value(tmp_path: Path) -> None:
    model = model_from_proto(by_rate())
    (switch,) = switches(model.proto.graph)
    assert (switch.input, switch.branches, switch.values) == ("sr", ("by_rate",), (16000,))
    assert any("{sr: 16000}" in problem for problem in inspect_model(model).problems)
    onnx.save(by_rate(), tmp_path / "m.onnx")
    text = init_config(tmp_path / "m.onnx", tmp_path / "c.yaml").read_text()
    assert "# constants: {sr: 16000}" in text


def test_what_a_condition_computes_from_a_shape_or_many_values_is_no_switch() -> None:
    proto = by_rate()
    proto.graph.input[1].type.tensor_type.shape.dim.add().dim_value = 2
    assert switches(proto.graph) == ()


def test_another_value_is_another_model() -> None:
    made = {model_from_proto(by_rate(), constants={"sr": v}).sha256 for v in (8000, 16000)}
    assert len({*made, model_from_proto(by_rate()).sha256}) == 3


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"rs": 1}, r"no input 'rs'.*'x', 'sr'"),
        ({"sr": 1.5}, "no value of type int64"),
        ({"sr": [1, 2]}, r"shape \[\], the value \[2\]"),
        ({"x": 0.0}, r"shape \['\?', 3, 8, 8\], the value \[\]"),
        ({"x": [[[[0.0] * 8] * 8] * 3], "sr": 1}, "every input"),
    ],
)
def test_constants_that_do_not_fit(constants: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        model_from_proto(by_rate(), constants=constants)  # type: ignore[arg-type]


def test_the_file_is_compared_at_that_value(tmp_path: Path) -> None:
    onnx.save(by_rate(), tmp_path / "m.onnx")
    model = model_from_proto(by_rate(), tmp_path / "m.onnx", constants=RATE)
    whole = comparable(model)
    assert isinstance(whole, onnx.ModelProto)
    x = np.ones((1, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(values(whole, {"x": x}), values(model, {"x": x}))


def test_two_ifs_whose_branches_share_names() -> None:
    proto = by_rate(nested=False)
    second = helper.make_node(
        "If", ["is_16k"], ["again"], "second",
        then_branch=branch("a", seed=3, nested=False),
        else_branch=branch("b", seed=4, nested=False),
    )  # fmt: skip
    proto.graph.node.insert(2, second)
    proto.graph.node[3].CopyFrom(helper.make_node("Mul", ["chosen", "again"], ["y"], "mul"))
    model = model_from_proto(proto, constants=RATE)
    x = np.random.default_rng(5).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        values(model, {"x": x}), values(proto, {"x": x, "sr": np.asarray(16000)})
    )
    assert len(make_plan(GraphView.of(model)).int8_nodes) == 2


def test_a_condition_that_is_stored_needs_no_word_of_the_user() -> None:
    passed = [helper.make_node("Identity", ["x"], ["same"])]
    through = helper.make_graph(passed, "through", [], [info("same")])
    node = helper.make_node("If", ["yes"], ["z"], "if", then_branch=through, else_branch=through)
    graph = helper.make_graph(
        [node, helper.make_node("Neg", ["z"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.asarray(True), "yes")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model = model_from_proto(proto)
    assert [n.op_type for n in model.proto.graph.node] == ["Identity", "Neg"]


def test_a_run_of_one_branch(tmp_path: Path) -> None:
    onnx.save(by_rate(), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    text = """
version: 1
name: branches
model:
  path: m.onnx
  constants: {sr: 16000}
  shapes: {x: {min: [1, 3, 8, 8], opt: [4, 3, 8, 8], max: [8, 3, 8, 8]}}
data: {calibration: {source: arrays, path: rows.npz, batch: 4}}
precision: {target: {metric: sqnr_db, min: 10}}
backends: [{name: onnxruntime, lowering: emulate}, {name: onnxruntime, lowering: deploy}]
report: {formats: [md], latency: null}
"""
    (tmp_path / "c.yaml").write_text(text)
    record = run(load_config(tmp_path / "c.yaml"), out=tmp_path / "runs")
    assert record.status == "met"
    folder = next((tmp_path / "runs").iterdir())
    assert "sr = 16000" in (folder / "report.md").read_text()


def test_not_for_a_quantized_model(tmp_path: Path) -> None:
    from trtune.configs.schema import Config
    from trtune.run.subject import subject_of

    config = Config.model_validate(
        {
            "version": 1,
            "name": "a",
            "model": {"path": str(tmp_path / "m.onnx"), "constants": RATE},
            "data": {"calibration": {"source": "arrays", "path": "x.npz"}},
            "precision": {"default": "qat"},
        }
    )
    with pytest.raises(ConfigError, match=r"model\.constants"):
        subject_of(config)


def test_a_bound_of_range_that_a_branch_gives_as_one_element() -> None:
    """Files hold that, behind Ifs whose shapes onnxruntime does not know, and it runs them."""
    ends = [
        helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.INT64, None)],
        )
        for name in ("many", "few")
    ]
    stored = {
        "many": np.asarray([4], np.int64),
        "few": np.asarray(2, np.int64),
        "is_many": np.asarray(True),
        "zero": np.asarray(0, np.int64),
        "one": np.asarray(1, np.int64),
    }
    nodes = [
        helper.make_node("If", ["is_many"], ["size"], then_branch=ends[0], else_branch=ends[1]),
        helper.make_node("Range", ["zero", "size", "one"], ["steps"]),
        helper.make_node("Cast", ["steps"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "floats"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    graph = helper.make_graph(
        nodes, "steps", [x], [info("y")],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    model = model_from_proto(proto)
    assert "If" not in {node.op_type for node in model.proto.graph.node}
    found = make_session(model.proto).run(None, feeds)[0]
    np.testing.assert_array_equal(found, feeds["x"] + np.arange(4))
