#!/usr/bin/env python3
"""Accuracy of calibrated and tuned models on real data, each case in a process of its own.

    python benchmarks/accuracy.py --all                 all cases
    python benchmarks/accuracy.py --methods             each shared model with each method, no pins
    python benchmarks/accuracy.py --precisions int8,fp8,mixed
                                                        each shared model in INT8, in FP8, and with
                                                        both on the tuner's ladder; and EfficientNet
                                                        with its outlier picture under plain max
    python benchmarks/accuracy.py --methods --limits    and what weights alone and activations
                                                        alone cost, beside what is reached
    python benchmarks/accuracy.py --only resnet20       those whose name holds a text
    python benchmarks/accuracy.py --jobs 4 --cores 4    several at a time, each on cores of its own
    python benchmarks/accuracy.py --peers PEERS.py      other tools on the same pictures as well

Each case is one config of `benchmarks/configs/` as `trtune run` takes it, some with another
method. `--peers` names a script that quantizes MODEL with TOOL METHOD and prints one JSON line.
The data is found through TRTUNE_DATA, or beside the checkout. `--json` names a file that gets every
row as it is measured, `--set KEY=VALUE` goes to every run; `--all` writes `results/accuracy.md`.
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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Queue
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
NO_PINS = ("precision.max_pins=0", "backends=[{name: onnxruntime, lowering: emulate}]")
PREPARED = "auto, prepared"
METHODS = {
    PREPARED: ("calibration.method=auto", "calibration.prepare=auto"),
    "auto": ("calibration.method=auto", "calibration.prepare=none"),
    **{
        name: (f"calibration.method={name}", "calibration.prepare=none")
        for name in ("entropy", "mse", "percentile", "max")
    },
}
"""How a model is calibrated without pins: as it is by default, and what that must not be behind."""

WANTED = {
    "resnet20_cifar10": (30.5, 89.6),
    "vit_cifar10": (30.0, 76.3),
    "mobilenetv2_cifar10": (30.5, 86.6),
    "efficientnet_b0_cifar10": (15.0, 85.0),
    "mobilenetv2_imagenet": (20.0, 84.3),
    "squeezenet1.1_imagenet": (30.5, None),
    "yolox_nano_coco_ap": (None, 30.0),
}
"""SQNR in dB and top-1 or AP in per cent that the default method is to reach."""
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
    Case("resnet20_cifar10_qat", "QAT as it is"),
    Case("mobilenetv2_cifar10_qat", "QAT as it is"),
    Case("mobilenetv2_imagenet_qat_uint8", "QAT made symmetric, top-1 of 82.5"),
    *(Case(name, "FP16, at most 0.2 points lost", FP16) for name in FLOAT),
    *(Case(name, "INT8 with FP16 around it", HALF_AROUND) for name in FLOAT[:4]),
)  # fmt: skip

METHOD_CASES = tuple(
    Case(name, label, (*overrides, *NO_PINS))
    for name in WANTED
    for label, overrides in METHODS.items()
)

LADDERS = {
    "int8": ("precision.default=int8",),
    "fp8": ("precision.default=fp8",),
    "mixed": ("precision.default=int8", "precision.ladder=[int8, fp8, fp16, fp32]"),
}
"""What `--precisions` measures. Only what is pinned above FP8 costs speed, and counts as a pin."""
OUTLIER_MODEL = "efficientnet_b0_cifar10"
OUTLIER = ("calibration.method=max", "calibration.prepare=none", "precision.max_pins=0")
ONE_BACKEND = ("backends=[{name: onnxruntime, lowering: emulate}]", "compare.alone=false")


def precision_cases(precisions: Sequence[str]) -> list[Case]:
    """Each shared model in each of `precisions`; SystemExit for one that is none of `LADDERS`."""
    unknown = [name for name in precisions if name not in LADDERS]
    if unknown:
        raise SystemExit(f"--precisions: {unknown[0]!r} is none of {', '.join(LADDERS)}")
    found = [
        Case(model, name, (*LADDERS[name], *ONE_BACKEND))
        for model in (*FLOAT, "yolox_nano_coco_ap")
        for name in precisions
    ]
    return found + [
        Case(OUTLIER_MODEL, f"{name}, plain max", (*LADDERS[name], *OUTLIER, *ONE_BACKEND))
        for name in precisions
        if name != "mixed"
    ]


PEERS = (("ort", "MinMax"), ("modelopt", "max"), ("modelopt", "entropy"))


@dataclass(frozen=True)
class Row:
    """One variant of one case; accuracies in per cent, `failed` says why there are none."""

    model: str
    case: str
    lowering: str
    variant: str
    value: float | None
    sqnr_db: float | None
    agreement: float | None
    pins: int
    status: str
    seconds: float
    failed: str = ""
    layers: str = ""
    """How many run in what."""


def run_case(case: Case, cores: frozenset[int]) -> list[Row]:
    """Run one config in a folder of its own, on `cores` if any are given."""
    command = [sys.executable, "-m", "trtune", "run", str(HERE / "configs" / f"{case.config}.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--json", "--out", folder]
        for override in case.overrides:
            command += ["--set", override]
        if cores:
            listed = ",".join(str(core) for core in sorted(cores))
            command = ["taskset", "-c", listed, *command]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        seconds = time.perf_counter() - started
    if done.returncode not in (0, 3):
        why = f"exit {done.returncode}: {done.stderr.strip()[-500:]}"
        return [Row(case.config, case.label, "", "", None, None, None, 0, "failed", seconds, why)]
    record: dict[str, Any] = json.loads(done.stdout)
    return [_row(case, variant, record["status"], seconds) for variant in record["variants"]]


def _row(case: Case, variant: dict[str, Any], status: str, seconds: float) -> Row:
    def per_cent(value: Any) -> float | None:
        return None if value is None else 100 * float(value)

    value = variant["top1"] if variant.get("top1") is not None else None
    if value is None and case.config.endswith("_ap"):
        value = variant["value"]
    return Row(
        case.config, case.label, variant["backend"].split("/")[-1], variant["name"],
        per_cent(value), None if variant["sqnr_db"] is None else float(variant["sqnr_db"]),
        per_cent(variant["agreement"]), len(variant["pinned"]), status, seconds,
        layers=", ".join(f"{n} {name}" for name, n in variant["nodes"].items() if n),
    )  # fmt: skip


HEADER = (
    *("model", "case", "lowering", "variant", "top-1 or AP %", "SQNR dB", "agree %", "pins"),
    *("target", "seconds", "layers"),
)


def _text(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def cells_of(row: Row) -> list[str]:
    return [
        row.model, row.case, row.lowering, row.variant, _text(row.value, 2), _text(row.sqnr_db, 2),
        _text(row.agreement, 1), str(row.pins), row.failed or row.status, f"{row.seconds:.0f}",
        row.layers,
    ]  # fmt: skip


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return ["| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines]


def methods_table(rows: Sequence[Row]) -> list[str]:
    """A line a model: FP32, what each method reaches, and what is wanted."""
    lines = []
    for model, (decibels, value) in WANTED.items():
        own = [row for row in rows if row.model == model]
        if not own:
            continue
        plain = next((row.value for row in own if row.variant == "fp32"), None)
        line = [model, _text(plain, 2)]
        for label in METHODS:
            found = [row for row in own if row.case == label and row.variant == "int8"]
            held = found[0] if found else None
            line.append(
                "" if held is None else f"{_text(held.sqnr_db, 2)} dB, {_text(held.value, 2)}"
            )
        wanted = ", ".join(
            text
            for text in (f"{decibels} dB" if decibels else "", f"{value}" if value else "")
            if text
        )
        seconds = [row.seconds for row in own if row.case == PREPARED]
        lines.append([*line, wanted, f"{seconds[0]:.0f}" if seconds else ""])
    header = ["model", "FP32", *METHODS, "wanted", "seconds, prepared"]
    return markdown(header, lines)


PARTS = (
    *("all, nearest codes", "all, rounded", "weights alone, nearest", "weights alone, rounded"),
    "activations alone",
)
"""The columns of the table of limits, as `limits.py` names them."""


def limits_of(model: str, cores: frozenset[int]) -> dict[str, dict[str, float]]:
    """What `limits.py` measures of a model, in a process of its own; nothing if it fails."""
    command = [sys.executable, str(HERE / "limits.py"), model, "--json"]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, sorted(cores))), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"limits of {model}: {done.stderr.strip()[-500:]}", flush=True)
        return {}
    found: dict[str, dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])["limits"]
    return found


def limits_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A line for each model as calibrated and as prepared."""
    lines = [
        [model, case, *(f"{parts[part]:.2f}" for part in PARTS)]
        for model, cases in found.items()
        for case, parts in cases.items()
    ]
    return markdown(["model", "", *PARTS], lines)


def peer_rows(script: Path, python: str, model: str) -> list[Row]:
    rows = []
    for tool, method in PEERS:
        command = [python, str(script), str(DATA / "models" / f"{model}.onnx"), tool, method]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        seconds = time.perf_counter() - started
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            why = done.stderr.strip()[-300:]
            rows.append(Row(model, "", tool, method, None, None, None, 0, "failed", seconds, why))
            continue
        found = json.loads(lines[-1])
        rows.append(
            Row(model, "", tool, method, 100 * found["top1"], float(found["sqnr_db"]),
                100 * found["agreement"], 0, "", float(found["seconds"]))
        )  # fmt: skip
    return rows


def report(
    rows: Sequence[Row],
    limits: Mapping[str, Mapping[str, Mapping[str, float]]],
    jobs: int,
    cores: int,
) -> str:
    each = f", {cores} cores a run, {jobs} at a time" if cores else ""
    labels = set(METHODS)
    others = [cells_of(row) for row in rows if row.case not in labels]
    parts = [
        f"# Accuracy\n\nMeasured {time.strftime('%Y-%m-%d')}, {platform.platform()}, "
        f"{platform.machine()}{each}, whole evaluation sets. Seconds are the wall time of the "
        "whole process, evaluations included.",
        "## By method, no pins, `emulate`",
        "\n".join(methods_table(rows)),
        *(
            [
                "## What weights alone and activations alone cost, dB",
                "\n".join(limits_table(limits)),
            ]
            if limits
            else []
        ),
        "## Other cases",
        "\n".join(markdown(HEADER, others)),
    ]
    return "\n\n".join(parts) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every case; writes results/accuracy.md")
    parser.add_argument("--methods", action="store_true", help="the cases by method alone")
    parser.add_argument("--precisions", default="", help="int8, fp8, mixed: those, with commas")
    parser.add_argument("--limits", action="store_true", help="weights and activations alone too")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for every run")
    parser.add_argument("--only", default="", help="cases whose config name holds this text")
    parser.add_argument("--label", default="", help="cases whose label is this text")
    parser.add_argument("--json", type=Path, help="a file for every row, written as it is measured")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--cores", type=int, default=0, help="cores a case is bound to; 0: all")
    parser.add_argument("--peers", type=Path, help="a script that runs other tools")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for --peers")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if not DATA.is_dir():
        raise SystemExit(f"the models and pictures are not at {DATA}: set TRTUNE_DATA")
    chosen: Sequence[Case] = METHOD_CASES if arguments.methods else (*METHOD_CASES, *CASES)
    if arguments.precisions:
        chosen = precision_cases(arguments.precisions.split(","))
    cases = [
        replace(case, overrides=(*case.overrides, *arguments.set))
        for case in chosen
        if arguments.only in case.config and arguments.label in ("", case.label)
    ]
    usable = sorted(os.sched_getaffinity(0))
    free: Queue[frozenset[int]] = Queue()
    for number in range(arguments.jobs):
        start = number * arguments.cores
        free.put(frozenset(usable[start : start + arguments.cores]))
    rows: list[Row] = []

    def one(case: Case) -> list[Row]:
        cores = free.get()
        try:
            return run_case(case, cores)
        finally:
            free.put(cores)

    def bounds(model: str) -> tuple[str, dict[str, dict[str, float]]]:
        cores = free.get()
        try:
            return model, limits_of(model, cores)
        finally:
            free.put(cores)

    print("\n".join(markdown(HEADER, [])), flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in as_completed([pool.submit(one, case) for case in cases]):
            rows += done.result()
            print("\n".join(markdown(HEADER, map(cells_of, done.result()))[2:]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    limits: dict[str, dict[str, dict[str, float]]] = {}
    if arguments.limits:
        wanted = [model for model in WANTED if arguments.only in model]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for model, found in pool.map(bounds, wanted):
                limits |= {model: found} if found else {}
                print("\n".join(limits_table({model: found})[2:]), flush=True)
    if arguments.peers:
        for model in dict.fromkeys(case.config for case in cases if case.config in FLOAT):
            rows += peer_rows(arguments.peers, arguments.peer_python, model)
    text = report(rows, limits, arguments.jobs, arguments.cores)
    print(text)
    if arguments.all:
        (HERE / "results" / "accuracy.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
