"""The GPU that nvidia-smi tells of, and the profiles of dynamic inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trtune.configs.errors import ConfigError, DataError
from trtune.datasets.batches import InputSpec
from trtune.precision.backends.gpu.profiles import (
    Gpu,
    Profile,
    check_shapes,
    find_gpu,
    make_profiles,
)

PICTURE = InputSpec("x", ("N", 3, 8, 8), "float32")
FREE = InputSpec("x", (None, 3, "H", "W"), "float32")
FIXED = InputSpec("x", (1, 3, 8, 8), "float32")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param("echo 'NVIDIA L4, 8.9, 580.1'", Gpu("NVIDIA L4", "8.9", "580.1"), id="one"),
        pytest.param(
            "echo 'A, B, 8.9, 580.1'; echo 'C, 9.0, 580.1'",
            Gpu("A, B", "8.9", "580.1"),
            id="the first of two, with a comma in its name",
        ),
        pytest.param("echo 'No devices were found'; exit 6", None, id="none"),
        pytest.param("exit 0", None, id="nothing said"),
    ],
)
def test_find_gpu(script: str, expected: Gpu | None, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    assert find_gpu(str(program)) == expected


def test_no_nvidia_smi_is_no_gpu(tmp_path: Path) -> None:
    assert find_gpu(str(tmp_path / "nvidia-smi")) is None


def test_a_gpu_in_words() -> None:
    gpu = Gpu("NVIDIA L4", "8.9", "580.1")
    assert str(gpu) == "NVIDIA L4 (compute capability 8.9, driver 580.1)"


@pytest.mark.parametrize(
    ("spec", "shapes", "batch", "expected"),
    [
        pytest.param(FIXED, {}, 8, {}, id="fixed: none"),
        pytest.param(
            PICTURE, {}, 8, {"x": ((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}, id="batch: default"
        ),
        pytest.param(
            PICTURE, {}, 64, {"x": ((1, 3, 8, 8), (64, 3, 8, 8), (64, 3, 8, 8))}, id="a large batch"
        ),
        pytest.param(
            FREE,
            {"x": {"min": [1, 3, 8, 8], "opt": [2, 3, 16, 8], "max": [4, 3, 32, 8]}},
            8,
            {"x": ((1, 3, 8, 8), (2, 3, 16, 8), (4, 3, 32, 8))},
            id="as asked",
        ),
        pytest.param(
            FIXED,
            {"x": {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [1, 3, 8, 8]}},
            8,
            {},
            id="fixed, and said again",
        ),
    ],
)
def test_make_profiles(
    spec: InputSpec,
    shapes: dict[str, dict[str, list[int]]],
    batch: int,
    expected: dict[str, tuple[tuple[int, ...], ...]],
) -> None:
    found = make_profiles([spec], shapes, batch=batch)
    assert found == {name: Profile(*three) for name, three in expected.items()}
    assert {n: Profile.from_json(p.to_json()) for n, p in found.items()} == found


def around(*shape: int, high: tuple[int, ...] = ()) -> dict[str, dict[str, tuple[int, ...]]]:
    return {"x": {"min": shape, "opt": shape, "max": high or shape}}


@pytest.mark.parametrize(
    ("spec", "shapes", "words"),
    [
        pytest.param(
            FREE, {}, ["'x'", "[?, 3, H, W]", "model.shapes.x: {min: [8, 3, 8, 8]"], id="not given"
        ),
        pytest.param(
            PICTURE, around(1, 4, 8, 8), ["model.shapes.x.min", "[1, 4, 8, 8]", "[N, 3, 8, 8]"],
            id="a fixed dimension changed",
        ),
        pytest.param(PICTURE, around(1, 3, 8), ["model.shapes.x.min", "[1, 3, 8]"], id="rank"),
        pytest.param(
            PICTURE, around(4, 3, 8, 8, high=(2, 3, 8, 8)), ["axis 0", "4, 4, 2"], id="max < min"
        ),
        pytest.param(
            PICTURE, {"y": {}}, ["model.shapes.y", "no such input", "'x'"], id="unknown input"
        ),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_name_the_input_and_the_key(
    spec: InputSpec, shapes: dict[str, dict[str, tuple[int, ...]]], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        make_profiles([spec], shapes)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (4, 3)])
def test_shapes_inside_the_profile_pass(shape: tuple[int, ...]) -> None:
    check_shapes({"x": Profile((1, 3), (2, 3), (4, 3))}, {"x": np.zeros(shape)})


@pytest.mark.parametrize("shape", [(5, 3), (0, 3), (4, 2), (4, 3, 1)])
def test_shapes_outside_the_profile_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"input 'x' has shape .* outside .*\[1, 3\] to \[4, 3\]"):
        check_shapes({"x": Profile((1, 3), (2, 3), (4, 3))}, {"x": np.zeros(shape)})
