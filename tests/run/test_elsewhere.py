"""Engines for other GPUs than this machine's: which are asked for, real builds, what is reused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinyproject
from rtxparts import needs_rtx

import trtune
from trtune.configs.errors import ConfigError
from trtune.configs.schema import Config
from trtune.run.stages.elsewhere import by_backend, check_targets
from trtune.run.work import targets_in

RTX = '{name: tensorrt_rtx, compute_capabilities: ["8.6", "8.9"], apart: true}'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tinyproject.write_project(tmp_path)


def config(project: Path, backends: str, *more: str) -> Config:
    return tinyproject.config_of(project, f"backends=[{{name: onnxruntime}}, {backends}]", *more)


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ('{name: tensorrt_rtx, compute_capabilities: ["8.6", "8.9"]}', []),
        (RTX, [("tensorrt_rtx", "8.6", None), ("tensorrt_rtx", "8.9", None)]),
        ("{name: tensorrt}", []),
        (
            "{name: tensorrt, typing: strong, gpu_types: [H100, L4, H100]}",
            [("tensorrt/strong", "H100", "H100"), ("tensorrt/strong", "L4", "L4")],
        ),
    ],
)
def test_targets(project: Path, backends: str, expected: list[tuple[str, str, str | None]]) -> None:
    found = targets_in(config(project, backends))
    assert [(t.section.label, t.name, t.gpu_type) for t in found] == expected
    assert list(by_backend(found)) == list(dict.fromkeys(label for label, *_ in expected))


def test_another_type_of_gpu_needs_a_cluster(project: Path) -> None:
    targets = targets_in(config(project, "{name: tensorrt, gpu_types: [L4]}"))
    with pytest.raises(ConfigError, match="gpu_types L4: engines for other GPUs are built on the"):
        check_targets(targets, None)


def test_a_calibrator_that_reads_pictures_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="gpu_types: calibrator 'minmax' reads pictures"):
        config(project, "{name: tensorrt, gpu_types: [L4], calibrator: minmax}")


@needs_rtx
def test_an_engine_for_each_compute_capability(project: Path) -> None:
    asked = config(project, RTX, "report.formats=[md]")
    record = trtune.run(asked, out=project / "runs")
    run = next((project / "runs").iterdir())
    (tuned,) = (v for v in record.variants if (v.backend, v.name) == ("tensorrt_rtx", "tuned"))
    assert tuned.engines == {name: f"tensorrt_rtx/{name}/engine.plan" for name in ("8.6", "8.9")}
    both = (run / "tensorrt_rtx" / "engine.plan").stat().st_size
    for name, path in tuned.engines.items():
        assert 0 < (run / path).stat().st_size <= both
        told = json.loads((run / path).with_name("engine.json").read_text())
        assert told["details"]["compute_capabilities"] == [name]
    assert "for 8.6: `tensorrt_rtx/8.6/engine.plan`" in (run / "report.md").read_text()
    before = {path: (run / path).stat().st_mtime_ns for path in tuned.engines.values()}
    (run / tuned.engines["8.9"]).unlink()
    trtune.run(asked, out=project / "runs")
    after = {path: (run / path).stat().st_mtime_ns for path in tuned.engines.values()}
    kept, again = tuned.engines["8.6"], tuned.engines["8.9"]
    assert after[kept] == before[kept]
    assert after[again] > before[again]
