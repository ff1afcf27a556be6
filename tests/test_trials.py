"""`init --data`: what a first config knows of the data, and the preprocessing that fits FP32."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from trtune.configs.load import load_config
from trtune.tools import init_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def made(name: str, folder: Path) -> Path:
    shutil.copytree(EXAMPLES / name, folder / name)
    runpy.run_path(str(folder / name / "make.py"), run_name="__main__")
    return folder / name


@pytest.mark.parametrize("place", ["data", "data/data.yaml"])
def test_a_detector_gets_its_boxes_its_measure_and_the_best_preprocessing(
    tmp_path: Path, place: str
) -> None:
    folder = made("detector", tmp_path)
    written = init_config(folder / "detector.onnx", tmp_path / "mine.yaml", data=folder / place)
    text = written.read_text(encoding="utf-8")
    config = load_config(written)
    section, target = config.data.calibration, config.precision.target
    assert section.source == "yolo"
    assert section.preprocess is not None
    assert section.preprocess.channels == "RGB"
    assert (section.preprocess.scale, section.preprocess.mean) == (1 / 255, (0.0,))
    assert target is not None
    assert (target.metric, target.max_drop) == ("ap", 0.01)
    assert text.count("# tried on FP32: ap ") == 4
    other = config.data.evaluation
    assert (other.split, other.skip) == (("val", 0) if "yaml" in place else (None, section.take))


def test_without_data_the_kind_of_detector_says_the_preprocessing(tmp_path: Path) -> None:
    folder = made("detector", tmp_path)
    text = init_config(folder / "detector.onnx", tmp_path / "mine.yaml").read_text()
    assert "source: yolo" in text
    assert "letterbox: {size: 128}" in text
    assert "# target: {metric: ap, max_drop: 0.01}" in text


def test_data_without_labels_is_counted(tmp_path: Path) -> None:
    folder = made("segmenter", tmp_path)
    written = init_config(
        folder / "segmenter.onnx", tmp_path / "mine.yaml", data=folder / "data" / "images"
    )
    config = load_config(written)
    assert (config.data.calibration.take, config.data.evaluation.skip) == (24, 24)
    assert config.precision.target is not None
    assert config.precision.target.metric == "sqnr_db"
    assert "{metric: pixel_agreement, min: 0.95}" in written.read_text()
