"""RunResults as Polygraphy's own tools read them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import coarse, engine_of, rows
from polygraphy.comparator import RunResults

from trtune.configs.errors import DataError
from trtune.precision.compare.run_results import (
    few_batches,
    polygraphy_run,
    save_inputs,
    save_run_results,
)

TOOL = "from polygraphy.tools import main; main()"


def test_polygraphy_reads_what_was_written(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    path = tmp_path / "outputs.json"
    with engine_of(proto) as exact, engine_of(coarse(proto)) as tested:
        engines = {"onnxruntime/fp32": exact, "onnxruntime/int8": tested}
        save_run_results(path, engines, few_batches(exact, rows(proto, 7, size=3)))
    found = RunResults.load(str(path))
    assert list(found.keys()) == list(engines)
    assert [len(iterations) for iterations in found.values()] == [2, 2]
    first, last = found["onnxruntime/fp32"]
    expected = tinymodels.run(proto, tinymodels.feeds(proto, batch=7))
    for name, values in expected.items():
        together = np.concatenate([first[name], last[name]])
        np.testing.assert_allclose(together, values[:4], rtol=1e-4, atol=1e-5)
    shown = subprocess.run(
        [sys.executable, "-c", TOOL, "inspect", "data", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "onnxruntime/int8" in shown.stdout


def test_without_samples_nothing_is_written(tmp_path: Path) -> None:
    proto = tinymodels.mlp()
    with engine_of(proto) as engine, pytest.raises(DataError, match="no samples"):
        few_batches(engine, rows(proto, 0))


def test_heavy_outputs_are_kept_of_fewer_pictures() -> None:
    proto = tinymodels.conv_relu()
    with engine_of(proto) as engine:
        (one,) = few_batches(engine, rows(proto, 7, size=3), limit=1)
        assert len(one) == 1
        assert [len(b) for b in few_batches(engine, rows(proto, 7, size=3))] == [3, 1]


def test_polygraphy_repeats_the_outputs_for_the_same_inputs(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    model, inputs, outputs = (tmp_path / n for n in ("net.onnx", "in.json", "out.json"))
    onnx.save(proto, model)
    with engine_of(proto) as engine:
        batches = few_batches(engine, rows(proto, 5, size=3))
        save_run_results(outputs, {"onnxruntime/fp32": engine}, batches)
    save_inputs(inputs, batches)
    line = shlex.split(polygraphy_run(model, outputs, inputs=inputs))
    done = subprocess.run([sys.executable, "-c", TOOL, *line[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


def test_the_line_quotes_what_a_shell_would_split() -> None:
    line = polygraphy_run(Path("a b.onnx"), Path("outputs.json"))
    assert line == "polygraphy run 'a b.onnx' --onnxrt --load-outputs outputs.json"
