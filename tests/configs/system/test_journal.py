"""A run's folder while it is worked in: its log, its lock, what killed runs left."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trtune.configs.errors import DataError, TrtuneError
from trtune.configs.system.journal import RunFolder, working_in

log = logging.getLogger("trtune.tests")


@contextmanager
def logged_to(folder: Path) -> Iterator[RunFolder]:
    """A run in `folder`, opened."""
    with working_in(folder) as run:
        run.open()
        yield run


@pytest.fixture
def level() -> Iterator[int]:
    """The level of the package's logger, put back afterwards."""
    root = logging.getLogger("trtune")
    before = root.level
    yield before
    root.setLevel(before)


class TestLog:
    def test_it_is_appended_from_info_up(self, tmp_path: Path) -> None:
        for number in range(2):
            with logged_to(tmp_path / "run"):
                log.debug("not this")
                log.info("number %d", number)
        log.warning("afterwards")
        lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
        assert [line.split(" ", 2)[2] for line in lines] == ["INFO number 0", "INFO number 1"]

    @pytest.mark.parametrize("set_to", [logging.NOTSET, logging.DEBUG, logging.WARNING])
    def test_the_level_is_as_it_was_afterwards(
        self, tmp_path: Path, level: int, set_to: int
    ) -> None:
        root = logging.getLogger("trtune")
        root.setLevel(set_to)
        with logged_to(tmp_path):
            assert root.getEffectiveLevel() <= logging.INFO
        assert root.level == set_to
        assert not [h for h in root.handlers if isinstance(h, logging.FileHandler)]

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            pytest.param(TrtuneError("no room"), "TrtuneError: no room", id="an error"),
            pytest.param(KeyboardInterrupt(), "KeyboardInterrupt", id="Ctrl-C"),
        ],
    )
    def test_the_last_line_is_why_it_ended(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, line: str
    ) -> None:
        def work() -> None:
            with logged_to(tmp_path):
                raise error

        with pytest.raises(type(error)):
            work()
        assert (tmp_path / "log.txt").read_text().endswith(f" ERROR stopped by {line}\n")
        assert capsys.readouterr().err == ""

    def test_what_a_killed_run_left_behind_is_removed(self, tmp_path: Path) -> None:
        for leftover in (".tuning", ".writing-abc", "stages/.writing-def", "engine/.writing-g"):
            (tmp_path / leftover).mkdir(parents=True)
            (tmp_path / leftover / "model.onnx").write_text("half")
        (tmp_path / "stages" / "gate.json").write_text("{}")
        with logged_to(tmp_path):
            found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
        assert found == ["engine", "log.txt", "stages", "stages/gate.json"]

    def test_two_cannot_work_in_one_folder(self, tmp_path: Path) -> None:
        with logged_to(tmp_path):
            (tmp_path / ".tuning").mkdir()
            with pytest.raises(TrtuneError) as failure, logged_to(tmp_path):
                pass
            assert (tmp_path / ".tuning").is_dir()
        assert str(failure.value) == (
            f"another trtune works in {tmp_path}; wait for it, or choose another place with --out"
        )
        with logged_to(tmp_path):
            log.info("free again")

    def test_a_file_system_without_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_locks(file: object) -> bool:
            raise OSError(37, "No locks available")

        monkeypatch.setattr("trtune.configs.system.journal.try_lock", no_locks)
        with logged_to(tmp_path):
            log.info("all the same")
        assert "all the same" in (tmp_path / "log.txt").read_text()

    def test_a_place_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "run"
        with pytest.raises(TrtuneError) as failure, logged_to(folder):
            pass
        assert str(failure.value) == (
            f"cannot write to {folder}: Not a directory; choose another place with --out"
        )
        assert failure.value.exit_code == 1

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_full_disk_makes_no_noise(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "log.txt").symlink_to("/dev/full")
        with logged_to(tmp_path):
            log.info("there is no room for this")
        assert capsys.readouterr().err == ""


class TestBeforeItIsOpened:
    def test_what_was_logged_comes_first_and_nothing_is_on_the_disk(self, tmp_path: Path) -> None:
        with working_in(tmp_path / "run") as run:
            log.info("the model was read")
            assert not (tmp_path / "run").exists()
            run.open()
            log.info("calibrated")
        lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
        assert [line.split(" ", 3)[3] for line in lines] == ["the model was read", "calibrated"]

    @pytest.mark.parametrize("opened", [False, True])
    def test_wrong_input_leaves_no_folder_behind(self, tmp_path: Path, opened: bool) -> None:
        def work() -> None:
            with working_in(tmp_path / "run") as run:
                if opened:
                    run.open()
                raise DataError("no labels")

        with pytest.raises(DataError):
            work()
        assert not (tmp_path / "run").exists()

    def test_but_an_earlier_run_stays(self, tmp_path: Path) -> None:
        with logged_to(tmp_path / "run") as run:
            (run.path / "run.json").write_text("{}")
        with pytest.raises(DataError), logged_to(tmp_path / "run"):
            raise DataError("no labels")
        assert (tmp_path / "run" / "run.json").is_file()
        assert "stopped by DataError: no labels" in (tmp_path / "run" / "log.txt").read_text()


def test_two_runs_in_two_threads_write_each_its_own_log(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def work(name: str) -> None:
        with logged_to(tmp_path / name):
            meeting.wait()
            for number in range(20):
                log.info("%s %d", name, number)
            meeting.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("a", "b"):
        lines = (tmp_path / name / "log.txt").read_text().splitlines()
        assert [line.split(" ", 3)[3] for line in lines] == [f"{name} {n}" for n in range(20)]
    root = logging.getLogger("trtune")
    assert not [handler for handler in root.handlers if "Journal" in type(handler).__name__]


def test_a_helper_thread_of_the_only_run_is_heard(tmp_path: Path) -> None:
    with logged_to(tmp_path):
        thread = threading.Thread(target=lambda: log.info("from a worker"))
        thread.start()
        thread.join()
    assert "from a worker" in (tmp_path / "log.txt").read_text()


def test_a_python_without_the_modules_of_posix_can_run(tmp_path: Path) -> None:
    """Windows has neither fcntl nor resource: nothing of the package needs them at import."""
    import subprocess

    program = (
        "import sys\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import trtune.run.pipeline, trtune.tools, trtune.doctor, trtune.cli\n"
        "from pathlib import Path\n"
        "from trtune.configs.system.journal import working_in\n"
        "with working_in(Path('run')) as run:\n"
        "    run.open()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "run" / "log.txt").is_file()
