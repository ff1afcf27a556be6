#!/usr/bin/env python3
"""How many evaluations and pins a 56-layer ResNet takes to a target 2 and 4 dB above no pins.

    python benchmarks/deep.py                       three networks
    python benchmarks/deep.py --seeds 5 --prepare auto

The networks are made here from the trained ResNet with 20 layers: each block that keeps the size
stands four times, its residual branch shared among them (what a deeper network computes as so many
smaller steps, few of which matter much), and every weight a little different. In `LOUD` of its
branches a channel is many times as large as the others, which the next weights take back: nothing
changes in FP32, and one scale for the whole tensor hurts, as it does where training left such
channels. Each is run as `trtune run` does it, by default without preparation, which would mend just
that. Said are the plans that were measured, the pins, and the value.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))
TRAINED, BLOCKS, STEPS, SPREAD = "resnet20_cifar10", 3, 4, 0.1
UNEVEN = 0.3
"""How evenly a branch is shared out (Dirichlet's parameter): one of the steps has most of it."""
LOUD, LOUDNESS = 3, 24.0
GAINS = (2.0, 4.0)
CONFIG = """version: 1
name: deep{seed}
extends: presets/cifar10.yaml
model: {{path: {model}}}
data:
  calibration: {{source: arrays, path: {data}/cifar10_calib512.npz, batch: 32}}
  evaluation: {{path: {data}/cifar10_test2000.npz, take: 1000}}
calibration: {{method: auto, prepare: {prepare}}}
precision: {{target: {{metric: sqnr_db, min: {least}}}, max_pins: {pins}}}
backends: [{{name: onnxruntime, lowering: emulate}}]
"""


def network(path: Path, seed: int) -> None:
    """Write a 56-layer ResNet for 32 x 32 pictures to `path`: of the trained one with 20 layers
    each block that keeps the size stands `STEPS` times, its residual branch shared among them."""
    rng = np.random.default_rng(seed)
    model = onnx.load(DATA / "models" / f"{TRAINED}.onnx")
    graph = model.graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    weights = dict(held)
    source: dict[str, str] = {}  # what stands for a tensor of the trained network by now
    for name, block in blocks(graph.node):
        steps = STEPS if name.isdigit() and int(name) % BLOCKS else 1
        shares = rng.dirichlet([UNEVEN] * steps)
        entry = next(t for t in block[0].input if t not in held)
        for step in range(steps):
            made = {o: f"{o}/{step}" if steps > 1 else o for node in block for o in node.output}
            for node in block:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.name = f"{node.name or node.output[0]}/{step}"
                copy.input[:] = [made.get(t, source.get(t, t)) for t in node.input]
                copy.output[:] = [made[o] for o in node.output]
                if node.op_type == "Conv" and steps > 1:
                    share = shares[step] if "/c2/" in node.output[0] else 1.0
                    for index in (1, 2):
                        value = held[node.input[index]] * share
                        noise = 1 + SPREAD * rng.standard_normal(value.shape)
                        copy.input[index] = f"{node.input[index]}/{step}"
                        weights[copy.input[index]] = (value * noise).astype(np.float32)
                nodes.append(copy)
            source[entry] = source[block[-1].output[0]] = made[block[-1].output[0]]
    make_loud(nodes, weights, rng)
    read = {t for node in nodes for t in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in weights.items() if name in read
    )
    del graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, path)


def make_loud(
    nodes: Iterable[onnx.NodeProto], weights: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    """Make one channel between the two convolutions of `LOUD` branches `LOUDNESS` times as large,
    and the weights that read it as much smaller: the same network in FP32, behind a ReLU."""
    convs = [node for node in nodes if node.op_type == "Conv"]
    inner = [
        (first, then)
        for first, then in pairwise(convs)
        if "/c1/" in first.output[0] and "/c2/" in then.output[0] and first.input[1] in weights
    ]
    for place in rng.choice(len(inner), LOUD, replace=False):
        first, then = inner[place]
        channel = rng.integers(len(weights[first.input[1]]))
        for tensor in first.input[1:]:
            weights[tensor] = weights[tensor].copy()
            weights[tensor][channel] *= LOUDNESS
        weights[then.input[1]] = weights[then.input[1]].copy()
        weights[then.input[1]][:, channel] /= LOUDNESS


def blocks(nodes: Iterable[onnx.NodeProto]) -> list[tuple[str, list[onnx.NodeProto]]]:
    """The nodes by the residual block that they belong to, as `/l/l.3/...` in their results says;
    "" for what is in none."""

    def block(node: onnx.NodeProto) -> str:
        match = re.match(r"/l/l\.(\d+)/", node.output[0])
        return match[1] if match else ""

    return [(name, list(found)) for name, found in groupby(nodes, key=block)]


def run(folder: Path, seed: int, least: float, pins: int, prepare: str) -> dict[str, Any]:
    """What `trtune run` records of one target."""
    config = folder / f"deep{seed}.yaml"
    model = folder / f"deep{seed}.onnx"
    config.write_text(
        CONFIG.format(seed=seed, model=model, data=DATA, prepare=prepare, least=least, pins=pins)
    )
    command = [sys.executable, "-m", "trtune", "run", str(config), "--json", "--force"]
    done = subprocess.run(
        [*command, "--out", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"seed {seed}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows_of(folder: Path, seed: int, prepare: str) -> list[str]:
    """A line of the table for each target of one network."""
    network(folder / f"deep{seed}.onnx", seed)
    plain = run(folder, seed, 0.0, 16, prepare)
    start = next(v["sqnr_db"] for v in plain["variants"] if v["name"] == "int8")
    lines = []
    for gain in GAINS:
        record = run(folder, seed, start + gain, 16, prepare)
        tuned = next(v for v in record["variants"] if v["name"] == "tuned")
        lines.append(
            f"| {seed} | {start:.2f} | +{gain:g} dB | {record['status']} | "
            f"{len(record['tuning'])} | {len(tuned['pinned'])} | {tuned['sqnr_db']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="networks to make")
    parser.add_argument("--prepare", default="none", help="calibration.prepare")
    told = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"the pictures are not at {DATA}: set TRTUNE_DATA")
    print("| seed | no pins, dB | target | | evaluations | pins | dB |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(told.seeds):
            print("\n".join(rows_of(Path(folder), seed, told.prepare)), flush=True)


if __name__ == "__main__":
    main()
