"""engine.json: read back as written, reused only for what it was made from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import tinymodels
from candidates import Plan, candidate

from trtune.precision.runtime.api import BuildInfo
from trtune.precision.runtime.engine_json import read_engine_json, reusable, write_engine_json


def test_an_empty_folder_has_nothing_to_reuse(tmp_path: Path) -> None:
    made = candidate(tinymodels.mlp, Plan("int8"))
    assert reusable(tmp_path, made, backend="onnxruntime/emulate", versions={}) is None


@pytest.mark.parametrize("built", [True, False])
def test_engine_json_is_read_back_as_it_was_written(built: bool, tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"plan")
    info = BuildInfo(
        backend="tensorrt_rtx",
        path=path if built else None,
        size_bytes=4 if built else None,
        precisions={"conv": "int8", "softmax": "unknown"},
        not_honoured=("conv: planned int8, runs in fp32",),
        seconds=1.25,
        versions={"tensorrt_rtx": "1.7.1"},
        log="the last line",
        reason="no NVIDIA GPU" if built else "not installed",
        details={"settings": {"workspace": 64}, "driver": None},
    )
    write_engine_json(tmp_path, info, candidate(tinymodels.mlp, Plan("int8")))
    assert read_engine_json(tmp_path) == info


def test_a_folder_can_be_moved_with_its_engine(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "model.onnx").write_bytes(b"model")
    made = candidate(tinymodels.mlp, Plan("int8"))
    info = BuildInfo("onnxruntime/emulate", old / "model.onnx", 5)
    write_engine_json(old, info, made)
    old.rename(new)
    assert read_engine_json(new).path == new / "model.onnx"
    assert reusable(new, made, backend="onnxruntime/emulate", versions={}) is not None


def test_an_engine_of_before_there_were_details_is_still_read(tmp_path: Path) -> None:
    made = candidate(tinymodels.mlp, Plan("int8"))
    write_engine_json(tmp_path, BuildInfo("onnxruntime/emulate"), made)
    value = json.loads((tmp_path / "engine.json").read_text("utf-8"))
    del value["details"]
    (tmp_path / "engine.json").write_text(json.dumps(value), "utf-8")
    assert read_engine_json(tmp_path).details == {}
    assert reusable(tmp_path, made, backend="onnxruntime/emulate", versions={}) is not None


def test_an_engine_of_other_settings_is_not_reused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = candidate(tinymodels.mlp, Plan("int8"))
    settings = {"compute_capabilities": ["8.9"], "workspace": None}
    write_engine_json(tmp_path, BuildInfo("tensorrt_rtx", details={"settings": settings}), made)
    found = partial(reusable, tmp_path, made, backend="tensorrt_rtx", versions={})
    assert found(settings=settings) is not None
    caplog.set_level("INFO")
    other = {**settings, "workspace": 64}
    assert found(settings=other) is None
    assert "settings changed" in caplog.text
