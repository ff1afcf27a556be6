#!/usr/bin/env python3
"""By which yardstick a detector's pins are best chosen: AP with none to eight of them.

    python benchmarks/yardsticks.py
    python benchmarks/yardsticks.py --yardsticks groups,agreement --nodes 8 --pins 1   a quick look

Pins are chosen greedily on held-out calibration pictures, each the one that leaves least by the
yardstick in the quantized network, the six that promised most asked again behind each pin. groups:
noise of the worst group of columns (what trtune takes); whole: noise over all outputs; agreement:
detections above 0.3 that are not FP32's; closeness: 1 - AP with FP32's detections above 0.3 as the
objects. AP, and the standard error of its difference to FP32's, are of the evaluation pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trtune.configs.load import load_config
from trtune.configs.progress import silent
from trtune.datasets.batches import Batch
from trtune.datasets.holdout import hold_out
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.precision.tune.leave_one_out import LeaveOneOut, Quantizing, held_reference
from trtune.reports.accuracy import evaluate
from trtune.reports.measures.detection import (
    THRESHOLDS,
    AveragePrecision,
    DetectionAgreement,
    Reading,
)
from trtune.reports.outputs import Run
from trtune.run.work import RunWork, Setup
from trtune.run.workspace import Workspace

CONFIG = Path(__file__).resolve().parent / "configs" / "yolox_nano_coco_ap.yaml"
READING = Reading("yolox")
AGAIN = 6
SHOWN = (1, 2, 4, 6, 8)


def agreement(batches: Sequence[Batch], exact: Sequence[Any], found: Sequence[Any]) -> float:
    measure = DetectionAgreement(READING)
    for batch, theirs, mine in zip(batches, exact, found, strict=True):
        measure.update_pair(theirs, mine, batch)
    return 1 - measure.result()


def closeness(batches: Sequence[Batch], exact: Sequence[Any], found: Sequence[Any]) -> float:
    measure = AveragePrecision(THRESHOLDS, READING, "ap")
    for batch, theirs, mine in zip(batches, exact, found, strict=True):
        objects = tuple(
            np.column_stack([each.classes, each.boxes])
            for each in READING.detections(theirs, batch, score=0.3)
        )
        measure.update(mine, replace(batch, labels=objects))
    return 1 - measure.result()


def whole(batches: Sequence[Batch], exact: Sequence[Any], found: Sequence[Any]) -> float:
    pairs = [(e[name], f[name]) for e, f in zip(exact, found, strict=True) for name in e]
    signal = sum(float((e.astype(np.float64) ** 2).sum()) for e, _ in pairs)
    return sum(float(((e - f).astype(np.float64) ** 2).sum()) for e, f in pairs) / signal


YARDSTICKS: dict[str, Any] = {
    "groups": None,
    "whole": whole,
    "agreement": agreement,
    "closeness": closeness,
}


def value(work: RunWork, plan: PrecisionPlan) -> str:
    """AP of a plan on the evaluation pictures."""
    proto = lower_emulate(work.model_for(plan), plan, work.calibrated.table)
    with OrtEngine(partial(make_session, proto)) as engine:
        return average_precision(work, engine.infer)


def average_precision(work: RunWork, infer: Run) -> str:
    """AP of `infer` on the evaluation pictures, with the standard error of the difference to FP32;
    in per cent."""
    found = evaluate(
        infer,
        work.setup.evaluation.source,
        metric="ap",
        asked=work.bench.metric.asked,
        reference=work.bench.reference,
        fixed_batch=1,
        layout=work.bench.layout,
    )
    error = found.difference_error or 0.0
    return f"{100 * (found.value or 0.0):.2f} ±{100 * error:.2f}"


def chosen(work: RunWork, told: argparse.Namespace, yardstick: Any) -> list[str]:
    """The pins that a yardstick chooses, in order."""
    section, plan = work.setup.config.calibration, work.untuned
    network = Quantizing(work.model_for, work.subject.view, work.calibrated.table, "cpu")
    pictures = hold_out(work.setup.calibration.source, section.holdout)
    held = held_reference(network, plan, pictures, memory=section.memory)
    held = replace(held, yardstick=yardstick)
    left: dict[str, float] = {}
    pins: list[str] = []
    for _ in range(told.pins):
        within = LeaveOneOut(network, plan.pin(pins, "fp32", "", origin=TUNER), held)
        asked = sorted(left, key=lambda n: left[n])[:AGAIN] or plan.int8_nodes[: told.nodes or None]
        left |= {node: within.without(node) / max(within.noise, 1e-12) for node in asked}
        pins.append(min(left, key=lambda node: left[node]))
        del left[pins[-1]]
    return pins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yardsticks", default=",".join(YARDSTICKS))
    parser.add_argument("--pins", type=int, default=SHOWN[-1])
    parser.add_argument("--nodes", type=int, default=0, help="only so many nodes; 0: all")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    told = parser.parse_args()
    config = load_config(CONFIG, overrides=["calibration.prepare=none", *told.overrides])
    with tempfile.TemporaryDirectory() as folder:
        work = RunWork(Setup.of(config, silent), Workspace(Path(folder)))
        print(f"no pins: AP {value(work, work.untuned)}", flush=True)
        for name in told.yardsticks.split(","):
            pins = chosen(work, told, YARDSTICKS[name])
            for count in [n for n in SHOWN if n <= len(pins)]:
                plan = work.untuned.pin(pins[:count], "fp32", "", origin=TUNER)
                print(f"{name}, {count} pins: AP {value(work, plan)} {pins[:count]}", flush=True)


if __name__ == "__main__":
    main()
