"""The walk to a target in a run: what is measured on all pictures, and what ends early."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinyproject import config_of, write_project

from trtune.reports.record import Used
from trtune.reports.summary import samples_text
from trtune.run.pipeline import run
from trtune.run.tuning import is_enough, noise_of

BOUND = "precision.target={{metric: sqnr_db, min: {}}}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "project", evaluation=96)


def test_plans_that_miss_end_early_and_what_is_reported_is_whole(project: Path) -> None:
    two = "precision.max_pins=2"
    record = run(config_of(project, BOUND.format(60), two), out=project / "runs")
    start, *others = record.tuning
    assert (start.whole, start.samples) == (True, 96)
    ended = [step for step in others if not step.whole]
    assert ended
    for step in ended:
        assert not step.met
        assert 0 < step.samples < 96
        assert "missed for certain after" in step.reason
    assert any(step.whole for step in others)  # the best of those that miss
    assert {v.samples for v in record.variants if v.name != "fp32"} == {96}
    assert all(point.sqnr_db is not None for point in record.front)


def test_every_value_has_its_standard_error(project: Path) -> None:
    record = run(
        config_of(project, "precision.target={metric: top1, max_drop: 0.5}"),
        out=project / "runs",
    )
    for variant in record.variants:
        if variant.name != "fp32":
            assert variant.error is not None
            assert variant.sqnr_error is not None
            assert variant.sqnr_error > 0
            assert variant.agreement_error is not None
    assert record.tuning[0].error == record.variants[1].error


def test_a_second_run_takes_what_ended_early_too(project: Path) -> None:
    config = config_of(project, BOUND.format(60))
    first = run(config, out=project / "runs")
    again = run(config_of(project, BOUND.format(60), "precision.max_pins=2"), out=project / "runs")
    seen = {tuple(step.pinned): step for step in first.tuning}
    for step in again.tuning:
        before = seen.get(tuple(step.pinned))
        if before is not None and before.whole == step.whole:
            assert step.cached
            assert step.value == before.value


@pytest.mark.parametrize(
    ("value", "threshold", "higher", "enough"),
    [(0.84, 0.85, True, False), (0.85, 0.85, True, True), (9.0, 9.5, False, True),
     (0.84, None, True, True), (None, 0.5, True, False)],
)  # fmt: skip
def test_enough(value: float | None, threshold: float | None, higher: bool, enough: bool) -> None:
    assert is_enough(value, threshold, higher=higher) is enough


def test_noise_of_decibels() -> None:
    assert noise_of(10.0) == pytest.approx(0.1)
    assert noise_of(float("inf")) == 0.0


def test_how_many_pictures_did_what(project: Path) -> None:
    target = "precision.target={metric: top1, max_drop: 0.5}"
    some = ("data.evaluation.take=50", "data.calibration.take=20")
    record = run(config_of(project, target, *some), out=project / "runs")
    assert record.data["evaluation"] == Used(used=50, of=96)
    assert record.data["calibration"].of == 24
    assert record.baseline.output == "logits"
    assert samples_text(record).endswith("measured on 50 of 96 pictures; top-1 of output 'logits'.")
