#!/usr/bin/env python3
"""The tuner against the best pair and the best triple that trying them all finds.

    python benchmarks/tuning.py                                        resnet20_cifar10
    python benchmarks/tuning.py mobilenetv2_cifar10 --near 24          others, by their config
    python benchmarks/tuning.py resnet20_cifar10 --set calibration.prepare=none

Brute force tries all pairs of the `--near` nodes that gain most alone in the quantized network (0:
of all nodes), and all triples of them, on one half of `--pictures` evaluation pictures; for each
pair only what lies behind the third node is run. The best of hundreds is so by chance too: what it
is worth is measured on the other half. Then the tuner's own search is asked for as much there: its
order comes from held-out calibration pictures, its values from the half that chose nothing. Said
are its pins and how many plans it measured. The data is found as in `accuracy.py`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from trtune.configs.load import load_config
from trtune.configs.progress import silent
from trtune.datasets.batches import Batch
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
from trtune.run.stages.pins import ranked_pictures
from trtune.run.tuning import alone_of
from trtune.run.work import RunWork, Setup
from trtune.run.workspace import Workspace

HERE = Path(__file__).resolve().parent
MOST_PINS = 16


def decibels(noise: float) -> float:
    return math.inf if noise <= 0 else -10 * math.log10(noise)


@dataclass(frozen=True)
class Problem:
    """A quantized network, the pictures that brute force chooses by, those that judge, and those
    that the tuner ranks on, with the noise of nodes that are quantized alone."""

    network: Quantizing
    plan: PrecisionPlan
    tried: Reference
    judged: Reference
    held: Reference
    alone: Mapping[str, float]

    @classmethod
    def of(cls, work: RunWork, pictures: int) -> Problem:
        setup, section = work.setup, work.setup.config.calibration
        table = work.calibrated.table
        network = Quantizing(work.model_for, work.subject.view, table, "cpu")

        def reference(held: tuple[Batch, ...]) -> Reference:
            return held_reference(network, work.untuned, held, memory=section.memory)

        drawn = hold_out(setup.evaluation.source, pictures)
        ranked = ranked_pictures(work.subject.view, section.holdout)
        alone = work.workspace.get(alone_of(work))
        return cls(
            network,
            work.untuned,
            reference(drawn[::2]),
            reference(drawn[1::2]),
            reference(hold_out(setup.calibration.source, ranked)),
            {node: 10 ** (-sums.sqnr_db / 10) for node, sums in alone.items()},
        )

    def behind(self, pins: Sequence[str], nodes: Sequence[str]) -> dict[str, float]:
        """Noise on the pictures that brute force has with `pins` and each of `nodes` besides."""
        plan = self.plan.pin(pins, "fp32", "", origin=TUNER)
        without = LeaveOneOut(self.network, plan, self.tried).without
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
            path = pin_path(
                self.network, self.plan, self.held, self.alone, limit=MOST_PINS, enough=enough
            )
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
            worth = noise_with(problem.network, problem.plan, problem.judged, best)
            tuned = problem.tuned(worth)
            lines.append(
                f"| {name} | {decibels(none):.2f} | best {what} of {len(sets)} | "
                f"{decibels(sets[best]):.2f} | {decibels(worth):.2f} | {size} | "
                f"{len(tuned.chosen.pinned)} | {tuned.chosen.score.value:.2f} | "
                f"{len(tuned.steps)} |"
            )
        print(f"{name}: {len(found)} sets of pins tried in {took:.0f} s", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["resnet20_cifar10"])
    parser.add_argument("--near", type=int, default=0, help="nodes that brute force tries; 0: all")
    parser.add_argument("--pictures", type=int, default=256, help="evaluation pictures that judge")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    told = parser.parse_args()
    print("| model | no pins, dB | brute force | where chosen, dB | dB | pins "
          "| tuner's pins | dB | evaluations |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name in told.names:
        lines = compare(name, told.overrides, near=told.near, pictures=told.pictures)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
