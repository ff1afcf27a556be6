"""TensorRT-RTX on a real GPU: engines that run, or the exact reason why this GPU runs none."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.engine import TrtEngine
from trtune.precision.backends.gpu.runtime import DeviceProperties

pytestmark = pytest.mark.gpu

MODELS = ["conv_relu", "residual", "concat", "mlp", "attention"]


def built(project: Callable[[str], Any], rtx: ModuleType, gpu: DeviceProperties, name: str) -> Any:
    """A build for this very GPU; skips, with the reason, if RTX has none for it."""
    capability = gpu.compute_capability
    if not hasattr(rtx.ComputeCapability, f"SM{capability.replace('.', '')}"):
        pytest.skip(f"TensorRT-RTX does not know compute capability {capability}")
    here = project(name)
    backend = f"{{name: tensorrt_rtx, compute_capabilities: ['{capability}']}}"
    return here, here.build(backend)


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_runs_and_computes_what_the_qdq_model_does(
    rtx: ModuleType, gpu: DeviceProperties, project: Callable[[str], Any], sqnr: Any, name: str
) -> None:
    here, info = built(project, rtx, gpu, name)
    assert info.path is not None
    feeds = here.feeds(4)
    emulated = here.build("{name: onnxruntime, lowering: emulate}")
    qdq = tinymodels.run(onnx.load(emulated.path), feeds)
    with TrtEngine(rtx, info.path, name="tensorrt_rtx") as engine:
        found = engine.infer(feeds)
        timing = engine.latency(feeds, warmup=5, runs=20)
    assert sqnr(qdq, found) > 25.0
    assert timing.compute.median > 0


def test_an_engine_for_another_gpu_says_so(
    rtx: ModuleType, gpu: DeviceProperties, project: Callable[[str], Any]
) -> None:
    other = "8.6" if gpu.compute_capability != "8.6" else "12.0"
    info = project("mlp").build(f"{{name: tensorrt_rtx, compute_capabilities: ['{other}']}}")
    feeds = {"input": np.zeros((1, 16), np.float32)}
    if info.reason:
        assert gpu.compute_capability in info.reason
    with (
        pytest.raises(TrtuneError, match=r"tensorrt_rtx 1\."),
        TrtEngine(rtx, info.path, name="tensorrt_rtx") as engine,
    ):
        engine.infer(feeds)
