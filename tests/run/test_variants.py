"""The variants of a run: which there are on each backend, and what they take."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from rtxparts import needs_rtx
from tinyproject import BOTH, config_of, work_of, write_project

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.timing import GpuTiming, Spread
from trtune.precision.graph.file import save_model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.runtime.api import BuildInfo, Candidate, Usable
from trtune.precision.runtime.engine_json import write_engine_json
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.record import Latency
from trtune.reports.tables import read_layers
from trtune.run.backends import Backends
from trtune.run.pipeline import run
from trtune.run.speed.latency import Speed, on_gpu
from trtune.run.stages.engines import cpu_model
from trtune.run.variants import finished

RTX = 'backends=[{name: onnxruntime}, {name: tensorrt_rtx, compute_capabilities: ["8.9"]}]'


class TestLatency:
    def test_it_is_kept_for_as_long_as_nothing_changes(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = write_project(tmp_path)
        caplog.set_level(logging.INFO)
        found = []
        for latency in ("{warmup: 0, runs: 3}", "{warmup: 0, runs: 3}", "{warmup: 1, runs: 3}"):
            work = work_of(folder, BOTH, f"report.latency={latency}")
            found.append([one.speed.models for one in finished(work, work.untuned)])
        (emulate, deploy) = zip(*found, strict=True)
        assert emulate == ({}, {}, {})
        assert set(deploy[0]) == {"fp32", "untuned", "tuned"}
        assert deploy[0] == deploy[1]
        assert "latency-onnxruntime-deploy again: report.latency changed" in caplog.messages

    def test_none_is_measured_if_the_config_says_so(self, tmp_path: Path) -> None:
        work = work_of(write_project(tmp_path), BOTH, "report.latency=null")
        assert [one.speed for one in finished(work, work.untuned)] == [Speed(), Speed()]


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        pytest.param("model name\t: A CPU\nflags\t: sse avx2 avx512_vnni\n", "A CPU, avx2, "
                     "avx512_vnni", id="x86"),
        pytest.param("CPU part\t: 0xd0c\nFeatures\t: fp asimddp i8mm\n", "0xd0c, asimddp, i8mm",
                     id="ARM"),
    ],
)  # fmt: skip
def test_a_processor_is_its_name_and_its_integer_instructions(
    tmp_path: Path, fields: str, model: str
) -> None:
    (tmp_path / "cpuinfo").write_text(fields)
    assert cpu_model(tmp_path / "cpuinfo") == model
    assert cpu_model(tmp_path / "none")


def test_times_on_a_gpu_are_of_the_computation_with_the_copies_beside_it() -> None:
    timing = GpuTiming(
        compute=Spread(2.0, 3.0, 4.0),
        end_to_end=Spread(5.0, 6.0, 7.0),
        throughput=100.0,
        warmup=3,
        runs=9,
        graph=False,
        graph_reason="a loop",
    )
    assert on_gpu(timing, batch=8) == Latency(
        median=2.0,
        p95=3.0,
        p99=4.0,
        runs=9,
        batch=8,
        end_to_end=5.0,
        throughput=800.0,
        cuda_graph=False,
        note="a loop",
    )
    assert (
        on_gpu(GpuTiming(timing.compute, None, 100.0, 3, 9, graph=True), batch=1).end_to_end is None
    )


@needs_rtx
@pytest.mark.slow
class TestBuildOnly:
    """TensorRT-RTX on a machine without a GPU that it supports: real engines that cannot run."""

    def test_its_variants_have_no_value_but_the_reason_and_the_compilers_account(
        self, tmp_path: Path
    ) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder, RTX, "precision.pin={n_conv2: fp32}")
        record = run(config, out=folder / "runs")
        built = [v for v in record.variants if v.backend == "tensorrt_rtx"]
        assert [v.name for v in built] == ["int8", "tuned"]
        for variant in built:
            assert variant.value is None
            assert variant.latency_ms is None
            assert variant.reason is not None
            assert "GPU" in variant.reason
            assert variant.account == {"int8": 2, "fp32": 1}
            assert variant.not_honoured == []
            assert variant.command is not None
            assert variant.command.startswith("tensorrt_rtx --onnx=model.onnx")
        measured = [v for v in record.variants if v.backend == "onnxruntime/emulate"]
        assert [v.name for v in measured] == ["fp32", "int8", "tuned"]
        assert all(v.account == {} for v in measured)

    def test_the_table_of_layers_says_what_the_compiler_made_of_each(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder, RTX, "precision.pin={n_conv2: fp32}", "report.formats=[csv]")
        run(config, out=folder / "runs")
        (layers,) = (folder / "runs").glob("*/layers.csv")
        runs_in = {row.node: row.runs_in for row in read_layers(layers)}
        assert runs_in["n_conv1"] == "tensorrt_rtx: int8"
        assert runs_in["n_conv2"] == "tensorrt_rtx: fp32"

    def test_alone_it_is_tuned_on_the_emulation(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder, 'backends=[{name: tensorrt_rtx, compute_capabilities: ["8.9"]}]')
        record = run(config, out=folder / "runs")
        assert [(v.name, v.backend, v.value) for v in record.variants] == [
            ("int8", "tensorrt_rtx", None),
            ("tuned", "tensorrt_rtx", None),
        ]
        assert record.tuning[0].sqnr_db is not None


class OnGpu(OrtEngine):
    """onnxruntime in the place of an engine that times itself."""

    def latency(self, feeds: Mapping[str, Any], *, warmup: int, runs: int) -> GpuTiming:
        assert self.infer(feeds)
        return GpuTiming(Spread(2.0, 3.0, 4.0), None, 100.0, warmup, runs, graph=True)

    def layer_times(self, feeds: Mapping[str, Any]) -> dict[str, float]:
        return {"n_conv1 + n_relu1": 0.5, "Reformatting": 0.1}


class Elsewhere:
    """A backend that runs here and is not onnxruntime to the pipeline: all its models are built."""

    name, lowering = "elsewhere", "emulate"
    versions: Mapping[str, str] = MappingProxyType({"elsewhere": "1.0"})
    settings: Mapping[str, Any] = MappingProxyType({"level": 3})

    def __init__(self) -> None:
        self.built: list[str] = []

    def obstacle(self) -> str:
        return ""

    def doctor(self) -> Usable:
        return Usable(True)

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        table = candidate.table or CalibrationTable({})
        path = folder / "engine.plan"
        save_model(lower_emulate(candidate.model, candidate.plan, table), path)
        names = list(candidate.plan.nodes)
        layer = {"Name": f"{names[0]} + {names[1]}", "LayerType": "Convolution"}
        (folder / "layers.json").write_text(json.dumps({"Layers": [layer]}))
        info = BuildInfo(
            self.name, path, path.stat().st_size,
            {n: candidate.plan.precision(n) for n in candidate.plan.compute_nodes},
            versions=self.versions,
            details={"settings": dict(self.settings), "command": "build it", "notes": ["a note"]},
        )  # fmt: skip
        write_engine_json(folder, info, candidate)
        self.built.append(folder.name)
        return info

    def load(self, folder: Path) -> OnGpu:
        return OnGpu(lambda: make_session(folder / "engine.plan"))


class TestRunsHere:
    """A backend with engines of its own that run: every variant is built, measured and timed."""

    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
        found = Elsewhere()
        backends = Backends((found,), (), ("emulate",))
        monkeypatch.setattr("trtune.run.work.backends_of", lambda *given, **options: backends)
        return found

    def test_fp32_is_an_engine_too(self, tmp_path: Path, backend: Elsewhere) -> None:
        folder = write_project(tmp_path)
        config = config_of(
            folder, "report.latency={warmup: 1, runs: 3}", "report.formats=[csv]",
            "precision.pin={n_conv2: fp32}",
        )  # fmt: skip
        record = run(config, out=folder / "runs")
        assert [v.name for v in record.variants] == ["fp32", "int8", "tuned"]
        fp32, int8, tuned = record.variants
        assert backend.built.count("fp32") == 1  # for the gate, and measured where it stands
        assert fp32.sqnr_db == float("inf")
        assert int8.sqnr_db == tuned.sqnr_db
        assert fp32.account == {"fp32": 3}
        assert int8.account == {"int8": 2, "fp32": 1}
        assert (int8.command, int8.notes) == ("build it", ["a note"])
        for variant in record.variants:
            assert variant.latency_ms is not None
            assert (variant.latency_ms.median, variant.latency_ms.throughput) == (2.0, 100.0)
            assert variant.latency_note is None
        rows = {r.node: r for r in read_layers(next((folder / "runs").glob("*/layers.csv")))}
        assert rows["n_conv1"].time_ms == 0.5
        assert rows["n_conv2"].time_ms is None
        assert rows["n_conv2"].runs_in == "elsewhere: fp32"
        assert rows["n_logits"].runtime_sqnr_db == float("inf")  # onnxruntime against itself
        assert rows["n_logits"].runtime.startswith("elsewhere, ")

    def test_an_engine_that_differs_in_fp32_already_stops_the_run(
        self, tmp_path: Path, backend: Elsewhere, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_project(tmp_path)
        infer = OnGpu.infer
        monkeypatch.setattr(
            OnGpu, "infer", lambda self, feeds: {n: 1.1 * y for n, y in infer(self, feeds).items()}
        )
        with pytest.raises(TrtuneError, match="logits"):
            run(config_of(folder), out=folder / "runs")

    def test_the_second_run_builds_and_measures_nothing(
        self, tmp_path: Path, backend: Elsewhere
    ) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder, "report.latency={warmup: 1, runs: 3}")
        first = run(config, out=folder / "runs")
        built = list(backend.built)
        again = run(config, out=folder / "runs")
        assert backend.built == built
        assert again.variants == first.variants
