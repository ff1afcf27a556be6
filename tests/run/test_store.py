"""Stages keyed by what they were made from, and the folder's log."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtune.configs.errors import DataError, TrtuneError
from trtune.run.store import Evaluations, logged_to, read_stage, write_stage

log = logging.getLogger("trtune.tests")

KEY = {"model": "abc", "data": "def", "method": None}


class TestStages:
    @pytest.mark.parametrize(
        "value", [{"a": [1, 2.5, None]}, [], 0, True, {"sqnr_db": float("inf")}]
    )
    def test_a_value_is_given_back_for_its_key(self, tmp_path: Path, value: object) -> None:
        write_stage(tmp_path, "gate", KEY, value)
        assert read_stage(tmp_path, "gate", dict(reversed(KEY.items()))) == value
        assert [p.name for p in (tmp_path / "stages").iterdir()] == ["gate.json"]

    def test_there_is_none_yet(self, tmp_path: Path) -> None:
        assert read_stage(tmp_path, "gate", KEY) is None

    @pytest.mark.parametrize(
        ("key", "changed"),
        [
            pytest.param({**KEY, "model": "xyz"}, "model", id="one part"),
            pytest.param({**KEY, "model": "x", "data": "y"}, "model, data", id="two parts"),
            pytest.param({**KEY, "onnx": "1.19"}, "onnx", id="a part that is new"),
            pytest.param({"model": "abc", "method": None}, "data", id="a part that is gone"),
        ],
    )
    def test_the_log_names_the_parts_that_changed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: dict[str, str], changed: str
    ) -> None:
        write_stage(tmp_path, "gate", KEY, 1)
        with caplog.at_level(logging.INFO):
            assert read_stage(tmp_path, "gate", key) is None
        assert caplog.messages == [f"gate: not reused, {changed} changed"]

    def test_the_log_says_what_is_reused(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_stage(tmp_path, "gate", KEY, 1)
        with caplog.at_level(logging.INFO):
            read_stage(tmp_path, "gate", KEY)
        assert caplog.messages == [f"gate: reused from {tmp_path}/stages/gate.json"]

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param('{"key": {"mo', id="cut off"),
            pytest.param('{"value": 1}', id="no key"),
            pytest.param("[1]", id="a list"),
            pytest.param("", id="empty"),
            pytest.param('{"key": 3, "value": 1}', id="a key that is no mapping"),
        ],
    )
    def test_a_broken_file_is_as_good_as_none(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
    ) -> None:
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages" / "gate.json").write_text(text)
        assert read_stage(tmp_path, "gate", KEY) is None
        assert "gate.json cannot be read (" in caplog.text
        assert caplog.messages[0].endswith("): doing the stage again")


class TestEvaluations:
    def test_they_outlive_the_process(self, tmp_path: Path) -> None:
        Evaluations(tmp_path).put({"candidate": "a"}, {"value": 0.5})
        again = Evaluations(tmp_path)
        again.put({"candidate": "b"}, {"value": float("-inf")})
        last = Evaluations(tmp_path)
        assert last.get({"candidate": "a"}) == {"value": 0.5}
        assert last.get({"candidate": "b"}) == {"value": float("-inf")}
        assert last.get({"candidate": "c"}) is None

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"'])
    def test_a_broken_file_holds_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages" / "evaluations.json").write_text(text)
        known = Evaluations(tmp_path)
        assert known.get(KEY) is None
        known.put(KEY, 1)
        assert list(
            json.loads((tmp_path / "stages" / "evaluations.json").read_text()).values()
        ) == [1]


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
            pytest.param(DataError("x.npz is empty"), "DataError: x.npz is empty", id="an error"),
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
        def no_locks(file: object, operation: int) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr("fcntl.flock", no_locks)
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
