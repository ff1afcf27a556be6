#!/usr/bin/env python3
"""Calibration on a GPU: seconds over plain inference on the same GPU, and against the CPU.

usage: gpu.py [--data DIR] [--cpu] [--out FILE.json] [CASE ...]
       gpu.py --whole [--out FILE.json]

Each case runs the network on batches of random pictures: plain (the outputs alone, inputs and
outputs bound to the device's memory), then while every tensor that would carry a scale is counted.
Both are the median of several rounds in one process. `--cpu` also times calibration on the CPU.
Networks that --data does not hold are left out; resnet50 is made here, with random weights.

`--whole` runs everything for resnet50 (method auto, preparation, comparison, tuning) first on the
GPU and then on the CPU of the same machine, each in a process of its own, and tells the stages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtune.calibrate.collect import collect
from trtune.calibrate.gpu.memory import cuda_core
from trtune.calibrate.sessions import open_session
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch
from trtune.precision.graph.file import load_model, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.run.stages.engines import cpu_model

CASES = {  # name: file, pictures an inference, height and width, batches
    "resnet50 b64": ("", 64, 224, 8),
    "resnet50 b16": ("", 16, 224, 16),
    "mobilenetv2 b64": ("mobilenetv2_imagenet.onnx", 64, 224, 8),
    "vit_cifar10 b64": ("vit_cifar10.onnx", 64, 32, 32),
    "yolox_nano b1": ("yolox_nano_coco.onnx", 1, 416, 64),
}

MORE = 10


def resnet50() -> onnx.ModelProto:
    """ResNet-50 (v1.5, batch norm folded) with random weights, input `input` N x 3 x 224 x 224."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def const(name: str, value: NDArray[Any]) -> str:
        weights.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def conv(x: str, out: str, cin: int, cout: int, k: int, stride: int = 1) -> str:
        scale = (2 / (cin * k * k)) ** 0.5
        w = const(f"{out}_w", rng.standard_normal((cout, cin, k, k)) * scale)
        b = const(f"{out}_b", rng.standard_normal(cout) * 0.1)
        return op("Conv", x, w, b, out=out, kernel_shape=[k, k], pads=[k // 2] * 4,
                  strides=[stride, stride])  # fmt: skip

    x = op("Relu", conv("input", "stem", 3, 64, 7, 2), out="stem_relu")
    x = op("MaxPool", x, out="pool", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    cin = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
            y = op("Relu", conv(x, f"{name}a", cin, width, 1), out=f"{name}a_relu")
            y = op("Relu", conv(y, f"{name}b", width, width, 3, stride), out=f"{name}b_relu")
            y = conv(y, f"{name}c", width, 4 * width, 1)
            skip = x if block else conv(x, f"{name}d", cin, 4 * width, 1, stride)
            x = op("Relu", op("Add", y, skip, out=f"{name}_sum"), out=f"{name}_out")
            cin = 4 * width
    x = op("Flatten", op("GlobalAveragePool", x, out="mean"), out="flat")
    w = const("fc_w", rng.standard_normal((1000, 2048)) * 0.02)
    op("Gemm", x, w, const("fc_b", np.zeros(1000)), out="logits", transB=1)
    shape = ["N", 3, 224, 224]
    graph = helper.make_graph(
        nodes, "resnet50", [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Pictures:
    """Random pictures, made once. A `BatchSource`."""

    identity, skipped = "random", ()

    def __init__(self, name: str, step: int, size: int, batches: int) -> None:
        rng = np.random.default_rng(1)
        arrays = [rng.standard_normal((step, 3, size, size)).astype(np.float32) for _ in range(2)]
        self.count = step * batches
        self._name, self._step, self._arrays, self._batches = name, step, arrays, batches

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._batches):
            items = tuple(f"{number * self._step + i:06d}" for i in range(self._step))
            yield Batch({self._name: self._arrays[number % 2]}, items, None)


def plain_inference(model: onnx.ModelProto, source: Pictures) -> Callable[[], float]:
    """A function that runs all batches on the GPU and gives the seconds it took."""
    device = cuda_core().Device(0)
    device.set_current()
    stream = device.create_stream()
    session = open_session(model.SerializeToString(), device="cuda:0", stream=int(stream.handle))
    binding = session.io_binding()
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    first = next(iter(source))
    held = {n: ort.OrtValue.ortvalue_from_numpy(a, "cuda", 0) for n, a in first.feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)

    def run() -> float:
        start = time.perf_counter()
        for _ in source:
            session.run_with_iobinding(binding, run_options)
        stream.sync()
        return time.perf_counter() - start

    return run


def machine() -> dict[str, Any]:
    """What the figures are of."""
    return {
        "gpu": cuda_core().Device(0).name,
        "host": cpu_model(),
        "cores": usable_cores(),
        "onnxruntime": ort.__version__,
    }


def measured(name: str, data: Path, *, cpu: bool, rounds: int) -> dict[str, Any] | None:
    file, step, size, batches = CASES[name]
    if file and not (data / "models" / file).is_file():
        return None
    model = load_model(data / "models" / file) if file else model_from_proto(resnet50())
    view = GraphView.of(model)
    tensors = list(place(view, make_plan(view)).activations)
    source = Pictures(model.inputs[0].name, step, size, batches)
    plain = plain_inference(model.proto, source)
    plain()

    def counted(device: str) -> float:
        start = time.perf_counter()
        collect(model.proto, tensors, source, device=device)
        return time.perf_counter() - start

    def slope(device: str) -> float:
        """Seconds over all batches without the start: many rounds of them less one."""
        once = counted(device)
        source._batches *= 1 + MORE
        many = counted(device)
        source._batches //= 1 + MORE
        return (many - once) / MORE

    counted("cuda")
    pairs = [(plain(), slope("cuda")) for _ in range(rounds)]
    found = {
        "case": name,
        "tensors": len(tensors),
        "pictures": source.count,
        "plain_s": statistics.median(p for p, _ in pairs),
        "counted_s": statistics.median(c for _, c in pairs),
        "ratio": statistics.median(c / p for p, c in pairs),
        "ratios": sorted(round(c / p, 3) for p, c in pairs),
        "whole_s": counted("cuda"),
    }
    if cpu:
        found["cpu_s"] = counted("cpu")
        found["cpu_over_gpu"] = found["cpu_s"] / found["whole_s"]
    return found


WHOLE = """
version: 1
name: resnet50-{device}
model: {{path: resnet50.onnx}}
runtime: {{device: {device}}}
data:
  calibration: {{source: arrays, path: pictures.npz, take: {pictures}, batch: 16}}
  evaluation: {{source: arrays, path: pictures.npz, skip: {pictures}, batch: 16}}
calibration: {{method: auto, prepare: {prepare}}}
precision: {{target: {{metric: sqnr_db, min: {least}}}, max_pins: 4}}
backends: [{{name: onnxruntime, lowering: emulate}}]
report: {{formats: [json], latency: null}}
"""


def whole(
    folder: Path, device: str, *, pictures: int, prepare: str, least: float
) -> dict[str, Any]:
    """The seconds of a whole run of resnet50 on `device`, and of its stages, in a new process."""
    if not (folder / "resnet50.onnx").is_file():
        onnx.save(resnet50(), folder / "resnet50.onnx")
        rng = np.random.default_rng(3)
        flat = rng.standard_normal((2 * pictures, 3, 28, 28)).astype(np.float32)
        np.savez(folder / "pictures.npz", input=np.kron(flat, np.ones((1, 1, 8, 8), np.float32)))
    config = folder / f"{device}.yaml"
    config.write_text(WHOLE.format(device=device, pictures=pictures, prepare=prepare, least=least))
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "trtune", "run", str(config), "--out", str(folder), "--json", "-v"],
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr[-4000:])
    record = json.loads(done.stdout)
    log = next(folder.glob(f"resnet50-{device}-*/log.txt")).read_text()
    return {
        "device": device,
        "seconds": seconds,
        "calibration": record["calibration"],
        "variants": {v["name"]: v["sqnr_db"] for v in record["variants"]},
        "steps": [[s["pinned"], s["value"], s["seconds"]] for s in record["tuning"]],
        "log": log.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--whole", nargs="*", metavar="DEVICE", help="cuda and cpu by default")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--prepare", default="auto")
    parser.add_argument("--least", type=float, default=30.0, help="dB that tuning is to reach")
    asked = parser.parse_args()
    if asked.whole is not None:
        with tempfile.TemporaryDirectory() as folder:
            found = [
                whole(Path(folder), device, pictures=asked.pictures, prepare=asked.prepare,
                      least=asked.least)
                for device in asked.whole or ("cuda", "cpu")
            ]  # fmt: skip
        for one in found:
            print(json.dumps(one, indent=1))
        if asked.out:
            asked.out.write_text(json.dumps({"where": machine(), "rows": found}, indent=1))
        return
    rows = []
    for case in asked.cases or CASES:
        found = measured(case, asked.data, cpu=asked.cpu, rounds=asked.rounds)
        if found is None:
            print(f"{case}: not in {asked.data}")
            continue
        rows.append(found)
        print(json.dumps(found), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps({"where": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
