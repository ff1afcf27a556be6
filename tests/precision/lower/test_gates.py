"""Gates in integers: which they are, that onnxruntime computes them so, and what that costs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import tinymodels
import tinyproject
from tinymodels import Net
from tinyquant import case, op_counts, outputs

import trtune
from trtune.calibrate.cache import Cache, dump_cache, read_cache
from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.deploy import deploy_tensors, lower_deploy
from trtune.precision.lower.gates import find_gates
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.runtime.session import optimized_graph


def two_silus_joined() -> onnx.ModelProto:
    """Two convolutions with SiLU whose sum, and a pool of it, are joined for a third."""
    net = Net()
    x = net.input("input")
    made = []
    for name in ("left", "right"):
        y = net.conv(x, name, 3, 8)
        gate = net.op("Sigmoid", y, out=f"{name}_gate")
        made.append(net.op("Mul", gate, y, out=f"{name}_silu"))
    both = net.op("Add", *made, out="sum")
    pool = net.op("MaxPool", both, out="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    net.conv(net.op("Concat", both, pool, out="joined", axis=1), "last", 16, 8)
    return net.model({"last": ("N", 8, 8, 8)})


def gates_of(proto: onnx.ModelProto, **pins: str) -> tuple[list[str], list[str]]:
    view = GraphView.of(model_from_proto(proto))
    plan = make_plan(view, pins=pins)
    found = find_gates(view, plan, deploy_tensors(view, plan))
    return list(found.sigmoids), list(found.products)


def test_gates_and_what_carries_their_products() -> None:
    sigmoids, products = gates_of(two_silus_joined())
    assert sigmoids == ["left_gate", "right_gate"]
    assert products == ["left_silu", "right_silu", "sum", "pool", "joined"]


def test_the_gate_of_a_float_convolution_stays_float() -> None:
    sigmoids, products = gates_of(two_silus_joined(), n_left="fp32")
    assert sigmoids == ["right_gate"]
    assert "left_silu" not in products


def test_a_pinned_sigmoid_or_product_stays_float() -> None:
    assert gates_of(two_silus_joined(), n_left_gate="fp32")[0] == ["right_gate"]
    assert gates_of(two_silus_joined(), n_left_silu="fp32")[0] == ["right_gate"]


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    onnx.save(proto, folder / "model.onnx")
    return op_counts(optimized_graph(folder / "model.onnx"))


def test_nothing_leaves_the_integers_between_convolutions(tmp_path: Path) -> None:
    prepared = case(two_silus_joined())
    lowered = lower_deploy(prepared.model, prepared.plan, prepared.table)
    found = kernels(lowered, tmp_path)
    assert (found["QLinearSigmoid"], found["QLinearMul"]) == (2, 2)
    assert (found["QLinearAdd"], found["QLinearConcat"], found["QLinearConv"]) == (1, 1, 2)
    assert not found["Sigmoid"] + found["Mul"] + found["Add"] + found["Concat"]
    exact = outputs(prepared.model.proto, prepared.feeds)
    ours = outputs(lowered, prepared.feeds, integer_kernels=True)
    assert min(sqnr_db(exact[name], ours[name]) for name in exact) > 25


def test_a_table_without_the_scales_of_products_leaves_their_gates_float(tmp_path: Path) -> None:
    prepared = case(two_silus_joined())
    less = {t: s for t, s in prepared.table.scales.items() if t != "right_silu"}
    lowered = lower_deploy(prepared.model, prepared.plan, CalibrationTable(less))
    found = kernels(lowered, tmp_path)
    assert (found["QLinearSigmoid"], found["QLinearMul"]) == (1, 1)
    exact = outputs(prepared.model.proto, prepared.feeds)
    ours = outputs(lowered, prepared.feeds, integer_kernels=True)
    assert min(sqnr_db(exact[name], ours[name]) for name in exact) > 25


def test_a_run_takes_a_cache_without_the_scales_of_products(tmp_path: Path) -> None:
    folder = tinyproject.write_project(tmp_path, tinymodels.MODELS["silu_se"]())
    asked = ["backends=[{name: onnxruntime, lowering: deploy}]", "calibration.method=mse",
             "calibration.prepare=none"]  # fmt: skip
    trtune.calibrate(tinyproject.config_of(folder, *asked), out=folder / "first")
    held = read_cache(next(folder.glob("first/*/calibration.cache")))
    assert {"dw_silu", "se"} <= set(held.scales)
    older = {t: s for t, s in held.scales.items() if t not in ("dw_silu", "se")}
    (folder / "older.cache").write_text(dump_cache(Cache(held.header, older)))
    trusted = [*asked, f"calibration.cache={folder}/older.cache", "calibration.trust_cache=true"]
    record = trtune.run(tinyproject.config_of(folder, *trusted), out=folder / "second")
    assert {v.name for v in record.variants if v.sqnr_db} >= {"int8"}


def test_squeeze_and_excitation_runs_in_integers(tmp_path: Path) -> None:
    prepared = case(tinymodels.MODELS["silu_se"]())
    found = kernels(lower_deploy(prepared.model, prepared.plan, prepared.table), tmp_path)
    assert (found["QLinearSigmoid"], found["QLinearMul"]) == (3, 3)
    assert not found["Sigmoid"] + found["Mul"]
