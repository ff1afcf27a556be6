from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper

from trtune.calibrate.cpu import taps
from trtune.calibrate.cpu.taps import Reader, tap
from trtune.configs.errors import ModelError


def read(reader: Reader, feeds: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of one batch, copied before the next segment overwrites it."""
    return {t: a.copy() for part in reader.read(feeds) for t, a in part.items()}


def plainly(model: onnx.ModelProto, tensors: list[str], feeds: dict[str, Any]) -> dict[str, Any]:
    marked = onnx.ModelProto.FromString(taps.with_outputs(model, tensors))
    return {t: tinymodels.run(marked, feeds)[t] for t in tensors}


@pytest.mark.parametrize("sizes", [None, 1 << 30], ids=["one segment", "one tensor a segment"])
@pytest.mark.parametrize("name", ["conv_relu", "residual", "concat", "silu_se", "attention"])
def test_tensors_are_those_of_the_model_whatever_their_order(name: str, sizes: int | None) -> None:
    model = tinymodels.MODELS[name]()
    tensors = [node.output[0] for node in model.graph.node]
    tapped = tap(model, tensors, sizes=dict.fromkeys(tensors, sizes) if sizes else None)
    assert (len(tapped.segments) == 1) == (sizes is None)
    reader = Reader(tapped)
    for seed in range(3):  # memory of onnxruntime's own first, then bound buffers
        feeds = tinymodels.feeds(model, batch=3, seed=seed)
        expected, found = plainly(model, tensors, feeds), read(reader, feeds)
        assert found.keys() == expected.keys()
        for tensor, array in found.items():
            ours, theirs = np.sort(array, axis=None), np.sort(expected[tensor], axis=None)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=tensor)


def test_the_batch_may_change_between_reads() -> None:
    model = tinymodels.residual()
    reader = Reader(tap(model, ["stem_relu", "sum"], sizes={"stem_relu": 1 << 30}))
    for batch in (2, 2, 5, 5, 1, 2, 5):
        feeds = tinymodels.feeds(model, batch=batch, seed=batch)
        found = read(reader, feeds)
        for tensor, array in plainly(model, ["stem_relu", "sum"], feeds).items():
            assert found[tensor].shape[0] == batch
            assert found[tensor].sum() == pytest.approx(array.sum(), rel=1e-4)


def positive_values() -> onnx.ModelProto:
    """The entries of `input` above zero: as many as there happen to be, each doubled."""
    nodes = [
        helper.make_node("Greater", ["input", "zero"], ["above"]),
        helper.make_node("Compress", ["input", "above"], ["kept"]),
        helper.make_node("Mul", ["kept", "two"], ["doubled"]),
        helper.make_node("Abs", ["doubled"], ["out"]),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N"])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["M"])]
    graph = helper.make_graph(nodes, "sparse", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_shapes_that_depend_on_the_data_are_read_all_the_same(cut: bool) -> None:
    tensors = ["kept", "doubled"]
    sizes = dict.fromkeys(tensors, 1 << 30) if cut else None
    reader = Reader(tap(positive_values(), tensors, sizes=sizes))
    for row in ([1, -1, 2], [3, -1, -2], [1, 2, 3], [-1, 5, 6], [-1, -1, -1]):
        found = read(reader, {"input": np.array(row, np.float32)})
        positive = [value for value in row if value > 0]
        assert found["kept"].tolist() == positive
        assert found["doubled"].tolist() == [2 * value for value in positive]


def test_no_tensor_needs_no_session() -> None:
    assert tap(tinymodels.conv_relu(), []).segments == ()


def test_half_precision_tensors_are_handed_out_as_they_are() -> None:
    model = tinymodels.half_weights()
    reader = Reader(tap(model, ["half"]))
    feeds = tinymodels.feeds(model)
    for _ in range(2):
        assert read(reader, feeds)["half"].dtype == np.float16


def test_external_weights_are_found(tmp_path: Path) -> None:
    model = tinymodels.conv_relu()
    feeds = tinymodels.feeds(model)
    expected = plainly(model, ["relu1"], feeds)["relu1"]
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    found = read(Reader(tap(bare, ["relu1"], external_dir=tmp_path)), feeds)["relu1"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_not_touched() -> None:
    model = tinymodels.silu_se()
    before = model.SerializeToString()
    tap(model, ["stem_silu", "se_mean"], sizes={"stem_silu": 1 << 30})
    assert model.SerializeToString() == before


def test_a_model_that_onnxruntime_refuses() -> None:
    model = tinymodels.conv_relu()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"cannot load the model.*NoSuchOperator"):
        tap(model, ["relu1"])
