"""Inputs that are the same for all samples, outputs without a batch or with rows by the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyproject
from numpy.typing import NDArray

from trtune.run.pipeline import run

RNG = np.random.default_rng(11)


def rows(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def write(folder: Path, net: tinymodels.Net, outputs: dict[str, tuple[int | str, ...]],
          **arrays: NDArray[np.float32]) -> Path:  # fmt: skip
    folder.mkdir(exist_ok=True)
    proto = net.model(outputs)
    onnx.checker.check_model(proto)
    onnx.save(proto, folder / "net.onnx")
    for name in ("calibration", "evaluation"):
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "tiny.yaml").write_text(tinyproject.TEXT)
    return folder


def camera(folder: Path) -> Path:
    net = tinymodels.Net()
    x = net.input("x")
    net.input("camera", (8, 8))
    net.input("gain", ())
    y = net.op("MatMul", net.conv(x, "c", 3, 8), "camera", out="turned")
    net.op("Mul", y, "gain", out="y")
    return write(folder, net, {"y": ("N", 8, 8, 8)}, x=rows(24, 3, 8, 8), camera=rows(8, 8),
                 gain=np.array(0.5, np.float32))  # fmt: skip


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_model_with_time_first_is_fed_along_the_axis_that_is_given(
    batch: int, tmp_path: Path
) -> None:
    net = tinymodels.Net()
    x = net.op("MatMul", net.input("x", (16, batch, 8)), net.weight("w", 8, 12), out="y")
    net.op("MatMul", net.op("Relu", x, out="r"), net.weight("v", 12, 5), out="z")
    folder = write(tmp_path / "p", net, {"z": (16, batch, 5)}, x=rows(16, 10, 8))
    config = tinyproject.config_of(folder, "data.calibration.axis={x: 1}", tinyproject.BOTH)
    record = run(config, out=tmp_path / "runs")
    assert record.status == "met"
    assert [v.samples for v in record.variants if v.name != "fp32"] == [10] * 4
    assert all(v.nodes["int8"] == 2 for v in record.variants if v.name != "fp32")


def time_first(folder: Path) -> Path:
    net = tinymodels.Net()
    x = net.input("x", (1, 3, 8, 8))
    flat = net.op(
        "Reshape", net.conv(x, "c", 3, 10), net.const("s", [1, 10, 64], np.int64), out="f"
    )
    net.op("Transpose", flat, out="y", perm=[2, 0, 1])
    return write(folder, net, {"y": (64, 1, 10)}, x=rows(24, 3, 8, 8))


def state(folder: Path) -> Path:
    net = tinymodels.Net()
    x, h = net.input("x", ("N", 16)), net.input("h", (2, "N", 8))
    first = net.op("MatMul", x, net.weight("w", 16, 8), out="first")
    net.op("Add", first, h, out="y")
    return write(folder, net, {"y": (2, "N", 8)}, x=rows(24, 16), h=rows(2, 24, 8))


@pytest.mark.parametrize("project", [camera, time_first, state])
def test_it_runs(project: object, tmp_path: Path) -> None:
    assert callable(project)
    config = tinyproject.config_of(project(tmp_path / "project"))
    record = run(config, out=tmp_path / "runs")
    assert record.status == "met"
    assert record.baseline.samples == 24
