"""What decides the key of a stage, and what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinymodels

from trtune.calibrate.table import CalibrationTable
from trtune.configs.schema import Compare
from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.run.stage import Need, Stage, content, flat, mark, versions


def key(**needs: Any) -> str:
    return Stage("x", needs, lambda folder: None).key()


@pytest.fixture(scope="module")
def plan() -> PrecisionPlan:
    return make_plan(GraphView.of(model_from_proto(tinymodels.conv_relu())))


class TestPlans:
    def test_the_words_of_a_reason_do_not_count(self, plan: PrecisionPlan) -> None:
        name = plan.compute_nodes[0]
        one = plan.pin([name], "fp32", "pinned by the tuner: it hurts", origin=TUNER)
        other = plan.pin([name], "fp32", "pinned by the tuner: 12.3 dB", origin=TUNER)
        assert one != other
        assert key(plan=one) == key(plan=other)

    def test_a_precision_does(self, plan: PrecisionPlan) -> None:
        pinned = plan.pin([plan.compute_nodes[0]], "fp32", "", origin=TUNER)
        assert key(plan=plan) != key(plan=pinned)


class TestTables:
    def test_scales_count_and_where_they_came_from_does_not(self) -> None:
        table = CalibrationTable({"a": 0.5}, provenance={"data": "x"})
        assert key(t=table) == key(t=replace(table, provenance={"data": "y"}))
        assert key(t=table) != key(t=CalibrationTable({"a": 0.25}))


def test_a_model_counts_by_its_content_and_not_by_its_place() -> None:
    proto = tinymodels.conv_relu()
    here, there = (model_from_proto(proto, Path(p)) for p in ("a/m.onnx", "b/n.onnx"))
    assert key(m=here) == key(m=there)


def test_a_section_of_the_config_counts_by_its_values() -> None:
    assert key(c=Compare()) == key(c=Compare(pictures=32))
    assert key(c=Compare()) != key(c=Compare(pictures=33))


def test_what_is_told_does_not_count() -> None:
    assert key(d=Need("x", {"a": 1})) == key(d=Need("x", {"a": 2})) == key(d="x")


def test_what_nothing_is_known_of_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no content that a key could be made of"):
        content(object())


def test_marks_are_readable_where_they_are_short() -> None:
    stage = Stage("x", {"method": "mse", "n": 3, "tensors": ["a"] * 99}, lambda folder: None)
    marks = stage.marks()
    assert (marks["version"], marks["method"], marks["n"]) == (1, "mse", 3)
    assert len(marks["tensors"]) == 64
    assert mark("w" * 65) != "w" * 65


def test_flat_leaves_an_empty_mapping_as_it_is() -> None:
    assert flat({"a": {}, "b": {"c": {"d": 1}}}, "") == {"a": {}, "b.c.d": 1}


def test_versions_are_those_installed() -> None:
    import numpy

    assert versions("numpy") == {"numpy": numpy.__version__}
