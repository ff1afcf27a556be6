"""The command `export`."""

from __future__ import annotations

import json
from pathlib import Path

from tinyproject import config_of, write_project
from typer.testing import CliRunner

from trtune.cli.commands import app
from trtune.run.naming import run_folder
from trtune.run.pipeline import run


def test_a_run_is_exported_into_its_own_folder(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    config = config_of(folder)
    run(config, out=folder / "runs")
    home = run_folder(config, folder / "runs")
    done = CliRunner().invoke(app, ["export", str(home), "--to", "trtexec", "--json"])
    assert done.exit_code == 0
    value = json.loads(done.stdout)
    assert Path(value["folder"]) == home / "export-trtexec"
    assert all((home / "export-trtexec" / name).is_file() for name in value["files"])
    again = CliRunner().invoke(app, ["export", str(home), "--to", "trtexec"])
    assert again.exit_code == 2
