"""Which model of a backend is the one to deploy: timings are given here, and not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels
from tinyproject import config_of, record_of, write_project

from trtune.configs.schema import Config
from trtune.reports.record import RunRecord
from trtune.run.pipeline import build, run, run_folder
from trtune.run.speed import latency

DEPLOY = "backends=[{name: onnxruntime, lowering: deploy}]"
TIMED = "report={formats: [json, csv, md], latency: {warmup: 0, runs: 50}}"
FEW = "report.latency={warmup: 0, runs: 5}"
PINNED = "precision.pin={n_conv1: fp32}"


def takes(
    monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float], *, spread: float = 0.01
) -> list[list[str]]:
    """Let inferences take `seconds`, a little more or less from turn to turn; gives what is timed
    each time."""
    asked: list[list[str]] = []

    def turns(calls: Mapping[str, Callable[[], object]], *, runs: int, **_: Any) -> latency.Turns:
        asked.append(list(calls))
        for call in calls.values():
            call()
        count = -(-runs // 5)
        swing = 1 + spread * np.linspace(-1, 1, count)
        return {name: [[seconds[name] * s] * 5 for s in np.roll(swing, k)]
                for k, name in enumerate(calls)}  # fmt: skip

    monkeypatch.setattr(latency, "measure_turns", turns)
    return asked


SLOW = {"fp32": 0.010, "untuned": 0.012, "tuned": 0.0125}
FAST = {"fp32": 0.010, "untuned": 0.005, "tuned": 0.0055}


def ran(folder: Path, *overrides: str) -> tuple[Config, Path, RunRecord]:
    config = config_of(folder, DEPLOY, *overrides)
    record = run(config, out=folder / "runs")
    return config, run_folder(config, folder / "runs"), record


def quantized(path: Path) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("pin", [[], [PINNED]])
def test_a_slower_model_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: list[str]
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    takes(monkeypatch, SLOW)
    config, place, record = ran(folder, TIMED, *pin)
    fp32, _, tuned = record.variants
    assert tuned.shipped is not None
    assert (tuned.shipped.model, tuned.shipped.path) == ("fp32", "onnxruntime-deploy/model.onnx")
    assert tuned.shipped.speedups["quantized"].median == pytest.approx(0.8, rel=0.05)
    assert fp32.path == tuned.shipped.path
    assert tuned.path == "onnxruntime-deploy/quantized/model.onnx"
    assert tuned.nodes["int8"] > 0
    assert not quantized(place / fp32.path)
    assert quantized(place / tuned.path)
    assert "the model to ship there is FP32" in (place / "report.md").read_text(encoding="utf-8")
    given = np.load(folder / "evaluation.npz")
    feeds = {"input": given["input"][:8].astype(np.float32)}
    exact, shipped = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for path in (folder / "net.onnx", place / fp32.path)
    )
    np.testing.assert_allclose(shipped, exact, rtol=1e-5, atol=1e-6)
    assert record_of(config, folder)["variants"][2]["shipped"]["model"] == "fp32"


def test_a_faster_one_is_where_it_always_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    takes(monkeypatch, FAST)
    _, place, record = ran(folder, TIMED)
    tuned = record.variants[-1]
    assert tuned.shipped is not None
    assert tuned.shipped.model == "quantized"
    assert tuned.path == tuned.shipped.path == "onnxruntime-deploy/model.onnx"
    assert record.variants[0].path == "net.onnx"
    assert quantized(place / tuned.path)
    assert not (place / "onnxruntime-deploy" / "quantized").exists()


@pytest.mark.parametrize(
    ("overrides", "spread"),
    [
        pytest.param([FEW], 0.01, id="too few turns to say"),
        pytest.param([TIMED], 0.5, id="within the noise of the turns"),
    ],
)
def test_what_is_not_known_to_be_slower_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], spread: float
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    takes(monkeypatch, {"fp32": 0.01, "untuned": 0.0101, "tuned": 0.0101}, spread=spread)
    _, place, record = ran(folder, *overrides)
    tuned = record.variants[-1]
    assert (tuned.shipped is None) is (overrides == [FEW])
    assert tuned.shipped is None or tuned.shipped.model == "quantized"
    assert quantized(place / "onnxruntime-deploy" / "model.onnx")


def test_the_choice_is_kept_and_nothing_is_timed_or_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    asked = takes(monkeypatch, SLOW)
    config, place, record = ran(folder, TIMED)
    files = {p: p.stat().st_mtime_ns for p in (place / "onnxruntime-deploy").rglob("*")}
    assert len(asked) == 1
    (info,) = build(config, out=folder / "runs")
    assert info.path == place / "onnxruntime-deploy" / "model.onnx"
    assert not quantized(info.path)
    _, _, again = ran(folder, TIMED)
    assert len(asked) == 1
    assert {p: p.stat().st_mtime_ns for p in (place / "onnxruntime-deploy").rglob("*")} == files
    assert [v.path for v in again.variants] == [v.path for v in record.variants]


def test_another_measurement_can_choose_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    takes(monkeypatch, SLOW)
    ran(folder, TIMED)
    takes(monkeypatch, FAST)
    _, place, record = ran(folder, TIMED, "report.latency.runs=45")
    assert record.variants[-1].path == "onnxruntime-deploy/model.onnx"
    assert quantized(place / "onnxruntime-deploy" / "model.onnx")
    assert not (place / "onnxruntime-deploy" / "quantized").exists()


def test_what_nodes_run_in_is_still_told_of_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    takes(monkeypatch, SLOW)
    _, place, record = ran(folder, TIMED)
    assert record.variants[-1].account["int8"] > 0
    assert "onnxruntime/deploy: int8" in (place / "layers.csv").read_text(encoding="utf-8")
