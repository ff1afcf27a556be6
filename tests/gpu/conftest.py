"""The machine that these tests need: an NVIDIA GPU, cuda-python, and TensorRT or TensorRT-RTX.

    pytest tests/gpu                                  skips, with the reason, what cannot run here
    TRTUNE_REQUIRE=gpu,tensorrt pytest tests/gpu      fails instead: for the machine that must
    pytest -m gpu                                     these, and the tests of CUDA alone

Each engine is built once for all tests that look at it. TensorRT times kernels while it builds:
the whole takes some minutes.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
import tinyproject
from numpy.typing import NDArray

import trtune
from trtune.configs.errors import TrtuneError
from trtune.configs.schema import Config
from trtune.precision.backends.gpu.runtime import DeviceProperties, device_properties
from trtune.precision.runtime.api import BuildInfo

REQUIRE = "TRTUNE_REQUIRE"
Arrays = dict[str, NDArray[Any]]


def lacking(name: str, reason: str) -> None:
    """Skip the test, or fail it where `name` is required."""
    required = os.environ.get(REQUIRE, "").split(",")
    (pytest.fail if name in required else pytest.skip)(f"{name}: {reason}")


def imported(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        lacking(name, f"not installed ({error})")
        raise


@pytest.fixture(scope="session")
def gpu() -> DeviceProperties:
    """The first GPU."""
    try:
        return device_properties()
    except TrtuneError as error:
        lacking("gpu", str(error))
        raise


@pytest.fixture(scope="session")
def trt(gpu: DeviceProperties) -> ModuleType:
    """TensorRT 10 or 11."""
    return imported("tensorrt")


@pytest.fixture(scope="session")
def rtx(gpu: DeviceProperties) -> ModuleType:
    """TensorRT-RTX."""
    return imported("tensorrt_rtx")


@dataclass
class Project:
    """A tiny model with data and a config; what is built or run is kept by its overrides."""

    folder: Path
    proto: onnx.ModelProto
    kept: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def config(self, *overrides: str) -> Config:
        return trtune.load_config(self.folder / "tiny.yaml", overrides=overrides)

    def build(self, backend: str, *overrides: str) -> BuildInfo:
        """Build with one backend, written as in the config: "{name: tensorrt}"."""
        key = ("build", backend, *overrides)
        if key not in self.kept:
            config = self.config(f"backends=[{backend}]", *overrides)
            (self.kept[key],) = trtune.build(config, out=self.folder / "runs")
        info: BuildInfo = self.kept[key]
        return info

    def run(self, *overrides: str) -> Any:
        """All stages; the run record."""
        key = ("run", *overrides)
        if key not in self.kept:
            self.kept[key] = trtune.run(self.config(*overrides), out=self.folder / "runs")
        return self.kept[key]

    def feeds(self, count: int = 4, seed: int = 7) -> Arrays:
        """A batch that is in neither data set."""
        return tinyproject.draw(self.proto, count, seed=seed)

    def reference(self, feeds: Arrays) -> Arrays:
        """The FP32 model in onnxruntime."""
        return tinymodels.run(self.proto, feeds)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """The project of a model in `tinymodels`, the same one for all tests."""
    kept: dict[str, Project] = {}

    def make(name: str) -> Project:
        if name not in kept:
            proto = tinymodels.MODELS[name]()
            folder = tmp_path_factory.mktemp(name)
            kept[name] = Project(tinyproject.write_project(folder, proto, labels=False), proto)
        return kept[name]

    return make


@pytest.fixture(scope="session")
def sqnr() -> Callable[[Arrays, Arrays], float]:
    """Decibels between two sets of outputs, the worst of them."""

    def worst(reference: Arrays, other: Arrays) -> float:
        assert list(reference) == list(other)
        found = []
        for name, array in reference.items():
            signal = array.astype(np.float64)
            noise = float(((signal - other[name]) ** 2).sum())
            power = float((signal**2).sum())
            found.append(float("inf") if noise == 0 else 10 * np.log10(power / noise))
        return min(found)

    return worst
