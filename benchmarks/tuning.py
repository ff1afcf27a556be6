#!/usr/bin/env python3
"""The tuner's order of pins against the best pair that trying them all finds, on real networks.

    python benchmarks/tuning.py                     resnet20_cifar10
    python benchmarks/tuning.py mobilenetv2_cifar10 others, by the name of their config

Both are judged on the same held-out pictures, by noise at the output that suffers most: whatever a
pair of pins reaches must take the tuner no more than three. The data is found as in `accuracy.py`.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

from trtune.configs.load import load_config
from trtune.configs.progress import silent
from trtune.configs.system.machine import usable_cores
from trtune.run.stages.pins import HeldOut
from trtune.run.work import RunWork, Setup
from trtune.run.workspace import Workspace

HERE = Path(__file__).resolve().parent
NEAR = 20
"""Pairs are of the nodes that gain most alone in the quantized network, so many of them."""


def decibels(noise: float) -> float:
    return math.inf if noise <= 0 else -10 * math.log10(noise)


def compare(name: str) -> str:
    """One line: no pins, the tuner's first pins, and the best pair of all."""
    config = load_config(HERE / "configs" / f"{name}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        work = RunWork(Setup.of(config, silent), Workspace(Path(folder)))
        section = config.calibration
        held = HeldOut(
            work.candidate(work.untuned),
            work.subject.view,
            work.model_for,
            work.setup.calibration,
            section.holdout,
            section.memory,
            silent,
        )
        started = time.perf_counter()
        path = work.workspace.get(held.path({}, limit=3, enough=0.0))
        took = time.perf_counter() - started
        nodes = [step.node for step in path.steps][:NEAR]
        pairs = list(combinations(nodes, 2))
        _ = held.reference
        with ThreadPoolExecutor(usable_cores()) as pool:
            noises = list(pool.map(held.noise_of, pairs))
        best = min(range(len(pairs)), key=lambda k: noises[k])
    steps = ", ".join(f"{decibels(noise):.2f}" for noise in path.noises[:4])
    return (
        f"{name}: {steps} dB with 0 to 3 pins of the tuner, in {took:.0f} s; best of "
        f"{len(pairs)} pairs {decibels(noises[best]):.2f} dB ({', '.join(pairs[best])})"
    )


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["resnet20_cifar10"]:
        print(compare(chosen), flush=True)
