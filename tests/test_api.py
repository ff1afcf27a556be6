"""What `import trtune` offers."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from pathlib import Path

import onnx
import pytest
import tinymodels

import trtune


def fresh(program: str, cwd: Path) -> str:
    """What `program` prints in a Python that has imported nothing of the package yet."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_it_loads_nothing_else(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, typing, importlib; a = set(sys.modules); import trtune; "
        "print(sorted(m for m in set(sys.modules) - a if not m.startswith('trtune')))"
    )
    loaded = ast.literal_eval(fresh(program, tmp_path))
    assert set(loaded) <= set(sys.stdlib_module_names)
    assert len(loaded) < 20


@pytest.mark.parametrize("name", sorted(set(trtune.__all__) - {"__version__"}))
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(trtune, name)
    assert callable(value)
    assert value.__doc__ or type(value).__call__.__doc__
    assert name in dir(trtune)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'trtune' has no attribute 'callibrate'"):
        trtune.callibrate  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import trtune", id="alone"),
        pytest.param("import trtune, trtune.calibrate.table", id="after a module of the folder"),
        pytest.param("import trtune.calibrate.table as t, trtune; t.CalibrationTable", id="as"),
        pytest.param("import trtune; from trtune import calibrate", id="by name"),
    ],
)
def test_calibrate_is_the_folder_and_the_stage(imports: str, tmp_path: Path) -> None:
    program = (
        f"{imports}\n"
        "import trtune.calibrate.cache\n"
        "print(callable(trtune.calibrate), trtune.calibrate.cache.ALGORITHMS[0])"
    )
    assert fresh(program, tmp_path) == "True EntropyCalibration2"


def test_the_folders_are_ordinary_modules() -> None:
    import trtune.reports

    assert type(trtune.reports) is types.ModuleType


def test_a_model_in_two_calls(tmp_path: Path) -> None:
    onnx.save(tinymodels.conv_relu(), tmp_path / "net.onnx")
    found = trtune.inspect(tmp_path / "net.onnx")
    assert [node.precision for node in found.nodes if node.macs] == ["int8"] * 3
    written = trtune.init_config(tmp_path / "net.onnx", tmp_path / "net.yaml")
    with pytest.raises(trtune.ConfigError, match="no such folder"):
        trtune.load_config(written)
