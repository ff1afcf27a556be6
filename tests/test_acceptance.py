"""Real models on real pictures, through the configs of the benchmarks.

The full numbers of every case, all evaluation pictures and the tuning of each, are those of
benchmarks/accuracy.py; here is what fits into minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from realdata import DATA, needs_data

from trtune.configs.errors import ModelError
from trtune.configs.load import load_config
from trtune.reports.record import RunRecord, Variant
from trtune.run.pipeline import run

CONFIGS = Path(__file__).parents[1] / "benchmarks" / "configs"
QUICK = (
    "calibration.prepare=none",
    "compare.pictures=4",
    "compare.alone=false",
    "report={formats: [json], latency: null}",
    "backends=[{name: onnxruntime, lowering: emulate}]",
)

pytestmark = [pytest.mark.slow, needs_data]


def result(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> RunRecord:
    monkeypatch.setenv("TRTUNE_DATA", str(DATA))
    config = load_config(CONFIGS / f"{name}.yaml", overrides=[*QUICK, *overrides])
    return run(config, out=out)


def variant(record: RunRecord, name: str) -> Variant:
    return next(v for v in record.variants if v.name == name)


def test_one_outlier_picture_does_not_ruin_efficientnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = result(
        "efficientnet_b0_cifar10",
        tmp_path,
        monkeypatch,
        "calibration.method=entropy",
        "data.calibration.skip=224",
        "data.calibration.take=128",
        "data.evaluation.take=400",
        "precision.target={metric: top1, max_drop: 0.0115}",
    )
    assert record.status == "met"
    assert record.baseline.value == pytest.approx(0.85, abs=0.03)
    assert variant(record, "int8").pinned == []
    assert record.calibration is not None
    worst = record.calibration.dominant[0]
    assert worst.item == "321"
    assert worst.tensors > 40
    assert worst.worst_ratio > 1000


@pytest.mark.parametrize("name", ["resnet20_cifar10", "vit_cifar10"])
def test_entropy_loses_at_most_half_a_point(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = result(name, tmp_path, monkeypatch)
    assert record.status == "met"
    tuned = variant(record, "tuned")
    assert tuned.drop is not None
    assert tuned.drop <= 0.005 + 1e-9
    assert len(tuned.pinned) <= 4


def test_squeezenet_keeps_its_accuracy_emulated_and_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = result(
        "squeezenet1.1_imagenet",
        tmp_path,
        monkeypatch,
        "calibration.method=entropy",
        "backends=[{name: onnxruntime, lowering: emulate}, {name: onnxruntime, lowering: deploy}]",
    )
    assert record.status == "met"
    emulate, deploy = (v for v in record.variants if v.name == "tuned")
    assert emulate.top1 is not None
    assert deploy.top1 is not None
    assert min(emulate.top1, deploy.top1) >= 0.613
    assert deploy.top1 >= emulate.top1 - 0.005


def test_auto_and_few_pins_reach_the_target_on_mobilenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = result(
        "mobilenetv2_imagenet",
        tmp_path,
        monkeypatch,
        "data.evaluation.take=100",
        "precision.target={metric: sqnr_db, min: 20}",
    )
    untuned, tuned = variant(record, "int8"), variant(record, "tuned")
    assert untuned.sqnr_db is not None
    assert untuned.sqnr_db > 15.9, "what the best other tool reaches"
    assert record.status == "met"
    assert 1 <= len(tuned.pinned) <= 4
    assert tuned.not_honoured == []


def test_a_qat_model_keeps_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = result("resnet20_cifar10_qat", tmp_path, monkeypatch, "data.evaluation.take=500")
    original, imported = variant(record, "original"), variant(record, "qat")
    assert record.status == "met"
    assert imported.value == original.value
    assert imported.sqnr_db == original.sqnr_db
    assert imported.nodes == {"int8": 22, "fp16": 0, "fp32": 0}


def test_tensorflows_uint8_is_refused_and_with_leave_made_symmetric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, few = "mobilenetv2_imagenet_qat_uint8", "data.evaluation.take=200"
    with pytest.raises(ModelError, match="findings stand in the way") as failure:
        result(name, tmp_path, monkeypatch, few, "precision.allow_requantize=false")
    assert "allow_requantize: true" in str(failure.value)
    record = result(name, tmp_path, monkeypatch, few)
    original, imported = variant(record, "original"), variant(record, "qat")
    assert original.value is not None
    assert imported.value is not None
    assert imported.value >= original.value - 0.01
    assert imported.value != original.value or imported.sqnr_db != original.sqnr_db
    assert record.notes


def test_half_precision_keeps_the_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = result(
        "mobilenetv2_cifar10",
        tmp_path,
        monkeypatch,
        "data.evaluation.take=500",
        "precision.default=fp16",
        "precision.target={metric: top1, max_drop: 0.002}",
    )
    half = variant(record, "fp16")
    assert record.status == "met"
    assert half.nodes == {"int8": 0, "fp16": 53, "fp32": 0}
    assert half.sqnr_db is not None
    assert half.sqnr_db > 50
