"""What stands before a logarithm or a reciprocal: whatever INT8 rounds to zero becomes its floor.

No range mends that, since the small values count as much as the large ones; the tuner must find the
product and leave it in float.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyproject
from onnx import TensorProto, helper, numpy_helper

from trtune.configs.load import load_config
from trtune.run.pipeline import run

CONFIG = """
version: 1
name: log
model: {path: m.onnx}
data:
  calibration: {source: arrays, path: rows.npz, take: 32, batch: 8}
  evaluation: {skip: 32}
calibration: {method: max, prepare: none}
precision: {target: {metric: sqnr_db, min: 20}, max_pins: 2}
backends: [{name: onnxruntime, lowering: emulate}]
report: {formats: [md], latency: null}
"""


def mel(op: str = "Log") -> onnx.ModelProto:
    """Powers of a spectrum through a filter bank, then their logarithm, then a layer."""
    rng = np.random.default_rng(0)
    bank = np.eye(64, 16, dtype=np.float32) + rng.uniform(0, 1e-4, (64, 16)).astype(np.float32)
    layer = rng.normal(size=(16, 8)).astype(np.float32)
    floor = np.asarray(1e-10, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "bank"], ["mel"], "filters"),
        helper.make_node("Max", ["mel", "floor"], ["above"], "above"),
        helper.make_node(op, ["above"], ["scaled"], "scaled"),
        helper.make_node("MatMul", ["scaled", "layer"], ["y"], "layer"),
    ]
    constants = (("bank", bank), ("layer", layer), ("floor", floor))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return proto


def test_the_tuner_pins_the_product_below(tmp_path: Path) -> None:
    onnx.save(mel(), tmp_path / "m.onnx")
    rng = np.random.default_rng(1)
    powers = np.exp(rng.uniform(-14, 3, (96, 64))).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=powers)
    (tmp_path / "c.yaml").write_text(CONFIG)
    record = run(load_config(tmp_path / "c.yaml"), out=tmp_path / "runs")
    int8, tuned = (next(v for v in record.variants if v.name == n) for n in ("int8", "tuned"))
    assert int8.sqnr_db is not None
    assert tuned.sqnr_db is not None
    assert int8.sqnr_db < 10
    assert tuned.sqnr_db >= 20
    assert record.status == "met"
    assert "filters" in tuned.pinned


@pytest.mark.parametrize(("low", "status"), [(-3, "met"), (-14, "missed")])
def test_what_only_the_float_model_reaches_is_missed_and_says_why(
    tmp_path: Path, low: int, status: str
) -> None:
    """Reciprocals of powers over seven decades: the layer behind cannot be INT8 either."""
    onnx.save(mel("Reciprocal"), tmp_path / "m.onnx")
    powers = np.exp(np.random.default_rng(1).uniform(low, 3, (96, 64))).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=powers)
    (tmp_path / "c.yaml").write_text(CONFIG)
    record = run(load_config(tmp_path / "c.yaml"), out=tmp_path / "runs")
    tuned = next(v for v in record.variants if v.name == "tuned")
    assert record.status == tuned.verdict == status
    assert tuned.pinned == (["filters"] if status == "met" else ["filters", "layer"])
    reached = [note for note in record.notes if "only with every node in float" in note]
    assert len(reached) == (status == "missed")


def test_divisions_by_zero_do_not_end_the_search(tmp_path: Path) -> None:
    """Zeros of a ReLU: infinite in FP32 where INT8 has other zeros, so the noise has no end."""
    net = tinymodels.Net()
    x = net.op("Relu", net.conv(net.input("input"), "a", 3, 16), out="ar")
    x = net.op("Relu", net.conv(x, "b", 16, 8), out="br")
    net.op("Reciprocal", x, out="y")
    net.conv("ar", "z", 16, 8)
    proto = net.model({"y": ("N", 8, 8, 8), "z": ("N", 8, 8, 8)})
    tinyproject.write_project(tmp_path, proto, labels=False)
    record = run(tinyproject.config_of(tmp_path), out=tmp_path / "runs")
    tuned = next(v for v in record.variants if v.name == "tuned")
    assert record.status == "met"
    assert sorted(tuned.pinned) == ["n_a", "n_b"]
    assert tuned.nodes["int8"] == 1
