"""A run record and its layers, shaped like EfficientNet-B0 on CIFAR-10 with one broken picture."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trtune.reports.record import (
    Baseline,
    CalibrationRecord,
    DominantPicture,
    HistogramPlot,
    Latency,
    LayerRow,
    Outlier,
    RunRecord,
    TuningStep,
    Variant,
)

PINS = ["/features/features.1/features.1.0/block/block.0/Conv", "/classifier/classifier.1/Gemm"]


def make_layers(count: int) -> list[LayerRow]:
    """`count` layers with plausible errors; the first and last are pinned."""
    rng = np.random.default_rng(7)
    rows = []
    for index in range(count):
        block, part = divmod(index, 4)
        op = "Gemm" if index == count - 1 else "Conv"
        node = f"/features/features.{block // 3 + 1}/features.{block // 3 + 1}.{block % 3}"
        node += f"/block/block.{part}/{op}"
        node = {0: PINS[0], count - 1: PINS[1]}.get(index, node)
        pinned = node in PINS
        alone = float(18 + 20 * rng.random() + 8 * rng.random() ** 2)
        rows.append(
            LayerRow(
                node=node,
                op=op,
                shape=f"8x{16 + 8 * block}x{max(1, 32 >> block // 5)}x{max(1, 32 >> block // 5)}",
                macs=int(rng.integers(40_000, 9_000_000)),
                parameters=int(rng.integers(288, 400_000)),
                precision="fp32" if pinned else "int8",
                reason="pinned by tuning: 11.9 dB alone" if pinned else "default",
                origin="tuner" if pinned else "default",
                tensor=f"{node}_output_0",
                amax=float(np.exp(rng.normal(1.2, 1.0))),
                method=["entropy", "mse", "percentile", "max"][int(rng.integers(4))],
                accumulated_sqnr_db=float(34 - 14 * index / count + 5 * rng.normal()),
                accumulated_cosine=0.99,
                alone_sqnr_db=11.9 + index / count if pinned else alone,
                time_ms=None,
            )
        )
    return rows


def make_histogram(name: str, *, outlier: float, seed: int) -> HistogramPlot:
    """8-bin octaves over |x| of a SiLU-like tensor with one far value."""
    rng = np.random.default_rng(seed)
    x = np.abs(np.where(rng.random(200_000) < 0.6, 0.28, 3.0) * rng.normal(size=200_000))
    x = np.append(x, [outlier, outlier * 0.8])
    exponents = np.arange(-20, math.ceil(math.log2(x.max())) + 1)
    edges = np.concatenate([[0.0], (2.0 ** exponents[:, None] * (1 + np.arange(8) / 8)).ravel()])
    counts, _ = np.histogram(x, edges)
    return HistogramPlot(
        tensor=name,
        edges=edges.tolist(),
        counts=counts.tolist(),
        amax=float(np.quantile(x, 0.9999)),
        max=float(x.max()),
        method="entropy",
    )


def make_record() -> RunRecord:
    """Two backends, four tuning steps, two pins, one picture that dominates 45 tensors."""
    latency = {"runs": 50, "batch": 8}
    nodes = {"int8": 80, "fp16": 0, "fp32": 2}
    emulate, deploy = "onnxruntime/emulate", "onnxruntime/deploy"
    shared = {"value": 0.8485, "drop": 0.003, "sqnr_db": 21.4, "agreement": 0.9695}
    plain = {"value": 0.8345, "drop": 0.017, "sqnr_db": 15.2, "agreement": 0.9315}
    int8 = {"int8": 82, "fp16": 0, "fp32": 0}
    fp32 = {"int8": 0, "fp16": 0, "fp32": 82}
    variants = [
        Variant(name="fp32", backend=emulate, value=0.8515, drop=0.0, size_bytes=16_204_112,
                nodes=fp32, latency_ms=Latency(median=31.2, p95=33.0, **latency)),
        Variant(name="int8", backend=emulate, size_bytes=16_391_020, nodes=int8, **plain,
                latency_ms=Latency(median=58.1, p95=61.0, **latency)),
        Variant(name="tuned", backend=emulate, size_bytes=16_390_400, nodes=nodes, pinned=PINS,
                latency_ms=Latency(median=57.0, p95=60.2, **latency), **shared),
        Variant(name="fp32", backend=deploy, value=0.8515, drop=0.0, size_bytes=16_204_112,
                nodes=fp32, latency_ms=Latency(median=31.0, p95=33.4, **latency)),
        Variant(name="int8", backend=deploy, size_bytes=4_391_020, nodes=int8, **plain,
                latency_ms=Latency(median=15.9, p95=17.4, **latency)),
        Variant(name="tuned", backend=deploy, size_bytes=4_502_133, nodes=nodes, pinned=PINS,
                latency_ms=Latency(median=16.4, p95=17.8, **latency), **shared),
        Variant(name="int8", backend="tensorrt", value=None, pinned=PINS, not_honoured=[PINS[1]],
                reason="built, but there is no NVIDIA GPU here to run it"),
    ]  # fmt: skip
    steps = [
        ("start", [], 0.8345), ("pin", [PINS[0]], 0.843), ("pin", [*PINS], 0.8475),
        ("pin", [*PINS, "/features/features.0/features.0.0/Conv", "/a/b/Conv"], 0.8495),
        ("unpin", [*PINS, "/a/b/Conv"], 0.849), ("unpin", [*PINS], 0.8485),
        ("unpin-rejected", [PINS[1]], 0.8405),
    ]  # fmt: skip
    tuning = [
        TuningStep(step=i, action=a, pinned=p, value=v, builds=1, seconds=4.2, met=v >= 0.8465)
        for i, (a, p, v) in enumerate(steps)
    ]
    outliers = [
        Outlier(tensor=f"/features/features.{i}/block/act_{i}", item="321", max=812.5 / (i + 1),
                median_max=0.18229, ratio=4457.2 / (i + 1) ** 1.5, runner_up=2.1 + i)
        for i in range(18)
    ]  # fmt: skip
    histograms = [
        make_histogram(f"/features/features.{i}/block/block.0/Mul_output_0", outlier=o, seed=i)
        for i, o in enumerate((812.0, 9.0, 60.0, 14.0, 3000.0, 11.0))
    ]
    return RunRecord(
        schema=1,
        name="efficientnet_b0-cifar10-int8",
        key="9f2c41d07ab3",
        status="met",
        model={"path": "models/efficientnet_b0_cifar10.onnx", "opset": 17},
        target={"metric": "top1", "max_drop": 0.005},
        baseline=Baseline(metric="top1", value=0.8515, samples=2000),
        variants=variants,
        tuning=tuning,
        calibration=CalibrationRecord(
            method="auto", pictures=512, seconds=36.2, inference_seconds=10.9,
            peak_rss_bytes=812_000_000, tensors=131, search_seconds=21.4,
            methods={"entropy": 71, "mse": 38, "percentile": 22}, skipped=["broken_17.png"],
            dominant=[DominantPicture(item="321", tensors=45, worst_ratio=4457.2,
                                      worst_tensor="/features/features.0/block/act_0")],
            outliers=outliers,
        ),
        histograms=histograms,
        notes=["opset 11 was upgraded to 17: Q/DQ per channel needs 13"],
        command="trtune run efficientnet_b0_cifar10.yaml --set data.calibration.take=512",
        started="2025-03-02T09:41:07+00:00",
        seconds=187.4,
        versions={"trtune": "0.1.0", "onnxruntime": "1.22.0", "onnx": "1.18.0", "numpy": "2.2.6",
                  "python": "3.11.9", "platform": "Linux x86_64, 8 cores"},
        hashes={"model": "b1f0" * 16, "calibration data": "77ac" * 16, "config": "05de" * 16},
    )  # fmt: skip


@pytest.fixture(scope="session")
def record() -> RunRecord:
    return make_record()


@pytest.fixture(scope="session")
def layers() -> list[LayerRow]:
    return make_layers(82)
