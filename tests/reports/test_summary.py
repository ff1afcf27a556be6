from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from trtune.reports.record import (
    Baseline,
    CalibrationRecord,
    DominantPicture,
    Latency,
    RunRecord,
    Shipped,
    Speedup,
    Variant,
)
from trtune.reports.summary import (
    MINUS,
    change_text,
    count,
    decibels,
    headline,
    main_variant,
    metric_text,
    number,
    outlier_sentences,
    seconds_text,
    size_text,
    speedup,
    tail,
    target_text,
    target_value,
    three,
    verdict,
)


def make(
    *variants: Variant,
    metric: str = "top1",
    value: float | None = 0.8427,
    target: dict[str, object] | None = None,
    status: str = "met",
    calibration: CalibrationRecord | None = None,
) -> RunRecord:
    return RunRecord.model_validate(
        {
            "schema": 1,
            "name": "run",
            "key": "k",
            "status": status,
            "baseline": Baseline(metric=metric, value=value, samples=744),
            "variants": list(variants),
            "target": target,
            "calibration": calibration,
        }
    )


INT8 = Variant(
    name="int8",
    backend="onnxruntime/emulate",
    value=0.8172,
    drop=0.0255,
    nodes={"int8": 53, "fp16": 0, "fp32": 0},
)
TUNED = Variant(
    name="tuned",
    backend="onnxruntime/emulate",
    value=0.845,
    drop=-0.0023,
    nodes={"int8": 52, "fp16": 0, "fp32": 1},
    pinned=["a", "b"],
)


@pytest.mark.parametrize(
    ("metric", "drop", "text"),
    [
        pytest.param("top1", 0.0255, f"{MINUS}2.55", id="a loss is negative, in points"),
        pytest.param("agreement", -0.001, "+0.10", id="a gain is positive"),
        pytest.param("top1", 0.0, "0.00", id="nothing lost has no sign"),
        pytest.param("top1", 1e-9, "0.00", id="less than a hundredth of a point has no sign"),
        pytest.param("my.metric:iou", 0.25, f"{MINUS}0.25", id="another metric in its own unit"),
    ],
)
def test_change(metric: str, drop: float, text: str) -> None:
    assert change_text(metric, drop) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (metric_text("cosine", 0.99871234), "0.99871"),
        (metric_text("my:iou", 0.123456), "0.1235"),
        (decibels(-math.inf), f"{MINUS}∞ dB"),
        (decibels(-3.21), f"{MINUS}3.2 dB"),
        (number(-0.5), f"{MINUS}0.5"),
        (number(99_999.4), "99999"),
        (three(9.996), "10.0"),
        (three(99.96), "100"),
        (count(1234), "1.23 k"),
        (size_text(2_000_000_000), "2.00 GB"),
        (seconds_text(59.99), "60 s"),
        (tail("x" * 50, length=5), "…xxxx"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("record", "value", "text"),
    [
        pytest.param(
            make(target={"metric": "top1", "max_drop": 0.005}),
            0.8377,
            "top-1 of at least 83.77 % (no more than 0.5 points below FP32)",
            id="a drop in points",
        ),
        pytest.param(
            make(metric="sqnr_db", value=None, target={"metric": "sqnr_db", "min": 20.5}),
            20.5,
            "SQNR of at least 20.5 dB",
            id="a minimum",
        ),
        pytest.param(
            make(metric="m:iou", value=0.5, target={"metric": "m:iou", "max_drop": 0.1}),
            0.4,
            "iou of at least 0.4 (no more than 0.1 below FP32)",
            id="a drop of a user's metric",
        ),
        pytest.param(make(), None, "", id="no target"),
        pytest.param(
            make(value=None, target={"metric": "top1", "max_drop": 0.1}),
            None,
            "",
            id="no baseline to drop from",
        ),
    ],
)
def test_target(record: RunRecord, value: float | None, text: str) -> None:
    assert target_value(record) == pytest.approx(value)
    assert target_text(record) == text


@pytest.mark.parametrize(
    ("record", "line", "more"),
    [
        pytest.param(
            make(INT8, TUNED, target={"metric": "top1", "max_drop": 0.005}),
            "INT8 with 2 pins: top-1 84.50 % (FP32 84.27 %), 52 of 53 layers INT8 (98.1 %).",
            "The target, top-1 of at least 83.77 % (no more than 0.5 points below FP32), is met. "
            f"Without pins INT8 reaches 81.72 % ({MINUS}2.55 points).",
            id="tuned and met",
        ),
        pytest.param(
            make(INT8, target={"metric": "top1", "max_drop": 0.005}, status="missed"),
            "INT8 with no pins: top-1 81.72 % (FP32 84.27 %), 53 of 53 layers INT8.",
            "The target, top-1 of at least 83.77 % (no more than 0.5 points below FP32), "
            "is missed.",
            id="untuned and missed",
        ),
        pytest.param(
            make(Variant(name="qat", backend="onnxruntime", value=0.84), value=None),
            "QAT with no pins: top-1 84.00 %.",
            "",
            id="an imported model without a target, baseline or layers",
        ),
        pytest.param(
            make(INT8.model_copy(update={"nodes": {"fp32": 1}})),
            "INT8 with no pins: top-1 81.72 % (FP32 84.27 %), all 1 layer FP32.",
            "",
            id="nothing quantized",
        ),
        pytest.param(
            make(
                Variant(name="int8", backend="tensorrt", value=None, reason="no GPU here"),
                status="failed",
            ),
            "No quantized model was measured: no GPU here",
            "The run failed.",
            id="built only",
        ),
        pytest.param(make(status="failed"), "Nothing measured.", "The run failed.", id="nothing"),
    ],
)
def test_headline_and_verdict(record: RunRecord, line: str, more: str) -> None:
    assert headline(record) == line
    assert verdict(record) == more


def test_the_tuned_variant_that_was_measured_is_the_main_one() -> None:
    unmeasured = TUNED.model_copy(update={"backend": "tensorrt", "value": None})
    assert main_variant(make(INT8, unmeasured, TUNED)) == TUNED
    assert main_variant(make(INT8, unmeasured)) == INT8


@pytest.mark.parametrize(
    ("backend", "name", "batch", "expected"),
    [
        pytest.param("onnxruntime/deploy", "int8", 8, 2.0, id="deploy against its own FP32"),
        pytest.param("onnxruntime/emulate", "int8", 8, None, id="emulation has no speed"),
        pytest.param("onnxruntime/deploy", "int8", 1, None, id="another batch is no comparison"),
    ],
)
def test_speedup(backend: str, name: str, batch: int, expected: float | None) -> None:
    def variant(name: str, median: float, batch: int) -> Variant:
        latency = Latency(median=median, p95=median, runs=5, batch=batch)
        return Variant(name=name, backend=backend, value=0.5, latency_ms=latency)

    fp32, int8 = variant("fp32", 10.0, 8), variant(name, 5.0, batch)
    assert speedup(make(fp32, int8), int8) == expected
    assert speedup(make(fp32, int8), fp32) is None
    assert speedup(make(int8), int8) is None


@pytest.mark.parametrize(("median", "told"), [(9.0, False), (10.01, False), (12.5, True)])
def test_the_verdict_says_where_int8_is_slower_than_fp32(median: float, told: bool) -> None:
    def variant(name: str, median: float, backend: str = "onnxruntime/deploy") -> Variant:
        latency = Latency(median=median, p95=median, runs=5, batch=1)
        return Variant(name=name, backend=backend, value=0.5, latency_ms=latency)

    emulated = variant("tuned", 99.0, "onnxruntime/emulate")
    found = verdict(make(emulated, variant("fp32", 10.0), variant("tuned", median)))
    said = "does not pay on onnxruntime/deploy on this machine: 12.5 ms against 10 ms in FP32"
    assert (said in found) is told
    assert "emulate" not in found


@pytest.mark.parametrize(
    ("model", "speedup", "said"),
    [
        pytest.param(
            "fp32",
            Speedup(median=0.8, low=0.78, high=0.83, turns=10),
            "INT8 does not pay on onnxruntime/deploy on this machine: 12.5 ms against 10 ms in "
            "FP32 (0.78 to 0.83 times as fast in 10 turns, with 95 % confidence). So the model to "
            "ship there is FP32, in d/model.onnx; the quantized one is d/quantized/model.onnx.",
            id="slower",
        ),
        pytest.param(
            "quantized",
            Speedup(median=0.98, low=0.78, high=1.01, turns=10),
            "INT8 is no faster than FP32 on onnxruntime/deploy on this machine: 12.5 ms against "
            "10 ms in FP32 (0.78 to 1.01 times as fast in 10 turns, with 95 % confidence).",
            id="open",
        ),
        pytest.param(
            "quantized",
            Speedup(median=0.8, turns=2),
            "INT8 does not pay on onnxruntime/deploy on this machine: 12.5 ms against 10 ms in "
            "FP32, so the FP32 model is the one to ship there.",
            id="too few turns",
        ),
    ],
)
def test_the_verdict_says_what_was_shipped_and_what_that_rests_on(
    model: Literal["quantized", "fp32"], speedup: Speedup, said: str
) -> None:
    def variant(name: str, median: float, **more: Any) -> Variant:
        latency = Latency(median=median, p95=median, runs=50, batch=1)
        nodes, backend = {"int8": 3}, "onnxruntime/deploy"
        return Variant(
            name=name, backend=backend, value=0.5, latency_ms=latency, nodes=nodes, **more
        )

    shipped = Shipped(model=model, path="d/model.onnx", speedups={"quantized": speedup})
    tuned = variant("tuned", 12.5, shipped=shipped, path="d/quantized/model.onnx")
    assert said in verdict(make(variant("fp32", 10.0), tuned))


def test_the_headline_says_how_much_faster_where_that_is_known() -> None:
    latency = Latency(median=4.0, p95=5.0, runs=5, batch=1)
    fp32 = Variant(name="fp32", backend="onnxruntime/deploy", value=0.8427, latency_ms=latency)
    fast = INT8.model_copy(
        update={
            "backend": "onnxruntime/deploy",
            "latency_ms": latency.model_copy(update={"median": 2.0}),
        }
    )
    assert headline(make(fp32, fast)).endswith("53 of 53 layers INT8, 2.00 times as fast as FP32.")


def test_the_picture_that_dominates_has_its_sentence() -> None:
    calibration = CalibrationRecord(
        method="entropy", pictures=512, seconds=1, inference_seconds=1, peak_rss_bytes=1, tensors=9,
        dominant=[
            DominantPicture(item="321", tensors=45, worst_ratio=4457.3, worst_tensor="conv_2"),
            DominantPicture(item="7", tensors=1, worst_ratio=9.44, worst_tensor="x"),
        ],
    )  # fmt: skip
    assert outlier_sentences(make(calibration=calibration)) == [
        "picture 321 sets the range of 45 tensors, up to 4457 times the median (conv_2)",
        "picture 7 sets the range of 1 tensor, up to 9.4 times the median (x)",
    ]
    assert outlier_sentences(make()) == []
