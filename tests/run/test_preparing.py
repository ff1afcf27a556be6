"""The prepare stage: what it keeps, and that a run goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tinymodels
from tinyproject import config_of, draw, write_project
from tinyquant import uneven

from trtune.calibrate.cache import load_table
from trtune.run.pipeline import run, run_folder

FORCED = "calibration.prepare=[scale, shift, round, bias]"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path, uneven(tinymodels.depthwise()), calibration=48)


def test_what_was_prepared_is_in_the_record_and_beside_the_cache(project: Path) -> None:
    config = config_of(project, FORCED)
    record = run(config)
    folder = run_folder(config)
    assert record.prepared
    assert {move for moves in record.prepared.values() for move in moves} <= {
        *("scale", "shift", "round", "bias")
    }
    assert any("prepared.onnx and prepared.cache belong together" in note for note in record.notes)
    held = json.loads((folder / "run.json").read_text())
    assert held["prepared"] == record.prepared
    feeds = draw(uneven(tinymodels.depthwise()), 4, seed=9)
    exact = tinymodels.run(uneven(tinymodels.depthwise()), feeds)
    session = onnxruntime.InferenceSession(str(folder / "prepared.onnx"))
    names = [output.name for output in session.get_outputs()]
    for name, value in zip(names, session.run(names, feeds), strict=True):
        assert np.abs(value - exact[name]).max() < 0.05 * np.abs(exact[name]).max()
    table = load_table(folder / "prepared.cache")
    assert table.scales != load_table(folder / "calibration.cache").scales


def test_a_second_run_takes_the_kept_model(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(project, FORCED)
    first = run(config)

    def never(*args: object, **options: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr("trtune.run.stages.preparing.prepare_model", never)
    second = run(config)
    assert second.prepared == first.prepared
    assert [v.sqnr_db for v in second.variants] == [v.sqnr_db for v in first.variants]


def test_none_prepares_nothing(project: Path) -> None:
    config = config_of(project, "calibration.prepare=none")
    assert run(config).prepared == {}
    assert not (run_folder(config) / "prepared.onnx").exists()


def test_one_method_for_all_says_what_another_would_have_kept(project: Path) -> None:
    clipped = ("calibration.method=percentile", "calibration.percentile=80")
    for overrides, expected in ((clipped, 1), (("calibration.method=auto",), 0)):
        notes = run(config_of(project, *overrides, "calibration.prepare=none")).notes
        found = [note for note in notes if note.startswith("calibration.method")]
        assert len(found) == expected
        assert all("lose 3 dB and more against another method" in note for note in found)
        assert all("max +" in note or "mse +" in note for note in found)
