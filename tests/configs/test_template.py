"""The config that `trtune init` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from trtune.configs.errors import ConfigError
from trtune.configs.load import load_config
from trtune.configs.schema import Config
from trtune.configs.template import DATA_PATH, ModelInput, init_text


def load(folder: Path, inputs: Sequence[ModelInput], model: str = "net.onnx") -> Config:
    (folder / model).write_bytes(b"")
    (folder / "pics").mkdir(exist_ok=True)
    (folder / "a.npz").write_bytes(b"")
    text = init_text(model, inputs)
    data = "pics" if "source: images" in text else "a"
    assert DATA_PATH in text
    (folder / "c.yaml").write_text(text.replace(DATA_PATH, data), encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 110
    return load_config(folder / "c.yaml")


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        pytest.param((1, 3, 224, 224), "float32", (256, 224, "NCHW", "RGB", 3), id="ImageNet"),
        pytest.param(("N", 299, 299, 3), "float32", (342, 299, "NHWC", "RGB", 3), id="NHWC"),
        pytest.param(
            (8, 3, 480, 640), "float16", (549, (480, 640), "NCHW", "RGB", 3), id="not square"
        ),
        pytest.param((None, 3, 32, 32), "float32", ((32, 32), None, "NCHW", "RGB", 3), id="small"),
        pytest.param((1, 1, 28, 28), "float32", ((28, 28), None, "NCHW", "GRAY", 1), id="grey"),
        pytest.param(("N", 3, "H", "W"), "float32", (256, 224, "NCHW", "RGB", 3), id="free sides"),
    ],
)
def test_one_picture_like_input_reads_pictures(
    tmp_path: Path, shape: Sequence[int | str | None], dtype: str, expected: tuple[object, ...]
) -> None:
    config = load(tmp_path, [("input", shape, dtype)])
    section = config.data.calibration
    assert section.source == "images"
    p = section.preprocess
    assert p is not None
    assert (p.resize, p.crop, p.layout, p.channels, len(p.mean)) == expected
    assert p.scale == 1 / 255
    assert section.batch == (shape[0] if isinstance(shape[0], int) else 8)


def test_bytes_stay_bytes(tmp_path: Path) -> None:
    preprocess = load(tmp_path, [("x", (1, 224, 224, 3), "uint8")]).data.calibration.preprocess
    assert preprocess is not None
    assert preprocess.scale == 1
    assert preprocess.mean == (0.0,)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param([("ids", (1, 128), "int64")], id="rank 2"),
        pytest.param([("x", (1, 4, 32, 32), "float32")], id="four channels"),
        pytest.param([("x", (1, 3, 32, 32), "int64")], id="integers"),
        pytest.param([("a", (1, 3, 8, 8), "float32"), ("b", (1, 9), "float32")], id="two inputs"),
        pytest.param([("s", (), "float32")], id="a scalar"),
        pytest.param([], id="no input"),
    ],
)
def test_anything_else_reads_arrays(tmp_path: Path, inputs: list[ModelInput]) -> None:
    section = load(tmp_path, inputs).data.calibration
    assert section.source == "arrays"
    assert section.preprocess is None
    assert set(section.inputs) == ({name for name, _, _ in inputs} if len(inputs) > 1 else set())


def test_free_dimensions_get_shapes(tmp_path: Path) -> None:
    inputs: list[ModelInput] = [
        ("input ids", ("batch", "seq"), "int64"),
        ("mask: 1", ("batch", "seq"), "int64"),
        ("fixed", (1, 4), "float32"),
    ]
    shapes = load(tmp_path, inputs).model.shapes
    assert list(shapes) == ["input ids", "mask: 1"]
    assert shapes["input ids"] == shapes["mask: 1"]
    assert shapes["input ids"].min == (1, 1)
    assert shapes["input ids"].opt == (8, 128)
    assert shapes["input ids"].max == (32, 512)


def test_a_dimension_of_one_name_has_one_range(tmp_path: Path) -> None:
    shapes = load(tmp_path, [("a", ("n", 4), "float32"), ("b", (1, "n"), "float32")]).model.shapes
    assert shapes["a"].max == (32, 4)
    assert shapes["b"].max == (1, 32)


def test_fixed_inputs_get_no_shapes(tmp_path: Path) -> None:
    assert load(tmp_path, [("x", (1, 3, 32, 32), "float32")]).model.shapes == {}


def test_inputs_are_listed_with_shape_and_type() -> None:
    text = init_text("m.onnx", [("in: put", ("N", None, 3), "float32")])
    assert "  #   'in: put': float32 [N, '?', 3]\n" in text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param("net.onnx", "net-int8", id="the stem"),
        pytest.param("my net (v2).onnx", "my-net-v2-int8", id="made of what a folder may hold"),
        pytest.param("${odd}: #.onnx", "odd-int8", id="text that YAML would read otherwise"),
        pytest.param("模型.onnx", "model-int8", id="nothing left"),
    ],
)
def test_names(tmp_path: Path, model: str, name: str) -> None:
    config = load(tmp_path, [("x", (1, 3, 32, 32), "float32")], model)
    assert config.name == name
    assert config.model.path == str(tmp_path / model)


def test_what_is_given_is_used() -> None:
    value = yaml.safe_load(
        init_text("m.onnx", [("x", (1, 4), "float32")], data_path="d/a.npy", name="mine")
    )
    assert value["name"] == "mine"
    assert value["data"]["calibration"]["path"] == "d/a.npy"


def test_without_data_it_says_what_to_fill_in(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "c.yaml").write_text(init_text("m.onnx", [("x", (1, 3, 32, 32), "float32")]))
    with pytest.raises(
        ConfigError, match=r"data\.calibration\.path: no such folder: .*PATH/TO/YOUR"
    ):
        load_config(tmp_path / "c.yaml")


def test_a_picture_beside_its_size_reads_pictures(tmp_path: Path) -> None:
    inputs: list[ModelInput] = [
        ("im_shape", ("N", 2), "float32"),
        ("image", ("N", 3, 640, 480), "float32"),
        ("scale_factor", ("N", 2), "float32"),
    ]
    section = load(tmp_path, inputs).data.calibration
    assert section.source == "images"
    assert section.feed == {"im_shape": [640, 480], "scale_factor": 1}
    assert section.preprocess is not None


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("tokens", ("N", 77), "int64"), id="tokens"),
        pytest.param(("second", ("N", 3, 64, 64), "float32"), id="a second picture"),
    ],
)
def test_what_is_more_than_a_few_numbers_reads_arrays(tmp_path: Path, other: ModelInput) -> None:
    section = load(tmp_path, [("image", ("N", 3, 64, 64), "float32"), other]).data.calibration
    assert section.source == "arrays"
    assert section.feed == {}
