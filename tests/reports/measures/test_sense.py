from __future__ import annotations

import math

import numpy as np
import pytest

from trtune.datasets.batches import Batch, InputSpec
from trtune.reports.measures.recognise import task_of
from trtune.reports.measures.sense import (
    near_chance,
    odd_inputs,
    same_pictures,
    threshold_below_zero,
    unlike_classes,
    unlike_range,
)


@pytest.mark.parametrize(
    ("metric", "value", "classes", "samples", "stops"),
    [
        pytest.param("top1", 0.31, 1000, 744, None, id="far from chance"),
        pytest.param("top1", 0.0, 1000, 744, True, id="nothing is right"),
        pytest.param("top1", 0.11, 10, 2000, True, id="one in ten of ten classes"),
        pytest.param("top1", 0.5, 2, 10, False, id="so few that it may be right"),
        pytest.param("ap", 0.004, 80, 128, True, id="no boxes"),
        pytest.param("ap", 0.34, 80, 128, None, id="boxes"),
        pytest.param("ap50", math.nan, 80, 128, True, id="no objects"),
        pytest.param("sqnr_db", -3, 10, 128, None, id="closeness has no chance"),
        pytest.param("top1", 0.0, None, 128, None, id="classes unknown"),
    ],
)
def test_near_chance(
    metric: str, value: float, classes: int | None, samples: int, stops: bool | None
) -> None:
    found = near_chance(metric, value, classes, samples)
    assert [oddity.stops for oddity in found] == ([] if stops is None else [stops])


def test_a_threshold_below_zero_is_met_by_anything() -> None:
    assert threshold_below_zero("top1", -0.01)[0].stops
    assert not threshold_below_zero("top1", 0.2)
    assert not threshold_below_zero("sqnr_db", -3)


def test_pictures_in_both_sets_are_counted() -> None:
    (found,) = same_pictures(["a", "b"], ["b", "c", "d"])
    assert found.text.startswith("1 of 3 samples of data.evaluation are in data.calibration too")
    assert not same_pictures(["a"], ["b"])


def batch(*values: float) -> Batch:
    rows = np.random.default_rng(0).normal(size=(len(values), 3, 8, 8)).astype(np.float32)
    for row, value in zip(rows, values, strict=True):
        row *= abs(value)
    return Batch({"x": rows}, tuple(f"p{k}" for k in range(len(values))))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ((1, 1), []),
        ((1, 0), [("constant_inputs", False)]),
        ((0, 0), [("constant_inputs", True)]),
        ((1e5, 1), [("large_inputs", False)]),
    ],
)
def test_odd_inputs(values: tuple[float, ...], found: list[tuple[str, bool]]) -> None:
    assert [(o.what, o.stops) for o in odd_inputs([batch(*values)])] == found


@pytest.mark.parametrize(
    ("values", "amax", "odd"),
    [
        pytest.param((255.0, 0.0), 1.0, True, id="pixels that were to be divided"),
        pytest.param((0.5, 1.0), 255.0, True, id="divided pixels for a model of bytes"),
        pytest.param((0.0, 1.5), 1.0, False, id="near"),
        pytest.param((0.0, 0.0), 1.0, False, id="black is another finding"),
        pytest.param((3.0, 0.0), 0.0, False, id="no range"),
        pytest.param((3.0, 0.0), math.inf, False, id="an infinite one"),
    ],
)
def test_values_far_from_the_scale(values: tuple[float, ...], amax: float, odd: bool) -> None:
    fed = Batch({"x": np.array(values)[:, np.newaxis]}, ("a", "b"))
    assert [o.what for o in unlike_range([fed], {"x": amax, "y": 1.0})] == ["unlike_range"] * odd


def test_folders_unlike_classes() -> None:
    assert unlike_classes(3, 10)[0].stops
    assert not unlike_classes(10, 10)
    assert not unlike_classes(None, 10)


Shape = tuple[int | str | None, ...]


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind", "classes"),
    [
        ([(1, 3, 416, 416)], [(1, 3549, 85)], "detection", 80),
        ([("n", 3, 640, 640)], [("n", 24, 8400)], "detection", 20),
        ([("n", 3, 224, 224)], [("n", 1000)], "classification", 1000),
        ([("n", 3, 224, 224)], [("n", 1000, 1, 1)], "classification", 1000),
        ([("n", 3, 512, 512)], [("n", 21, 512, 512)], "segmentation", 21),
        ([("n", 40)], [("n", 12)], None, None),
    ],
)
def test_the_shapes_say_the_task(
    inputs: list[Shape], outputs: list[Shape], kind: str | None, classes: int | None
) -> None:
    task = task_of(
        [InputSpec(f"i{k}", shape, "float32") for k, shape in enumerate(inputs)],
        [InputSpec(f"o{k}", shape, "float32") for k, shape in enumerate(outputs)],
    )
    assert (task and task.kind, task and task.classes) == (kind, classes)


def test_tokens_go_in_as_whole_numbers() -> None:
    task = task_of([InputSpec("ids", ("b", "t"), "int64")],
                   [InputSpec("logits", ("b", "t", 32000), "float32")])  # fmt: skip
    assert task is not None
    assert (task.kind, task.metric, task.classes) == ("text", "perplexity", 32000)
