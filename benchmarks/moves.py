#!/usr/bin/env python3
"""What scales and shifts of tensors cost in kernels: TensorRT-RTX engines, built without a GPU.

    python benchmarks/moves.py                     every shared model, for an 8.9 GPU
    python benchmarks/moves.py --only yolox

In each model every tensor is scaled, and shifted, that can be (by numbers that mean nothing, for it
is the kernels that are looked at): more than preparation would do. Writes `results/moves.md`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

import trtune
from trtune.calibrate.table import CalibrationTable
from trtune.datasets.open import open_section
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.rtx.log import read_kernels
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.prepare.affine import Affine, apply_affine, input_channels, may_shift
from trtune.precision.prepare.draft import Draft
from trtune.precision.runtime.api import Candidate
from trtune.precision.tune.preparing import Move, apply_moves, channel_tensors, extended_plan
from trtune.precision.tune.scales import calibrate_model

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))
MODELS = (
    *("resnet20_cifar10", "mobilenetv2_cifar10", "efficientnet_b0_cifar10", "vit_cifar10"),
    *("mobilenetv2_imagenet", "squeezenet1.1_imagenet", "yolox_nano_coco_ap"),
)
HEADER = (
    *("model", "moved", "of them without a node", "kernels before", "after"),
    *("planned INT8", "INT8 in the compiler's account", "not as planned"),
)


def every_move(model: Model, view: GraphView, plan: PrecisionPlan) -> list[Move]:
    """A scale for each tensor that allows one, and a shift where its readers allow it."""
    placement = place(view, plan)
    rng = np.random.default_rng(0)
    moves = []
    for tensor, axis in channel_tensors(view, placement).items():
        edges = placement.activations[tensor]
        channels = input_channels(view, view.by_name[edges[0][0]])
        scale = np.exp(rng.normal(0, 0.5, channels)).astype(np.float32)
        shift = 0.5 if may_shift(view, edges) else 0.0
        for affine in (
            Affine(tensor, edges, scale, shift, axis),
            Affine(tensor, edges, scale, 0.0, axis),
            Affine(tensor, edges, np.ones(channels, np.float32), shift, axis),
        ):
            if apply_affine(Draft(model), affine) is not None:
                moves.append(Move(affine, 1.0))
                break
    return moves


def kernels_of(
    model: Model, plan: PrecisionPlan, table: CalibrationTable, capability: str
) -> tuple[int, Counter[str], tuple[str, ...]]:
    """Kernels of the engine, what its planned INT8 nodes run in, and what is not as planned."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        backend = RtxBackend(compute_capabilities=[capability])
        info = backend.build(Candidate(model, plan, table), out)
        kernels = read_kernels((out / "build.log").read_text(encoding="utf-8", errors="replace"))
    ran = Counter(info.precisions.get(node, "unknown") for node in plan.int8_nodes)
    return len(kernels or ()), ran, tuple(info.not_honoured)


def row_of(name: str, capability: str) -> tuple[str, ...]:
    config = trtune.load_config(HERE / "configs" / f"{name}.yaml")
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    plan = make_plan(view)
    assert config.data is not None
    few = config.data.calibration.model_copy(update={"take": 8})
    source = open_section(few, model.inputs)
    before = calibrate_model(model, view, plan, source, method="max").table
    base, _, _ = kernels_of(model, plan, before, capability)
    moved, done = apply_moves(model, every_move(model, view, plan))
    new = GraphView.of(moved)
    extended = extended_plan(plan, new)
    table = calibrate_model(moved, new, extended, source, method="max").table
    after, ran, broken = kernels_of(moved, extended, table, capability)
    return (
        name,
        str(len(done)),
        str(sum(move.folded for move in done)),
        str(base),
        str(after),
        str(len(extended.int8_nodes)),
        str(ran["int8"]),
        "; ".join(broken) or "none",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name holds this text")
    parser.add_argument("--capability", default="8.9", help="compute capability to build for")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"the models and pictures are not at {DATA}: set TRTUNE_DATA")
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for name in MODELS:
        if arguments.only in name:
            lines.append("| " + " | ".join(row_of(name, arguments.capability)) + " |")
            print(lines[-1], flush=True)
    if not arguments.only:
        title = (
            f"# What moves cost\n\nBuilt {time.strftime('%Y-%m-%d')} with TensorRT-RTX "
            f"{version('tensorrt-rtx')} for compute capability {arguments.capability}, without a "
            "GPU: every tensor scaled and shifted that can be.\n\n"
        )
        (HERE / "results" / "moves.md").write_text(title + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
