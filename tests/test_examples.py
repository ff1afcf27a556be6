"""The examples with made data run from their files alone, and reach what they are for."""

from __future__ import annotations

import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from trtune.configs.errors import DataError
from trtune.configs.load import load_config
from trtune.run.pipeline import run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(params=["detector", "segmenter", "tokens"])
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the example's folder with its model and data made."""
    folder = tmp_path / str(request.param)
    shutil.copytree(EXAMPLES / folder.name, folder)
    runpy.run_path(str(folder / "make.py"), run_name="__main__")
    return folder


def test_an_example_meets_its_target(example: Path) -> None:
    config = load_config(example / f"{example.name}.yaml")
    record = run(config, out=example / "runs")
    assert record.status == "met"
    fp32, int8, _ = record.variants
    assert fp32.value is not None
    assert int8.value is not None
    assert int8.nodes["int8"] >= 2
    target = config.precision.target
    assert target is not None
    assert target.max_drop is not None
    sign = -1 if target.metric == "perplexity" else 1
    assert int8.drop == pytest.approx(sign * (fp32.value - int8.value))
    assert int8.drop <= target.max_drop


@pytest.mark.parametrize(
    ("name", "needs"), [("hugging_face", "datasets"), ("torch_loader", "torch")]
)
def test_loaders_of_training_code(name: str, needs: str, tmp_path: Path) -> None:
    found = find_spec(needs)
    ours = EXAMPLES.parent / "datasets"
    if found is None or not found.origin or Path(found.origin).is_relative_to(ours):
        pytest.skip(f"{needs} is not installed (extra `loaders`)")
    folder = tmp_path / "loaders"
    shutil.copytree(EXAMPLES / "loaders", folder)
    runpy.run_path(str(folder / "make.py"), run_name="__main__")
    record = run(load_config(folder / f"{name}.yaml"), out=folder / "runs")
    assert record.status == "met"
    assert record.calibration is not None
    assert 32 <= record.calibration.pictures <= 64  # some of the 64 are held out
    assert record.baseline.samples == 96
    assert record.baseline.value is not None
    assert record.baseline.value > 0.95


def test_a_wrong_set_up_stops_unless_forced(tmp_path: Path) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(EXAMPLES / "detector", folder)
    runpy.run_path(str(folder / "make.py"), run_name="__main__")
    wrong = load_config(
        folder / "detector.yaml", overrides=["data.calibration.preprocess.scale=0.0001"]
    )
    with pytest.raises(DataError, match=r"ap50 is 0.00 %, where guessing .*--force"):
        run(wrong, out=folder / "runs")
    assert run(wrong, out=folder / "runs", force=True).baseline.value == 0.0


@pytest.mark.parametrize("metric", ["detection_agreement", "agreement"])
def test_agreement_needs_no_labels(metric: str, tmp_path: Path) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(EXAMPLES / "detector", folder)
    runpy.run_path(str(folder / "make.py"), run_name="__main__")
    config = load_config(
        folder / "detector.yaml",
        overrides=[
            "data.calibration.labels=null",
            f"precision.target={{metric: {metric}, min: 0.9}}",
        ],
    )
    record = run(config, out=folder / "runs")
    assert record.status == "met"
