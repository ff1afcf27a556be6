#!/usr/bin/env python3
"""INT8 on onnxruntime's integer CPU kernels (`deploy`) beside FP32: how fast, and where time goes.

    python benchmarks/deploy.py                       every float model of the data, in turns
    python benchmarks/deploy.py --profile MODEL ...   also milliseconds by operator of both

Each model is a process of its own: calibrated (entropy, 64 pictures), lowered, and both models then
take turns on the same batch, after a warm-up. The ratio is the median of the turns' ratios. SQNR is
that of the outputs of 64 further pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MODELS = {
    "resnet20_cifar10": 32,
    "mobilenetv2_cifar10": 32,
    "efficientnet_b0_cifar10": 32,
    "vit_cifar10": 32,
    "mobilenetv2_imagenet": 8,
    "squeezenet1.1_imagenet": 8,
    "yolox_nano_coco": 1,
}
"""The shared models that came in float, and the pictures of an inference."""


def profiled(model: Any, feeds: dict[str, Any], threads: int, *, integer: bool) -> dict[str, float]:
    """Milliseconds of an inference by operator, from onnxruntime's own profile of 20."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "0" if integer else "1")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        for _ in range(20):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 20e3
    return {name: round(ms, 3) for name, ms in spent.most_common() if ms > 0.001}


def sqnr(session: Any, other: Any, batches: list[dict[str, Any]]) -> float:
    """The decibels of the worst output of `other` against that of `session`."""
    signal: dict[int, float] = {}
    noise: dict[int, float] = {}
    for feeds in batches:
        pairs = zip(session.run(None, feeds), other.run(None, feeds), strict=True)
        for number, (a, b) in enumerate(pairs):
            signal[number] = signal.get(number, 0) + float(np.square(a, dtype=np.float64).sum())
            noise[number] = noise.get(number, 0) + float(np.square(a - b, dtype=np.float64).sum())
    return min(10 * float(np.log10(signal[n] / max(noise[n], 1e-30))) for n in signal)


def measure(name: str, threads: int, rounds: int, *, profile: bool) -> dict[str, Any]:
    """One model in this process."""
    from trtune import load_config
    from trtune.datasets.batches import rebatch
    from trtune.datasets.open import open_section
    from trtune.precision.graph.file import load_model
    from trtune.precision.graph.view import GraphView
    from trtune.precision.lower.deploy import lower_deploy
    from trtune.precision.plan.rules import make_plan
    from trtune.precision.runtime.session import make_session
    from trtune.precision.tune.scales import calibrate_model

    size = MODELS[name]
    config = load_config(HERE / "configs" / f"{name}.yaml", overrides=["data.calibration.take=64"])
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    plan = make_plan(view)
    source = open_section(config.data.calibration, model.inputs)
    table = calibrate_model(model, view, plan, source, lowerings=["deploy"], method="entropy").table
    lowered = lower_deploy(model, plan, table)
    given = config.data.evaluation.model_copy(update={"skip": 64, "take": 64})
    batches = [dict(b.feeds) for b in rebatch(iter(open_section(given, model.inputs)), size)]
    full = make_session(model.proto, threads=threads)
    ours = make_session(lowered, threads=threads, integer_kernels=True)
    feeds = batches[0]

    def seconds(session: Any, runs: int) -> float:
        began = time.perf_counter()
        for _ in range(runs):
            session.run(None, feeds)
        return (time.perf_counter() - began) / runs

    seconds(ours, 3)
    seconds(full, 3)
    runs = max(2, int(0.15 / seconds(full, 3)))
    turns = [(seconds(full, runs), seconds(ours, runs)) for _ in range(rounds)]
    found: dict[str, Any] = {
        "model": name,
        "batch": size,
        "fp32_ms": 1e3 * statistics.median(a for a, _ in turns),
        "int8_ms": 1e3 * statistics.median(b for _, b in turns),
        "speedup": statistics.median(a / b for a, b in turns),
        "range": [min(a / b for a, b in turns), max(a / b for a, b in turns)],
        "sqnr_db": sqnr(full, ours, batches),
        "int8": sum(p == "int8" for p in (plan.precision(n) for n in plan.compute_nodes)),
        "nodes": len(plan.compute_nodes),
    }
    if profile:
        found["profile_fp32"] = profiled(model.proto, feeds, threads, integer=False)
        found["profile_int8"] = profiled(lowered, feeds, threads, integer=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        (name,) = asked.models
        print(json.dumps(measure(name, asked.threads, asked.rounds, profile=asked.profile)))
        return
    found = []
    print("| model, pictures an inference | FP32 | INT8 | speed-up | SQNR |\n|---|---|---|---|---|")
    for name in asked.models or MODELS:
        command = [sys.executable, __file__, "--measure", name, "--threads", str(asked.threads)]
        command += ["--rounds", str(asked.rounds), *(["--profile"] if asked.profile else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr[-1500:]}", file=sys.stderr)
            continue
        one = json.loads(done.stdout.strip().splitlines()[-1])
        found.append(one)
        low, high = one["range"]
        print(
            f"| {name}, {one['batch']} | {one['fp32_ms']:.2f} ms | {one['int8_ms']:.2f} ms "
            f"| {one['speedup']:.2f} ({low:.2f} to {high:.2f}) | {one['sqnr_db']:.1f} dB |",
            flush=True,
        )
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
