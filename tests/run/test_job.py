"""What a job reuses, what it does again and why, and what it keeps in its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from tinyproject import BOTH, config_of, job_of, log_of, record_of, write_project

from trtune.configs.errors import CacheError, DataError
from trtune.run.job import Job, run_folder, run_key
from trtune.run.pipeline import run, run_record_of

PINNING = "precision.target={metric: sqnr_db, min: 46}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


def finish(job: Job) -> Job:
    """Every stage of `job`, and its record."""
    job.gate()
    run_record_of(job, "", "", 0.0)
    return job


def lines(caplog: pytest.LogCaptureFixture, folder: Path) -> list[str]:
    """What was logged, without the folder."""
    return [message.replace(f"{folder}/runs/", "") for message in caplog.messages]


class TestKey:
    def test_the_report_does_not_count(self, project: Path) -> None:
        plain = config_of(project)
        other = config_of(project, "report={formats: [html], latency: {runs: 3}}")
        assert run_folder(plain, "out") == run_folder(other, "out")
        assert run_folder(plain) == Path("runs") / f"tiny-{run_key(plain)}"

    @pytest.mark.parametrize(
        "override",
        [
            "calibration.method=mse",
            "calibration.holdout=5",
            "data.calibration.take=20",
            "precision.pin={n_conv1: fp32}",
            "precision.target.min=6",
            "compare.pictures=5",
            BOTH,
        ],
    )
    def test_everything_else_does(self, project: Path, override: str) -> None:
        assert run_key(config_of(project)) != run_key(config_of(project, override))


class TestReuse:
    def test_a_second_run_computes_nothing(
        self, project: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        latency = "report.latency={warmup: 0, runs: 2}"
        first = finish(job_of(project, PINNING, BOTH, latency))
        assert first.builds >= 6
        before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*") if p.is_file()}
        caplog.clear()
        caplog.set_level(logging.INFO)
        second = finish(job_of(project, PINNING, BOTH, latency))
        assert second.builds == 0
        assert "reference" not in vars(second)
        for stage in ("gate", "calibrate", "compare", "alone", "latency-onnxruntime-deploy"):
            assert f"{stage}: reused from {first.folder}/stages/{stage}.json" in caplog.messages
        for backend in ("FP32", "onnxruntime/emulate", "onnxruntime/deploy"):
            assert f"evaluation of {backend}: reused" in caplog.messages
        assert not [m for m in caplog.messages if "changed" in m or "not reused" in m]
        after = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*") if p.is_file()}
        written = {p.relative_to(first.folder).as_posix() for p in after if after[p] != before[p]}
        assert written == {"config.yaml", "plan.json", "stages/tune.json"}
        assert second.reused_calibration
        assert second.tuned.plan == first.tuned.plan
        assert all(step.score.cached for step in second.tuned.steps)

    def test_another_report_of_the_same_run(self, project: Path) -> None:
        run(config_of(project, PINNING), out=project / "runs")
        config = config_of(project, PINNING, "report.formats=[md]")
        folder = run_folder(config, project / "runs")
        engine = folder / "onnxruntime-emulate" / "model.onnx"
        made = engine.stat().st_mtime_ns
        record = run(config, out=project / "runs")
        assert [p.name for p in (project / "runs").iterdir()] == [folder.name]
        assert (folder / "report.md").is_file()
        assert engine.stat().st_mtime_ns == made
        assert [step.builds for step in record.tuning] == [0] * len(record.tuning)
        assert "calibrate: reused from" in log_of(config, project)

    @pytest.mark.parametrize(
        ("touch", "said", "kept"),
        [
            pytest.param(
                lambda project: other_weights(project / "net.onnx"),
                ["gate: not reused, model changed", "calibrate: not reused, model changed"],
                [],
                id="the model",
            ),
            pytest.param(
                lambda project: other_rows(project / "calibration.npz"),
                ["gate: not reused, data changed", "calibrate: not reused, data changed"],
                ["evaluation of FP32: reused"],
                id="the calibration data",
            ),
            pytest.param(
                lambda project: other_rows(project / "evaluation.npz"),
                ["compare: not reused, evaluation_data changed"],
                ["calibrate: reused from", "alone: reused from"],
                id="the evaluation data",
            ),
            pytest.param(
                lambda project: other_labels(project / "evaluation.npz"),
                [],
                ["calibrate: reused from", "alone: reused from"],
                id="the labels",
            ),
        ],
    )
    def test_what_changed_is_done_again_and_named(
        self,
        project: Path,
        caplog: pytest.LogCaptureFixture,
        touch: Callable[[Path], None],
        said: list[str],
        kept: list[str],
    ) -> None:
        first = finish(job_of(project, "precision.target={metric: top1, min: 0.1}"))
        touch(project)
        caplog.clear()
        caplog.set_level(logging.INFO)
        second = finish(job_of(project, "precision.target={metric: top1, min: 0.1}"))
        assert second.folder == first.folder
        for line in said:
            assert line in caplog.messages
        for line in kept:
            assert any(message.startswith(line) for message in caplog.messages)
        assert second.builds > 0
        assert second.hashes != first.hashes

    def test_the_same_bytes_at_another_time_are_the_same(self, project: Path) -> None:
        finish(job_of(project))
        for name in ("net.onnx", "calibration.npz", "evaluation.npz"):
            (project / name).write_bytes((project / name).read_bytes())
        assert finish(job_of(project)).builds == 0

    def test_an_edited_cache_is_not_trusted(
        self, project: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = finish(job_of(project))
        cache = first.folder / "calibration.cache"
        original = cache.read_text()
        digit = original.rstrip()[-1]
        cache.write_text(original.rstrip()[:-1] + ("1" if digit == "0" else "0") + "\n")
        again = job_of(project)
        assert again.table.scales == first.table.scales
        assert not again.reused_calibration
        assert cache.read_text() == original
        assert (
            f"the kept calibration cannot be used ({cache} does not say which model and data it "
            "was made from: calibration.cache.json belongs to another text of it (edited, or half "
            "a write)" in caplog.text
        )

    @pytest.mark.parametrize(
        "name", ["calibration.cache", "calibration.cache.json", "histograms.npz"]
    )
    @pytest.mark.parametrize(
        "harm",
        [
            pytest.param(lambda path: path.unlink(), id="missing"),
            pytest.param(lambda path: path.write_bytes(path.read_bytes()[:40]), id="cut off"),
            pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        ],
    )
    def test_a_broken_calibration_is_made_again(
        self,
        project: Path,
        caplog: pytest.LogCaptureFixture,
        name: str,
        harm: Callable[[Path], None],
    ) -> None:
        first = finish(job_of(project))
        harm(first.folder / name)
        again = finish(job_of(project))
        assert again.table.scales == first.table.scales
        assert not again.reused_calibration
        assert "): calibrating again" in caplog.text
        assert finish(job_of(project)).reused_calibration

    def test_the_cache_of_another_calibration_is_not_taken(
        self, project: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = finish(job_of(project))
        other = finish(job_of(project, "calibration.method=percentile"))
        for name in ("calibration.cache", "calibration.cache.json"):
            (first.folder / name).write_bytes((other.folder / name).read_bytes())
        caplog.set_level(logging.INFO)
        again = job_of(project)
        assert again.table.scales == first.table.scales
        assert "calibrate: not reused, calibration.cache is of another calibration" in caplog.text

    def test_a_changed_engine_is_built_again(self, project: Path) -> None:
        first = finish(job_of(project))
        engine = first.folder / "onnxruntime-emulate" / "model.onnx"
        original = engine.read_bytes()
        engine.write_bytes(original[:-100])
        again = finish(job_of(project))
        assert again.builds == 1
        assert engine.read_bytes() == original

    def test_an_edited_metric_measures_again(self, project: Path) -> None:
        metric = project / "mine.py"
        text = "def constant(outputs, batch):\n    return {}\n"
        target = f"precision.target={{metric: '{metric}:constant', min: 0.1}}"
        metric.write_text(text.format(0.5))
        config = config_of(project, target)
        assert run(config, out=project / "runs").variants[0].value == 0.5
        forget(metric)
        metric.write_text(text.format(0.25))
        assert run(config, out=project / "runs").variants[0].value == 0.25
        assert record_of(config, project)["variants"][1]["value"] == 0.25

    def test_no_pin_left_of_an_earlier_run_on_other_data(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinymodels.depthwise())
        exact = "precision.target={metric: top1, max_drop: 0}"
        assert finish(job_of(folder, exact)).tuned.plan.pinned == ("n_logits",)
        rows = dict(np.load(folder / "evaluation.npz"))
        np.savez(folder / "evaluation.npz", **{name: array[4:] for name, array in rows.items()})
        again = finish(job_of(folder, exact))
        assert again.tuned.plan.pinned == ()
        engine = again.engine_folder(again.backends[0])
        assert sorted(p.name for p in engine.iterdir()) == ["engine.json", "model.onnx"]


def other_weights(path: Path) -> None:
    proto = onnx.load(path)
    weights = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    changed = onnx.numpy_helper.from_array(
        weights * np.float32(1.5), proto.graph.initializer[0].name
    )
    proto.graph.initializer[0].CopyFrom(changed)
    onnx.save(proto, path)


def other_rows(path: Path) -> None:
    rows = dict(np.load(path))
    rows["input"] = rows["input"] * np.float32(1.5)
    np.savez(path, **rows)


def other_labels(path: Path) -> None:
    rows = dict(np.load(path))
    rows["labels"] = (rows["labels"] + 1) % 10
    np.savez(path, **rows)


def forget(module: Path) -> None:
    """As a new process has it: `module` is not imported yet, nor compiled."""
    import importlib
    import shutil
    import sys

    sys.modules.pop(module.stem)
    shutil.rmtree(module.parent / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()


class TestOrder:
    def test_labels_out_of_range_show_before_calibration(self, project: Path) -> None:
        rows = dict(np.load(project / "evaluation.npz"))
        rows["labels"][17] = 10
        np.savez(project / "evaluation.npz", **rows)
        job = job_of(project, "precision.target={metric: top1, min: 0.1}")
        with pytest.raises(DataError, match=r"^label 10 of 17 is out of range"):
            finish(job)
        assert "calibrated" not in vars(job)

    def test_a_wrong_pin_shows_before_calibration(self, project: Path) -> None:
        job = job_of(project, "precision.pin={n_konv1: fp32}")
        with pytest.raises(Exception, match="did you mean 'n_conv1'"):
            finish(job)
        assert "calibrated" not in vars(job)


class TestSharing:
    def test_pins_do_not_calibrate_again(self, project: Path) -> None:
        """The table has every quantizable node's tensors, whatever is pinned."""
        pinned = job_of(project, "precision.pin={n_conv2: fp32}")
        assert set(pinned.table.scales) >= {"input", "relu1", "flat"}
        assert pinned.untuned.int8_nodes == ("n_conv1", "n_logits")

    def test_the_comparison_is_of_the_plan_with_the_users_pins(self, project: Path) -> None:
        errors = job_of(project, "precision.pin={n_conv2: fp32}").layers
        assert set(errors.alone) == {"n_conv1", "n_logits"}
        assert "n_conv2" in errors.accumulated

    def test_ranking_is_worst_first_with_a_reason(self, project: Path) -> None:
        job = job_of(project)
        decibels = [job.alone[node].sqnr_db for node, _ in job.ranking]
        assert decibels == sorted(decibels)
        assert job.ranking[0] == ("n_logits", f"alone it leaves {decibels[0]:.1f} dB at the output")

    def test_auto_chooses_by_the_output(self, project: Path) -> None:
        job = job_of(project, "calibration.method=auto")
        assert job.calibrated.pictures == 24 - 4
        assert job.calibrated.search_seconds > 0
        assert set(job.table.methods) == set(job.table.scales)


class TestNamedCache:
    def test_a_malformed_one(self, project: Path) -> None:
        mine = project / "mine.cache"
        mine.write_text("TRT-8601-EntropyCalibration2\ninput 3c0a\n")
        job = job_of(project, f"calibration.cache={mine}")
        with pytest.raises(CacheError) as failure:
            _ = job.table
        assert str(failure.value) == (
            f"{mine}: line 2: expected '<tensor>: <1 to 8 hex digits>', found 'input 3c0a'"
        )


def test_the_folder_holds_the_keys_of_its_stages(project: Path) -> None:
    job = finish(job_of(project))
    for stage in ("gate", "calibrate", "compare", "alone", "tune"):
        held = json.loads((job.folder / "stages" / f"{stage}.json").read_text())
        assert job.hashes["model"] in held["key"].values()
        assert held["key"]["onnxruntime"] == job.versions["onnxruntime"]
