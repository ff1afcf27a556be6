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
from trtune.run.speed import latency, placing
from trtune.run.speed.choice import decided

DEPLOY = "backends=[{name: onnxruntime, lowering: deploy}]"
TIMED = "report={formats: [json, csv, md], latency: {warmup: 0, runs: 50}}"
FEW = "report.latency={warmup: 0, runs: 5}"
PINNED = "precision.pin={n_conv1: fp32}"


def takes(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Mapping[str, float],
    *,
    spread: float = 0.01,
    tried: Mapping[str, tuple[str, ...]] | None = None,
) -> list[list[str]]:
    """Let inferences take `seconds`, a little more or less from turn to turn, and these placements
    be `tried`; gives what is timed each time."""
    asked: list[list[str]] = []

    def turns(calls: Mapping[str, Callable[[], object]], *, runs: int, **_: Any) -> latency.Turns:
        asked.append(list(calls))
        for call in calls.values():
            call()
        count = -(-runs // 5)
        swing = 1 + spread * np.linspace(-1, 1, count)
        taken = {name: seconds.get(name, seconds["tuned"]) for name in calls}
        return {name: [[taken[name] * s] * 5 for s in np.roll(swing, k)]
                for k, name in enumerate(calls)}  # fmt: skip

    monkeypatch.setattr(latency, "measure_turns", turns)
    monkeypatch.setattr(placing, "cheaper_placements", lambda *_, **__: dict(tried or {}))
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
    assert asked == [["fp32", "untuned", "tuned"], ["fp32", "quantized"]]
    (info,) = build(config, out=folder / "runs")
    assert info.path == place / "onnxruntime-deploy" / "model.onnx"
    assert not quantized(info.path)
    _, _, again = ran(folder, TIMED)
    assert len(asked) == 2
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


PLACES = {"partly 1": ("n_conv1",), "partly 2": ("n_conv1", "n_conv2")}


@pytest.mark.parametrize(
    ("one", "two", "model", "floats"),
    [
        pytest.param(0.009, 0.011, "partly", ["n_conv1"], id="the first is faster than FP32"),
        pytest.param(0.009, 0.008, "partly", ["n_conv1", "n_conv2"], id="the second more so"),
        pytest.param(0.0115, 0.0111, "fp32", [], id="none is faster than FP32"),
    ],
)
def test_layers_that_take_longer_in_int8_are_left_in_float(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one: float,
    two: float,
    model: str,
    floats: list[str],
) -> None:
    folder = write_project(tmp_path, tinymodels.residual())
    asked = takes(monkeypatch, {**SLOW, "partly 1": one, "partly 2": two}, tried=PLACES)
    config, place, record = ran(folder, TIMED)
    fp32, int8, tuned = record.variants
    assert asked[1] == ["fp32", "quantized", "partly 1", "partly 2"]
    assert tuned.shipped is not None
    assert (tuned.shipped.model, tuned.shipped.floats) == (model, floats)
    assert tuned.shipped.path == "onnxruntime-deploy/model.onnx"
    assert tuned.latency_ms is not None
    assert fp32.latency_ms is not None
    if model == "partly":
        assert tuned.nodes["int8"] == int8.nodes["int8"] - len(floats)
        assert int8.path == "onnxruntime-deploy/untuned/model.onnx"
        assert tuned.path == tuned.shipped.path
        assert tuned.pinned == []
        assert tuned.latency_ms.median == pytest.approx(1e3 * min(one, two), rel=0.05)
        said = (place / "report.md").read_text(encoding="utf-8")
        assert "left in FP32 on onnxruntime/deploy" in said
    (info,) = build(config, out=folder / "runs")
    assert info.path == place / "onnxruntime-deploy" / "model.onnx"
    assert len(asked) == 2


def test_the_choice_is_of_what_is_faster_beyond_the_noise() -> None:
    def turns(*ratios: float) -> list[list[float]]:
        return [[r] * 5 for r in ratios]

    steady = [1.0] * 10
    found = decided(
        {
            "fp32": turns(*steady),
            "quantized": turns(*(0.9 for _ in steady)),
            "partly 1": turns(*(0.7, 1.0) * 5),
        },
        {"partly 1": ("a",)},
        batch=1,
    )
    assert (found.model, found.floats) == ("quantized", ())
    assert found.speedups["quantized"].median == pytest.approx(1 / 0.9)
    assert set(found.latency) == {"fp32", "untuned", "tuned"}


def test_where_int8_is_slower_than_fp32_the_faster_placement_is_taken_though_turns_differ() -> None:
    steady = [[1.0]] * 10
    partly = [[r] for r in (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 1.2, 1.2, 1.2)]
    slower = [[1.02]] * 10
    turns = {"fp32": steady, "quantized": slower, "partly 1": partly}
    found = decided(turns, {"partly 1": ("a",)}, batch=1)
    assert (found.model, found.floats) == ("partly", ("a",))
    assert found.speedups["partly"].median == pytest.approx(1 / 0.9)


def test_real_times_of_nodes_give_placements_that_can_be_built(tmp_path: Path) -> None:
    """Nothing is injected here, and nothing is said of which it is."""
    folder = write_project(tmp_path, tinymodels.silu_se())
    _, place, record = ran(folder, TIMED)
    tuned = record.variants[-1]
    assert tuned.shipped is not None
    assert (place / tuned.shipped.path).is_file()
    assert tuned.sqnr_db is not None
    assert tuned.sqnr_db > 10
