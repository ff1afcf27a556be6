"""Which outputs decide, what a verdict says, and how sure it is: whole runs on small networks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from realdata import shared_case

from trtune.configs.errors import ConfigError, InputError
from trtune.configs.load import load_config
from trtune.reports.record import RunRecord, Variant
from trtune.run.pipeline import run

SQNR = {"metric": "sqnr_db", "min": 20.0}

AS_IT_IS = {"method": "auto", "prepare": "none"}
"""Not prepared, which would leave less to be pinned."""


def run_case(name: str, out: Path, precision: Mapping[str, Any], **sections: Any) -> RunRecord:
    model, arrays = shared_case(f"{name}.onnx"), shared_case(f"{name}.npz")
    backends = sections.pop("backends", [{"name": "onnxruntime", "lowering": "emulate"}])
    method = sections.pop("method", "auto")
    path = out / "c.yaml"
    out.mkdir(exist_ok=True)
    value = {
        "version": 1,
        "name": "judged",
        "model": {"path": str(model)},
        "data": {"calibration": {"source": "arrays", "path": str(arrays), "batch": 4}},
        "calibration": {"method": method},
        "precision": {"target": SQNR, **precision},
        "backends": backends,
        "report": {"latency": None},
        **sections,
    }
    path.write_text(json.dumps(value))
    return run(load_config(path), out=out)


def variant(record: RunRecord, name: str, lowering: str = "emulate") -> Variant:
    return next(v for v in record.variants if v.name == name and v.backend.endswith(f"/{lowering}"))


def test_the_worst_output_decides(tmp_path: Path) -> None:
    record = run_case("two_outputs", tmp_path, {}, calibration=AS_IT_IS)
    before, after = variant(record, "int8"), variant(record, "tuned")
    assert set(after.outputs) == {"boxes", "scores"}
    for each in (before, after):
        assert each.value == pytest.approx(min(o.sqnr_db for o in each.outputs.values()))
    assert before.verdict == "missed"
    assert (record.status, after.verdict, after.pinned) == ("met", "met", ["cls_conv"])
    assert "scores" in (next(tmp_path.glob("judged-*")) / "report.md").read_text()


def test_channels_of_one_output_are_judged_apart(tmp_path: Path) -> None:
    record = run_case("joined_output", tmp_path, {})
    after = variant(record, "tuned")
    assert list(after.outputs) == ["out[:, 0:4]", "out[:, 4:20]"]
    assert record.status == "met"
    assert min(o.sqnr_db for o in after.outputs.values()) > 20


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param({"outputs": ["boxes"]}, id="outputs"),
        pytest.param(
            {"precision": {"target": {**SQNR, "output": "boxes"}}}, id="the target's output"
        ),
    ],
)
def test_only_chosen_outputs_decide(tmp_path: Path, chosen: dict[str, Any]) -> None:
    precision = chosen.pop("precision", {})
    record = run_case("two_outputs", tmp_path, precision, **chosen)
    assert record.status == "met"
    assert variant(record, "tuned").pinned == []
    assert set(variant(record, "tuned").outputs) == {"boxes"}


def test_an_output_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"outputs: the model has no output 'box'.*'boxes'"):
        run_case("two_outputs", tmp_path, {}, outputs=["box"])
    with pytest.raises(ConfigError, match=r"precision\.target\.output: .*'scores'"):
        run_case("two_outputs", tmp_path, {"target": {**SQNR, "output": "score"}})


def test_weights_behind_constants_are_quantized(tmp_path: Path) -> None:
    record = run_case("weights_behind_transpose", tmp_path, {})
    assert variant(record, "tuned").nodes["int8"] == 2
    assert record.status == "met"


def test_a_run_without_int8_is_never_met(tmp_path: Path) -> None:
    record = run_case("weights_behind_transpose", tmp_path, {"pin": {"re:.*": "fp32"}})
    assert record.status == "missed"
    assert {v.verdict for v in record.variants if v.name != "fp32"} <= {"missed", None}
    assert any("INT8" in note for note in record.notes)


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="qat"):
        run_case("quantized_as_int8", tmp_path, {})


def test_a_pin_counts_in_deploy_as_in_emulation(tmp_path: Path) -> None:
    backends = [{"name": "onnxruntime", "lowering": how} for how in ("emulate", "deploy")]
    record = run_case(
        "pinned_in_deploy",
        tmp_path,
        {"pin": {"branch_pinned": "fp32"}},
        backends=backends,
        method="entropy-s7310",
        outputs=["b"],
    )
    emulated, deployed = (variant(record, "int8", how) for how in ("emulate", "deploy"))
    assert emulated.value is not None
    assert deployed.value is not None
    assert emulated.value > 30
    assert deployed.value == pytest.approx(emulated.value, abs=1.0)


def test_a_value_comes_with_its_interval_and_pictures(tmp_path: Path) -> None:
    record = run_case("two_outputs", tmp_path, {})
    for each in record.variants:
        if each.name == "fp32":
            assert each.interval is None
            assert each.verdict is None
            continue
        assert each.value is not None
        assert each.interval is not None
        low, high = each.interval
        assert low < each.value < high
        assert each.samples == 24
        assert math.isclose(each.value - low, high - each.value, rel_tol=1e-6)


def test_a_target_inside_the_interval_is_met_within_noise(tmp_path: Path) -> None:
    easy = {"target": {"metric": "sqnr_db", "min": 1}}
    value = variant(run_case("two_outputs", tmp_path / "a", easy, outputs=["boxes"]), "tuned").value
    assert value is not None
    record = run_case(
        "two_outputs", tmp_path / "b", {"target": {"metric": "sqnr_db", "min": value - 0.01}},
        outputs=["boxes"],
    )  # fmt: skip
    assert (record.status, variant(record, "tuned").within_noise) == ("met", True)
    report = (next((tmp_path / "b").glob("judged-*")) / "report.md").read_text()
    assert "within the noise of 24 pictures" in report


def test_the_tuner_stops_after_so_many_evaluations(tmp_path: Path) -> None:
    record = run_case(
        "two_outputs", tmp_path, {"max_evaluations": 1, "target": {"metric": "sqnr_db", "min": 36}}
    )
    assert len(record.tuning) == 1
    assert record.status == "missed"


def test_it_says_how_many_pins_a_missed_target_takes(tmp_path: Path) -> None:
    record = run_case(
        "two_outputs",
        tmp_path,
        {"max_pins": 1, "target": {"metric": "sqnr_db", "min": 37}},
        calibration=AS_IT_IS,
    )
    assert record.status == "missed"
    assert record.pins_needed in (2, 3)
    assert [point.pins for point in record.front] == [0, 1]
    assert any("would meet the target" in note for note in record.notes)
