#!/usr/bin/env python3
"""Accuracy of calibrated and tuned models on real data, each case in a process of its own.

    python benchmarks/accuracy.py                       all cases
    python benchmarks/accuracy.py --only resnet20       those whose name holds a text
    python benchmarks/accuracy.py --peers PEERS.py      other tools on the same pictures as well

Each case is one config of `benchmarks/configs/` as `trtune run` takes it, some with another
method. `--peers` names a script that quantizes MODEL with TOOL METHOD and prints one JSON line.
The data is found through TRTUNE_DATA, or beside the checkout. Writes `results/accuracy.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))


@dataclass(frozen=True)
class Case:
    config: str
    label: str
    overrides: tuple[str, ...] = ()


FLOAT = (
    *("resnet20_cifar10", "mobilenetv2_cifar10", "efficientnet_b0_cifar10", "vit_cifar10"),
    *("mobilenetv2_imagenet", "squeezenet1.1_imagenet"),
)
FP16 = (
    "precision.default=fp16",
    "precision.target={metric: top1, max_drop: 0.002}",
    "backends=[{name: onnxruntime}]",
)
DEFAULT = ("calibration.method=auto", "calibration.prepare=auto", "precision.target=null")
HALF_AROUND = ("precision.fallback=fp16",)

CASES = (
    Case("efficientnet_b0_cifar10", "entropy, no pins",
         ("calibration.method=entropy", "precision.target=null")),
    Case("efficientnet_b0_cifar10", "auto, at most 0.5 points lost"),
    Case("mobilenetv2_imagenet", "auto, 20.5 dB, at most 4 pins"),
    Case("squeezenet1.1_imagenet", "auto, top-1 of 61.3"),
    Case("mobilenetv2_cifar10", "entropy, at most 0.5 points lost, 4 pins"),
    Case("resnet20_cifar10", "entropy, at most 0.5 points lost, 4 pins"),
    Case("vit_cifar10", "entropy, at most 0.5 points lost, 4 pins"),
    Case("mobilenetv2_imagenet_deploy", "auto, at most 0.5 points lost on both"),
    Case("yolox_nano_coco", "entropy, 20 dB"),
    *(Case(name, "as it is by default, no pins", DEFAULT) for name in (*FLOAT, "yolox_nano_coco")),
    Case("resnet20_cifar10_qat", "QAT as it is"),
    Case("mobilenetv2_cifar10_qat", "QAT as it is"),
    Case("mobilenetv2_imagenet_qat_uint8", "QAT made symmetric, top-1 of 82.5"),
    *(Case(name, "FP16, at most 0.2 points lost", FP16) for name in FLOAT),
    *(Case(name, "INT8 with FP16 around it", HALF_AROUND) for name in FLOAT[:4]),
)  # fmt: skip

PEERS = (("ort", "MinMax"), ("modelopt", "max"), ("modelopt", "entropy"))


def run_case(case: Case, out: Path) -> dict[str, Any]:
    """Run one config; its record with the wall time of the whole process."""
    command = [sys.executable, "-m", "trtune", "run", str(HERE / "configs" / f"{case.config}.yaml")]
    command += ["--json", "--out", str(out)]
    for override in case.overrides:
        command += ["--set", override]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{case.config}: exit {done.returncode}\n{done.stderr[-3000:]}")
    record: dict[str, Any] = json.loads(done.stdout)
    return {**record, "wall_seconds": time.perf_counter() - started, "exit": done.returncode}


def rows_of(case: Case, record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for variant in record["variants"]:
        top1 = variant["top1"]
        rows.append([
            case.config, case.label, variant["backend"].split("/")[-1], variant["name"],
            "" if top1 is None else f"{100 * top1:.2f}",
            "" if variant["sqnr_db"] is None else f"{float(variant['sqnr_db']):.1f}",
            "" if variant["agreement"] is None else f"{100 * variant['agreement']:.1f}",
            str(len(variant["pinned"])), record["status"],
        ])  # fmt: skip
    return rows


def peer_rows(script: Path, python: str, model: str) -> list[list[str]]:
    rows = []
    for tool, method in PEERS:
        command = [python, str(script), str(DATA / "models" / f"{model}.onnx"), tool, method]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            rows.append([model, "", tool, method, "failed", "", "", "", ""])
            continue
        found = json.loads(lines[-1])
        rows.append([
            model, f"{found['seconds']} s", tool, method, f"{100 * found['top1']:.2f}",
            str(found["sqnr_db"]), f"{100 * found['agreement']:.1f}", "", "",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose config name holds this text")
    parser.add_argument("--peers", type=Path, help="a script that runs other tools")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for --peers")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"the models and pictures are not at {DATA}: set TRTUNE_DATA")
    header = [
        "model",
        "case",
        "lowering",
        "variant",
        "top-1 %",
        "SQNR dB",
        "agree %",
        "pins",
        "target",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.only not in case.config:
                continue
            rows = rows_of(case, run_case(case, Path(folder)))
            if arguments.peers and case.config not in seen:
                rows += peer_rows(arguments.peers, arguments.peer_python, case.config)
            seen.add(case.config)
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            print("\n".join(lines[-len(rows) :]), flush=True)
    if not arguments.only:
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        title = f"# Accuracy\n\nMeasured {time.strftime('%Y-%m-%d')}, {platform.platform()}.\n\n"
        (results / "accuracy.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
