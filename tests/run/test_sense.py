"""What a run says, or refuses, because model, data and labels do not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from PIL import Image

from trtune.calibrate.cache import save_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import DataError
from trtune.configs.load import load_config
from trtune.run.pipeline import run

TEXT = """
version: 1
name: sense
model: {path: net.onnx}
data:
  calibration: {source: images, path: pics, take: 12, batch: 4, preprocess: {scale: SCALE}}
  evaluation: {skip: 12}
calibration: {method: max, holdout: 4, prepare: none}
precision: {target: {metric: top1, max_drop: 0.5}}
compare: {pictures: 4}
backends: [{name: onnxruntime, lowering: emulate}]
report: {formats: [json], latency: null}
"""
SCALE = 0.003


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A classifier of three colours and pictures of them in folders called by two of the names."""
    net = tinymodels.Net()
    x = net.input("x", ("N", 3, 8, 8))
    weights = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    lit = net.op("Conv", x, net.const("w", weights), out="lit")
    mean = net.op("GlobalAveragePool", lit, out="mean")
    net.op("Flatten", mean, out="y")
    onnx.save(net.model({"y": ("N", 3)}), tmp_path / "net.onnx")
    rng = np.random.default_rng(3)
    for number in range(24):
        kind = number % 2
        pixels = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
        pixels[..., kind] += 150
        place = tmp_path / "pics" / ("green", "blue")[1 - kind] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    (tmp_path / "sense.yaml").write_text(TEXT.replace("SCALE", str(SCALE)))
    return tmp_path


def test_fewer_folders_than_classes_need_to_be_named(project: Path) -> None:
    with pytest.raises(DataError, match=r"2 classes, .* and the model 3: .*`classes`"):
        run(load_config(project / "sense.yaml"), out=project / "runs")


def test_classes_say_which_they_are(project: Path) -> None:
    # the fixture lights channel 0 in `blue` and channel 1 in `green`
    config = load_config(
        project / "sense.yaml", overrides=["data.calibration.classes=[blue, green, red]"]
    )
    record = run(config, out=project / "runs")
    assert record.baseline.value == 1.0
    assert any("blue = 0, green = 1" in note for note in record.notes)


def test_closeness_asks_for_no_classes(project: Path) -> None:
    config = load_config(
        project / "sense.yaml", overrides=["precision.target={metric: sqnr_db, min: 1}"]
    )
    assert run(config, out=project / "runs").status == "met"


@pytest.mark.parametrize(("amax", "said"), [(1.0, False), (255.0, True)])
def test_a_cache_of_other_pixels_is_said(project: Path, amax: float, said: bool) -> None:
    table = CalibrationTable.from_amax(dict.fromkeys(["x", "lit", "mean", "y"], amax))
    save_table(project / "own.cache", table)
    config = load_config(
        project / "sense.yaml",
        overrides=[
            "precision.target={metric: sqnr_db, min: -100}",
            f"calibration.cache={project / 'own.cache'}",
            "calibration.trust_cache=true",
        ],
    )
    record = run(config, out=project / "runs")
    assert any("is preprocess.scale right" in note for note in record.notes) is said
