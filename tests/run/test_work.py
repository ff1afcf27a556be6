"""What a run reuses, what it does again and why, and what it keeps in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from tinyproject import BOTH, config_of, work_of, write_project

from trtune.configs.errors import CacheError, ConfigError, DataError, TrtuneError
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.runtime.api import BuildInfo, Candidate
from trtune.reports.record import RunRecord
from trtune.run.backends import Backends
from trtune.run.comparing import compared
from trtune.run.pipeline import run, run_folder
from trtune.run.tuning import ranked

PINNING = "precision.target={metric: sqnr_db, min: 46}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


class Ran:
    """A run of the project, its folder, and what its log said this time."""

    def __init__(self, project: Path, *overrides: str) -> None:
        self.config = config_of(project, *overrides)
        self.folder = run_folder(self.config, project / "runs")
        log = self.folder / "log.txt"
        before = log.stat().st_size if log.is_file() else 0
        self.progress: list[str] = []
        self.record: RunRecord = run(self.config, out=project / "runs", progress=self._tell)
        lines = log.read_text()[before:].splitlines()
        self.lines = [line.split(" ", 3)[3] for line in lines]

    def _tell(self, what: str, done: int, total: int | None) -> None:
        self.progress.append(what)

    @property
    def again(self) -> list[str]:
        """Why stages were made again."""
        return [line for line in self.lines if " again: " in line]

    def reused(self, *names: str) -> bool:
        """Whether all of these stages were reused."""
        return all(any(x.startswith(f"{name}: reused from") for x in self.lines) for name in names)


class TestReuse:
    def test_a_second_run_computes_nothing(self, project: Path) -> None:
        latency = "report.latency={warmup: 0, runs: 2}"
        first = Ran(project, PINNING, BOTH, latency)
        before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*") if p.is_file()}
        second = Ran(project, PINNING, BOTH, latency)
        assert second.progress == []
        assert second.again == []
        assert second.reused("gate", "calibrate", "baseline", "compare", "alone", "tune")
        assert second.reused("engine-onnxruntime-emulate", "engine-onnxruntime-deploy-untuned")
        assert second.reused("evaluation", "latency-onnxruntime-deploy")
        after = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*") if p.is_file()}
        written = {p.relative_to(first.folder).as_posix() for p in after if after[p] != before[p]}
        assert written == {"config.yaml", "plan.json", "log.txt", "run.json"}
        assert second.record.calibration is not None
        assert second.record.calibration.reused
        assert second.record.variants == first.record.variants
        assert all(step.cached and not step.builds for step in second.record.tuning)

    def test_another_report_of_the_same_run(self, project: Path) -> None:
        first = Ran(project, PINNING)
        again = Ran(project, PINNING, "report.formats=[md]")
        assert again.folder == first.folder
        assert (again.folder / "report.md").is_file()
        assert again.progress == []

    @pytest.mark.parametrize(
        "override",
        [
            "calibration.memory=1GiB",
            "compare.memory=64MiB",
            "backends=[{name: onnxruntime, threads: 1}]",
        ],
    )
    def test_settings_that_change_no_result_do_nothing_again(
        self, project: Path, override: str
    ) -> None:
        first = Ran(project)
        again = Ran(project, override)
        assert (again.folder, again.again, again.progress) == (first.folder, [], [])

    def test_more_pins_go_on_where_fewer_ended(self, project: Path) -> None:
        target = "precision.target={metric: sqnr_db, min: 200}"
        first = Ran(project, target, "precision.max_pins=1")
        more = Ran(project, target, "precision.max_pins=2")
        assert more.folder == first.folder
        assert more.again[0] == "tune again: precision.max_pins changed"
        assert [s.cached for s in more.record.tuning] == [True, True, False]
        assert more.reused("calibrate", "alone", "compare")

    def test_a_project_that_moves_with_its_runs_does_nothing_again(
        self, project: Path, tmp_path: Path
    ) -> None:
        Ran(project)
        moved = tmp_path / "elsewhere" / "project"
        shutil.copytree(project, moved)
        again = Ran(moved)
        assert (again.again, again.progress) == ([], [])

    def test_another_target_or_pin_takes_over_what_it_does_not_change(self, project: Path) -> None:
        first = Ran(project)
        other = Ran(project, "precision.pin={n_conv2: fp32}", "precision.target.min=10")
        assert other.folder != first.folder
        assert other.reused("gate", "calibrate", "baseline")
        assert "compare again: plan changed" in other.again
        assert "calibrate" not in other.progress
        assert (other.folder / "calibration.cache").is_file()

    @pytest.mark.parametrize(
        ("touch", "said", "kept"),
        [
            pytest.param(
                lambda project: other_weights(project / "net.onnx"),
                ["gate again: model changed", "calibrate again: model changed"],
                [],
                id="the model",
            ),
            pytest.param(
                lambda project: other_rows(project / "calibration.npz"),
                [
                    "gate again: data.calibration changed",
                    "calibrate again: data.calibration changed",
                ],
                ["baseline"],
                id="the calibration data",
            ),
            pytest.param(
                lambda project: other_rows(project / "evaluation.npz"),
                ["compare again: data.evaluation changed"],
                ["calibrate", "alone"],
                id="the evaluation data",
            ),
            pytest.param(
                lambda project: other_labels(project / "evaluation.npz"),
                ["baseline again: data.evaluation changed"],
                ["calibrate", "alone"],
                id="the labels",
            ),
        ],
    )
    def test_what_changed_is_done_again_and_named(
        self, project: Path, touch: Callable[[Path], None], said: list[str], kept: list[str]
    ) -> None:
        target = "precision.target={metric: top1, min: 0.1}"
        first = Ran(project, target)
        touch(project)
        second = Ran(project, target)
        assert second.folder == first.folder
        for line in said:
            assert line in second.again
        assert second.reused(*kept)
        assert second.record.hashes != first.record.hashes

    def test_the_config_is_named_that_changed_the_data(self, project: Path) -> None:
        Ran(project)
        other = Ran(project, "data.calibration.take=16", "calibration.method=mse")
        (why,) = [line for line in other.again if line.startswith("calibrate")]
        assert why == "calibrate again: data.calibration.take, calibration.method changed"

    def test_the_same_bytes_at_another_time_are_the_same(self, project: Path) -> None:
        Ran(project)
        for name in ("net.onnx", "calibration.npz", "evaluation.npz"):
            (project / name).write_bytes((project / name).read_bytes())
        assert Ran(project).progress == []

    @pytest.mark.parametrize(
        "name", ["calibration.cache", "calibration.cache.json", "histograms.npz"]
    )
    @pytest.mark.parametrize(
        "harm",
        [
            pytest.param(lambda path: path.unlink(), id="missing"),
            pytest.param(lambda path: path.write_bytes(path.read_bytes()[:40]), id="cut off"),
            pytest.param(lambda path: path.write_bytes(path.read_bytes() + b" "), id="edited"),
        ],
    )
    def test_a_broken_calibration_is_made_again(
        self, project: Path, name: str, harm: Callable[[Path], None]
    ) -> None:
        first = Ran(project)
        file = first.folder / name
        original = file.read_bytes()
        harm(file)
        again = Ran(project)
        assert "calibrate" in again.progress
        assert again.again[0].startswith(f"calibrate again: {file} ")
        assert file.read_bytes() == original or name == "histograms.npz"
        assert Ran(project).progress == []

    def test_the_cache_of_another_calibration_is_not_taken(self, project: Path) -> None:
        first = Ran(project)
        scales = (first.folder / "calibration.cache").read_bytes()
        other = Ran(project, "calibration.method=percentile")
        for name in ("calibration.cache", "calibration.cache.json"):
            (first.folder / name).write_bytes((other.folder / name).read_bytes())
        again = Ran(project)
        assert again.again[0].startswith("calibrate again: ")
        assert (again.folder / "calibration.cache").read_bytes() == scales

    def test_a_changed_engine_is_built_again(self, project: Path) -> None:
        first = Ran(project)
        engine = first.folder / "onnxruntime-emulate" / "model.onnx"
        original = engine.read_bytes()
        engine.write_bytes(original[:-100])
        again = Ran(project)
        assert set(again.progress) == {"build onnxruntime/emulate"}
        assert engine.read_bytes() == original

    def test_another_processor_measures_deploy_again_and_the_emulation_not(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Ran(project, BOTH)
        monkeypatch.setattr("trtune.run.stages.engines.cpu_model", lambda: "another one")
        again = Ran(project, BOTH)
        assert "evaluate onnxruntime/deploy" in again.progress
        assert "evaluate onnxruntime/emulate" not in again.progress
        assert "calibrate" not in again.progress

    def test_another_numba_fills_histograms_again(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Ran(project)
        installed = importlib.metadata.version
        monkeypatch.setattr(
            "trtune.run.stage.package_version", lambda n: "9.9" if n == "numba" else installed(n)
        )
        again = Ran(project)
        assert again.again[0] == "calibrate again: numba changed"

    def test_no_pin_left_of_an_earlier_run_on_other_data(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinymodels.depthwise())
        exact = "precision.target={metric: top1, max_drop: 0}"
        assert Ran(folder, exact).record.variants[-1].pinned == ["n_logits"]
        rows = dict(np.load(folder / "evaluation.npz"))
        np.savez(folder / "evaluation.npz", **{name: array[4:] for name, array in rows.items()})
        again = Ran(folder, exact)
        assert again.record.variants[-1].pinned == []
        engine = again.folder / "onnxruntime-emulate"
        assert sorted(p.name for p in engine.iterdir()) == ["engine.json", "model.onnx"]


HELPED = """
import functools
from helper import SCALE, scaled

@scaled
def decorated(outputs, batch):
    return 1.0

def base(by, outputs, batch):
    return by * SCALE

partial = functools.partial(base, 1.0)

def closing(by):
    def closure(outputs, batch):
        return by * SCALE
    return closure

closure = closing(1.0)

class Callable:
    def __call__(self, outputs, batch):
        return SCALE

called = Callable()
"""
HELPER = """
import functools

SCALE = {}

def scaled(function):
    @functools.wraps(function)
    def inner(outputs, batch):
        return SCALE * function(outputs, batch)
    return inner
"""


class TestOwnCode:
    @pytest.mark.parametrize("name", ["decorated", "base_", "partial", "closure", "called"])
    def test_an_edited_metric_measures_again_in_whatever_form(
        self, project: Path, name: str
    ) -> None:
        (project / "mine.py").write_text(HELPED + "\nbase_ = lambda o, b: base(1.0, o, b)\n")
        target = f"precision.target={{metric: '{project}/mine.py:{name}', min: 0.1}}"
        for value in (0.5, 0.25):
            (project / "helper.py").write_text(HELPER.format(value))
            ran = Ran(project, target)
            assert [v.value for v in ran.record.variants] == [value] * 3
        assert "baseline again: metric changed" in ran.again
        assert ran.reused("calibrate", "compare")

    def test_an_edited_source_is_read_again(self, project: Path) -> None:
        (project / "feeds.py").write_text(
            "import numpy as np\n"
            "from feeding.deep import SEED\n"
            "def rows():\n"
            "    rng = np.random.default_rng(SEED)\n"
            "    yield {'input': rng.normal(size=(16, 3, 8, 8)).astype('float32')}\n"
        )
        (project / "feeding").mkdir()
        override = (
            f"data={{calibration: {{source: python, path: '{project}/feeds.py:rows', "
            f"labels: null}}, evaluation: {{source: arrays, path: '{project}/evaluation.npz'}}}}"
        )
        for seed in (1, 2):
            (project / "feeding" / "deep.py").write_text(f"SEED = {seed}\n")
            ran = Ran(project, override)
        assert "calibrate again: data.calibration changed" in ran.again


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
    """The same rows with a few other labels."""
    rows = dict(np.load(path))
    rows["labels"][:4] = (rows["labels"][:4] + 1) % 10
    np.savez(path, **rows)


class TestOrder:
    def test_labels_out_of_range_show_before_calibration(self, project: Path) -> None:
        rows = dict(np.load(project / "evaluation.npz"))
        rows["labels"][17] = 10
        np.savez(project / "evaluation.npz", **rows)
        seen: list[str] = []
        config = config_of(project, "precision.target={metric: top1, min: 0.1}")
        with pytest.raises(DataError, match=r"^label 10 of 17 is out of range"):
            run(config, out=project / "runs", progress=lambda what, done, total: seen.append(what))
        assert "calibrate" not in seen
        assert list((project / "runs").iterdir()) == []

    def test_a_wrong_pin_shows_before_anything(self, project: Path) -> None:
        config = config_of(project, "precision.pin={n_konv1: fp32}")
        with pytest.raises(ConfigError, match="did you mean 'n_conv1'"):
            run(config, out=project / "runs")
        assert not (project / "runs").exists()


class Broken(OnnxruntimeBackend):
    """A backend that fails, as the test says: building every model, or only the tuned ones."""

    def __init__(self, after: int) -> None:
        super().__init__("deploy")
        self.after = after

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        self.after -= 1
        if self.after < 0:
            raise TrtuneError("out of memory on the GPU")
        return super().build(candidate, folder)


class TestFailing:
    @pytest.mark.parametrize("after", [0, 1, 2, 3])
    def test_the_others_are_finished_and_the_reason_is_told(
        self, project: Path, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        broken = Broken(after)

        def backends(*given: object, **options: object) -> Backends:
            return Backends((OnnxruntimeBackend(), broken), (), ("emulate", "deploy"))

        monkeypatch.setattr("trtune.run.work.backends_of", backends)
        record = run(config_of(project, PINNING, BOTH), out=project / "runs")
        assert record.status == "failed"
        assert [(v.name, v.status) for v in record.variants] == [
            *[(name, "done") for name in ("fp32", "int8", "tuned")],
            ("int8", "failed"),
        ]
        assert record.variants[-1].reason == "out of memory on the GPU"
        assert record.variants[2].value is not None
        assert record.variants[2].value > 46

    def test_alone_its_error_is_the_runs(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = Backends((Broken(0),), (), ("deploy",))
        monkeypatch.setattr("trtune.run.work.backends_of", lambda *given, **options: found)
        with pytest.raises(TrtuneError, match=r"^out of memory on the GPU$") as failure:
            run(config_of(project, PINNING), out=project / "runs")
        assert failure.value.exit_code == 1


class TestSharing:
    def test_pins_do_not_calibrate_again(self, project: Path) -> None:
        """The table has every quantizable node's tensors, whatever is pinned."""
        pinned = work_of(project, "precision.pin={n_conv2: fp32}")
        assert set(pinned.calibrated.table.scales) >= {"input", "relu1", "flat"}
        assert pinned.untuned.int8_nodes == ("n_conv1", "n_logits")

    def test_the_comparison_is_of_the_plan_with_the_users_pins(self, project: Path) -> None:
        errors = compared(work_of(project, "precision.pin={n_conv2: fp32}"))
        assert set(errors.alone) == {"n_conv1", "n_logits"}
        assert "n_conv2" in errors.accumulated

    def test_ranking_is_worst_first_with_a_reason(self, project: Path) -> None:
        alone = dict(compared(work_of(project)).alone)
        ranking = ranked(alone)
        decibels = [alone[node].sqnr_db for node, _ in ranking]
        assert decibels == sorted(decibels)
        assert ranking[0] == ("n_logits", f"alone it leaves {decibels[0]:.1f} dB at the output")

    def test_auto_chooses_by_the_output(self, project: Path) -> None:
        found = work_of(project, "calibration.method=auto").calibrated
        assert found.pictures == 24 - 6  # a quarter is held out of so few
        assert found.search_seconds > 0
        assert set(found.table.methods) == set(found.table.scales)


def test_a_malformed_cache_in_the_config(project: Path) -> None:
    mine = project / "mine.cache"
    mine.write_text("TRT-8601-EntropyCalibration2\ninput 3c0a\n")
    work = work_of(project, f"calibration.cache={mine}")
    with pytest.raises(CacheError) as failure:
        _ = work.calibrated
    assert str(failure.value) == (
        f"{mine}: line 2: expected '<tensor>: <1 to 8 hex digits>', found 'input 3c0a'"
    )


def test_the_folder_holds_the_keys_of_its_stages(project: Path) -> None:
    ran = Ran(project)
    for stage in ("gate", "calibrate", "compare", "alone", "tune"):
        held = json.loads((ran.folder / "stages" / f"{stage}.json").read_text())
        assert len(held["needs"]["model"]) == 64
        assert held["needs"]["onnxruntime"] == ran.record.versions["onnxruntime"]
