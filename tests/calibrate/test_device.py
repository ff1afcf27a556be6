"""Which device a word means, and what is said where there is none."""

from __future__ import annotations

import pytest
from tinymodels import conv_relu

from trtune.calibrate import sessions
from trtune.calibrate.sessions import device_of, gpu_name, why_no_gpu
from trtune.configs.errors import ConfigError, TrtuneError

HERE = why_no_gpu(0)


def test_the_cpu_is_always_there() -> None:
    assert device_of("cpu") == "cpu"
    assert gpu_name("cpu") == ""


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", ""])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="take 'cpu', 'cuda' or 'cuda:N'"):
        device_of(word)


def test_auto_takes_a_gpu_only_where_one_can_be_used() -> None:
    assert device_of("auto") == ("cpu" if HERE else "cuda:0")


@pytest.mark.skipif(not HERE, reason="a GPU can be used here")
def test_a_gpu_that_is_not_here_says_what_to_do() -> None:
    with pytest.raises(TrtuneError, match=r"cannot be used: .*; or take 'cpu'"):
        device_of("cuda")


def test_onnxruntime_without_cuda_names_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(sessions, "is_installed", lambda name: name == "onnxruntime")
    assert "pip install 'trtune[gpu]'" in why_no_gpu(0)


def test_both_packages_of_onnxruntime_at_once_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(sessions, "is_installed", lambda name: True)
    assert "are both installed" in why_no_gpu(0)


def test_a_session_that_falls_back_to_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime runs on the CPU, with a line in its log, where CUDA's libraries are missing."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    made = sessions.ort.InferenceSession

    def on_cpu(model: bytes, options: object, **chosen: object) -> object:
        return made(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: both)
    monkeypatch.setattr(sessions.ort, "InferenceSession", on_cpu)
    with pytest.raises(TrtuneError, match="would have run the network on the CPU"):
        sessions.open_session(conv_relu().SerializeToString(), device="cuda")
