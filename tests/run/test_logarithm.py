"""What stands before a logarithm: whatever INT8 rounds to zero becomes the floor of the log.

No range mends that, since the small values count as much as the large ones; the tuner must find the
product and leave it in float.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
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


def mel() -> onnx.ModelProto:
    """Powers of a spectrum through a filter bank, then their logarithm, then a layer."""
    rng = np.random.default_rng(0)
    bank = np.eye(64, 16, dtype=np.float32) + rng.uniform(0, 1e-4, (64, 16)).astype(np.float32)
    layer = rng.normal(size=(16, 8)).astype(np.float32)
    floor = np.asarray(1e-10, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "bank"], ["mel"], "filters"),
        helper.make_node("Max", ["mel", "floor"], ["above"], "above"),
        helper.make_node("Log", ["above"], ["scaled"], "scaled"),
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
