"""A tiny model with its data in a folder, and a config for it that runs in half a second.

The data is `calibration.npz` and `evaluation.npz` with `labels` that are what the model itself
says, so that its FP32 top-1 is 1; no reports are drawn and no latency is measured unless asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tinymodels
from numpy.typing import NDArray

from trtune.configs.load import load_config
from trtune.configs.progress import silent
from trtune.configs.schema import Config
from trtune.run.naming import run_folder
from trtune.run.work import RunWork, Setup
from trtune.run.workspace import Workspace

TEXT = """
version: 1
name: tiny
model: {path: net.onnx}
data:
  calibration: {source: arrays, path: calibration.npz, batch: 8}
  evaluation: {path: evaluation.npz}
calibration: {method: max, holdout: 4, prepare: none}
precision: {target: {metric: sqnr_db, min: 5}}
compare: {pictures: 4}
backends: [{name: onnxruntime, lowering: emulate}]
report: {formats: [json], latency: null}
"""
BOTH = "backends=[{name: onnxruntime, lowering: emulate}, {name: onnxruntime, lowering: deploy}]"


def draw(proto: onnx.ModelProto, count: int, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """`count` samples for every input, also where the model fixes its batch."""
    free = onnx.ModelProto()
    free.CopyFrom(proto)
    for info in free.graph.input:
        info.type.tensor_type.shape.dim[0].dim_value = 0
    return tinymodels.feeds(free, batch=count, seed=seed)


def answers(proto: onnx.ModelProto, rows: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    """The model's own class of each sample, from its first output."""
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    step = dim.dim_value or 4
    count = len(next(iter(rows.values())))
    found = []
    for start in range(0, count, step):
        taken = np.minimum(np.arange(start, start + step), count - 1)
        outputs = tinymodels.run(proto, {name: array[taken] for name, array in rows.items()})
        found.append(next(iter(outputs.values())).reshape(step, -1).argmax(axis=1))
    return np.concatenate(found)[:count].astype(np.int64)


def write_project(
    folder: Path,
    proto: onnx.ModelProto | None = None,
    *,
    calibration: int = 24,
    evaluation: int = 20,
    labels: bool = True,
) -> Path:
    """Model (`conv_relu` by default), data and config.yaml in `folder`, which is given back."""
    proto = tinymodels.conv_relu() if proto is None else proto
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / "net.onnx")
    for seed, (name, count) in enumerate(
        [("calibration", calibration), ("evaluation", evaluation)]
    ):
        rows = draw(proto, count, seed=seed)
        extra = {"labels": answers(proto, rows)} if labels else {}
        np.savez(folder / f"{name}.npz", **rows, **extra)
    (folder / "tiny.yaml").write_text(TEXT)
    return folder


def config_of(folder: Path, *overrides: str, check: bool = True) -> Config:
    """The config in `folder`, with `--set` overrides."""
    return load_config(folder / "tiny.yaml", overrides=overrides, check=check)


def work_of(folder: Path, *overrides: str) -> RunWork:
    """The work on that config, whose runs go to `folder/runs`."""
    config = config_of(folder, *overrides)
    place = run_folder(config, folder / "runs")
    return RunWork(Setup.of(config, silent), Workspace(place))


def log_of(config: Config, folder: Path) -> str:
    """What `log.txt` of the config's run in `folder/runs` says."""
    return (run_folder(config, folder / "runs") / "log.txt").read_text(encoding="utf-8")


def record_of(config: Config, folder: Path) -> dict[str, Any]:
    """`run.json` of the config's run in `folder/runs`."""
    text = (run_folder(config, folder / "runs") / "run.json").read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text)
    return value


def fixed(proto: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """`proto` with `size` as its batch, in inputs and outputs."""
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = size
    return proto
