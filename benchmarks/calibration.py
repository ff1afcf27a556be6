#!/usr/bin/env python3
"""Time and memory of calibration beside plain inference and beside other tools.

    python benchmarks/calibration.py                           ours, on the CIFAR models
    python benchmarks/calibration.py --peers PEERS.py --all    and onnxruntime's and Model-Optimizer's

Every measurement is a process of its own. One of ours reads the model and the pictures, warms up
the compiled kernels, and then takes turns, `--repeats` times: plain onnxruntime FP32 inference over
the pictures (two threads, batches of 32), and calibration from batches to scales. The ratio is the
median of the ratios of a turn, so that a noisy machine hurts both sides alike. `--peers` names a
script that quantizes MODEL with TOOL METHOD and prints one JSON line with seconds and peak_rss_gb;
onnxruntime's Entropy takes 20 GB on some models and runs with `--all` only. The data is found
through TRTUNE_DATA, or beside the checkout. Writes `results/calibration.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))
MODELS = ("resnet20_cifar10", "mobilenetv2_cifar10", "vit_cifar10", "efficientnet_b0_cifar10")
PEERS = (("ort", "MinMax"), ("modelopt", "max"), ("modelopt", "entropy"))
HUNGRY = (("ort", "Entropy"),)
HEADER = ("model", "tool", "method", "pictures", "seconds", "x FP32 inference", "peak GB", "x ours")


def measure(name: str, method: str, pictures: int, repeats: int) -> dict[str, Any]:
    """Time one model in this process: medians of seconds, of turn-by-turn ratios, peak memory."""
    from trtune import load_config
    from trtune.datasets import Batch
    from trtune.inputs import open_data
    from trtune.precision.backends.onnxruntime import make_session
    from trtune.precision.calibration import calibrate_model
    from trtune.precision.graph import GraphView, load_model
    from trtune.precision.plan import make_plan

    overrides = [f"data.calibration.take={pictures}", "data.calibration.batch=32"]
    config = load_config(HERE / "configs" / f"{name}.yaml", overrides=overrides)
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    batches = [
        Batch({n: a.copy() for n, a in b.feeds.items()}, b.items)
        for b in open_data(config.data.calibration, model)
    ]

    class Held:
        """The decoded pictures: decoding is nobody's time here."""

        count = sum(map(len, batches))
        identity, skipped = "benchmark", ()

        def __iter__(self) -> Iterator[Batch]:
            return iter(batches)

    session = make_session(model.proto, threads=2)

    def infer() -> float:
        started = time.perf_counter()
        for batch in batches:
            session.run(None, dict(batch.feeds))
        return time.perf_counter() - started

    def calibrate() -> float:
        started = time.perf_counter()
        calibrate_model(model, view, make_plan(view), Held(), method=method)
        return time.perf_counter() - started

    infer()
    calibrate()
    turns = [(infer(), calibrate()) for _ in range(repeats)]
    return {
        "model": name,
        "method": method,
        "pictures": Held.count,
        "inference": statistics.median(plain for plain, _ in turns),
        "seconds": statistics.median(ours for _, ours in turns),
        "ratio": statistics.median(ours / plain for plain, ours in turns),
        "best_ratio": min(ours / plain for plain, ours in turns),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def ours(name: str, method: str, pictures: int, repeats: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, method, str(pictures), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peer(script: Path, python: str, name: str, tool: str, method: str) -> dict[str, Any] | None:
    """One run of another tool, or None if it failed (out of memory, say)."""
    command = [python, str(script), str(DATA / "models" / f"{name}.onnx"), tool, method]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def rows_of(name: str, arguments: argparse.Namespace) -> list[list[str]]:
    """The table's rows for one model; each is printed as it comes."""
    found = ours(name, arguments.method, 512, arguments.repeats)
    few = ours(name, arguments.method, 64, 1)
    best = f"{found['ratio']:.2f} (best {found['best_ratio']:.2f})"
    memory = f"{found['peak_rss_gb']:.2f} ({few['peak_rss_gb']:.2f} for 64 pictures)"
    pictures = str(found["pictures"])
    rows = [
        [name, "onnxruntime FP32", "", pictures, f"{found['inference']:.2f}", "1", "", ""],
        [name, "trtune", arguments.method, pictures, f"{found['seconds']:.2f}", best, memory, "1"],
    ]
    for tool, method in (*PEERS, *(HUNGRY if arguments.all else ())) if arguments.peers else ():
        result = peer(arguments.peers, arguments.peer_python, name, tool, method)
        if result is None:
            rows.append([name, tool, method, pictures, "failed", "", "", ""])
            continue
        seconds = result["seconds"]
        rows.append([
            name, tool, method, str(result["pictures"]), f"{seconds:.1f}",
            f"{seconds / found['inference']:.1f}", f"{result['peak_rss_gb']:.2f}",
            f"{seconds / found['seconds']:.1f}",
        ])  # fmt: skip
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        name, method, pictures, repeats = sys.argv[2:6]
        print(json.dumps(measure(name, method, int(pictures), int(repeats))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="config names")
    parser.add_argument("--method", default="entropy", help="our method (auto for ImageNet)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="a script that runs other tools")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for --peers")
    parser.add_argument("--all", action="store_true", help="also what takes 20 GB of memory")
    parser.add_argument("--append", action="store_true", help="add to results/calibration.md")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"the models and pictures are not at {DATA}: set TRTUNE_DATA")
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for name in arguments.models:
        lines += ["| " + " | ".join(row) + " |" for row in rows_of(name, arguments)]
    path = HERE / "results" / "calibration.md"
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") + "\n" if arguments.append and path.is_file() else ""
    title = (
        f"Measured {time.strftime('%Y-%m-%d')}, {platform.platform()}, {os.cpu_count()} cores.\n"
    )
    heading = "" if before else "# Calibration: time and memory\n\n"
    path.write_text(before + heading + title + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
