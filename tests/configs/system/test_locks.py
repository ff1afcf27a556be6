"""Locks on files: threads, processes, a killed holder, Windows' way, and none at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from trtune.configs.errors import TrtuneError
from trtune.configs.system import locks
from trtune.configs.system.locks import lock_of, locked, try_lock, unlock

HOLD = """
import sys, pathlib
from trtune.configs.system.locks import locked
with locked(pathlib.Path(sys.argv[1]), patience=0, remedy=""):
    print("held", flush=True)
    sys.stdin.read()
"""


class Msvcrt:
    """`msvcrt.locking` as Windows documents it: byte ranges, by handle, at the file's position."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, file: int, way: int, count: int) -> None:
        place = (os.fstat(file).st_ino, os.lseek(file, 0, os.SEEK_CUR))
        if way == self.LK_UNLCK:
            if self.held.pop(place, None) != file:
                raise OSError(errno.EACCES, "Permission denied")
        elif self.held.setdefault(place, file) != file or count != 1:
            raise OSError(errno.EACCES, "Permission denied")


@pytest.fixture(params=["this system", "Windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name == "Windows":
        windows = Msvcrt()
        monkeypatch.setattr(locks, "_modules", lambda: (None, windows))
    return name


@pytest.mark.usefixtures("system")
def test_one_handle_at_a_time_holds_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with path.open("a") as first, path.open("a") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.write("a line\n")
        first.flush()
        unlock(first)
        assert try_lock(second)
        second.write("another\n")
        unlock(second)
    assert path.read_text() == "a line\nanother\n"


@pytest.mark.usefixtures("system")
def test_two_threads_keep_each_other_out(tmp_path: Path) -> None:
    found: list[bool] = []

    def other() -> None:
        with (tmp_path / "log.txt").open("a") as handle:
            found.append(try_lock(handle))

    with (tmp_path / "log.txt").open("a") as handle:
        assert try_lock(handle)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        unlock(handle)
    assert found == [False]


@pytest.mark.usefixtures("system")
def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    with pytest.raises(KeyError), locked(path, patience=0, remedy=""):
        raise KeyError("anything")
    with locked(path, patience=0, remedy=""):
        assert lock_of(path).is_file()
    assert not path.exists()


@pytest.mark.usefixtures("system")
def test_whoever_waits_too_long_is_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    with (
        locked(path, patience=0, remedy=""),
        pytest.raises(TrtuneError) as failure,
        locked(path, patience=0, remedy="choose another place"),
    ):
        pass
    assert str(failure.value) == (
        f"another process has held {lock_of(path)} for 0 seconds; wait for it to end, or choose "
        "another place"
    )


def test_a_process_that_died_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TrtuneError), locked(path, patience=0, remedy=""):
            pass
        holder.kill()
        holder.wait()
    with locked(path, patience=10, remedy=""):
        pass


def test_a_place_that_cannot_hold_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrtuneError, match=f"cannot lock {tmp_path}/file/timing.cache"),
        locked(tmp_path / "file" / "timing.cache", patience=0, remedy="choose another"),
    ):
        pass


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param((None, None), id="a Python without either module"),
        pytest.param(
            (SimpleNamespace(flock=lambda *_: os.open("/", os.O_RDWR), LOCK_EX=2, LOCK_NB=4), None),
            id="a file system without locks",
        ),
    ],
)
def test_without_locks_the_work_is_done_all_the_same(
    modules: tuple[object, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(locks, "_modules", lambda: modules)
    with (tmp_path / "log.txt").open("a") as handle, pytest.raises(OSError, match="Errno"):
        try_lock(handle)
    with caplog.at_level("INFO"), locked(tmp_path / "timing.cache", patience=0, remedy=""):
        pass
    assert "cannot be locked" in caplog.text
