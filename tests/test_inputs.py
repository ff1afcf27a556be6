"""From config values to sources and backends, and the checks before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinymodels
from PIL import Image
from tinyproject import config_of, fixed, job_of, write_project

from trtune.configs.errors import ConfigError, DataError
from trtune.datasets.batches import Batch
from trtune.inputs import (
    backends_of,
    check_data,
    check_precisions,
    first_batch,
    open_data,
    repeat_to,
)
from trtune.precision.model import load_model


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
        source = open_data(config.data.calibration, load_model(project / "net.onnx"))
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
        source = open_data(config.data.calibration, load_model(project / "net.onnx"))
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
        source = open_data(config.data.calibration, load_model(project / "net.onnx"))
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
        check_data(config_of(folder), *job_of(folder).sources)
        config = config_of(folder, "precision.target={metric: top5, max_drop: 0}")
        with pytest.raises(DataError, match=r"^metric 'top5' needs labels, and the data has none"):
            check_data(config, *job_of(folder).sources)

    def test_too_few_for_one_batch_of_the_model(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, fixed(tinymodels.conv_relu(), 4), calibration=3)
        with pytest.raises(DataError) as failure:
            _ = job_of(folder).sources
        assert str(failure.value) == (
            "data.calibration: the model takes 4 samples at a time, and there are only 3; "
            "give more, or export the model with a free batch dimension"
        )

    def test_evaluation_may_be_fewer_than_a_batch(self, tmp_path: Path) -> None:
        folder = write_project(
            tmp_path, fixed(tinymodels.conv_relu(), 4), calibration=8, evaluation=3
        )
        assert len(first_batch(job_of(folder).sources[1], "data.evaluation")) == 3


class TestBackends:
    def test_each_entry_is_one(self, project: Path) -> None:
        config = config_of(
            project, "backends=[{name: onnxruntime, lowering: deploy, threads: 2}, "
            "{name: onnxruntime}]",
        )  # fmt: skip
        backends = backends_of(config)
        assert [(b.name, b.threads) for b in backends] == [
            ("onnxruntime/deploy", 2),
            ("onnxruntime/emulate", None),
        ]

    @pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
    def test_a_runtime_of_a_later_version(self, project: Path, name: str) -> None:
        config = config_of(project, f"backends=[{{name: onnxruntime}}, {{name: {name}}}]")
        with pytest.raises(ConfigError) as failure:
            backends_of(config)
        assert str(failure.value) == (
            f"backends.1.name: '{name}' is not available in this version of trtune, which runs "
            "onnxruntime (lowerings emulate and deploy). The emulate model is explicit Q/DQ as "
            "TensorRT reads it: build it with trtexec --onnx=model.onnx --stronglyTyped, and take "
            "this backend out of the config"
        )


class TestPrecisions:
    @pytest.mark.parametrize(
        ("override", "key", "precision"),
        [
            ("precision.default=fp16", "precision.default", "fp16"),
            ("precision.default=bf16", "precision.default", "bf16"),
            ("precision.fallback=fp16", "precision.fallback", "fp16"),
            ("precision.pin={'op:Conv': fp32, n_conv1: bf16}", "precision.pin.n_conv1", "bf16"),
        ],
    )
    def test_one_of_a_later_version(
        self, project: Path, override: str, key: str, precision: str
    ) -> None:
        with pytest.raises(ConfigError) as failure:
            check_precisions(config_of(project, override))
        assert str(failure.value) == (
            f"{key}: '{precision}' is not available in this version of trtune; use int8 or fp32"
        )

    def test_int8_and_fp32_are_there(self, project: Path) -> None:
        assert check_precisions(config_of(project, "precision.pin={n_conv1: fp32}")) is None


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        pytest.param(2, [0, 1], id="fewer"),
        pytest.param(3, [0, 1, 2], id="as many"),
        pytest.param(7, [0, 1, 2, 0, 1, 2, 0], id="more: again from the first"),
    ],
)
def test_repeat_to(size: int, rows: list[int]) -> None:
    batch = Batch({"x": np.arange(6, dtype=np.float32).reshape(3, 2)}, ("a", "b", "c"))
    feeds = repeat_to(batch, size)
    np.testing.assert_array_equal(feeds["x"], batch.feeds["x"][rows])
    assert feeds["x"].flags.c_contiguous
