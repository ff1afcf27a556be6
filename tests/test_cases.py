"""Small models on which whole runs fell short once: each from its file to the record."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from realdata import shared_case

from trtune.configs.errors import ModelError
from trtune.configs.load import load_config
from trtune.reports.record import RunRecord, Variant
from trtune.run.pipeline import run

slow = pytest.mark.slow
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
TEXT = """
version: 1
name: case
model: {{path: {model}}}
data: {{calibration: {{source: arrays, path: {data}, batch: 8}}}}
calibration: {{method: auto, holdout: 4}}
precision: {{target: {{metric: sqnr_db, min: 20}}}}
compare: {{pictures: 4}}
backends: [{{name: onnxruntime, lowering: emulate}}]
report: {{formats: [json], latency: null}}
"""
RTX = 'backends=[{name: onnxruntime}, {name: tensorrt_rtx, compute_capabilities: ["8.9"]}]'
QAT = "precision.default=qat"
NO_TARGET = "precision.target=null"


def drawn(folder: Path, model: Path) -> Path:
    """Sixteen samples of noise for the model's one input."""
    (info,) = onnx.load(model).graph.input
    shape = [16, *(dim.dim_value for dim in info.type.tensor_type.shape.dim[1:])]
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.savez(folder / "rows.npz", **{info.name: rows})
    return folder / "rows.npz"


def ran(folder: Path, name: str, *overrides: str) -> RunRecord:
    model = shared_case(f"{name}.onnx")
    rows = model.with_suffix(".npz")
    path = folder / "case.yaml"
    data = rows if rows.is_file() else drawn(folder, model)
    path.write_text(TEXT.format(model=model, data=data))
    return run(load_config(path, overrides=list(overrides)), out=folder / "runs")


def variant(record: RunRecord, name: str) -> Variant:
    return next(one for one in record.variants if one.name == name)


@pytest.mark.parametrize(
    ("name", "int8"),
    [
        ("batch_minus_one", 1),
        pytest.param("free_minus_one", 1, marks=slow),
        pytest.param("scalar_input", 1, marks=slow),
        ("side_input", 1),
        ("camera_matrix", 4),
        pytest.param("causal_add", 4, marks=slow),
        ("causal_where", 4),
        pytest.param("masked_inf", 2, marks=slow),
        ("crnn_time_first", 2),
        pytest.param("layernorm_apart", 2, marks=slow),
        pytest.param("weights_behind_transpose", 2, marks=slow),
        ("weights_behind_all", 6),
    ],
)
def test_what_was_refused_or_left_in_fp32_is_met_in_int8(
    name: str, int8: int, tmp_path: Path
) -> None:
    record = ran(tmp_path, name)
    assert record.status == "met"
    tuned = variant(record, "tuned")
    assert tuned.nodes["int8"] == int8
    assert tuned.pinned == []
    assert tuned.sqnr_db is not None
    assert tuned.sqnr_db > 20


@slow
@pytest.mark.parametrize("default", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["masked_inf", "causal_add", "causal_where", "layernorm_apart"])
def test_masks_and_normalisations_run_in_half(name: str, default: str, tmp_path: Path) -> None:
    record = ran(tmp_path, name, f"precision.default={default}")
    assert record.status == "met"
    assert variant(record, default).nodes[default] > 0


@pytest.mark.parametrize(
    ("name", "pinned"),
    [
        pytest.param("two_outputs", "cls_conv", id="scores are an output of their own"),
        pytest.param("joined_output", "dfl_like", marks=slow, id="scores are channels"),
    ],
)
def test_scores_beside_boxes_are_judged(name: str, pinned: str, tmp_path: Path) -> None:
    record = ran(tmp_path, name, "calibration.prepare=none")
    untuned, tuned = variant(record, "int8"), variant(record, "tuned")
    assert untuned.sqnr_db is not None
    assert untuned.sqnr_db < 5  # the boxes alone would say more than 30
    assert (record.status, tuned.pinned) == ("met", [pinned])


def test_rows_that_follow_the_data_are_no_reason_to_stop(tmp_path: Path) -> None:
    record = ran(tmp_path, "nms_inside", NO_TARGET)
    assert variant(record, "int8").nodes["int8"] == 2


@slow
@pytest.mark.parametrize("name", ["plugin_nms", "plugin_default_domain"])
def test_a_plugin_is_cut_and_put_back(name: str, tmp_path: Path) -> None:
    record = ran(tmp_path, name, *([RTX] if HAS_RTX else []))
    assert record.status == "met"
    assert any("cut before EfficientNMS_TRT" in note for note in record.notes)
    if HAS_RTX:
        assert list(tmp_path.glob("runs/*/tensorrt_rtx*/whole.onnx"))


def test_a_quantized_model_is_no_fp32_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"already quantized: .*`precision.default: qat`"):
        ran(tmp_path, "quantized_as_int8")


@pytest.mark.parametrize("name", ["quantized_as_int8", "convtranspose_axis0", "fp16_rest"])
def test_a_quantized_model_is_imported_whole(name: str, tmp_path: Path) -> None:
    record = ran(tmp_path, name, QAT)
    original, imported = variant(record, "original"), variant(record, "qat")
    assert record.status == "met"
    assert imported.nodes["int8"] == 3
    assert imported.sqnr_db is not None
    assert original.sqnr_db is not None
    # onnxruntime 1.23 itself loses 9 dB where Q/DQ in the file is float16; it is float32 in ours
    assert imported.sqnr_db > original.sqnr_db - 0.1
    if name != "fp16_rest":
        assert imported.sqnr_db == pytest.approx(original.sqnr_db, abs=0.1)


@slow
@pytest.mark.skipif(not HAS_RTX, reason="needs tensorrt-rtx")
def test_the_rest_in_fp16_builds_with_all_convolutions_in_int8(tmp_path: Path) -> None:
    record = ran(tmp_path, "fp16_rest", QAT, RTX)
    (built,) = (v for v in record.variants if v.name == "tuned" and "rtx" in v.backend)
    assert built.status == "done"
    assert built.nodes["int8"] == 3
    assert built.not_honoured == []
