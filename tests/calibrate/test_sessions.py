"""The one place that makes onnxruntime sessions."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels

from trtune.calibrate import sessions
from trtune.calibrate.sessions import CPU, CUDA, open_session, providers_of
from trtune.configs.errors import ConfigError, ModelError, TrtuneError

ROOT = Path(__file__).parents[2]
LAYERS = ("configs", "datasets", "calibrate", "precision", "reports", "trtune")
MAKES = re.compile(r"\bInferenceSession\(|\bSessionOptions\(|\bSessionFromOnnx\b")


def test_no_other_module_makes_a_session() -> None:
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    found = {path.relative_to(ROOT) for path in files if MAKES.search(path.read_text("utf-8"))}
    assert {path for path in found if path.parts[0] != "trtune" or len(path.parts) == 2} <= {
        Path("calibrate/sessions.py")
    }


@pytest.mark.parametrize("optimize", ["none", "basic", "extended", "all"])
def test_a_session_gives_the_models_numbers(optimize: str, tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    feeds = tinymodels.feeds(proto)
    expected = tinymodels.run(proto, feeds)
    for model in (path, proto.SerializeToString()):
        session = open_session(model, optimize=optimize, threads=1)
        assert session.get_providers() == [CPU]
        names = [output.name for output in session.get_outputs()]
        for name, array in zip(names, session.run(names, feeds), strict=True):
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def test_the_optimized_graph_is_written(tmp_path: Path) -> None:
    target = tmp_path / "optimized.onnx"
    model = tinymodels.conv_relu().SerializeToString()
    open_session(model, optimize="basic", write_optimized=target)
    assert onnx.load(target, load_external_data=False).graph.node


def test_what_onnxruntime_refuses_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="cannot load the model: "):
        open_session(b"no model")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_the_users_mistake(device: str) -> None:
    with pytest.raises(ConfigError, match="take 'cpu', 'cuda' or 'cuda:N'"):
        open_session(b"", device=device)


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:3", 3)])
def test_a_gpu_comes_before_the_cpu(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    (kind, chosen), fallback = providers_of(device)
    assert (kind, fallback) == (CUDA, CPU)
    assert (chosen["device_id"], chosen["use_tf32"]) == (str(index), "0")


def test_without_a_cuda_provider_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(TrtuneError, match="pip install onnxruntime-gpu"):
        open_session(b"", device="cuda:0")


def test_no_more_threads_than_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime itself starts one for each core of the machine, whatever the process's share."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("TRTUNE_CORES", "3")
    options = sessions._options(None, "all", integer_kernels=False)
    assert options.intra_op_num_threads == min(3, len(os.sched_getaffinity(0)))
