#!/usr/bin/env python3
"""How many evaluations and pins a 56-layer ResNet takes to a target 2 and 4 dB above no pins.

    python benchmarks/deep.py                       three networks
    python benchmarks/deep.py --seeds 5 --prepare auto

The networks are made here, with what trained ones have: weights with heavy tails, channels of
very different gain, residual branches that grow fainter with depth, ReLUs that are mostly off, a
classifier fitted (ridge regression) to CIFAR-10's labels. Each is run as `trtune run` does it, by
default without preparation, which would leave nothing to tune. Said are the plans that were
measured, the pins, and the value.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WIDTHS, BLOCKS, CLASSES, FITTED = (16, 32, 64), 9, 10, 256
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


class Builder:
    """A network that grows layer by layer, and what it makes of some pictures so far."""

    def __init__(self, seed: int, pictures: Array) -> None:
        self._rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values = {"input": pictures}

    def constant(self, name: str, array: Array) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node, run on the pictures."""
        node = helper.make_node(kind, inputs, [f"{name}_out"], name, **attributes)
        self.nodes.append(node)
        read = [n for n in inputs if n in self.values]
        held = [w for w in self.weights if w.name in inputs]
        typed = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in read]
        out = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)]
        alone = helper.make_model(
            helper.make_graph([node], name, typed, out, held),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
        session = onnxruntime.InferenceSession(
            alone.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {n: self.values[n] for n in read})
        self.values[f"{name}_out"] = found
        return f"{name}_out"

    def conv(
        self, source: str, width: int, name: str, *, size: int, stride: int, gain: float
    ) -> str:
        """A convolution with its batch norm folded: channels of the wanted mean and deviation."""
        rng, channels = self._rng, self.values[source].shape[1]
        weights = rng.standard_t(4, (width, channels, size, size)) / np.sqrt(channels * size * size)
        weights *= np.exp(rng.normal(0, 0.5, (1, channels, 1, 1)))
        raw = self.constant(f"{name}_raw", weights.astype(np.float32))
        options = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [size // 2] * 4}
        out = self.values[self.add("Conv", [source, raw], f"{name}_probe", **options)]
        self.nodes.pop()
        self.weights.pop()
        wanted = gain * np.exp(rng.normal(0, 0.6, width))
        factor = wanted / (out.std(axis=(0, 2, 3)) + 1e-6)
        offset = rng.normal(-0.3, 0.5, width) * wanted - out.mean(axis=(0, 2, 3)) * factor
        held = self.constant(
            f"{name}_w", (weights * factor[:, None, None, None]).astype(np.float32)
        )
        bias = self.constant(f"{name}_b", offset.astype(np.float32))
        return self.add("Conv", [source, held, bias], name, **options)


def network(path: Path, seed: int) -> None:
    """Write a 56-layer ResNet for 32 x 32 pictures to `path`."""
    with np.load(DATA / "cifar10_calib512.npz") as held:
        names = {held[name].ndim: held[name] for name in held.files}
    pixels, labels = names[4][:FITTED].astype(np.float32) / 255, names[1][:FITTED]
    pictures = (
        (pixels - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)
    ).transpose(0, 3, 1, 2)
    net = Builder(seed, np.ascontiguousarray(pictures))
    x = net.add("Relu", [net.conv("input", WIDTHS[0], "stem", size=3, stride=1, gain=1)], "relu")
    for stage, width in enumerate(WIDTHS):
        for block in range(BLOCKS):
            name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
            y = net.conv(x, width, f"{name}_conv1", size=3, stride=stride, gain=1)
            y = net.add("Relu", [y], f"{name}_relu1")
            y = net.conv(y, width, f"{name}_conv2", size=3, stride=1, gain=0.8 / (1 + block) ** 0.5)
            if stride == 2:
                x = net.conv(x, width, f"{name}_down", size=1, stride=2, gain=1)
            x = net.add("Relu", [net.add("Add", [y, x], f"{name}_add")], f"{name}_relu2")
    pooled = net.add("GlobalAveragePool", [x], "pool")
    flat = net.add("Flatten", [pooled], "flat")
    features = net.values[flat].astype(np.float64)
    wide = np.hstack([features, np.ones((len(features), 1))])
    targets = 10 * (np.eye(CLASSES)[labels] - 0.1)
    ridge = 0.1 * np.trace(wide.T @ wide) / wide.shape[1] * np.eye(wide.shape[1])
    fitted = np.linalg.solve(wide.T @ wide + ridge, wide.T @ targets).astype(np.float32)
    weights, bias = net.constant("fc_w", fitted[:-1].T), net.constant("fc_b", fitted[-1])
    logits = net.add("Gemm", [flat, weights, bias], "fc", transB=1)
    model = helper.make_model(
        helper.make_graph(
            net.nodes,
            "resnet56",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 32, 32])],
            [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["N", CLASSES])],
            net.weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, path)


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
