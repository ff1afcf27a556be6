"""Models with FP8 Q/DQ: taken apart, put together again bit for bit, linted and refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper, numpy_helper
from realdata import shared_case
from tinyquant import Case, named, outputs

from trtune.calibrate.cache import load_table
from trtune.configs.errors import ModelError
from trtune.datasets.batches import Batch
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import TUNER
from trtune.precision.quantized.importing import (
    Imported,
    import_quantized,
    insert_file,
    lint_model,
    quantization_errors,
    strip_file,
)

MIXED: Mapping[str, Mapping[str, str]] = {
    "concat": {"n_left": "fp8", "n_mix": "fp8"},
    "residual": {"n_conv2": "fp8"},
    "silu_se": {"op:Conv": "fp8"},
    "shared_weight": {"n_conv1": "fp8"},
    "mlp": {"re:.*": "fp8"},
    "attention": {"n_qkv": "fp8"},
}


def written(name: str, pins: Mapping[str, str], folder: Path) -> tuple[Case, Path]:
    """A model of `tinymodels` quantized with `pins`, and the file that it is in."""
    view = GraphView.of(named(name).model)
    there = {p: k for p, k in pins.items() if ":" in p or p in view.by_name}
    found = named(name, pins=there or {"op:MatMul": "fp8"})
    path = folder / f"{name}.onnx"
    onnx.save(lower_emulate(found.model, found.plan, found.table), path)
    return found, path


def noise_of(imported: Imported, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    feeds = {
        spec.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape]).astype(
            np.float32
        )
        for spec in imported.model.inputs
    }
    errors = quantization_errors(imported, [Batch(feeds, ("a", "b"))])
    return sum(found.noise for found in errors.values())


@pytest.mark.parametrize("name", MIXED)
def test_what_was_written_is_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    found, path = written(name, MIXED[name], tmp_path)
    imported = import_quantized(path)
    assert imported.changes == ()
    assert imported.plan.counts() == found.plan.counts()
    assert imported.plan.fp8_nodes == found.plan.fp8_nodes
    assert imported.plan.int8_nodes == found.plan.int8_nodes
    assert noise_of(imported) == 0
    assert type(imported.plan).from_json(imported.plan.to_json()) == imported.plan


@pytest.mark.parametrize("name", MIXED)
def test_strip_and_insert_are_the_way_back(name: str, tmp_path: Path) -> None:
    found, path = written(name, MIXED[name], tmp_path)
    floats, cache, again = (tmp_path / n for n in ("float.onnx", "model.cache", "again.onnx"))
    strip_file(path, floats, cache)
    insert_file(floats, cache, again)
    before, after = outputs(onnx.load(path), found.feeds), outputs(onnx.load(again), found.feeds)
    for output, values in before.items():
        np.testing.assert_array_equal(after[output], values)
    table = load_table(cache)
    for tensor, scale in table.float8.items():
        assert scale == pytest.approx(found.table.float8_scale(tensor), rel=1e-6)


def test_lint_knows_the_type_and_does_not_complain(tmp_path: Path) -> None:
    _, path = written("residual", {"n_conv2": "fp8"}, tmp_path)
    rows = lint_model(path)
    kinds = {row.kind: row.severity for row in rows}
    assert kinds["fp8"] == "info"
    assert not any(row.blocks for row in rows)
    assert "8.9" in next(row.tensorrt for row in rows if row.kind == "fp8")


def test_a_node_of_the_file_may_be_moved_to_int8_and_to_float(tmp_path: Path) -> None:
    found, path = written("residual", {"n_conv2": "fp8"}, tmp_path)
    imported = import_quantized(path)
    view = GraphView.of(imported.model)
    for precision, pairs in (("int8", 0), ("fp32", 0)):
        plan = imported.plan.pin(["n_conv2"], precision, "", origin=TUNER)
        proto = lower_emulate(imported.model, plan, imported.table)
        kinds = [t.data_type for t in proto.graph.initializer if "zero_point" in t.name]
        assert kinds.count(TensorProto.FLOAT8E4M3FN) == pairs
        exact = outputs(imported.model.proto, found.feeds)["logits"]
        given = outputs(proto, found.feeds)["logits"]
        assert float(((given - exact) ** 2).sum() / (exact**2).sum()) < 0.02
    assert view.by_name["n_conv2"].op_type == "Conv"


def fp8_pair(net: tinymodels.Net, x: str, name: str, kind: int, scale: float = 0.02) -> str:
    """`x` through Q/DQ of a type."""
    net.const(f"{name}_s", scale)
    net.initializers.append(helper.make_tensor(f"{name}_z", kind, [], [0.0]))
    q = net.op("QuantizeLinear", x, f"{name}_s", f"{name}_z", out=f"{name}_q")
    return net.op("DequantizeLinear", q, f"{name}_s", f"{name}_z", out=f"{name}_dq")


def test_weights_of_one_type_and_data_of_another_stay_float(tmp_path: Path) -> None:
    net = tinymodels.Net(opset=19)
    x = fp8_pair(net, net.input("input"), "x", TensorProto.FLOAT8E4M3FN)
    weights = np.random.default_rng(1).integers(-127, 128, (16, 3, 3, 3)).astype(np.int8)
    net.initializers.append(numpy_helper.from_array(weights, "w_codes"))
    net.const("w_s", 0.01)
    net.const("w_z", 0, np.int8)
    w = net.op("DequantizeLinear", "w_codes", "w_s", "w_z", out="w_dq")
    y = net.op("Conv", x, w, out="conv", kernel_shape=[3, 3], pads=[1] * 4)
    path = tmp_path / "mixed.onnx"
    onnx.save(net.head(y, 16), path)
    imported = import_quantized(path)
    assert imported.plan.quantized_nodes == ()
    assert noise_of(imported) == 0


def test_e5m2_is_refused_as_no_type_of_tensorrt(tmp_path: Path) -> None:
    net = tinymodels.Net(opset=19)
    x = fp8_pair(net, net.input("input"), "x", TensorProto.FLOAT8E5M2)
    path = tmp_path / "e5m2.onnx"
    onnx.save(net.head(net.conv(x, "conv", 3, 16), 16), path)
    with pytest.raises(ModelError, match="codes of type float8_e5m2"):
        import_quantized(path)


def test_model_optimizer_onnx(tmp_path: Path) -> None:
    imported = import_quantized(shared_case("makers/mo_fp8_max_fp16_cnn.onnx"))
    assert imported.changes == ()
    assert imported.plan.counts()["fp8"] == 2
    assert imported.plan.counts()["fp16"] == 6
    assert noise_of(imported) == 0


def test_operators_from_before_onnx_had_the_type() -> None:
    path = shared_case("makers/mot_fp8_ts_cnn.onnx")
    imported = import_quantized(path)
    assert imported.plan.counts()["fp8"] == 8
    assert noise_of(imported) == 0
    assert {row.kind for row in lint_model(path)} >= {"fp8", "own-fp8"}


def test_int4_is_refused_with_the_true_reason() -> None:
    with pytest.raises(ModelError) as caught:
        import_quantized(shared_case("makers/mo_int4_rtn_dq_fp32_tr.onnx"))
    text = str(caught.value)
    assert "INT4 is not imported: what is taken over is int8 and FP8" in text
    assert "weights in blocks" in text
