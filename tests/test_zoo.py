"""The benchmark of networks out of packages: the drawn data, and the extra that names packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def zoo() -> Any:
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "benchmarks" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    return module


def test_the_extra_names_the_packages(zoo: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = project["optional-dependencies"]["zoo"]
    assert {line.partition(";")[0].strip() for line in listed} == {
        network.package for network in zoo.NETWORKS
    }


def test_each_network_has_drawn_samples_one_at_a_time(zoo: Any) -> None:
    for network in zoo.NETWORKS:
        rows = network.draw(np.random.default_rng(0), 2)
        assert all(np.isfinite(array).all() for array in rows.values()), network.name
        axes = zoo.axes_of(rows, "openvino" in network.file)
        assert len(list(zoo.singles(rows, axes))) == 2, network.name


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 0.0, np.inf), (1.0, np.nan, -np.inf), (0.0, 1.0, -np.inf)],
)
def test_decibels(zoo: Any, signal: float, noise: float, expected: float) -> None:
    assert zoo._decibels(signal, noise) == expected
