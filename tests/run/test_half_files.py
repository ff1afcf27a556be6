"""Files whose floats are all float16, from the file to the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyproject
from onnx import TensorProto

from trtune.precision.backends.trt.weak import constrained_nodes
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.rules import make_plan
from trtune.run.pipeline import run, run_folder
from trtune.tools import init_config, inspect

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
RTX = 'backends=[{name: onnxruntime}, {name: tensorrt_rtx, compute_capabilities: ["8.9"]}]'
HALF = TensorProto.FLOAT16


def half_project(folder: Path, name: str = "attention") -> Path:
    return tinyproject.write_project(
        folder, tinymodels.in_half(tinymodels.MODELS[name]()), labels=False
    )


@pytest.mark.parametrize(
    ("overrides", "int8", "fp16", "least_db"),
    [
        (["precision.default=int8"], 4, 0, 30),
        (["precision.default=int8", "precision.fallback=fp16"], 4, 2, 30),
        (["precision.default=fp16"], 0, 6, 55),
        pytest.param(["precision.default=fp8"], 0, 0, 20, marks=pytest.mark.slow),
    ],
    ids=["int8", "int8 and fp16", "fp16", "fp8"],
)
def test_a_half_file_is_planned_like_any_other(
    tmp_path: Path, overrides: list[str], int8: int, fp16: int, least_db: float
) -> None:
    half_project(tmp_path)
    config = tinyproject.config_of(tmp_path, *overrides)
    record = run(config, out=tmp_path / "runs")
    tuned = next(one for one in record.variants if one.name == "tuned")
    assert record.status == "met"
    assert (tuned.nodes["int8"], tuned.nodes["fp16"]) == (int8, fp16)
    assert tuned.sqnr_db is not None
    assert tuned.sqnr_db > least_db
    assert any("computes in float16 are planned" in note for note in record.notes)
    written = onnx.load(
        run_folder(config, tmp_path / "runs") / "onnxruntime-emulate" / "model.onnx"
    )
    ends = (*written.graph.input, *written.graph.output)
    assert {info.type.tensor_type.elem_type for info in ends} == {HALF}


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed")
def test_rtx_builds_it_with_what_is_not_int8_in_float16(tmp_path: Path) -> None:
    half_project(tmp_path, "residual")
    config = tinyproject.config_of(tmp_path, "precision.fallback=fp16", RTX)
    record = run(config, out=tmp_path / "runs")
    built = [one for one in record.variants if one.backend == "tensorrt_rtx"]
    assert {one.name: one.nodes["int8"] for one in built} == {"int8": 4, "tuned": 4}
    assert all(not one.not_honoured for one in built)


def test_the_casts_at_its_ends_are_held_to_nothing() -> None:
    """TensorRT refuses another output type for a Cast than the one that it casts to."""
    proto = tinymodels.in_half(tinymodels.residual())
    view = GraphView.of(model_from_proto(proto, widen=True))
    first = next(node.name for node in view.nodes if node.op_type == "Conv")
    plan = make_plan(view, fallback="fp16", pins={first: "fp32"})
    held = constrained_nodes(plan)
    assert first in held
    assert not any(view.by_name[name].op_type == "Cast" for name in held)


def test_fp32_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    half_project(tmp_path, "conv_relu")
    config = tinyproject.config_of(tmp_path, "precision.default=fp32")
    record = run(config, out=tmp_path / "runs")
    assert not any("are planned" in note for note in record.notes)
    written = onnx.load(
        run_folder(config, tmp_path / "runs") / "onnxruntime-emulate" / "model.onnx"
    )
    assert {tensor.data_type for tensor in written.graph.initializer} == {HALF}


def test_inspect_and_init_say_what_a_run_will_do(tmp_path: Path) -> None:
    half_project(tmp_path, "conv_relu")
    found = inspect(tmp_path / "net.onnx")
    assert [node.precision for node in found.nodes if node.macs] == ["int8"] * 3
    assert any("are planned and measured in float32" in note for note in found.notes)
    assert not any("float16" in problem for problem in found.problems)
    assert {spec.dtype for spec in (*found.inputs, *found.outputs)} == {"float16"}
    assert json.dumps(found.to_dict())
    text = init_config(tmp_path / "net.onnx", tmp_path / "net.yaml").read_text()
    assert "default: int8" in text
    assert np.load(tmp_path / "calibration.npz")["input"].dtype == np.float16


@pytest.mark.parametrize("masked", [-np.inf, -65504.0], ids=["infinite", "lowest"])
@pytest.mark.parametrize("default", ["int8", pytest.param("fp16", marks=pytest.mark.slow)])
def test_masks_of_float16_files_are_no_error(tmp_path: Path, masked: float, default: str) -> None:
    """The lowest number twice is infinite in float16, and no number in float32 is lost by it."""
    net = tinymodels.Net()
    x = net.input("x", ("N", 6, 16))
    q, k, v = (net.op("MatMul", x, net.weight(f"{c}_w", 16, 16), out=c) for c in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, out="kt", perm=[0, 2, 1]), out="scores")
    mask = net.const("mask", np.triu(np.full((6, 6), masked), 1))
    scores = net.op("Add", net.op("Add", scores, mask, out="once"), mask, out="twice")
    mixed = net.op("MatMul", net.op("Softmax", scores, out="p"), v, out="mixed")
    net.op("MatMul", mixed, net.weight("o_w", 16, 16), out="y")
    proto = tinymodels.in_half(net.model({"y": ("N", 6, 16)}))
    tinyproject.write_project(tmp_path, proto, labels=False)
    options = [f"precision.default={default}", "precision.fallback=fp16"]
    record = run(tinyproject.config_of(tmp_path, *options), out=tmp_path / "runs")
    tuned = next(one for one in record.variants if one.name == "tuned")
    assert record.status == "met"
    assert (tuned.nodes["int8"], tuned.nodes["fp16"]) == ((4, 2) if default == "int8" else (0, 6))
