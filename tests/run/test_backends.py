"""The backends of a run: those that the config lists, and what this machine makes of them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from rtxparts import needs_rtx
from tinyproject import BOTH, config_of, write_project

from trtune.configs.errors import ConfigError
from trtune.configs.progress import silent
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.graph.file import Model
from trtune.run.backends import (
    backends_of,
    check_precisions,
)
from trtune.run.pipeline import build, calibrate, compare, run, run_folder

needs_no_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt") is not None, reason="TensorRT is installed"
)


def nowhere() -> Model:
    """The model of backends that do not look at the data."""
    raise AssertionError("no backend here needs the model")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


def arrays(project: Path) -> str:
    """The override that leaves the evaluation data as it is."""
    return f"data.evaluation={{source: arrays, path: '{project}/evaluation.npz'}}"


class TestBackends:
    def test_each_entry_is_one(self, project: Path) -> None:
        config = config_of(
            project, "backends=[{name: onnxruntime, lowering: deploy, threads: 2}, "
            "{name: onnxruntime}]",
        )  # fmt: skip
        backends = backends_of(config, nowhere, silent)
        assert [(b.name, getattr(b, "threads", 0)) for b in backends.present] == [
            ("onnxruntime/deploy", 2),
            ("onnxruntime/emulate", None),
        ]

    @needs_rtx
    def test_one_that_builds_but_cannot_run_here_is_taken(self, project: Path) -> None:
        config = config_of(
            project,
            "model.shapes={input: {min: [1, 3, 8, 8], opt: [4, 3, 8, 8], max: [8, 3, 8, 8]}}",
            'backends=[{name: tensorrt_rtx, compute_capabilities: ["8.9"], workspace: 1GiB, '
            "optimization_level: 2, timeout: 60}]",
        )
        (backend,) = backends_of(config, nowhere, silent).present
        assert isinstance(backend, RtxBackend)
        assert backend.settings["workspace"] == 1 << 30
        assert backend.settings["optimization_level"] == 2
        assert backend.settings["shapes"]["input"]["opt"] == [4, 3, 8, 8]
        assert backend.timeout == 60

    @needs_rtx
    def test_without_a_gpu_rtx_has_to_be_told_what_to_build_for(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(project))
        config = config_of(project, "backends=[{name: onnxruntime}, {name: tensorrt_rtx}]")
        found = backends_of(config, nowhere, silent)
        assert [backend.name for backend in found.present] == ["onnxruntime/emulate"]
        assert "no NVIDIA GPU was found here; name what to build" in found.absent[0].reason

    @needs_no_tensorrt
    def test_one_that_is_not_installed_is_absent_with_the_command(self, project: Path) -> None:
        config = config_of(project, "backends=[{name: onnxruntime}, {name: tensorrt}]")
        backends = backends_of(config, nowhere, silent)
        backends.require()
        (absent,) = backends.absent
        assert (absent.name, absent.required) == ("tensorrt", False)
        assert "TensorRT" in absent.reason
        assert "pip install 'trtune[trt10]'" in absent.remedy

    @needs_no_tensorrt
    @pytest.mark.parametrize(
        ("override", "end"),
        [
            pytest.param(
                "backends=[{name: onnxruntime}, {name: tensorrt, required: true}]",
                "or take it out of the config, or set `required: false`",
                id="it is required",
            ),
            pytest.param(
                "backends=[{name: tensorrt}]",
                "or take it out of the config, or add one that does, as {name: onnxruntime}",
                id="none is left",
            ),
        ],
    )
    def test_without_what_must_be_there_nothing_is_computed(
        self, project: Path, override: str, end: str
    ) -> None:
        config = config_of(project, override)
        for stage in (run, build):
            with pytest.raises(ConfigError) as failure:
                stage(config, out=project / "runs")
            text = str(failure.value)
            assert text.startswith("backend 'tensorrt' does not work here: ")
            assert "pip install 'trtune[trt10]'" in text
            assert text.endswith(end)
        assert not (project / "runs").exists()

    def test_unprobed_all_count_as_present(self, project: Path) -> None:
        config = config_of(project, "backends=[{name: tensorrt}]")
        found = backends_of(config, nowhere, silent, probe=False)
        assert ([b.name for b in found.present], found.absent) == (["tensorrt"], ())

    def test_the_ones_of_a_name(self, project: Path) -> None:
        found = backends_of(config_of(project, BOTH), nowhere, silent)
        assert [b.name for b in found.chosen("onnxruntime/deploy").present] == [
            "onnxruntime/deploy"
        ]
        assert len(found.chosen("onnxruntime").present) == len(found.chosen(None).present) == 2


class TestPrecisions:
    @pytest.mark.parametrize(
        ("override", "key", "precision"),
        [
            ("precision.default=fp16", "precision.default", "fp16"),
            ("precision.default=bf16", "precision.default", "bf16"),
            ("precision.fallback=fp16", "precision.fallback", "fp16"),
            ("precision.pin={'op:Conv': fp32, n_conv1: bf16}", "precision.pin.n_conv1", "bf16"),
        ],
    )
    def test_deploy_has_no_half(
        self, project: Path, override: str, key: str, precision: str
    ) -> None:
        with pytest.raises(ConfigError) as failure:
            check_precisions(config_of(project, BOTH, override))
        assert str(failure.value) == (
            f"backends.1.lowering: deploy runs in int8 and fp32 alone, and {key} is {precision}; "
            "use emulate, or fp32 there"
        )
        assert check_precisions(config_of(project, override)) is None

    def test_int8_and_fp32_are_everywhere(self, project: Path) -> None:
        assert check_precisions(config_of(project, BOTH, "precision.pin={n_conv1: fp32}")) is None


@needs_no_tensorrt
def test_what_is_not_installed_is_in_the_report_and_the_others_go_on(project: Path) -> None:
    config = config_of(
        project, "backends=[{name: onnxruntime}, {name: tensorrt}]", "report.formats=[md, html]"
    )
    assert calibrate(config, out=project / "runs").scales
    assert compare(config, out=project / "runs")
    (info,) = build(config, out=project / "runs")
    assert info.backend == "onnxruntime/emulate"
    record = run(config, out=project / "runs")
    assert record.status == "met"
    assert [(v.backend, v.status) for v in record.variants] == [
        *[("onnxruntime/emulate", "done")] * 3,
        ("tensorrt", "absent"),
    ]
    absent = record.variants[-1]
    assert (absent.name, absent.value) == ("int8", None)
    assert "pip install 'trtune[trt10]'" in str(absent.reason)
    text = (run_folder(config, project / "runs") / "report.md").read_text()
    assert "tensorrt" in text
