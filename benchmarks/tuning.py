#!/usr/bin/env python3
"""The tuner against the best pair and the best triple that trying them all finds.

    python benchmarks/tuning.py                                        resnet20_cifar10
    python benchmarks/tuning.py mobilenetv2_cifar10 --near 24          others, by their config
    python benchmarks/tuning.py resnet20_cifar10 --set calibration.prepare=none

Brute force tries all pairs of the `--near` nodes that gain most alone in the quantized network (0:
of all nodes), and all triples of them, on `--pictures` of the evaluation pictures; for each pair
only what lies behind the third node is run. Then the tuner's own search is asked for what the best
pair reaches, and for what the best triple does: its order comes from held-out calibration pictures,
its values from the same evaluation pictures as brute force. Said are its pins and how many plans it
measured. The data is found as in `accuracy.py`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from trtune.configs.load import load_config
from trtune.configs.progress import silent
from trtune.datasets.holdout import hold_out
from trtune.precision.compare.alone import in_parallel
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.tune.ladder import tune
from trtune.precision.tune.leave_one_out import (
    LeaveOneOut,
    Quantizing,
    Reference,
    held_reference,
    noise_with,
    pin_path,
)
from trtune.precision.tune.walk import Ranked, Score, Tuned
from trtune.run.work import RunWork, Setup
from trtune.run.workspace import Workspace

HERE = Path(__file__).resolve().parent
MOST_PINS = 16


def decibels(noise: float) -> float:
    return math.inf if noise <= 0 else -10 * math.log10(noise)


@dataclass(frozen=True)
class Problem:
    """A quantized network, the pictures that judge it, and those its pins are ranked on."""

    network: Quantizing
    plan: PrecisionPlan
    judged: Reference
    held: Reference

    @classmethod
    def of(cls, work: RunWork, pictures: int) -> Problem:
        setup, section = work.setup, work.setup.config.calibration
        table = work.calibrated.table
        network = Quantizing(work.model_for, work.subject.view, table, "cpu")

        def reference(source: object, count: int) -> Reference:
            held = hold_out(source, count)  # type: ignore[arg-type]
            return held_reference(network, work.untuned, held, memory=section.memory)

        return cls(
            network,
            work.untuned,
            reference(setup.evaluation.source, pictures),
            reference(setup.calibration.source, section.holdout),
        )

    def behind(self, pins: Sequence[str], nodes: Sequence[str]) -> dict[str, float]:
        """Noise on the judging pictures with `pins` and each of `nodes` besides."""
        plan = self.plan.pin(pins, "fp32", "", origin=TUNER)
        without = LeaveOneOut(self.network, plan, self.judged).without
        return dict(zip(nodes, in_parallel(without, list(nodes), what="pins"), strict=True))

    def brute_force(self, near: int) -> dict[tuple[str, ...], float]:
        """The noise with every pair, and every triple, of the `near` nodes that gain most alone."""
        single = self.behind([], list(self.plan.int8_nodes))
        nodes = sorted(single, key=lambda node: single[node])[: near or None]
        found: dict[tuple[str, ...], float] = {}
        for first in nodes:
            later = nodes[nodes.index(first) + 1 :]
            found |= {(first, n): noise for n, noise in self.behind([first], later).items()}
        for pair in combinations(nodes, 2):
            later = nodes[nodes.index(pair[1]) + 1 :]
            if later:
                found |= {(*pair, n): noise for n, noise in self.behind(pair, later).items()}
        return found

    def tuned(self, allowed: float) -> Tuned:
        """What the tuner finds where `allowed` noise is the target."""

        def evaluate(plan: PrecisionPlan) -> Score:
            pins = [n for n in plan.compute_nodes if plan.nodes[n].origin == TUNER]
            noise = noise_with(self.network, self.plan, self.judged, pins)
            loss = noise / allowed
            return Score(decibels(noise), loss <= 1 + 1e-9, loss=loss, noise=noise)

        def ranking(score: Score) -> Ranked:
            enough = 0.5 / (score.loss or 1.0)
            path = pin_path(self.network, self.plan, self.held, {}, limit=MOST_PINS, enough=enough)
            pins = tuple((step.node, "") for step in path.steps)

            def noise_of(chosen: Sequence[str]) -> float:
                return noise_with(self.network, self.plan, self.held, chosen)

            return Ranked(pins, path.noises, noise_of)

        return tune(self.plan, ranking, evaluate, max_pins=MOST_PINS, patience=2)


def compare(name: str, overrides: Sequence[str], *, near: int, pictures: int) -> list[str]:
    """Lines of a table: what brute force reaches, and with how many pins the tuner does."""
    config = load_config(HERE / "configs" / f"{name}.yaml", overrides=overrides)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        work = RunWork(Setup.of(config, silent), Workspace(Path(folder)))
        problem = Problem.of(work, pictures)
        started = time.perf_counter()
        found = problem.brute_force(near)
        took = time.perf_counter() - started
        none = noise_with(problem.network, problem.plan, problem.judged, [])
        for size, what in ((2, "pair"), (3, "triple")):
            sets = {pins: noise for pins, noise in found.items() if len(pins) == size}
            best = min(sets, key=lambda pins: sets[pins])
            tuned = problem.tuned(sets[best])
            lines.append(
                f"| {name} | {decibels(none):.2f} | best {what} of {len(sets)} | "
                f"{decibels(sets[best]):.2f} | {size} | {len(tuned.chosen.pinned)} | "
                f"{tuned.chosen.score.value:.2f} | {len(tuned.steps)} |"
            )
        print(f"{name}: {len(found)} sets of pins tried in {took:.0f} s", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["resnet20_cifar10"])
    parser.add_argument("--near", type=int, default=0, help="nodes that brute force tries; 0: all")
    parser.add_argument("--pictures", type=int, default=32, help="evaluation pictures that judge")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    told = parser.parse_args()
    print("| model | no pins, dB | brute force | dB | pins | tuner's pins | dB | evaluations |")
    print("|---|---|---|---|---|---|---|---|")
    for name in told.names:
        lines = compare(name, told.overrides, near=told.near, pictures=told.pictures)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
