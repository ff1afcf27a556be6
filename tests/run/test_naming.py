"""What makes a config another run: the name of its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tinyproject import BOTH, config_of, write_project

from trtune.configs.load import load_config
from trtune.configs.schema import Config
from trtune.run.naming import UNDECIDED, config_hash, run_folder, run_key

DEPLOY = "backends=[{{name: onnxruntime, lowering: deploy{}}}]"
RTX = 'backends=[{{name: tensorrt_rtx, compute_capabilities: ["8.9"]{}}}]'
TRT = "backends=[{{name: tensorrt{}}}]"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "project")


def test_the_folder_is_the_name_and_the_key(project: Path) -> None:
    config = config_of(project)
    assert run_folder(config) == Path("runs") / f"tiny-{run_key(config)}"
    assert run_folder(config, "out").parent == Path("out")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("report.formats=[json]", "report={formats: [html], latency: {runs: 3}}"),
        ("calibration.memory=1GiB", "calibration.memory=4GiB"),
        ("compare.memory=1GiB", "compare.memory=64MiB"),
        ("precision.max_pins=4", "precision.max_pins=8"),
        (DEPLOY.format(""), DEPLOY.format(", threads: 1")),
        (DEPLOY.format(""), DEPLOY.format(", required: true")),
        (RTX.format(""), RTX.format(", timeout: 60")),
        (TRT.format(""), TRT.format(", timing_cache: t.cache")),
    ],
)
def test_what_changes_no_result_does_not_count(project: Path, before: str, after: str) -> None:
    assert run_key(config_of(project, before)) == run_key(config_of(project, after))


@pytest.mark.parametrize(
    "override",
    [
        "calibration.method=mse",
        "calibration.holdout=5",
        "data.calibration.take=20",
        "precision.pin={n_conv1: fp32}",
        "precision.target.min=6",
        "compare.pictures=5",
        BOTH,
    ],
)
def test_everything_else_does(project: Path, override: str) -> None:
    assert run_key(config_of(project)) != run_key(config_of(project, override))


def test_the_order_of_pins_counts(project: Path) -> None:
    """The last pin that names a node holds."""
    one = "precision.pin={'re:.*': fp32, n_conv1: int8}"
    other = "precision.pin={n_conv1: int8, 're:.*': fp32}"
    assert run_key(config_of(project, one)) != run_key(config_of(project, other))
    assert config_hash(config_of(project, one)) != config_hash(config_of(project, other))
    assert run_key(config_of(project, one)) == run_key(config_of(project, one))


def test_what_pins_are_chosen_on_counts(project: Path) -> None:
    validation = "data.validation={path: " + str(project / "calibration.npz") + ", skip: 12}"
    assert run_key(config_of(project, validation)) != run_key(config_of(project))


def test_a_project_may_move(project: Path, tmp_path: Path) -> None:
    (project / "mine.py").write_text("def f(outputs, batch):\n    return 1.0\n")
    target = "precision.target={metric: 'mine.py:f', min: 0.1}"

    def at(folder: Path) -> Config:
        metric = target.replace("mine.py", str(folder / "mine.py"))
        return config_of(folder, metric)

    before = run_key(at(project))
    moved = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(project, moved)
    assert run_key(at(moved)) == before


def test_the_resolved_config_of_a_run_names_the_same_run(project: Path) -> None:
    from trtune.run.pipeline import calibrate

    config = config_of(project)
    calibrate(config, out=project / "runs")
    place = run_folder(config, project / "runs")
    assert run_folder(load_config(place / "config.yaml"), project / "runs") == place


def test_each_path_is_one_of_the_config(project: Path) -> None:
    """A key that was renamed in the schema would be in the name again without a word."""
    config = config_of(project, TRT.format(", timing_cache: t.cache"))
    dumped = config.model_dump(mode="json")
    fields = {name for entry in dumped["backends"] for name in entry} | {"threads", "timeout"}
    for path in UNDECIDED:
        value = dumped
        for word in path:
            if word == "*":
                assert path[-1] in fields
                break
            if word == "runtime":
                break
            value = value[word]
