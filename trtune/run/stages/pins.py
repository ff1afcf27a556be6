"""The order to pin in, as a stage: what un-quantizing nodes, or fp8 in the place of int8, gains in
the quantized network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress
from trtune.configs.system.cluster import Cluster
from trtune.datasets.holdout import hold_out
from trtune.precision.graph.macs import macs
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import Candidate
from trtune.precision.tune.leave_one_out import (
    Gains,
    PathStep,
    PinPath,
    Quantizing,
    Reference,
    float8_gains,
    held_reference,
    noise_with,
    pin_path,
)
from trtune.run.data import RunData
from trtune.run.stage import Stage, as_json, device_needs, versions

RANKING = 8_000_000_000
"""Multiply-accumulates that a node may be ranked on: 24 pictures of a MobileNet, 200 of 32 x 32."""
MOST = 10
"""Times as many pictures as are held out otherwise, at most."""

PATH = as_json(
    asdict, lambda value: PinPath(value["start"], tuple(PathStep(**s) for s in value["steps"]))
)
GAINS = as_json(asdict, lambda value: Gains(**value))


def ranked_pictures(view: GraphView, holdout: int) -> int:
    """How many pictures nodes are ranked on: `holdout`, and more where the network is small.

    On a few pictures the errors of two nodes cancel or add up by chance, by as much as 1 dB.
    """
    cost = sum(macs(view, node.name) for node in view.nodes)
    return max(holdout, min(MOST * holdout, RANKING // max(cost, 1)))


@dataclass(frozen=True)
class HeldOut:
    """A candidate on held-out pictures of `data`, which its pins are ranked on.

    `view` is that of its float model, and `model_for` gives what is lowered for a plan; `device`
    is where the networks run, on this machine or a `cluster`.
    """

    candidate: Candidate
    view: GraphView
    model_for: Callable[[PrecisionPlan], Model]
    data: RunData
    holdout: int
    memory: int
    device: str
    cluster: Cluster | None
    progress: Progress

    @property
    def table(self) -> CalibrationTable:
        """The scales; there are some where anything is int8."""
        assert self.candidate.table is not None
        return self.candidate.table

    @property
    def network(self) -> Quantizing:
        """How a plan becomes a network."""
        return Quantizing(self.model_for, self.view, self.table, self.device, self.cluster)

    @cached_property
    def reference(self) -> Reference:
        """The FP32 outputs on the pictures; computed when they are first asked for."""
        held_out = hold_out(self.data.source, ranked_pictures(self.view, self.holdout))
        return held_reference(
            self.network,
            self.candidate.plan,
            held_out,
            memory=self.memory,
        )

    def noise_of(self, pins: Sequence[str]) -> float:
        """Noise by signal with `pins`, of the output that suffers most."""
        return noise_with(self.network, self.candidate.plan, self.reference, pins)

    def gains(self) -> Stage[Gains]:
        """What moving each int8 node to fp8 gains."""

        def make(folder: Path) -> Gains:
            network = self.network
            plan, reference = self.candidate.plan, self.reference
            return float8_gains(network, plan, reference, progress=self.progress)

        return Stage("moves", self._needs(), make, GAINS)

    def _needs(self) -> dict[str, Any]:
        return {
            "model": self.candidate.model,
            "plan": self.candidate.plan,
            "scales": self.candidate.table,
            self.data.where: self.data.need,
            "calibration.holdout": self.holdout,
            "pictures": ranked_pictures(self.view, self.holdout),
            **versions("trtune", "onnx", "onnxruntime", "numpy"),
            **device_needs(self.device),
        }

    def path(self, alone: Mapping[str, float], *, limit: int, enough: float) -> Stage[PinPath]:
        """The order to pin in; `alone` is the noise of nodes that are quantized alone."""

        def make(folder: Path) -> PinPath:
            return pin_path(
                self.network,
                self.candidate.plan,
                self.reference,
                alone,
                limit=limit,
                enough=enough,
                progress=self.progress,
            )

        needs = {**self._needs(), "precision.max_pins": limit, "enough": f"{enough:.3g}"}
        return Stage("pins", needs, make, PATH)
