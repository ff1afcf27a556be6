"""Pins chosen on pictures of their own, `data.validation`, and reported on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tinyproject import config_of, record_of, write_project

from trtune.configs.schema import Config
from trtune.reports.summary import verdict
from trtune.run.naming import run_folder
from trtune.run.pipeline import run

TARGET = "precision.target={metric: sqnr_db, min: 45}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tiny project; its evaluation pictures are far easier than those pins are chosen on."""
    folder = write_project(tmp_path / "project", calibration=40)
    return folder


def choosing(folder: Path, *overrides: str) -> Config:
    validation = f"data.validation={{path: {folder / 'calibration.npz'}, skip: 24}}"
    return config_of(folder, "data.calibration.take=24", validation, *overrides)


def test_pins_are_chosen_on_validation_and_reported_on_evaluation(project: Path) -> None:
    record = run(choosing(project, TARGET), out=project / "runs")
    plain = run(config_of(project, "data.calibration.take=24", TARGET), out=project / "runs")
    chosen = record.validation
    assert chosen is not None
    assert (chosen.samples, chosen.threshold, chosen.baseline) == (16, 45.0, None)
    assert {v.samples for v in record.variants if v.name != "fp32"} == {20}
    assert record.tuning[0].value != plain.tuning[0].value
    untuned = next(v for v in record.variants if v.name == "int8")
    assert untuned.value == pytest.approx(plain.tuning[0].value)
    assert chosen.value == next(s for s in reversed(record.tuning) if s.met).value
    tuned = record.variants[-1]
    assert record.status == ("met" if tuned.verdict == "met" else "missed")
    assert "Pins were chosen on 16 pictures of data.validation, where the tuned" in verdict(record)
    assert {"validation_data", "evaluation_data"} <= record.hashes.keys()
    assert plain.validation is None
    assert "validation_data" not in plain.hashes


def test_what_misses_on_evaluation_is_missed(project: Path) -> None:
    with np.load(project / "evaluation.npz") as rows:
        arrays = {name: rows[name] * (3 if name == "input" else 1) for name in rows.files}
    np.savez(project / "evaluation.npz", **arrays)  # beyond every range: it saturates
    config = choosing(project, "precision.max_pins=0", "precision.target.min=25")
    record = run(config, out=project / "runs")
    assert record.validation is not None
    assert (record.validation.met, record.status) == (True, "missed")
    assert record_of(config, project)["validation"]["met"] is True


def test_labels_count_on_both(project: Path) -> None:
    target = "precision.target={metric: top1, max_drop: 0.9}"
    record = run(choosing(project, target), out=project / "runs")
    assert record.validation is not None
    assert record.validation.baseline == 1.0
    assert record.validation.threshold == pytest.approx(0.1)
    assert (record.baseline.samples, record.baseline.value) == (20, 1.0)


def test_a_second_run_reuses_both_baselines(project: Path) -> None:
    config = choosing(project, TARGET)
    run(config, out=project / "runs")
    log = run_folder(config, project / "runs") / "log.txt"
    before = log.stat().st_size
    run(config, out=project / "runs")
    lines = log.read_text()[before:]
    assert "baseline: reused" in lines
    assert "tune: reused" in lines
    assert " again: " not in lines


def test_shared_pictures_are_said(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = f"data.validation={{path: {project / 'calibration.npz'}, skip: 16}}"
    run(config_of(project, "data.calibration.take=24", shared), out=project / "runs")
    assert "8 of 24 samples of data.validation are in data.calibration too" in caplog.text
    caplog.clear()
    run(choosing(project), out=project / "runs")
    assert "are in data.calibration too" not in caplog.text
