"""The process of a build: how it starts, how it ends, and that nothing of it stays."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import numpy_helper
from rtxparts import needs_rtx

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ModelError, TrtuneError
from trtune.precision.backends.rtx import child as rtx_child
from trtune.precision.backends.rtx.child import FAILED, Request, scale_problems
from trtune.precision.backends.rtx.process import CHILD, BuildError, build_in_child
from trtune.precision.backends.rtx.support import COMPUTE_CAPABILITIES
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan

PROFILES = {"input": {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [4, 3, 8, 8]}}


def quantized(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = model_from_proto(proto)
    view = GraphView.of(model)
    plan = make_plan(view)
    table = CalibrationTable({tensor: 0.05 for tensor in place(view, plan).activations})
    return lower_emulate(model, plan, table)


def request_for(
    proto: onnx.ModelProto, work: Path, *, compute_capabilities: tuple[str, ...] = ("8.9",)
) -> Request:
    onnx.save(proto, work / "model.onnx")
    dynamic = [
        i.name for i in proto.graph.input if i.type.tensor_type.shape.dim[0].HasField("dim_param")
    ]
    return Request(
        model=str(work / "model.onnx"),
        plan=str(work / "engine.plan"),
        log=str(work / "build.log"),
        answer=str(work / "answer.json"),
        compute_capabilities=compute_capabilities,
        profiles={name: PROFILES["input"] for name in dynamic},
    )


def processes(folder: Path) -> list[int]:
    """Processes whose command line names `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found.append(int(entry.name))
    return found


@contextmanager
def soon(action: Callable[[], None], *, when: Callable[[], object]) -> Iterator[None]:
    """Do `action` in this process's signal handler, as soon as `when` says something."""

    def handler(number: int, frame: FrameType | None) -> None:
        if when():
            signal.setitimer(signal.ITIMER_REAL, 0)
            action()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What the child does


@needs_rtx
def test_a_build_gives_a_plan_a_log_and_an_answer(tmp_path: Path) -> None:
    request = request_for(quantized(tinymodels.residual()), tmp_path)
    build_in_child(request, tmp_path, timeout=120, opset=17)
    assert (tmp_path / "engine.plan").stat().st_size > 10_000
    assert "[V] Layers:\n" in (tmp_path / "build.log").read_text("utf-8")
    assert json.loads((tmp_path / "answer.json").read_text())["stage"] == "done"


@needs_rtx
def test_a_request_is_done_in_this_process_too(tmp_path: Path) -> None:
    request = request_for(quantized(tinymodels.residual()), tmp_path)
    answer = rtx_child.build_engine(request)
    assert (answer.stage, answer.problems) == ("done", ())
    assert (tmp_path / "engine.plan").read_bytes()


@needs_rtx
def test_the_compute_capabilities_are_those_of_the_installed_version() -> None:
    assert rtx_child.supported(importlib.import_module("tensorrt_rtx")) == [*COMPUTE_CAPABILITIES]


def test_scales_of_activations_must_be_0_d_constants() -> None:
    proto = quantized(tinymodels.conv_relu())
    assert scale_problems(proto) == ()
    for tensor in proto.graph.initializer:
        if tensor.name == "input/scale":
            tensor.CopyFrom(numpy_helper.from_array(np.array([0.05], np.float32), tensor.name))
    found = scale_problems(proto)
    assert len(found) == 2  # Q and DQ
    assert "'input/scale' has shape [1], not []" in found[0]
    proto.graph.initializer.remove(
        next(tensor for tensor in proto.graph.initializer if tensor.name == "relu1/scale")
    )
    assert any("'relu1/scale' is not a constant" in problem for problem in scale_problems(proto))


@needs_rtx
def test_a_scale_of_shape_1_is_refused_before_the_build(tmp_path: Path) -> None:
    proto = quantized(tinymodels.conv_relu())
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "input/scale")
    scale.CopyFrom(numpy_helper.from_array(np.array([0.05], np.float32), scale.name))
    with pytest.raises(TrtuneError, match=r"'input/scale' has shape \[1\]"):
        build_in_child(request_for(proto, tmp_path), tmp_path, timeout=120, opset=17)
    assert not (tmp_path / "engine.plan").exists()


# What the parent says


@needs_rtx
def test_an_unsupported_operator_is_named_with_its_node_and_opset(tmp_path: Path) -> None:
    net = tinymodels.Net()
    net.op("Unique", net.input("input"), out="y")
    request = request_for(net.model({"y": (None,)}), tmp_path)
    with pytest.raises(ModelError) as error:
        build_in_child(request, tmp_path, timeout=120, opset=17)
    for word in ("'n_y'", "operator Unique, opset 17", "UNSUPPORTED_NODE", "checkUnique"):
        assert word in str(error.value)


@needs_rtx
@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param("9.0", "compute capability 9.0 is not supported, only 7.5", id="unknown"),
        pytest.param("7.5", "Cannot compile operation 'n_logits'", id="no INT8"),
    ],
)
def test_what_the_compiler_refuses_is_said_in_its_words(
    found: str, words: str, tmp_path: Path
) -> None:
    proto = quantized(tinymodels.residual())
    request = request_for(proto, tmp_path, compute_capabilities=(found,))
    with pytest.raises(BuildError) as error:
        build_in_child(request, tmp_path, timeout=120, opset=17)
    assert words in str(error.value)
    assert any(words in problem for problem in error.value.problems)


def test_a_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tensorrt_rtx.py").write_text("raise ImportError('libnvinfer.so: cannot open')\n")
    monkeypatch.syspath_prepend(str(broken))
    request = request_for(quantized(tinymodels.conv_relu()), tmp_path)
    with pytest.raises(TrtuneError, match=r"libnvinfer\.so: cannot open.*pip install"):
        build_in_child(request, tmp_path, timeout=120, opset=17)


# How it ends


def stuck(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> Request:
    """A request whose build hangs in a library that says something first."""
    library = folder / "stuck"
    library.mkdir()
    (library / "tensorrt_rtx.py").write_text(
        "import os, pathlib, sys, time\n"
        "print('about to hang', file=sys.stderr, flush=True)\n"
        f"{then}\n"
        f"pathlib.Path({str(folder / 'started')!r}).write_text('')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(str(library))
    return request_for(quantized(tinymodels.conv_relu()), folder)


def test_a_build_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = stuck(tmp_path, monkeypatch)
    with pytest.raises(TrtuneError, match=r"stopped after 0\.5 s .*optimization_level"):
        build_in_child(request, tmp_path, timeout=0.5, opset=17)
    assert processes(tmp_path) == []


def test_an_interrupt_ends_the_build_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "grandchild.log"
    log.write_text("")
    spawn = f"import subprocess; subprocess.Popen(['tail', '-f', {str(log)!r}])"
    request = stuck(tmp_path, monkeypatch, spawn)

    def interrupt() -> None:
        raise KeyboardInterrupt

    started = (tmp_path / "started").exists
    with pytest.raises(KeyboardInterrupt), soon(interrupt, when=started):
        build_in_child(request, tmp_path, timeout=120, opset=17)
    assert gone(tmp_path)


def gone(folder: Path) -> bool:
    """Whether no process of `folder` is left, within some seconds: the kernel reaps later."""
    for _ in range(100):
        if not processes(folder):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("then", "words"),
    [
        pytest.param(
            "os.kill(os.getpid(), 9)", ["died by SIGKILL", "about to hang", "`workspace`"],
            id="killed, as for lack of memory",
        ),
        pytest.param("os.kill(os.getpid(), 11)", ["died by SIGSEGV", "about to hang"], id="crash"),
        pytest.param("os._exit(7)", ["died with status 7", "about to hang"], id="exit"),
        pytest.param("raise MemoryError('x')", ["status 1", "MemoryError", "`workspace`"],
                     id="a traceback"),
    ],
)  # fmt: skip
def test_last_words_of_a_build_that_died(
    then: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = stuck(tmp_path, monkeypatch, then)
    with pytest.raises(TrtuneError) as error:
        build_in_child(request, tmp_path, timeout=120, opset=17)
    assert [word for word in words if word not in str(error.value)] == []
    assert processes(tmp_path) == []


def test_a_build_whose_parent_is_gone_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = stuck(tmp_path, monkeypatch)
    (tmp_path / "request.json").write_text(json.dumps(asdict(request)))
    child = subprocess.Popen(
        [sys.executable, "-m", CHILD, str(tmp_path / "request.json")],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
    )
    try:
        while not (tmp_path / "started").exists():
            assert child.poll() is None
            time.sleep(0.02)
        assert child.stdin is not None
        child.stdin.close()  # what the kernel does for a parent that was killed
        assert child.wait(60) == FAILED
    finally:
        child.kill()
        child.wait()
