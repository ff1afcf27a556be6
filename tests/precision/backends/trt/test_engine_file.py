"""A plan that does not run here says which version or GPU is needed, and how to build again."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinymodels

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.runtime import DeviceProperties
from trtune.precision.backends.trt.engine_file import Cuda, check_plan, gpu_facts
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import BuildInfo, Candidate
from trtune.precision.runtime.engine_json import write_engine_json

ADA = DeviceProperties(0, "NVIDIA L4", "8.9", "580.95.05", "13.0", "13.0", 24 << 30, 20 << 30)
HOPPER = replace(ADA, name="NVIDIA H200", compute_capability="9.0")
TURING = replace(ADA, name="Tesla T4", compute_capability="7.5")
AGAIN = "trtune build CONFIG --backend tensorrt/weak"


def folder_of(folder: Path, **settings: Any) -> Path:
    """A folder as a build on ADA with 10.14.1.48 leaves it."""
    model = model_from_proto(tinymodels.mlp())
    plan = make_plan(GraphView.of(model), default="fp32")
    path = folder / "engine.plan"
    path.write_bytes(b"plan" * 100)
    details = {**gpu_facts(ADA), "settings": settings}
    info = BuildInfo(
        "tensorrt/weak", path, 400, versions={"tensorrt": "10.14.1.48"}, details=details
    )
    write_engine_json(folder, info, Candidate(model, plan))
    return folder


def checked(folder: Path, *, installed: str = "10.14.1.48", gpu: Any = ADA) -> Path:
    return check_plan(folder, installed=installed, gpu=gpu, backend="tensorrt/weak")


def test_a_plan_that_fits_is_given(tmp_path: Path) -> None:
    assert checked(folder_of(tmp_path)) == tmp_path / "engine.plan"


@pytest.mark.parametrize(
    ("settings", "installed", "gpu"),
    [
        pytest.param({"version_compatible": True}, "10.16.1.11", ADA, id="a later minor version"),
        pytest.param({"hardware_compatibility": "ampere_plus"}, "10.14.1.48", HOPPER, id="Hopper"),
        pytest.param({}, "10.14.1.48", replace(ADA, name="RTX 4090"), id="the same capability"),
    ],
)
def test_compatible_plans_run_elsewhere(
    tmp_path: Path, settings: Any, installed: str, gpu: Any
) -> None:
    assert checked(folder_of(tmp_path, **settings), installed=installed, gpu=gpu).is_file()


def test_another_gpu_of_the_same_capability_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        checked(folder_of(tmp_path), gpu=replace(ADA, name="NVIDIA RTX 4090"))
    assert "tuned on NVIDIA L4 and runs on NVIDIA RTX 4090" in caplog.text


@pytest.mark.parametrize(
    ("settings", "installed", "gpu", "message"),
    [
        pytest.param(
            {}, "10.16.1.11", ADA,
            "it was built with TensorRT 10.14.1.48, and 10.16.1.11 is installed (needed: "
            "pip install 'tensorrt==10.14.1.48')",
            id="a later version",
        ),
        pytest.param(
            {"version_compatible": True}, "11.4.0.106", ADA, "and 11.4.0.106 is installed",
            id="version-compatible, but another major version",
        ),
        pytest.param(
            {"version_compatible": True}, "10.3.0", ADA, "and 10.3.0 is installed",
            id="version-compatible, but an earlier one",
        ),
        pytest.param(
            {}, "10.14.1.48", HOPPER,
            "it was built for NVIDIA L4 of compute capability 8.9, and GPU 0 is NVIDIA H200 of 9.0 "
            "(needed: 8.9; `hardware_compatibility: ampere_plus` builds one for all from 8.0)",
            id="another GPU",
        ),
        pytest.param(
            {"hardware_compatibility": "ampere_plus"}, "10.14.1.48", TURING,
            "GPU 0 is Tesla T4 of 7.5 (needed: 8.0 or later", id="ampere_plus on Turing",
        ),
        pytest.param(
            {}, "10.14.1.48", None,
            "no usable NVIDIA GPU was found (needed: compute capability 8.9)", id="no GPU",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tmp_path: Path, settings: Any, installed: str, gpu: Any, message: str
) -> None:
    with pytest.raises(TrtuneError) as caught:
        checked(folder_of(tmp_path, **settings), installed=installed, gpu=gpu)
    assert message in str(caught.value)
    assert AGAIN in str(caught.value)


def test_both_are_named_when_both_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TrtuneError, match=r"built with TensorRT 10\.14.*; it was built for NVIDIA"):
        checked(folder_of(tmp_path), installed="11.4.0.106", gpu=HOPPER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"plan" * 50, "is truncated: 200 bytes, and 400 were built", id="truncated"),
        pytest.param(b"plan" * 101, "is changed: 404 bytes, and 400 were built", id="longer"),
        pytest.param(b"nalp" * 100, "was changed since it was built", id="other bytes"),
        pytest.param(None, "holds no engine (no file)", id="gone"),
    ],
)
def test_a_damaged_plan_is_not_given_to_tensorrt(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    folder = folder_of(tmp_path)
    if content is None:
        (folder / "engine.plan").unlink()
    else:
        (folder / "engine.plan").write_bytes(content)
    with pytest.raises(TrtuneError) as caught:
        checked(folder)
    assert message in str(caught.value)
    assert AGAIN in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"file": null}'])
def test_a_folder_without_an_engine_json_holds_no_engine(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "engine.json").write_text(text)
    with pytest.raises(TrtuneError, match="holds no built engine"):
        checked(tmp_path)


def test_a_build_from_an_unknown_gpu_is_tried(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    value = json.loads((folder / "engine.json").read_text())
    del value["details"]
    (folder / "engine.json").write_text(json.dumps(value))
    assert checked(folder, gpu=HOPPER).is_file()


def test_an_unknown_gpu_is_written_as_unknown() -> None:
    assert set(gpu_facts(None).values()) == {"unknown"}
    assert gpu_facts(replace(ADA, driver=""))["driver"] == "unknown"


def test_a_missing_gpu_is_found_missing(caplog: pytest.LogCaptureFixture) -> None:
    def none(device: int) -> DeviceProperties:
        raise TrtuneError("no NVIDIA driver is loaded here")

    with caplog.at_level(logging.INFO):
        assert Cuda(properties=none).find(1) is None
    assert "GPU 1: no NVIDIA driver is loaded here" in caplog.text
