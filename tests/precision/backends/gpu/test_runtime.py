"""cuda-python's errors in words, and what GPU there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cudadouble import MEMORY, CudaDouble, Status
from gpuparts import RUNTIME, needs_gpu

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu import runtime as cudaruntime
from trtune.precision.backends.gpu.driver import Stream
from trtune.precision.backends.gpu.memory import DeviceBuffer
from trtune.precision.backends.gpu.runtime import CudaError, device_properties, use_device


@pytest.mark.parametrize(
    ("code", "says"),
    [
        pytest.param(
            Status.cudaErrorMemoryAllocation,
            ["allocating 4.0 KiB on the GPU", "out of memory", "1.0 GiB of 1.0 GiB are free",
             "model.shapes"],
            id="out of memory: how much is free, and a smaller batch",
        ),
        pytest.param(
            Status.cudaErrorNoDevice, ["no CUDA-capable device", "CUDA_VISIBLE_DEVICES"],
            id="no GPU: where it may hide",
        ),
        pytest.param(
            Status.cudaErrorInsufficientDriver, ["insufficient", "or a newer"],
            id="driver too old: a newer one",
        ),
        pytest.param(
            Status.cudaErrorIllegalAddress, ["illegal memory access", "start it again"],
            id="a kernel went wrong: the process is lost",
        ),
        pytest.param(
            Status.cudaErrorInvalidValue, ["invalid argument", "trtune doctor"],
            id="anything else: look at the machine",
        ),
    ],
)  # fmt: skip
def test_a_failed_call_says_what_where_and_what_to_do(
    double: CudaDouble, code: Status, says: list[str]
) -> None:
    double.fail("cudaMalloc", code)
    with pytest.raises(CudaError) as caught:
        DeviceBuffer(4096)
    for part in ("CUDA failed while", code.name, *says):
        assert part in str(caught.value)
    assert caught.value.code == code.name
    assert double.cudaGetLastError() == (0,), "told once, not again at the next call"


def test_without_a_driver_the_error_says_that_a_gpu_machine_is_needed(double: CudaDouble) -> None:
    double.driver = 0
    with pytest.raises(CudaError, match="no NVIDIA driver is loaded here"):
        device_properties()


def test_without_cuda_python_the_error_has_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RUNTIME, None)
    with pytest.raises(TrtuneError, match=re.escape("pip install 'cuda-python>=13,<14'")):
        Stream()


def test_importing_the_module_imports_no_cuda() -> None:
    code = (
        "import sys, trtune.precision.backends.gpu.driver; sys.exit('cuda.bindings' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_such_gpu_names_the_setting(double: CudaDouble) -> None:
    with (
        pytest.raises(CudaError, match=r"choosing GPU 7: cudaErrorInvalidDevice.*`device`"),
        use_device(7),
    ):
        raise AssertionError("never entered")


def test_use_device_goes_back_also_after_an_error(double: CudaDouble) -> None:
    double.devices = 2

    def fail_there() -> None:
        with use_device(1):
            assert double.device == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_there()
    assert double.device == 0


def test_device_properties_of_the_double(double: CudaDouble) -> None:
    found = device_properties()
    assert (found.name, found.compute_capability) == ("Double", "8.9")
    assert (found.driver_cuda, found.runtime_cuda) == ("13.0", "13.0")
    assert (found.total_bytes, found.free_bytes) == (MEMORY, MEMORY)


@needs_gpu
@pytest.mark.gpu
def test_device_properties_of_a_real_gpu() -> None:
    found = device_properties()
    assert re.fullmatch(r"\d+\.\d", found.compute_capability)
    assert re.fullmatch(r"\d{3,}\.\d+(\.\d+)?", found.driver)
    assert found.name
    assert "\0" not in found.name
    assert 0 < found.free_bytes <= found.total_bytes


@pytest.mark.parametrize(
    ("text", "version"),
    [
        pytest.param(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
            "GCC version:  gcc version 12.3.0\n",
            "580.159.04",
            id="open kernel module",
        ),
        pytest.param(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82  Tue\n",
            "470.82",
            id="two parts",
        ),
        pytest.param("something else", "", id="nothing that looks like one"),
    ],
)
def test_driver_version_from_the_kernel_module(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert cudaruntime.driver_version(tmp_path / "version") == version


@pytest.mark.parametrize(
    ("script", "version"),
    [
        pytest.param("echo 535.104.05", "535.104.05", id="nvidia-smi tells"),
        pytest.param("echo NVIDIA-SMI has failed; exit 9", "", id="nvidia-smi fails"),
        pytest.param(None, "", id="no nvidia-smi"),
    ],
)
def test_driver_version_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, version: str
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cudaruntime.driver_version(tmp_path / "missing") == version
