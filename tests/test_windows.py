"""Windows, as far as it can be simulated: Python's POSIX modules and attributes are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels

# Runs before the package is imported. What Windows lacks is taken away once the packages that look
# at sys.platform (which stays as it is) are loaded; msvcrt's locks are those of Windows by name.
WITHOUT_POSIX = """
import importlib, importlib.abc, os, pkgutil, signal, sys, types

MISSING = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "posix_ipc"}

import multiprocessing, subprocess, tempfile, getpass, concurrent.futures
import matplotlib, numba, numpy, onnx, onnxruntime, pandas, PIL.Image, pydantic, rich.console, typer
import polygraphy.backend.onnxrt, yaml, jinja2

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

held = {}
def locking(file, way, count):
    place = (os.fstat(file).st_ino, os.lseek(file, 0, os.SEEK_CUR))
    if way == 0:
        held.pop(place)
    elif held.setdefault(place, file) != file:
        raise OSError(13, "Permission denied")

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=locking)
for name in MISSING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
for name in ("killpg", "sched_getaffinity", "geteuid", "getuid", "fork", "uname"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1"):
    delattr(signal, name)
"""

IMPORT_ALL = """
import trtune
for module in pkgutil.walk_packages(trtune.__path__, "trtune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in MISSING:
    assert name not in sys.modules, name
print(sum(name.startswith("trtune") for name in sys.modules))
"""

CALIBRATE = """
from trtune.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def without_posix(program: str, *arguments: str, folder: Path) -> str:
    """What `program` prints in a Python that has no POSIX modules."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="this is not a simulation there")
def test_every_module_is_imported(tmp_path: Path) -> None:
    assert int(without_posix(IMPORT_ALL, folder=tmp_path)) > 100


@pytest.mark.skipif(os.name != "posix", reason="this is not a simulation there")
def test_a_model_is_calibrated_and_its_run_folder_is_locked(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    onnx.save(proto, tmp_path / "model.onnx")
    feeds = tinymodels.feeds(proto, batch=8)
    np.savez(tmp_path / "data.npz", **feeds)
    (tmp_path / "trtune.yaml").write_text(
        "version: 1\nname: tiny\nmodel: {path: model.onnx}\n"
        "data: {calibration: {source: arrays, path: data.npz}}\n"
        "calibration: {method: max}\n",
        encoding="utf-8",
    )
    without_posix(CALIBRATE, "calibrate", "trtune.yaml", "--out", "runs", folder=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert list(run.rglob("*.cache"))
    assert "calibrat" in (run / "log.txt").read_text("utf-8")
