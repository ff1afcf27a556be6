"""What `trtune doctor` finds, and what it says about what it does not find."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trtune.calibrate import sessions
from trtune.cli.commands import app
from trtune.doctor import DEVICE, diagnose, installed_version


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


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


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_that_is_not_installed_comes_with_the_command() -> None:
    state = diagnose()["tensorrt"]
    assert not state.usable
    assert state.version == ""
    assert "cannot be imported" in state.reason
    assert "pip install 'trtune[trt10]'" in state.remedy
    assert "pip install" not in state.reason


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_rtx_builds_where_it_cannot_run(programs: Path) -> None:
    state = diagnose()["tensorrt_rtx"]
    assert state.usable
    assert state.reason == (
        "builds here, but cannot run: no NVIDIA GPU was found (nvidia-smi lists none)"
    )
    assert 'compute_capabilities: ["8.9"]' in state.remedy


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
    for name in ("onnxruntime/emulate   usable", "tensorrt_rtx", "tensorrt "):
        assert name in result.stdout
    assert result.stderr == ""


def test_as_json() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert list(found) == [
        *("onnxruntime/emulate", "onnxruntime/deploy", "tensorrt_rtx", "tensorrt"),
        "device cuda",
    ]
    assert found["onnxruntime/emulate"]["usable"] is True
    assert set(found["tensorrt"]) == {"usable", "reason", "remedy", "version"}


def test_a_broken_onnxruntime_is_said_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "onnxruntime" or name == "trtune.precision.backends.ort.backend":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    state = diagnose()["onnxruntime/emulate"]
    assert not state.usable
    assert state.reason.startswith("onnxruntime cannot be imported: ")
    assert "pip install" in state.remedy
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_a_gpu_that_cannot_be_used_comes_with_the_reason_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    state = diagnose()[DEVICE]
    assert not state.usable
    assert "has no CUDA provider" in state.reason
    assert state.remedy.startswith("pip uninstall onnxruntime, then pip install 'trtune[gpu]'")


def test_both_packages_of_onnxruntime_are_said_to_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "is_installed", lambda name: True)
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    state = diagnose()[DEVICE]
    assert state.reason.startswith("onnxruntime and onnxruntime-gpu are both installed")
    assert state.remedy == (
        "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu alone"
    )
