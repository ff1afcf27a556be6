"""What `trtune doctor` finds, and what it says about what it does not find."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trtune.cli import app
from trtune.doctor import diagnose, find_gpu, installed_version


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def nvidia_smi(folder: Path, body: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def package(folder: Path, module: str, version: str | None) -> None:
    """A module that must not be imported, with the metadata of a distribution or without."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text("raise SystemError('imported')")
    if version is not None:
        info = folder / f"{module}_cu13-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module}_cu13\nVersion: {version}\n"
        )
        (info / "top_level.txt").write_text(f"{module}\n")


def test_onnxruntime_works_with_both_lowerings() -> None:
    found = diagnose()
    for name in ("onnxruntime/emulate", "onnxruntime/deploy"):
        assert found[name].usable
        assert found[name].version == importlib.metadata.version("onnxruntime")
        assert found[name].reason == ""


def test_tensorrt_is_not_there_yet_and_the_reasons_say_so(programs: Path) -> None:
    found = diagnose()
    for name, gpu in (("tensorrt", "it needs one"), ("tensorrt_rtx", "it could build here")):
        state = found[name]
        assert not state.usable
        assert "this version of trtune does not build with it yet" in state.reason
        assert ("it is not installed" in state.reason) == (installed_version(name) is None)
        assert gpu in state.reason
        assert "lowering: emulate" in state.remedy


def test_the_gpu_and_its_driver_are_named(programs: Path) -> None:
    nvidia_smi(programs, 'echo "NVIDIA L4, 580.65.06"; echo "NVIDIA L4, 580.65.06"')
    assert find_gpu() == "NVIDIA L4, driver 580.65.06"
    assert "the GPU is there (NVIDIA L4, driver 580.65.06)" in diagnose()["tensorrt"].reason


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("echo 'could not communicate with the driver'; exit 9", id="it fails"),
        pytest.param("exit 0", id="it lists nothing"),
    ],
)
def test_a_driver_without_a_gpu_is_no_gpu(programs: Path, body: str) -> None:
    nvidia_smi(programs, body)
    assert find_gpu() is None


@pytest.mark.skipif(os.name == "nt", reason="needs a file that is no program of this system")
def test_an_nvidia_smi_that_cannot_start_is_no_gpu(programs: Path) -> None:
    (programs / "nvidia-smi").write_bytes(b"\x7fELF broken")
    (programs / "nvidia-smi").chmod(0o755)
    assert find_gpu() is None


@pytest.mark.parametrize(
    ("version", "expected"), [("10.14.1", "10.14.1"), (None, "")], ids=["known", "no metadata"]
)
def test_versions_are_read_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, expected: str
) -> None:
    package(tmp_path, "someruntime", version)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version("someruntime") == expected
    assert "someruntime" not in sys.modules


def test_the_command_ends_with_0_and_shows_a_row_a_backend() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for name in ("onnxruntime/emulate   usable", "tensorrt_rtx          not usable"):
        assert name in result.stdout
    assert result.stderr == ""


def test_as_json() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert list(found) == ["onnxruntime/emulate", "onnxruntime/deploy", "tensorrt_rtx", "tensorrt"]
    assert found["onnxruntime/emulate"]["usable"] is True
    assert set(found["tensorrt"]) == {"usable", "reason", "remedy", "version"}


def test_a_broken_onnxruntime_is_said_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "onnxruntime" or name == "trtune.precision.backends.onnxruntime":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    state = diagnose()["onnxruntime/emulate"]
    assert not state.usable
    assert state.reason.startswith("onnxruntime cannot be imported: ")
    assert "pip install" in state.remedy
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
