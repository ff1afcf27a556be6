"""What is kept of a run's final models for Polygraphy, and the lines that use it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from polygraphy.comparator import RunResults
from tinyproject import config_of, write_project

from trtune.run.pipeline import run, run_folder

TOOL = "from polygraphy.tools import main; main()"


def tool(line: str, folder: Path) -> str:
    """What a `polygraphy` line prints in `folder`, where it must not fail."""
    words = shlex.split(line)
    assert words[0] == "polygraphy"
    done = subprocess.run(
        [sys.executable, "-c", TOOL, *words[1:]], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_lines_of_the_report_repeat_and_show_the_outputs(tmp_path: Path) -> None:
    config = config_of(write_project(tmp_path), "report.formats=[md]")
    record = run(config, out=tmp_path / "runs")
    folder = run_folder(config, tmp_path / "runs")
    again, first, last = record.polygraphy
    assert "PASSED" in tool(again, folder)
    assert "fp32" in tool(first, folder)
    assert "onnxruntime/emulate" in tool(last, folder)
    assert all(line in (folder / "report.md").read_text("utf-8") for line in record.polygraphy)
    exact = RunResults.load(str(folder / "polygraphy" / "fp32.json"))
    tuned = RunResults.load(str(folder / "polygraphy" / "onnxruntime-emulate.json"))
    (reference,), (found,) = exact.values(), tuned.values()
    assert list(reference[0]) == list(found[0])
    assert reference[0] != found[0]


def test_another_run_of_the_same_name_keeps_its_own(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    for target in ("precision.target={metric: sqnr_db, min: 20}", "precision.max_pins=3"):
        config = config_of(project, "report.formats=[json]", target)
        run(config, out=tmp_path / "runs")
        run(config, out=tmp_path / "runs")
    found = sorted(path.parent.name for path in (tmp_path / "runs").rglob("inputs.json"))
    assert found == ["polygraphy"] * len(list((tmp_path / "runs").iterdir()))
