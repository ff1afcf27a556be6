"""The commands on a config, with a real model and real data: results, streams, exit status."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from PIL import Image
from realdata import data_dir, needs_data
from typer.testing import CliRunner, Result

import trtune
from trtune.calibrate.cache import load_table
from trtune.cli.commands import app
from trtune.configs.load import load_config
from trtune.reports.record import RunRecord
from trtune.run.naming import run_folder

CONFIG = """
version: 1
name: tiny
model: {path: net.onnx}
data: {calibration: {source: arrays, path: data.npz, labels: null, batch: 8}}
calibration: {method: max, holdout: 4, prepare: none}
precision: {target: {metric: sqnr_db, min: 5}}
compare: {pictures: 4}
backends: [{name: onnxruntime, lowering: emulate}, {name: onnxruntime, lowering: deploy}]
report: {latency: {warmup: 0, runs: 2}}
"""
OUTLIER = ("--set", "data.calibration.path=outlier.npz")

SLOW_DATA = '''
import pathlib, time
import numpy as np

def batches():
    """24 pictures. In the pass whose number is in the file `wait` it stops while that is there."""
    with open("passes", "a+") as passes:
        passes.write("x")
        number = passes.tell()
    rng = np.random.default_rng(0)
    for _ in range(3):
        print("a user's own words")
        while pathlib.Path("wait").exists() and pathlib.Path("wait").read_text() == str(number):
            pathlib.Path("reached").touch()
            time.sleep(0.02)
        yield {"input": rng.standard_normal((8, 3, 8, 8)).astype("float32")}
'''


def invoke(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == status, result.output
    return result


def write_project(folder: Path) -> None:
    onnx.save(tinymodels.conv_relu(), folder / "net.onnx")
    rows = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", input=rows)
    rows[7] *= 300
    np.savez(folder / "outlier.npz", input=rows)
    (folder / "slow.py").write_text(SLOW_DATA)
    (folder / "c.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A project, and `trtune run c.yaml -v` in it."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, invoke("run", "c.yaml", "-v")


@pytest.fixture
def project(finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the project without its runs."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the project with its finished run."""
    monkeypatch.chdir(finished[0])
    return finished[0]


class TestRun:
    def test_the_result_table_and_where_the_report_is(self, finished: tuple[Path, Result]) -> None:
        folder, result = finished
        assert "tiny  target met" in result.stdout
        for variant in ("fp32", "int8", "tuned"):
            for backend in ("onnxruntime/emulate", "onnxruntime/deploy"):
                assert re.search(rf"^ {variant} +{backend} ", result.stdout, re.M)
        last = result.stdout.splitlines()[-1]
        assert (folder / last.removeprefix("report: ")).name == "report.html"
        assert (folder / last.removeprefix("report: ")).is_file()

    def test_verbose_says_on_stderr_what_was_done(self, finished: tuple[Path, Result]) -> None:
        assert "report: " in finished[1].stderr
        assert "Traceback" not in finished[1].stderr

    def test_json_is_the_run_record_and_all_of_stdout(self, ran: Path) -> None:
        result = invoke("run", "c.yaml", "--json", "-v", "--set", "report.formats=[json]")
        record = RunRecord.from_json(result.stdout)
        assert record.status == "met"
        assert record.command == "trtune run c.yaml --set 'report.formats=[json]'"
        (saved,) = Path("runs").glob("tiny-*/run.json")
        assert RunRecord.from_json(saved.read_text()) == record

    def test_a_second_run_reuses_what_is_there(self, ran: Path) -> None:
        assert "calibrate: reused from" in invoke("run", "c.yaml", "-v").stderr

    def test_a_missed_target_ends_with_3_and_still_writes_the_report(self, project: Path) -> None:
        result = invoke("run", "c.yaml", "--set", "precision.target.min=200", "--set",
                        "precision.max_pins=0", "--out", "elsewhere", status=3)  # fmt: skip
        assert "target missed" in result.stdout
        (report,) = Path("elsewhere").glob("tiny-*/report.html")
        assert str(report) in result.stdout

    def test_an_output_place_that_is_a_file_ends_with_1(self, project: Path) -> None:
        Path("taken").write_text("")
        result = invoke("run", "c.yaml", "--out", "taken", status=1)
        assert result.stderr.startswith("error: cannot write ")
        assert "--out" in result.stderr
        assert "bug" not in result.stderr

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param("precision.pin={n_conv: fp32}", "did you mean 'n_conv", id="unknown pin"),
            pytest.param("data.calibration.skip=24", "empty", id="nothing is left of the data"),
            pytest.param("model.path=data.npz", "is not an ONNX file", id="not a model"),
        ],
    )
    def test_wrong_input_ends_with_2(self, project: Path, override: str, message: str) -> None:
        result = invoke("run", "c.yaml", "--set", override, status=2)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


class TestStages:
    def test_calibrate_names_the_picture_that_sets_the_ranges(self, project: Path) -> None:
        shown = invoke("calibrate", "c.yaml", *OUTLIER).stdout
        assert re.search(
            r"^\d+ tensors with a scale; method: max \(\d\), constant \(\d\)$", shown, re.M
        )
        assert re.search(r"^• picture 7 sets the range of \d tensors, up to \d+ times", shown, re.M)
        cache = Path(shown.splitlines()[-1].removeprefix("cache: "))
        assert cache.is_file()
        assert "EntropyCalibration2" in invoke("cache", "show", cache).stdout

    def test_calibrate_in_python(self, ran: Path) -> None:
        config = trtune.load_config("c.yaml")
        table = trtune.calibrate(config)
        assert table == load_table(trtune.run_folder(config) / "calibration.cache")
        assert table.scale("input") > 0

    def test_calibrate_as_json(self, project: Path) -> None:
        found = json.loads(invoke("calibrate", "c.yaml", "--json", *OUTLIER).stdout)
        assert set(found["scales"]) == set(found["methods"])
        assert found["dominant"][0]["item"] == "7"
        assert Path(found["cache"]).is_file()

    def test_calibrate_from_a_named_cache_has_no_pictures_to_name(self, project: Path) -> None:
        cache = json.loads(invoke("calibrate", "c.yaml", "--json").stdout)["cache"]
        found = invoke("calibrate", "c.yaml", "--json", "--set", f"calibration.cache={cache}")
        assert json.loads(found.stdout)["dominant"] == []

    def test_build_has_a_row_a_backend(self, ran: Path) -> None:
        shown = invoke("build", "c.yaml").stdout
        assert re.search(r"onnxruntime/emulate +runs/\S+/model\.onnx +3 +— +\d\S* kB", shown)
        assert "onnxruntime/deploy" in shown

    def test_build_of_one_backend(self, project: Path) -> None:
        found = json.loads(
            invoke("build", "c.yaml", "--backend", "onnxruntime/deploy", "--json").stdout
        )
        assert [info["backend"] for info in found] == ["onnxruntime/deploy"]
        assert Path(found[0]["path"]).is_file()

    def test_build_of_an_unknown_backend_names_the_known(self, project: Path) -> None:
        result = invoke("build", "c.yaml", "--backend", "onnxrt/emulate", status=2)
        assert "did you mean 'onnxruntime/emulate'?" in result.stderr

    def test_compare_shows_the_worst_layers(self, ran: Path) -> None:
        shown = invoke("compare", "c.yaml").stdout
        alone, accumulated = shown.split("Accumulated: ")
        assert re.search(r"n_conv1 +Conv +int8 +\d+\.\d dB", alone)
        assert "n_relu1" not in alone
        assert "n_relu1" in accumulated
        layers = Path(shown.splitlines()[-1].removeprefix("all 7 layers: "))
        assert layers.read_text().startswith("node,op,shape")

    def test_compare_as_json(self, ran: Path) -> None:
        rows = json.loads(invoke("compare", "c.yaml", "--json").stdout)
        assert [row["node"] for row in rows][:2] == ["n_conv1", "n_relu1"]

    def test_tune_says_how_to_get_the_report(self, project: Path) -> None:
        shown = invoke("tune", "c.yaml").stdout
        assert "target met" in shown
        (folder,) = Path("runs").iterdir()
        assert shown.splitlines()[-1] == (
            f"record: {folder}/run.json; `trtune report {folder}` draws the report"
        )

    def test_tune_needs_a_target(self, project: Path) -> None:
        result = invoke("tune", "c.yaml", "--set", "precision.target=null", status=2)
        assert "precision.target: nothing to tune for" in result.stderr


class TestReport:
    def test_it_is_written_again(self, ran: Path) -> None:
        (folder,) = Path("runs").glob("tiny-*")
        (folder / "report.html").unlink()
        shown = invoke("report", folder).stdout
        assert f"report: {folder}/report.html" in shown
        assert (folder / "report.html").is_file()
        assert "metric" not in shown

    def test_several_stand_side_by_side(self, ran: Path) -> None:
        (folder,) = Path("runs").glob("tiny-*")
        shutil.copytree(folder, "copy", dirs_exist_ok=True)
        shown = invoke("report", folder, "copy/run.json").stdout
        assert shown.count("tiny  target met") == 2
        assert re.search(r"^ run +backend +metric +FP32 +untuned +tuned", shown, re.M)
        assert len(json.loads(invoke("report", folder, "copy", "--json").stdout)) == 2

    def test_no_such_run_names_the_nearest(self, ran: Path) -> None:
        (folder,) = Path("runs").glob("tiny-*")
        result = invoke("report", f"{folder}x", status=2)
        assert result.stderr == f"error: {folder}x: no such run; did you mean '{folder}'?\n"

    def test_of_several_what_is_no_run_is_left_out_with_a_note(self, ran: Path) -> None:
        (folder,) = Path("runs").glob("tiny-*")
        Path("runs/empty").mkdir()
        Path("runs/broken").mkdir()
        Path("runs/broken/run.json").write_text("{")
        try:
            result = invoke("report", *sorted(Path("runs").iterdir()))
        finally:
            shutil.rmtree("runs/empty")
            shutil.rmtree("runs/broken")
        assert f"report: {folder}/report.html" in result.stdout
        assert "note: left out: runs/empty/run.json: no such file" in result.stderr
        assert "note: left out: runs/broken/run.json: not a run record" in result.stderr

    def test_a_folder_without_a_run(self, project: Path) -> None:
        assert "give a run's folder" in invoke("report", ".", status=2).stderr


class TestInit:
    @pytest.mark.parametrize("name", ["mlp", "two_inputs", "int64_input", "fixed_batch"])
    def test_run_accepts_what_init_wrote(self, project: Path, name: str) -> None:
        proto = tinymodels.MODELS[name]()
        onnx.save(proto, "net.onnx")
        invoke("init", "net.onnx")
        text = Path("net.yaml").read_text()
        if "source: images" in text:
            Path("data").mkdir()
            for i, row in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3))):
                Image.fromarray(row.astype(np.uint8)).save(f"data/{i}.png")
        else:
            arrays: dict[str, Any] = tinymodels.feeds(proto, batch=8)
            np.savez("data.npz", **arrays)
        few = text.replace("take: 256", "take: 4").replace("skip: 256", "skip: 4")
        Path("net.yaml").write_text(few.replace("PATH/TO/YOUR/DATA", "data"))
        result = CliRunner().invoke(app, ["run", "net.yaml", "--json"])
        assert result.exit_code in (0, 3), result.output
        variants = RunRecord.from_json(result.stdout).variants
        assert [variant.name for variant in variants] == ["fp32", "int8", "tuned"]

    @needs_data
    @pytest.mark.slow
    def test_run_accepts_what_init_wrote_for_a_real_model(self, project: Path) -> None:
        Path("pictures").mkdir()
        for picture in sorted((data_dir() / "images" / "nips17").glob("*.*g"))[:8]:
            shutil.copy(picture, "pictures")
        invoke("init", data_dir() / "models" / "squeezenet1.1_imagenet.onnx", "-o", "s.yaml")
        text = (
            Path("s.yaml")
            .read_text()
            .replace("take: 256", "take: 4")
            .replace("skip: 256", "skip: 4")
        )
        Path("s.yaml").write_text(text.replace("PATH/TO/YOUR/DATA", "pictures"))
        result = CliRunner().invoke(app, ["run", "s.yaml", "--json"])
        assert result.exit_code in (0, 3), result.output
        assert RunRecord.from_json(result.stdout).baseline.samples == 4


def start(project: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trtune", *args], cwd=project,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


SLOWLY = ("run", "c.yaml", "--set",
          "data.calibration={source: python, path: 'slow.py:batches', labels: null}")  # fmt: skip


def test_several_runs_side_by_side_go_to_a_file(ran: Path) -> None:
    (run,) = Path("runs").iterdir()
    shown = invoke("report", run, run, "-o", "both.html").stdout
    assert "side by side: both.html" in shown
    assert Path("both.html").read_text().count(run.name.rpartition("-")[0]) >= 2
    invoke("report", run, run, "-o", "both.md")
    assert Path("both.md").read_text().startswith("#")


class TestProgram:
    def test_what_a_users_function_prints_does_not_spoil_the_json(self, project: Path) -> None:
        done = start(project, *SLOWLY, "--json")
        stdout, stderr = done.communicate()
        assert done.returncode == 0, stderr
        assert RunRecord.from_json(stdout).status == "met"
        assert "a user's own words" in stderr
        assert "\x1b" not in stderr

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
    @pytest.mark.parametrize(
        ("number", "status", "word", "data_pass"),
        [
            pytest.param(signal.SIGINT, 130, "interrupted", 1, id="Ctrl-C, looking at the data"),
            pytest.param(signal.SIGINT, 130, "interrupted", 4, id="Ctrl-C, calibrating"),
            pytest.param(signal.SIGINT, 130, "interrupted", 6, id="Ctrl-C, measuring"),
            pytest.param(signal.SIGTERM, 143, "terminated", 4, id="SIGTERM, calibrating"),
        ],
    )
    def test_a_signal_ends_it_with_one_line_and_nothing_half_written(
        self, project: Path, number: signal.Signals, status: int, word: str, data_pass: int
    ) -> None:
        Path("wait").write_text(str(data_pass))
        program = start(project, *SLOWLY)
        while not Path("reached").exists() and program.poll() is None:
            time.sleep(0.02)
        program.send_signal(number)
        Path("wait").unlink()
        _, stderr = program.communicate()
        assert program.returncode == status, stderr
        assert stderr == (
            f"error: {word}; what was complete is kept: the same command goes on from there\n"
        )
        written = {path.name for path in Path("runs").rglob("*")}
        assert "run.json" not in written
        assert not any(name.startswith(".writing-") for name in written)
        config = load_config("c.yaml", overrides=[SLOWLY[-1]])
        invoke(*SLOWLY)
        assert (run_folder(config) / "report.html").is_file()
