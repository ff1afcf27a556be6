"""Runs that are interrupted or killed: nothing half-done counts as done, the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinymodels
from tinyproject import BOTH, config_of, log_of, write_project

from trtune.calibrate.cache import load_table
from trtune.configs.schema import Config
from trtune.precision.runtime.engine_json import read_engine_json
from trtune.reports.record import RunRecord
from trtune.run.pipeline import build, calibrate, compare, run, run_folder, tune

OVERRIDES = (
    "precision.target={metric: top1, max_drop: 0}",
    "calibration.method=auto",
    "data.evaluation.batch=4",
    "report={formats: [md, csv, json], latency: {warmup: 0, runs: 2}}",
    BOTH,
)
PREFIXES = (".writing-", ".tuning")


class Interrupter:
    """A `Progress` that presses Ctrl-C at call number `at`; `seen` is what it was called with."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.seen: list[str] = []

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.seen.append(what)
        if len(self.seen) - 1 == self.at:
            raise KeyboardInterrupt


def outcome(record: RunRecord) -> dict[str, Any]:
    """What of a record must not depend on how often it was interrupted."""
    variants = [v.model_dump(exclude={"latency_ms"}) for v in record.variants]
    steps = [s.model_dump(include={"action", "pinned", "value", "met"}) for s in record.tuning]
    assert record.calibration is not None
    return {
        "status": record.status,
        "variants": variants,
        "tuning": steps,
        "methods": record.calibration.methods,
        "outliers": record.calibration.outliers,
        "histograms": record.histograms,
        "notes": record.notes,
        "hashes": record.hashes,
    }


def assert_whole(place: Path) -> None:
    """Everything in a run's folder is complete: it can be read, and holds what its keys say."""
    assert not [p for p in place.rglob("*") if p.name.startswith(PREFIXES)]
    for file in place.rglob("*.json"):
        json.loads(file.read_text())
    if (place / "calibration.cache").exists():
        assert load_table(place / "calibration.cache").scales
    for engine in place.rglob("engine.json"):
        info = read_engine_json(engine.parent)
        assert info.path is not None
        assert info.path.is_file()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tinymodels.depthwise())


@pytest.fixture(scope="module")
def config(project: Path) -> Config:
    return config_of(project, *OVERRIDES)


@pytest.fixture(scope="module")
def whole(project: Path, config: Config) -> tuple[RunRecord, list[str]]:
    """An uninterrupted run, and what it said to its progress."""
    progress = Interrupter()
    return run(config, out=project / "whole", progress=progress), progress.seen


STAGES = (
    *("fp32", "calibrate", "choose ranges", "comparing layers", "rank layers"),
    *("build onnxruntime/emulate", "build onnxruntime/deploy"),
    *("evaluate onnxruntime/emulate", "evaluate onnxruntime/deploy", "latency"),
)
KEPT = (
    ("calibrate", "comparing layers"),
    ("choose ranges", "comparing layers"),
    ("comparing layers", "rank layers"),
    ("rank layers", "build onnxruntime/emulate"),
)
"""What is not done again once the stage beside it has begun."""


class TestCtrlC:
    def test_every_stage_tells_its_progress(self, whole: tuple[RunRecord, list[str]]) -> None:
        assert set(STAGES) <= set(whole[1])

    @pytest.mark.parametrize("last", [False, True], ids=["at its start", "at its end"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_the_next_run_goes_on_and_ends_the_same(
        self,
        project: Path,
        config: Config,
        whole: tuple[RunRecord, list[str]],
        tmp_path: Path,
        stage: str,
        last: bool,
    ) -> None:
        record, seen = whole
        at = len(seen) - 1 - seen[::-1].index(stage) if last else seen.index(stage)
        progress = Interrupter(at)
        with pytest.raises(KeyboardInterrupt):
            run(config, out=tmp_path, progress=progress)
        place = run_folder(config, tmp_path)
        assert_whole(place)
        assert not (place / "run.json").exists()
        assert (place / "log.txt").read_text().rstrip().endswith("stopped by KeyboardInterrupt")
        again = Interrupter()
        assert outcome(run(config, out=tmp_path, progress=again)) == outcome(record)
        for what, following in KEPT:
            if at >= seen.index(following):
                assert what not in again.seen, f"{what} was done, and was done again"

    def test_again_and_again(
        self, project: Path, config: Config, whole: tuple[RunRecord, list[str]], tmp_path: Path
    ) -> None:
        """Whoever interrupts every run after its first new step still gets there."""
        for number in range(0, len(whole[1]), 5):
            try:
                run(config, out=tmp_path, progress=Interrupter(number))
            except KeyboardInterrupt:
                assert_whole(run_folder(config, tmp_path))
        assert outcome(run(config, out=tmp_path)) == outcome(whole[0])

    @pytest.mark.parametrize(
        "stage",
        [calibrate, build, compare, tune],
        ids=["calibrate", "build", "compare", "tune"],
    )
    def test_the_other_commands_too(
        self, config: Config, tmp_path: Path, stage: Callable[..., Any]
    ) -> None:
        for at in (0, 3):
            with pytest.raises(KeyboardInterrupt):
                stage(config, out=tmp_path / str(at), progress=Interrupter(at))
            assert_whole(run_folder(config, tmp_path / str(at)))
            stage(config, out=tmp_path / str(at))
            assert_whole(run_folder(config, tmp_path / str(at)))


def test_ctrl_c_at_any_write_leaves_nothing_half_written(
    project: Path,
    config: Config,
    whole: tuple[RunRecord, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writes = [0, -1]
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        writes[0] += 1
        if writes[0] == writes[1]:
            raise KeyboardInterrupt
        sync(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    interrupted = 0  # each run keeps what it wrote, so that the next has less to write
    for number in range(1, 60):
        writes[0], writes[1] = 0, number
        try:
            record = run(config, out=tmp_path)
        except KeyboardInterrupt:
            interrupted += 1
            assert_whole(run_folder(config, tmp_path))
        else:
            break
    assert interrupted > 5
    assert outcome(record) == outcome(whole[0])


KILLED = """
import os, signal, sys
from pathlib import Path
from trtune.configs.load import load_config
from trtune.run.pipeline import run

config, out, what, number = sys.argv[1:5]
seen = 0

def progress(step, done, total):
    global seen
    seen += step == what
    if seen == int(number):
        os.kill(os.getpid(), signal.SIGKILL)

run(load_config(config, overrides=sys.argv[5:]), out=out, progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    ("stage", "number", "left"),
    [
        pytest.param("calibrate", 2, set(), id="while calibrating"),
        pytest.param("evaluate onnxruntime/emulate", 2, {".tuning"}, id="while tuning"),
    ],
)
def test_a_killed_run_is_resumed(
    project: Path,
    config: Config,
    whole: tuple[RunRecord, list[str]],
    tmp_path: Path,
    stage: str,
    number: int,
    left: set[str],
) -> None:
    program = [sys.executable, "-c", KILLED, str(project / "tiny.yaml"), str(tmp_path), stage]
    done = subprocess.run([*program, str(number), *OVERRIDES], cwd=tmp_path, timeout=120)
    assert done.returncode == -signal.SIGKILL
    place = run_folder(config, tmp_path)
    assert {p.name for p in place.rglob("*") if p.name.startswith(PREFIXES)} == left
    (place / "stages" / ".writing-abcdef").mkdir(parents=True, exist_ok=True)
    (place / "stages" / ".writing-abcdef" / "calibrate.json").write_text('{"key": {"mo')
    record = run(config, out=tmp_path)
    assert outcome(record) == outcome(whole[0])
    assert_whole(place)


KILLED_OFTEN = """
import os, signal, sys
from pathlib import Path
import numpy as np
import pandas, polygraphy.comparator, polygraphy.json
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import AMAX_METHODS, CANDIDATES
from trtune.configs.load import load_config
from trtune.precision.runtime.errors import ErrorSums
from trtune.run.pipeline import run

some = np.linspace(-1, 1, 64, dtype=np.float32)
for amax in {**AMAX_METHODS, **CANDIDATES}.values():
    amax(Histogram.of(some))  # what is loaded and compiled here is not in every child
ErrorSums().add(some, some)

config, out, points = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
loaded = load_config(config, overrides=sys.argv[4:])

def child(number):
    seen = 0
    def progress(step, done, total):
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
    if os.fork() == 0:
        run(loaded, out=out / point, progress=progress)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])

for point in points:
    print(point, child(int(point)), child(0), flush=True)
"""
TIMED = ("log.txt", "run.json", "report.md", "variants.csv", "engine.json")
"""What holds the time that something took, or was written at."""
TIMED_STAGES = ("calibrate", "engine-", "latency-", "tune")


def written(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` that does not hold a time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in TIMED
        and not (path.parent.name == "stages" and path.name.startswith(TIMED_STAGES))
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_thirty_kills_leave_the_same_bytes(
    project: Path, config: Config, whole: tuple[RunRecord, list[str]], tmp_path: Path
) -> None:
    calls = len(whole[1])
    points = sorted({1 + round(k * (calls - 1) / 29) for k in range(30)})
    assert len(points) == 30
    program = [sys.executable, "-W", "ignore", "-c", KILLED_OFTEN, str(project / "tiny.yaml")]
    program += [str(tmp_path), " ".join(map(str, points)), *OVERRIDES]
    done = subprocess.run(program, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    ends = [line.split()[1:] for line in done.stdout.splitlines()]
    assert ends == [[str(-signal.SIGKILL), "0"]] * 30, done.stdout
    run(config, out=tmp_path / "whole")
    expected = written(run_folder(config, tmp_path / "whole"))
    for point in points:
        found = written(run_folder(config, tmp_path / str(point)))
        assert found.keys() == expected.keys(), point
        assert [name for name in found if found[name] != expected[name]] == [], point


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_a_signal_while_tuning_from_the_command_line(project: Path, tmp_path: Path) -> None:
    """A metric of one's own that waits, so that the signal comes while a candidate is measured."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "calls = []\n"
        "def score(outputs, batch):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 5 and not (here / 'go').exists():\n"
        "        (here / 'reached').touch()\n"
        "        time.sleep(60)\n"
        "    return 1.0\n"
    )
    overrides = (
        f"precision.target={{metric: '{tmp_path}/slow.py:score', min: 0.5}}",
        "data.evaluation.batch=4",
    )
    options = [part for override in overrides for part in ("--set", override)]
    program = subprocess.Popen(
        [sys.executable, "-m", "trtune", "run", str(project / "tiny.yaml"), *options,
         "--out", str(tmp_path / "runs")],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "reached").exists() and program.poll() is None:
        time.sleep(0.02)
    program.send_signal(signal.SIGTERM)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == 143, stderr
    config = config_of(project, *overrides)
    assert_whole(run_folder(config, tmp_path / "runs"))
    (tmp_path / "go").touch()
    assert run(config, out=tmp_path / "runs").status == "met"
    assert "calibrate: reused from" in log_of(config, tmp_path)
