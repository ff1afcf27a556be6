"""Suppression and AP against pycocotools and a plain loop, decoders on tensors made by hand."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import realdata
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError
from trtune.datasets import open_source
from trtune.datasets.batches import Batch
from trtune.datasets.pictures.geometry import Frame
from trtune.datasets.pictures.preprocess import Preprocess
from trtune.precision.graph.file import load_model
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.accuracy import evaluate
from trtune.reports.measures.boxes import Detections, overlaps, suppress
from trtune.reports.measures.decoders import DECODERS, Decoding, recognise
from trtune.reports.measures.detection import (
    THRESHOLDS,
    AveragePrecision,
    DetectionAgreement,
    Reading,
    match,
)
from trtune.reports.measures.uncertainty import standard_error
from trtune.reports.outputs import Layout

HOW = Decoding((64, 64), 0.1, 0.5)


def slow_suppress(boxes: Any, scores: Any, classes: Any, iou: float) -> list[int]:
    kept: list[int] = []
    for row in np.argsort(-scores, kind="stable"):
        same = [k for k in kept if classes[k] == classes[row]]
        if not same or overlaps(boxes[[row]], boxes[same]).max() <= iou:
            kept.append(int(row))
    return kept


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 40, 700]), st.floats(0.1, 0.9))
@settings(max_examples=25, deadline=None)
def test_suppression_is_the_greedy_loop(seed: int, count: int, iou: float) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 30, (count, 2))], axis=1)
    scores = rng.integers(0, 50, count) / 50
    classes = rng.integers(0, 3, count)
    assert suppress(boxes, scores, classes, iou).tolist() == slow_suppress(
        boxes, scores, classes, iou
    )


def drawn(rng: Any, pictures: int) -> tuple[list[Detections], list[NDArray[np.float64]]]:
    """Objects, some of them crowds, and detections near them, of four classes."""
    found, objects = [], []
    for _ in range(pictures):
        count = int(rng.integers(0, 7))
        low = rng.uniform(0, 50, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 40, (count, 2))], axis=1)
        classes, crowd = rng.integers(0, 4, count), rng.random(count) < 0.15
        objects.append(np.column_stack([classes, boxes, crowd]))
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 3, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kinds = np.where(rng.random(3 * count) < 0.8, np.repeat(classes, 3), 0)
        scores = rng.random(3 * count).astype(np.float32)
        found.append(Detections(near.astype(np.float32), scores, kinds.astype(np.int64)))
    return found, objects


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_pycocotools(seed: int) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="extra detection is not installed")
    from pycocotools.cocoeval import COCOeval

    found, objects = drawn(np.random.default_rng(seed), 30)
    ours = AveragePrecision(THRESHOLDS, Reading(), "ap")
    ours._pictures = [match(f, o, THRESHOLDS) for f, o in zip(found, objects, strict=True)]

    truth = coco.COCO()
    annotations = [
        {"id": 1 + len(objects) * k + number, "image_id": number, "category_id": int(row[0]),
         "bbox": [row[1], row[2], row[3] - row[1], row[4] - row[2]], "iscrowd": int(row[5]),
         "area": (row[3] - row[1]) * (row[4] - row[2])}
        for number, rows in enumerate(objects)
        for k, row in enumerate(rows)
    ]  # fmt: skip
    truth.dataset = {
        "images": [{"id": number} for number in range(30)],
        "categories": [{"id": kind} for kind in range(4)],
        "annotations": annotations,
    }
    results = [
        {"image_id": number, "category_id": int(kind), "score": float(score),
         "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]}
        for number, each in enumerate(found)
        for box, score, kind in zip(each.boxes, each.scores, each.classes, strict=True)
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert ours.result() == pytest.approx(float(judge.stats[0]), abs=1e-6)


def batch(labels: list[Any], size: int = 64) -> Batch:
    return Batch(
        {"x": np.zeros((len(labels), 3, size, size), np.float32)},
        tuple(f"p{k}" for k in range(len(labels))),
        tuple(np.asarray(rows, np.float64).reshape(-1, 5) for rows in labels),
    )


TRUTH = [[1, 8, 8, 24, 40]]


def end2end(shift: float = 0.0) -> dict[str, NDArray[Any]]:
    rows = np.array([[[8 + shift, 8, 24 + shift, 40, 0.9, 1], [0, 0, 1, 1, 0.001, 0]]])
    return {"out": rows.astype(np.float32)}


def test_what_is_found_exactly_has_an_ap_of_one_and_a_batch_makes_no_difference() -> None:
    one = AveragePrecision(THRESHOLDS, Reading(), "ap")
    one.start()
    for _ in range(3):
        one.update(end2end(), batch([TRUTH]))
    whole = AveragePrecision(THRESHOLDS, Reading(), "ap")
    whole.start()
    whole.update({"out": np.repeat(end2end()["out"], 3, axis=0)}, batch([TRUTH] * 3))
    assert one.result() == whole.result() == pytest.approx(1.0)
    assert (one.count, standard_error(one)) == (3, 0.0)


def test_boxes_of_another_kind_are_refused() -> None:
    labels = Batch({"x": np.zeros((1, 3, 64, 64))}, ("p",), np.array([3]))
    with pytest.raises(DataError, match="metric 'ap' needs boxes"):
        AveragePrecision(THRESHOLDS, Reading(), "ap").update(end2end(), labels)


@pytest.mark.parametrize(("shift", "value"), [(0, 1.0), (1, 1.0), (40, 0.0)])
def test_agreement_of_detections(shift: float, value: float) -> None:
    measure = DetectionAgreement(Reading())
    measure.start()
    measure.update_pair(end2end(), end2end(shift), batch([[]]))
    assert measure.result() == value


def only(decoder: str, outputs: dict[str, Any], how: Decoding = HOW) -> list[list[float]]:
    (found,) = DECODERS[decoder](outputs, how)
    rows = np.column_stack([found.classes, found.boxes, found.scores])
    return [[round(float(value), 3) for value in row] for row in rows]


def test_yolox_adds_the_cell_and_takes_the_exponential() -> None:
    rows = np.zeros((1, 84, 7), np.float32)
    rows[0, 9] = [0.5, 0.25, np.log(2), np.log(4), 0.9, 0.1, 1.0]  # cell (1, 1) of stride 8
    assert only("yolox", {"o": rows}) == [[1, 4, -6, 20, 26, 0.9]]
    with pytest.raises(ModelError, match=r"has 84 cells .* and the output 80 rows"):
        only("yolox", {"o": rows[:, :80]})


def test_yolov5_and_yolov8_have_centres_in_pixels() -> None:
    five = np.zeros((1, 10, 7), np.float32)
    five[0, 3] = [32, 32, 16, 8, 0.5, 0.4, 1.0]
    assert only("yolov5", {"o": five}) == [[1, 24, 28, 40, 36, 0.5], [0, 24, 28, 40, 36, 0.2]]
    eight = np.zeros((1, 6, 10), np.float32)
    eight[0, :, 3] = [32, 32, 16, 8, 0.05, 0.6]
    assert only("yolov8", {"o": eight}) == [[1, 24, 28, 40, 36, 0.6]]


def test_ssd_and_detr_have_boxes_beside_scores() -> None:
    boxes = np.zeros((1, 5, 4), np.float32)
    boxes[0, 2] = [0.25, 0.25, 0.5, 0.75]
    scores = np.zeros((1, 5, 3), np.float32)
    scores[0, 2] = [0.1, 0.2, 0.7]
    found = only("ssd", {"boxes": boxes, "scores": scores})
    assert found == [[1, 16, 16, 32, 48, 0.7], [0, 16, 16, 32, 48, 0.2]]
    logits = np.full((1, 5, 3), -9, np.float32)
    logits[..., 2] = 9
    logits[0, 2] = [-9, 9, -9]
    assert only("detr", {"logits": logits, "boxes": boxes}) == [[1, 0, -8, 32, 40, 1.0]]


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param({"o": np.array([[[8, 8, 24, 40, 0.9, 1]]])}, id="rows of six"),
        pytest.param(
            {"n": np.array([[1]]), "boxes": np.array([[[8, 8, 24, 40], [1, 1, 2, 2]]]),
             "scores": np.array([[0.9, 0.8]]), "classes": np.array([[1, 0]])},
            id="EfficientNMS: the first of them",
        ),
        pytest.param(
            {"boxes": np.array([[[0.125, 0.125, 0.375, 0.625]]]), "labels": np.array([[1]]),
             "scores": np.array([[0.9]])},
            id="relative, another order",
        ),
        pytest.param(
            {"boxes": (np.array([[8, 8, 24, 40]]),), "sel": (np.array([1]),),
             "s": (np.array([0.9]),)},
            id="as many as there are",
        ),
    ],
)  # fmt: skip
def test_networks_with_their_own_suppression(outputs: dict[str, Any]) -> None:
    assert only("end2end", outputs) == [[1, 8, 8, 24, 40, 0.9]]


def test_of_four_columns_each_the_values_say_which_are_boxes() -> None:
    boxes = np.full((1, 2, 4), 0.5, np.float32)
    logits = np.array([[[9, -9, -9, -9], [-9, -9, -9, 9]]], np.float32)
    for outputs in ({"a": logits, "b": boxes}, {"a": boxes, "b": logits}):
        (found,) = DECODERS["detr"](outputs, Decoding((100, 200)))
        assert (found.classes.tolist(), found.scores.round(3).tolist()) == ([0], [1.0])
        assert found.boxes.tolist() == [[50, 25, 150, 75]]


@pytest.mark.parametrize(
    ("outputs", "size", "decoder"),
    [
        ({"output": (1, 3549, 85)}, 416, "yolox"),
        ({"output": (1, 25200, 85)}, 640, "yolov5"),
        ({"output0": ("batch", 84, 8400)}, 640, "yolov8"),
        ({"output0": (1, 300, 6)}, 640, "end2end"),
        ({"output": ("n", 7)}, 640, None),
        ({"boxes": (1, 8732, 4), "scores": (1, 8732, 91)}, 300, "ssd"),
        ({"logits": (1, 100, 92), "pred_boxes": (1, 100, 4)}, 800, "detr"),
        ({"logits": (1, 100, 4), "pred_boxes": (1, 100, 4)}, 800, "detr"),
        ({"num": (1, 1), "boxes": (1, 100, 4), "scores": (1, 100), "classes": (1, 100)}, 640,
         "end2end"),
        ({"logits": ("n", 1000)}, 224, None),
        ({"mask": (1, 21, 520, 520)}, 520, None),
    ],
)  # fmt: skip
def test_the_shapes_say_the_decoder(
    outputs: dict[str, Any], size: int, decoder: str | None
) -> None:
    assert recognise(outputs, (size, size)) == decoder


@pytest.mark.slow
@realdata.needs_data
@pytest.mark.parametrize(("metric", "value"), [("ap", 0.340), ("ap50", 0.503)])
def test_yolox_nano_on_128_pictures_of_coco(metric: str, value: float) -> None:
    pytest.importorskip("cv2", reason="extra detection is not installed")
    model = load_model(realdata.data_dir() / "models" / "yolox_nano_coco.onnx")
    source = open_source(
        "yolo",
        realdata.data_dir() / "images" / "coco_val2017_128",
        inputs=model.inputs,
        preprocess=Preprocess(
            letterbox=Frame(416, place="top_left"),
            scale=1,
            channels="BGR",
            resample="opencv-bilinear",
        ),
    )
    with OrtEngine(lambda: make_session(model.proto)) as engine:
        found = evaluate(
            engine.infer,
            source,
            metric=metric,
            fixed_batch=1,
            layout=Layout(tuple(model.inputs), tuple(model.outputs)),
        )
    assert found.value == pytest.approx(value, abs=0.003)
    assert found.error == pytest.approx(0.025, abs=0.01)
