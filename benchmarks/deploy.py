#!/usr/bin/env python3
"""INT8 on onnxruntime's integer CPU kernels (`deploy`) beside FP32: how fast, and where time goes.

    python benchmarks/deploy.py                       every float model of the data, in turns
    python benchmarks/deploy.py --profile MODEL ...   also milliseconds by operator of both

Each model is a process of its own: calibrated (entropy, 64 pictures) and lowered, all in INT8 and
with those layers in float that take longer in INT8 by their measured times, as a run does it. All
then take turns on the same batch, after a warm-up. A speed-up is the median of the turns' ratios,
with its 95 % interval; what is shipped is what a run would ship. SQNR is that of the INT8 model
chosen, on the outputs of 64 further pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

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
    from trtune.calibrate.sessions import open_session

    with tempfile.TemporaryDirectory() as folder:
        session = open_session(
            model.SerializeToString(),
            threads=threads,
            integer_kernels=integer,
            profile=Path(folder) / "profile",
        )
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
    from trtune.precision.backends.ort.backend import OnnxruntimeBackend
    from trtune.precision.graph.file import load_model
    from trtune.precision.graph.view import GraphView
    from trtune.precision.plan.rules import make_plan
    from trtune.precision.runtime.api import Candidate
    from trtune.precision.runtime.session import make_session
    from trtune.precision.tune.scales import calibrate_model
    from trtune.reports.latency import BURST, measure_turns
    from trtune.run.speed.choice import decided
    from trtune.run.speed.placing import cheaper_placements, faster_in_float

    size = MODELS[name]
    config = load_config(HERE / "configs" / f"{name}.yaml", overrides=["data.calibration.take=64"])
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    plan = make_plan(view)
    source = open_section(config.data.calibration, model.inputs)
    table = calibrate_model(model, view, plan, source, lowerings=["deploy"], method="entropy").table
    given = config.data.evaluation.model_copy(update={"skip": 64, "take": 64})
    batches = [dict(b.feeds) for b in rebatch(iter(open_section(given, model.inputs)), size)]
    backend, feeds = OnnxruntimeBackend("deploy", threads=threads), batches[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = {"quantized": Path(folder) / "quantized"}
        whole = Candidate(model, plan, table)
        info = backend.build(whole, paths["quantized"])
        tried = cheaper_placements(whole, view, backend, info, feeds, batch=size)
        for label, floats in tried.items():
            paths[label] = Path(folder) / label
            partly = Candidate(model, faster_in_float(plan, floats), table)
            backend.build(partly, paths[label])
        sessions = {"fp32": make_session(model.proto, threads=threads)}
        for label, path in paths.items():
            file = path / "model.onnx"
            sessions[label] = make_session(file, threads=threads, integer_kernels=True)
        calls = {label: partial(one.run, None, feeds) for label, one in sessions.items()}
        turns = measure_turns(calls, warmup=3, runs=rounds * BURST)
        alone = decided(turns, {}, batch=size)
        plain = (alone.speedups["quantized"].low or 0.0) > 1  # then a run tries nothing else
        chosen = alone if plain else decided(turns, tried, batch=size)
        best = next((k for k, floats in tried.items() if floats == chosen.floats), "quantized")
        found: dict[str, Any] = {
            "model": name,
            "batch": size,
            "fp32_ms": chosen.latency["fp32"].median,
            "int8_ms": 1e3 * statistics.median(t for turn in turns["quantized"] for t in turn),
            "speedups": {label: one.model_dump() for label, one in chosen.speedups.items()},
            "shipped": chosen.model,
            "floats": len(chosen.floats),
            "sqnr_db": sqnr(sessions["fp32"], sessions[best], batches),
            "int8": sum(p == "int8" for p in (plan.precision(n) for n in plan.compute_nodes)),
            "nodes": len(plan.compute_nodes),
        }
        if profile:
            lowered = onnx.load(paths[best] / "model.onnx")
            found["profile_fp32"] = profiled(model.proto, feeds, threads, integer=False)
            found["profile_int8"] = profiled(lowered, feeds, threads, integer=True)
    return found


def line(one: dict[str, Any]) -> str:
    """A row of the table: all in INT8, and what a run would ship."""
    whole = one["speedups"]["quantized"]
    taken = one["speedups"].get(one["shipped"], {"median": 1.0, "low": 1.0, "high": 1.0})
    ships = {
        "quantized": "all in INT8",
        "partly": f"{one['floats']} of {one['int8']} in float",
        "fp32": "FP32",
    }[one["shipped"]]
    whole_text, taken_text = (
        f"{s['median']:.2f} ({s['low']:.2f} to {s['high']:.2f})" for s in (whole, taken)
    )
    return (
        f"| {one['model']}, {one['batch']} | {one['fp32_ms']:.2f} ms | {one['int8_ms']:.2f} ms "
        f"| {whole_text} | {ships} | {taken_text} | {one['sqnr_db']:.1f} dB |"
    )


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
    columns = ("model, pictures an inference", "FP32", "INT8", "speed-up", "shipped", "speed-up")
    print(f"| {' | '.join((*columns, 'SQNR'))} |\n{'|---' * 7}|")
    for name in asked.models or MODELS:
        command = [sys.executable, __file__, "--measure", name, "--threads", str(asked.threads)]
        command += ["--rounds", str(asked.rounds), *(["--profile"] if asked.profile else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr[-1500:]}", file=sys.stderr)
            continue
        one = json.loads(done.stdout.strip().splitlines()[-1])
        found.append(one)
        print(line(one), flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
