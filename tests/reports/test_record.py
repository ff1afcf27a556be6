from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from trtune.reports.record import Baseline, RunRecord, TuningStep, Variant


def test_the_record_survives_its_file(record: RunRecord) -> None:
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_decibels_survive_the_file_as_valid_json(value: float) -> None:
    step = TuningStep(step=0, action="start", pinned=[], value=value, builds=1, seconds=0.1)
    record = RunRecord(
        schema=1,
        name="n",
        key="k",
        status="met",
        baseline=Baseline(metric="sqnr_db", value=None, samples=1),
        variants=[Variant(name="fp32", backend="onnxruntime", value=value)],
        tuning=[step],
    )
    text = record.to_json()
    assert RunRecord.from_json(text) == record
    json.loads(text, parse_constant=pytest.fail)


def test_run_json_has_the_keys_of_the_contract(record: RunRecord) -> None:
    value = json.loads(record.to_json())
    assert value["schema"] == 1
    assert {"metric", "value", "samples"} <= value["baseline"].keys()
    assert {
        "name", "backend", "value", "drop", "sqnr_db", "agreement", "latency_ms", "size_bytes",
        "nodes", "pinned", "not_honoured",
    } <= value["variants"][0].keys()  # fmt: skip
    assert {"median", "p95", "runs", "batch"} <= value["variants"][0]["latency_ms"].keys()
    assert {"step", "pinned", "value", "builds", "seconds"} <= value["tuning"][0].keys()


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Baseline.model_validate({"metric": "top1", "value": 1, "samples": 1, "extra": 1})
