"""From config values to sources and backends, and the checks before any work."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
from numpy.typing import NDArray
from PIL import Image
from tinyproject import BOTH, config_of, fixed, work_of, write_project

from trtune.configs.errors import ConfigError, DataError
from trtune.configs.progress import silent
from trtune.datasets.batches import Batch, InputSpec, first_batch, repeat_to
from trtune.datasets.open import open_section
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.graph.file import Model, load_model
from trtune.run.pipeline import build, calibrate, compare, run, run_folder
from trtune.run.wiring import (
    RunData,
    backends_of,
    check_data,
    check_precisions,
    check_shapes_of,
    data_of,
)

needs_no_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt") is not None, reason="TensorRT is installed"
)
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


CHOOSING = "data.validation={skip: 12, take: 4}"
"""Validation on rows of the calibration file that do not calibrate."""


def nowhere() -> Model:
    """The model of backends that do not look at the data."""
    raise AssertionError("no backend here needs the model")


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


class TestBackends:
    def test_each_entry_is_one(self, project: Path) -> None:
        config = config_of(
            project, "backends=[{name: onnxruntime, lowering: deploy, threads: 2}, "
            "{name: onnxruntime}]",
        )  # fmt: skip
        backends = backends_of(config, nowhere, silent)
        assert [(b.name, getattr(b, "threads", 0)) for b in backends.present] == [
            ("onnxruntime/deploy", 2),
            ("onnxruntime/emulate", None),
        ]

    @needs_rtx
    def test_one_that_builds_but_cannot_run_here_is_taken(self, project: Path) -> None:
        config = config_of(
            project,
            "model.shapes={input: {min: [1, 3, 8, 8], opt: [4, 3, 8, 8], max: [8, 3, 8, 8]}}",
            'backends=[{name: tensorrt_rtx, compute_capabilities: ["8.9"], workspace: 1GiB, '
            "optimization_level: 2, timeout: 60}]",
        )
        (backend,) = backends_of(config, nowhere, silent).present
        assert isinstance(backend, RtxBackend)
        assert backend.settings["workspace"] == 1 << 30
        assert backend.settings["optimization_level"] == 2
        assert backend.settings["shapes"]["input"]["opt"] == [4, 3, 8, 8]
        assert backend.timeout == 60

    @needs_rtx
    def test_without_a_gpu_rtx_has_to_be_told_what_to_build_for(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(project))
        config = config_of(project, "backends=[{name: onnxruntime}, {name: tensorrt_rtx}]")
        found = backends_of(config, nowhere, silent)
        assert [backend.name for backend in found.present] == ["onnxruntime/emulate"]
        assert "no NVIDIA GPU was found here; name what to build" in found.absent[0].reason

    @needs_no_tensorrt
    def test_one_that_is_not_installed_is_absent_with_the_command(self, project: Path) -> None:
        config = config_of(project, "backends=[{name: onnxruntime}, {name: tensorrt}]")
        backends = backends_of(config, nowhere, silent)
        backends.require()
        (absent,) = backends.absent
        assert (absent.name, absent.required) == ("tensorrt", False)
        assert "TensorRT" in absent.reason
        assert "pip install 'trtune[trt10]'" in absent.remedy

    @needs_no_tensorrt
    @pytest.mark.parametrize(
        ("override", "end"),
        [
            pytest.param(
                "backends=[{name: onnxruntime}, {name: tensorrt, required: true}]",
                "or take it out of the config, or set `required: false`",
                id="it is required",
            ),
            pytest.param(
                "backends=[{name: tensorrt}]",
                "or take it out of the config, or add one that does, as {name: onnxruntime}",
                id="none is left",
            ),
        ],
    )
    def test_without_what_must_be_there_nothing_is_computed(
        self, project: Path, override: str, end: str
    ) -> None:
        config = config_of(project, override)
        for stage in (run, build):
            with pytest.raises(ConfigError) as failure:
                stage(config, out=project / "runs")
            text = str(failure.value)
            assert text.startswith("backend 'tensorrt' does not work here: ")
            assert "pip install 'trtune[trt10]'" in text
            assert text.endswith(end)
        assert not (project / "runs").exists()

    def test_unprobed_all_count_as_present(self, project: Path) -> None:
        config = config_of(project, "backends=[{name: tensorrt}]")
        found = backends_of(config, nowhere, silent, probe=False)
        assert ([b.name for b in found.present], found.absent) == (["tensorrt"], ())

    def test_the_ones_of_a_name(self, project: Path) -> None:
        found = backends_of(config_of(project, BOTH), nowhere, silent)
        assert [b.name for b in found.chosen("onnxruntime/deploy").present] == [
            "onnxruntime/deploy"
        ]
        assert len(found.chosen("onnxruntime").present) == len(found.chosen(None).present) == 2


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
    def test_deploy_has_no_half(
        self, project: Path, override: str, key: str, precision: str
    ) -> None:
        with pytest.raises(ConfigError) as failure:
            check_precisions(config_of(project, BOTH, override))
        assert str(failure.value) == (
            f"backends.1.lowering: deploy runs in int8 and fp32 alone, and {key} is {precision}; "
            "use emulate, or fp32 there"
        )
        assert check_precisions(config_of(project, override)) is None

    def test_int8_and_fp32_are_everywhere(self, project: Path) -> None:
        assert check_precisions(config_of(project, BOTH, "precision.pin={n_conv1: fp32}")) is None


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


@needs_no_tensorrt
def test_what_is_not_installed_is_in_the_report_and_the_others_go_on(project: Path) -> None:
    config = config_of(
        project, "backends=[{name: onnxruntime}, {name: tensorrt}]", "report.formats=[md, html]"
    )
    assert calibrate(config, out=project / "runs").scales
    assert compare(config, out=project / "runs")
    (info,) = build(config, out=project / "runs")
    assert info.backend == "onnxruntime/emulate"
    record = run(config, out=project / "runs")
    assert record.status == "met"
    assert [(v.backend, v.status) for v in record.variants] == [
        *[("onnxruntime/emulate", "done")] * 3,
        ("tensorrt", "absent"),
    ]
    absent = record.variants[-1]
    assert (absent.name, absent.value) == ("int8", None)
    assert "pip install 'trtune[trt10]'" in str(absent.reason)
    text = (run_folder(config, project / "runs") / "report.md").read_text()
    assert "tensorrt" in text
