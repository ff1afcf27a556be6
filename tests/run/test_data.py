"""From the data sections of a config to batches, and the checks before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
from numpy.typing import NDArray
from PIL import Image
from tinyproject import config_of, fixed, work_of, write_project

from trtune.configs.errors import DataError
from trtune.datasets.batches import Batch, InputSpec, first_batch
from trtune.datasets.open import open_section
from trtune.precision.graph.file import load_model
from trtune.run.data import (
    RunData,
    check_data,
    check_shapes_of,
    data_of,
)
from trtune.run.pipeline import run

CHOOSING = "data.validation={skip: 12, take: 4}"
"""Validation on rows of the calibration file that do not calibrate."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


def arrays(project: Path) -> str:
    """The override that leaves the evaluation data as it is."""
    return f"data.evaluation={{source: arrays, path: '{project}/evaluation.npz'}}"


class TestOpenData:
    def test_rows_of_arrays(self, project: Path) -> None:
        config = config_of(
            project, "data.calibration.skip=2", "data.calibration.take=5",
            "data.calibration.batch=3",
        )  # fmt: skip
        source = open_section(config.data.calibration, load_model(project / "net.onnx").inputs)
        assert [batch.items for batch in source] == [("2", "3", "4"), ("5", "6")]
        wanted = np.load(project / "calibration.npz")
        first = next(iter(source))
        np.testing.assert_array_equal(first.feeds["input"], wanted["input"][2:5])
        assert first.labels is not None
        np.testing.assert_array_equal(first.labels, wanted["labels"][2:5])

    def test_pictures_go_through_every_step_of_the_preprocessing(self, project: Path) -> None:
        (project / "pictures").mkdir()
        values = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
        Image.fromarray(values).save(project / "pictures" / "a.png")
        config = config_of(
            project, f"data.calibration={{source: images, path: '{project}/pictures', "
            "labels: null, preprocess: {crop: [8, 8], scale: 0.5, mean: [1, 2, 3], std: [4, 5, 6], "
            "channels: BGR}}", arrays(project),
        )  # fmt: skip
        source = open_section(config.data.calibration, load_model(project / "net.onnx").inputs)
        cut = values[1:9, 2:10, ::-1].astype(np.float32) * 0.5
        wanted = ((cut - [1, 2, 3]) / [4, 5, 6]).transpose(2, 0, 1)[None]
        np.testing.assert_allclose(next(iter(source)).feeds["input"], wanted, rtol=1e-5)

    def test_a_function_with_arguments(self, project: Path) -> None:
        (project / "mine.py").write_text(
            "import numpy as np\n"
            "def rows(count):\n"
            "    yield {'input': np.full((count, 3, 8, 8), 7, 'float32')}\n"
        )
        config = config_of(
            project, f"data.calibration={{source: python, path: '{project}/mine.py:rows', "
            "labels: null, args: {count: 3}}", arrays(project),
        )  # fmt: skip
        source = open_section(config.data.calibration, load_model(project / "net.onnx").inputs)
        assert first_batch(source, "data.calibration").feeds["input"].shape == (3, 3, 8, 8)


class Nothing:
    """A source that yields nothing."""

    count: int | None = 0
    identity = ""
    skipped: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


class TestChecks:
    def test_no_batch_at_all(self) -> None:
        with pytest.raises(DataError) as failure:
            first_batch(Nothing(), "data.evaluation")
        assert str(failure.value) == (
            "data.evaluation: the data is empty; check path, take and skip"
        )

    def test_labels_are_asked_for_only_if_they_are_needed(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, labels=False)
        model = load_model(folder / "net.onnx")
        found = data_of(config_of(folder, CHOOSING), model)
        assert [data.where for data in found.values()] == [
            "data.calibration", "data.evaluation", "data.validation",
        ]  # fmt: skip
        sources = {name: data.source for name, data in found.items()}
        check_data(config_of(folder, CHOOSING), sources)
        config = config_of(folder, CHOOSING, "precision.target={metric: top5, max_drop: 0}")
        with pytest.raises(DataError, match=r"^metric 'top5' needs labels, and the data has none"):
            check_data(config, sources)

    def test_too_few_for_one_batch_of_the_model(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, fixed(tinymodels.conv_relu(), 4), calibration=3)
        with pytest.raises(DataError) as failure:
            work_of(folder)
        assert str(failure.value) == (
            "data.calibration: the model takes 4 samples at a time, and there are only 3; "
            "give more, or export the model with a free batch dimension"
        )

    def test_evaluation_may_be_fewer_than_a_batch(self, tmp_path: Path) -> None:
        folder = write_project(
            tmp_path, fixed(tinymodels.conv_relu(), 4), calibration=8, evaluation=3
        )
        assert len(first_batch(work_of(folder).setup.evaluation.source, "data.evaluation")) == 3


class TestShapes:
    """RunData outside of `model.shapes` is found before anything is computed."""

    SHAPES = "model.shapes={input: {min: [2, 3, 8, 8], opt: [4, 3, 8, 8], max: [8, 3, 8, 8]}}"

    @pytest.mark.parametrize(
        ("overrides", "part"),
        [
            pytest.param(
                ["data.calibration.batch=16"],
                "data.calibration: '0' gives input 'input' the shape [16, 3, 8, 8], outside of "
                "model.shapes.input: min [2, 3, 8, 8], max [8, 3, 8, 8]; ",
                id="a batch above max",
            ),
            pytest.param(
                ["data.evaluation.take=9"],
                "data.evaluation: what is left of 9 samples gives input 'input' the shape [1, 3",
                id="a last batch below min",
            ),
        ],
    )
    def test_it_names_the_data_and_the_shape(
        self, project: Path, overrides: list[str], part: str
    ) -> None:
        config = config_of(project, self.SHAPES, *overrides)
        with pytest.raises(DataError) as failure:
            run(config, out=project / "runs")
        assert str(failure.value).startswith(part)
        assert not (project / "runs").exists()

    def test_pictures_of_any_size_are_all_looked_at(self, tmp_path: Path) -> None:
        config = config_of(
            write_project(tmp_path), self.SHAPES, "data.calibration.batch=1", check=False
        )
        section = config.data.calibration.model_copy(update={"source": "python"})
        rows = [np.zeros((4, 3, 8, 8), np.float32), np.zeros((4, 3, 9, 8), np.float32)]
        data = RunData("data.calibration", section, Rows(rows))
        shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
        inputs = [InputSpec("input", (None, 3, None, None), "float32")]
        with pytest.raises(DataError, match=r"^data\.calibration: '4' gives .* \[4, 3, 9, 8\]"):
            check_shapes_of(data, inputs, shapes)

    def test_what_fits_goes_through(self, project: Path) -> None:
        assert run(config_of(project, self.SHAPES), out=project / "runs").status == "met"


class Rows:
    """Batches of given arrays."""

    identity = "rows"
    count: int | None = None
    skipped: tuple[str, ...] = ()

    def __init__(self, rows: list[NDArray[Any]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for array in self._rows:
            yield Batch({"input": array}, tuple(map(str, range(start, start + len(array)))))
            start += len(array)


def test_labels_are_counted_from_another_number(project: Path) -> None:
    section = config_of(project).data.evaluation
    model = load_model(project / "net.onnx")
    plain = open_section(section, model.inputs)
    shifted = open_section(section.model_copy(update={"label_offset": 1}), model.inputs)
    assert shifted.count == plain.count
    assert shifted.identity != plain.identity
    for before, after in zip(plain, shifted, strict=True):
        assert (before.labels is None) == (after.labels is None)
        if before.labels is not None and after.labels is not None:
            assert (after.labels == before.labels + 1).all()
