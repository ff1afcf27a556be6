"""`init --data`: what a first config knows of the data, and the preprocessing that fits FP32."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.numpy_helper import from_array

from trtune.configs.load import load_config
from trtune.tools import init_config
from trtune.trials import Trial, published_first

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


def counting_by_ids(model: onnx.ModelProto, ids: list[int], classes: int) -> onnx.ModelProto:
    """The example's detector as a DETR: class `ids[k]` for its class k, boxes of 0 to 1."""
    graph, spread = model.graph, np.zeros((classes, 3), np.float32)
    spread[ids, range(3)] = 1
    del graph.node[-1], graph.output[:]
    graph.initializer.extend([from_array(spread, "spread"), from_array(np.float32(128), "side")])
    graph.node.extend(
        [
            helper.make_node("MatMul", ["spread", "rows"], ["wide"]),
            helper.make_node("Transpose", ["wide"], ["logits_out"], perm=[0, 2, 1]),
            helper.make_node("Div", ["boxes", "side"], ["unit"]),
            helper.make_node("Transpose", ["unit"], ["pred_boxes"], perm=[0, 2, 1]),
        ]
    )
    for name, columns in (("logits_out", classes), ("pred_boxes", 4)):
        graph.output.append(helper.make_tensor_value_info(name, 1, [1, 64, columns]))
    return model


def as_coco(folder: Path, ids: list[int]) -> None:
    """Eight of the example's pictures with an instances file and `ids` as category ids."""
    labels = sorted((folder / "labels" / "val").glob("*.txt"))[:8]
    boxes: list[dict[str, object]] = []
    for number, path in enumerate(labels):
        for line in path.read_text().splitlines():
            kind, cx, cy, w, h = map(float, line.split())
            box = [(cx - w / 2) * 192, (cy - h / 2) * 128, w * 192, h * 128]
            boxes.append({"image_id": number, "category_id": ids[int(kind)], "bbox": box})
    value = {
        "images": [{"id": n, "file_name": f"{p.stem}.png"} for n, p in enumerate(labels)],
        "annotations": boxes,
        "categories": [{"id": number, "name": f"c{number}"} for number in ids],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(value))
    shutil.move(folder / "images" / "val", folder / "val")
    shutil.rmtree(folder / "labels")
    shutil.rmtree(folder / "images")
    (folder / "data.yaml").unlink()


def test_classes_that_are_the_ids_of_cocos_categories(tmp_path: Path) -> None:
    folder, ids = made("detector", tmp_path), [1, 17, 90]
    model = counting_by_ids(onnx.load(folder / "detector.onnx"), ids, 91)
    onnx.save(model, tmp_path / "detr.onnx")
    as_coco(folder / "data", ids)
    said: list[str] = []
    written = init_config(
        tmp_path / "detr.onnx", tmp_path / "mine.yaml", data=folder / "data", told=said.extend
    )
    section = load_config(written).data.calibration
    assert (section.source, section.categories, section.label_offset) == ("coco", "ids", 0)
    assert Path(section.path).name == "instances_val.json"
    assert section.preprocess is not None
    assert (section.preprocess.channels, section.preprocess.scale) == ("RGB", 1 / 255)
    assert "coco: 8 pictures; 4 calibrate" in said[1]


@pytest.mark.parametrize(
    ("decoder", "values", "first"),
    [
        ("yolox", (0.362, 0.355), "letterbox top left, BGR, 0 to 255"),
        ("yolox", (0.362, 0.330), "letterbox, BGR, 0 to 255"),
        ("ssd", (0.362, 0.355), "letterbox, BGR, 0 to 255"),
    ],
)
def test_what_a_family_is_published_with_wins_within_noise(
    decoder: str, values: tuple[float, float], first: str
) -> None:
    names = ("letterbox, BGR, 0 to 255", "letterbox top left, BGR, 0 to 255")
    trials = [Trial(name, {}, value) for name, value in zip(names, values, strict=True)]
    assert published_first(trials, decoder)[0].what == first


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
