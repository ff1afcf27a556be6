#!/usr/bin/env python3
"""Peak memory of a whole run on a detector with large outputs, by the number of pictures.

    python benchmarks/memory.py                       # writes results/memory.md
    python benchmarks/memory.py --pictures 8 --pictures 500

A network of 640 x 640 pictures with some 60 MB of activations a picture and one output of 84 x 8400
(2.8 MB), made here. Each run is a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
SIDE, CLASSES = 640, 80
CALIBRATION = 32
CONFIG = """
version: 1
name: detector
model: {{path: detector.onnx}}
data:
  calibration: {{source: arrays, path: pictures.npy, take: {calibration}, batch: 4,
                preprocess: {{scale: 0.00392156862745098}}}}
  evaluation: {{path: pictures.npy, skip: {calibration}, take: {pictures}}}
calibration: {{method: {method}, prepare: {prepare}}}
compare: {{alone: {alone}, pictures: 8, memory: {memory}MiB}}
backends: [{{name: onnxruntime, lowering: emulate}}]
report: {{formats: [json], latency: null}}
"""


class Graph:
    """Convolutions with fixed weights, in the order they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def conv(self, x: str, cin: int, cout: int, size: int, stride: int = 1) -> str:
        """A convolution of normal weights, without a bias."""
        name = f"conv{len(self.nodes)}"
        values = self._rng.standard_normal((cout, cin, size, size)) / np.sqrt(cin * size * size)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), f"{name}_w"))
        self.nodes.append(helper.make_node("Conv", [x, f"{name}_w"], [name], name,
                                           pads=[size // 2] * 4, strides=[stride] * 2))  # fmt: skip
        return name

    def act(self, op: str, *inputs: str, **attributes: object) -> str:
        """Any other operator of one output."""
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name


def detector() -> onnx.ModelProto:
    """A backbone of five strides, heads at 80, 40 and 20 cells, all in one output N x 84 x 8400."""
    graph, channels = Graph(), 4 + CLASSES
    graph.weights.append(numpy_helper.from_array(np.array([0, channels, -1]), "shape"))
    x, width, heads = "images", 3, []
    for level, wider in enumerate((16, 24, 32, 48, 64)):
        x = graph.act("Relu", graph.conv(x, width, wider, 3, 2))
        y = graph.act("Relu", graph.conv(x, wider, wider, 3))
        x, width = graph.act("Add", x, graph.conv(y, wider, wider, 1)), wider
        if level >= 2:
            heads.append(graph.act("Reshape", graph.conv(x, wider, channels, 1), "shape"))
    graph.act("Concat", *heads, axis=2)
    graph.nodes[-1].output[0] = "predictions"
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (
            ("images", ["N", 3, SIDE, SIDE]),
            ("predictions", ["N", channels, 8400]),
        )
    ]
    made = helper.make_graph(graph.nodes, "detector", ports[:1], ports[1:], graph.weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def draw(path: Path, count: int) -> None:
    """`count` pictures of flat rectangles, uint8 [count, 640, 640, 3], written one at a time."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIDE, SIDE, 3))
    for row in rows:
        row[:] = rng.integers(0, 256, 3)
        for _ in range(12):
            top, left = rng.integers(0, SIDE - 40, 2)
            row[top : top + rng.integers(20, 300), left : left + rng.integers(20, 300)] = (
                rng.integers(0, 256, 3)
            )
    rows.flush()


class Peak:
    """The most anonymous memory of this process while in `with`, looked at every few ms.

    Pages of mapped files (pictures, FP32's kept outputs) are in the resident set too, but the
    system takes them back when it needs them.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            (line,) = (line for line in lines if line.startswith("RssAnon:"))
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def whole_run(folder: Path, pictures: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run everything in this process: seconds, peak resident set and peak anonymous memory."""
    from trtune.configs.load import load_config
    from trtune.configs.system.machine import peak_rss
    from trtune.run.pipeline import run

    onnx.save(detector(), folder / "detector.onnx")
    draw(folder / "pictures.npy", arguments.calibration + pictures)
    text = CONFIG.format(
        pictures=pictures,
        calibration=arguments.calibration,
        method=arguments.method,
        prepare="none" if arguments.short else "auto",
        alone="false" if arguments.short else "true",
        memory=arguments.memory,
    )
    (folder / "detector.yaml").write_text(text)
    started = time.perf_counter()
    with Peak() as peak:
        run(load_config(folder / "detector.yaml"), out=folder / "runs")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "resident": float(peak_rss()), "anonymous": float(peak.bytes)}


def measured(calibration: int, pictures: int, arguments: argparse.Namespace) -> dict[str, float]:
    """`whole_run` in a process of its own."""
    command = [sys.executable, __file__, "--one", "--pictures", str(pictures)]
    command += ["--method", arguments.method, "--memory", str(arguments.memory)]
    command += ["--calibration", str(calibration)]
    command += ["--short"] if arguments.short else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def page(rows: list[str], arguments: argparse.Namespace) -> str:
    """What `results/memory.md` says."""
    return (
        "# Memory by the number of pictures\n\n"
        "A whole run (`benchmarks/memory.py`): 640 x 640 detector, 70 MB of activations and 2.8 MB "
        f"of output a picture, method {arguments.method},\ncalibration.memory 2 GiB, "
        f"compare.memory {arguments.memory} MiB; {platform.machine()}.\n"
        "Anonymous memory is what cannot be taken back; the resident set has pages of mapped files "
        "too (pictures, and what FP32 gave\nbeyond 256 MB). Of what FP32 gave at most 256 MB are "
        "held: 45 MB of 16 pictures, 256 MB of 96 and of more. Of the calibration\npictures an "
        "eighth is held out, up to `holdout` and to calibration.memory with their activations, and "
        "what tables are compared\non takes 512 MiB at most, with as much for its outputs. "
        "`tests/test_memory.py` holds it with compare.memory at 128 MiB, of\nwhich a quarter keeps "
        "outputs: 68 pictures need no more than 8, though their outputs are 169 MB.\n\n"
        "| calibration pictures | evaluation pictures | anonymous, MB | resident set, MB | seconds "
        "|\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, action="append", help="evaluation pictures")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="and of calibration")
    parser.add_argument("--method", default="auto", help="calibration.method")
    parser.add_argument("--memory", type=int, default=1024, help="compare.memory, in MiB")
    parser.add_argument("--short", action="store_true", help="no preparation, no nodes alone")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    counts = [(arguments.calibration, count) for count in arguments.pictures or [16, 96]]
    if arguments.one:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(whole_run(Path(name), counts[0][1], arguments)))
        return
    if not arguments.pictures:
        counts += [(6 * arguments.calibration, 16)]
    rows = []
    for calibration, count in counts:
        found = measured(calibration, count, arguments)
        sizes = f"{found['anonymous'] / 1e6:.0f} | {found['resident'] / 1e6:.0f}"
        rows.append(f"| {calibration} | {count} | {sizes} | {found['seconds']:.0f} |")
        print(rows[-1], flush=True)
    if not arguments.pictures:
        (HERE / "results" / "memory.md").write_text(page(rows, arguments), encoding="utf-8")


if __name__ == "__main__":
    main()
