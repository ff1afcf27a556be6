"""What each section of the config takes, and what it says about the rest."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from trtune.configs.schema import (
    Calibration,
    Config,
    Data,
    DataSet,
    Precision,
    Preprocess,
    Report,
    Shape,
    Target,
    TensorRT,
    TensorRTRTX,
)
from trtune.configs.values import format_bytes, parse_bytes

IMAGES = {"source": "images", "path": "/pics"}
ARRAYS = {"source": "arrays", "path": "/a.npz"}


def minimal(**more: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "x",
        "model": {"path": "/m.onnx"},
        "data": {"calibration": IMAGES},
        **more,
    }


def message(model: type[BaseModel], value: object) -> str:
    """The only error, as 'key below the value: message'."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    (error,) = caught.value.errors()
    key = [*map(str, error["loc"]), *filter(None, [error.get("ctx", {}).get("key", "")])]
    return f"{'.'.join(key)}: {error['msg']}"


def test_a_minimal_config_has_sensible_defaults() -> None:
    config = Config.model_validate(minimal())
    assert [backend.label for backend in config.backends] == ["onnxruntime/emulate"]
    assert config.calibration.method == "auto"
    assert config.calibration.memory == 2 * 1024**3
    assert config.compare.memory == 1024**3
    assert config.precision.target is None
    assert config.data.calibration.batch == 8
    assert config.data.calibration.preprocess == Preprocess()
    assert config.data.evaluation == config.data.calibration


def every_model(annotation: Any, found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """`found` and all models that `annotation` leads to."""
    inner = list(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation in found:
            return found
        found = found | {annotation}
        inner += [field.annotation for field in annotation.model_fields.values()]
    for part in inner:
        found = every_model(part, found)
    return found


def test_every_section_is_frozen_refuses_unknown_keys_and_describes_its_fields() -> None:
    models = every_model(Config, set())
    assert len(models) >= 15
    for model in models:
        assert model.model_config.get("frozen") is True, model
        assert model.model_config.get("extra") == "forbid", model
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("4GiB", 4 << 30, id="GiB"),
        pytest.param("512MiB", 512 << 20, id="MiB"),
        pytest.param("1.5 gib", 3 << 29, id="fraction, space, any case"),
        pytest.param("4096", 4096, id="digits"),
        pytest.param(4096, 4096, id="a number"),
        pytest.param("100B", 100, id="bytes"),
    ],
)
def test_parse_bytes(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert parse_bytes(format_bytes(expected)) == expected


@pytest.mark.parametrize("text", ["4GB", "lots", "-1", "0", 0, -5, True, 1.5, None, "0.1B"])
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(ValueError, match=r"^a size such as 4GiB, 512MiB or a number of bytes$"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(1 << 40, "1TiB", id="the largest unit that fits"),
        pytest.param(1536 << 10, "1536KiB", id="never a fraction"),
        pytest.param(1000, 1000, id="bytes stay a number"),
    ],
)
def test_format_bytes(value: int, expected: int | str) -> None:
    assert format_bytes(value) == expected


@pytest.mark.parametrize(
    ("model", "value", "expected"),
    [
        pytest.param(
            Shape,
            {"min": [1, 3], "opt": [1, 3], "max": [1]},
            ": min, opt and max need the same number of dimensions, found 2, 2 and 1",
            id="shapes of different rank",
        ),
        pytest.param(
            Shape,
            {"min": [1, 3], "opt": [8, 3], "max": [4, 3]},
            ": axis 0 must have min <= opt <= max, found 1, 8, 4",
            id="opt above max",
        ),
        pytest.param(
            Preprocess,
            {"mean": [0.5, 0.5]},
            "mean: RGB needs 3 values, or one, found 2",
            id="two means",
        ),
        pytest.param(
            Preprocess,
            {"channels": "GRAY", "std": [1, 1, 1]},
            "std: GRAY needs one value, found 3",
            id="three deviations for grey",
        ),
        pytest.param(
            Preprocess,
            {"std": [1, 0, 1]},
            "std: must be above 0, found [1.0, 0.0, 1.0]",
            id="std of 0",
        ),
        pytest.param(
            Preprocess,
            {"mean": [123.675, 116.28, 103.53]},
            "mean: 123.675 belongs to pixels from 0 to 255, but the default scale of 1/255 "
            "makes them "
            "0 to 1; add `scale: 1`, or divide mean and std by 255",
            id="means of bytes with the default scale",
        ),
        pytest.param(
            Preprocess,
            {"resize": 200, "crop": 224},
            "crop: 224 is larger than resize 200",
            id="crop above the short side",
        ),
        pytest.param(
            Preprocess,
            {"resize": [100, 300], "crop": [120, 200]},
            "crop: [120, 200] is larger than resize [100, 300]",
            id="crop above one side",
        ),
        pytest.param(
            Preprocess,
            {"crop": [1, 2, 3]},
            "crop: a number of pixels or [height, width]",
            id="3 sides",
        ),
        pytest.param(
            Preprocess,
            {"crop": True},
            "crop: a number of pixels or [height, width]",
            id="true as side",
        ),
        pytest.param(
            DataSet,
            {**IMAGES, "take": 3, "sample": 4},
            "sample: give take or sample, not both",
            id="take and sample",
        ),
        pytest.param(
            DataSet,
            {"source": "python", "path": "loader"},
            "path: source python needs module:function or file.py:function, not 'loader'",
            id="python without a function",
        ),
        pytest.param(
            DataSet,
            {"source": "arrays", "path": "/pics"},
            "path: source arrays reads .npz and .npy files, not '/pics'",
            id="arrays from something else",
        ),
        pytest.param(
            DataSet,
            {**ARRAYS, "args": {"n": 1}},
            "args: only source python takes args, not source arrays",
            id="args without a function",
        ),
        pytest.param(
            DataSet,
            {**IMAGES, "inputs": {"a": "b"}},
            "inputs: source images has no named arrays; it feeds the only input",
            id="names of pictures",
        ),
        pytest.param(
            Calibration,
            {"trust_cache": True},
            "trust_cache: needs calibration.cache, the file to be trusted",
            id="trust in nothing",
        ),
        pytest.param(
            Calibration,
            {"percentile": 0.999},
            "percentile: Input should be greater than 50",
            id="a percentile that is not in percent",
        ),
        pytest.param(
            Target,
            {"metric": "top1"},
            ": top1 needs max_drop or min",
            id="a target without a bound",
        ),
        pytest.param(
            Target,
            {"metric": "top1", "min": 0.8, "max_drop": 0.1},
            ": give max_drop or min, not both",
            id="two bounds",
        ),
        pytest.param(
            Target,
            {"metric": "sqnr_db", "max_drop": 1},
            ": sqnr_db compares with FP32 itself; give min, not max_drop",
            id="a drop of what FP32 has none of",
        ),
        pytest.param(
            Target,
            {"metric": "cosine"},
            ": cosine compares with FP32 itself; give min, not max_drop",
            id="cosine without min",
        ),
        pytest.param(
            Target,
            {"metric": "top1", "min": 84},
            "min: a fraction from 0 to 1 (0.005 is half a point), found 84",
            id="points for fractions",
        ),
        pytest.param(
            Target,
            {"metric": "cosine", "min": 2},
            "min: a cosine lies between -1 and 1, found 2",
            id="no such cosine",
        ),
        pytest.param(
            Precision,
            {"pin": {"re:(": "fp32"}},
            "pin: 're:(' is not a regular expression: missing ), unterminated subpattern at "
            "position 0",
            id="a broken pattern",
        ),
        pytest.param(
            Precision,
            {"pin": {"op:": "fp32"}},
            "pin: 'op:' names nothing; write a node name, op:TYPE or re:REGEX",
            id="no op",
        ),
        pytest.param(
            TensorRTRTX,
            {"name": "tensorrt_rtx", "compute_capabilities": ["sm_89"]},
            'compute_capabilities.0: a compute capability in quotes such as "8.9"',
            id="sm_89",
        ),
        pytest.param(
            TensorRT,
            {"name": "tensorrt", "typing": "strong", "calibrator": "minmax"},
            "calibrator: 'minmax' needs weak typing; strong typing has only table",
            id="a calibrator with strong typing",
        ),
        pytest.param(
            Config,
            minimal(backends=[]),
            "backends: the list is empty; give at least one",
            id="no backend",
        ),
        pytest.param(
            Config,
            minimal(backends=[{"name": "onnxruntime"}, {"name": "onnxruntime", "threads": 1}]),
            "backends.1: onnxruntime/emulate is listed twice; each gives one engine",
            id="the same engine twice",
        ),
        pytest.param(
            Config,
            minimal(
                data={"calibration": {**IMAGES, "labels": None}},
                precision={"target": {"metric": "top5", "max_drop": 0.01}},
            ),
            "precision.target.metric: top5 needs labels, but data.evaluation.labels is null; "
            "give labels, or use sqnr_db or cosine with min",
            id="accuracy without labels",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    model: type[BaseModel], value: object, expected: str
) -> None:
    assert message(model, value) == expected


@pytest.mark.parametrize(
    ("model", "value"),
    [
        pytest.param(Preprocess, {"mean": 127.5, "std": 127.5, "scale": 1}, id="one mean for all"),
        pytest.param(Preprocess, {"channels": "GRAY", "mean": [0.5]}, id="grey"),
        pytest.param(Preprocess, {"resize": 256, "crop": [256, 300]}, id="long side above resize"),
        pytest.param(
            DataSet, {"source": "python", "path": "a.b:load", "args": {"n": [1]}}, id="python"
        ),
        pytest.param(DataSet, {"source": "idx", "path": "x-ubyte.gz", "labels": "y.gz"}, id="idx"),
        pytest.param(
            DataSet, {**IMAGES, "sample": 5, "skip": 3, "seed": 7}, id="sample after skip"
        ),
        pytest.param(
            Target, {"metric": "my.metrics:f1", "max_drop": 3}, id="a metric of one's own"
        ),
        pytest.param(Target, {"metric": "cosine", "min": 0.99}, id="cosine"),
        pytest.param(Precision, {"pin": {"op:Softmax": "fp32", "re:.*": "bf16"}}, id="pins"),
        pytest.param(Report, {"latency": None}, id="no latency"),
    ],
)
def test_what_fits_is_taken(model: type[BaseModel], value: dict[str, Any]) -> None:
    taken = model.model_validate(value)
    assert model.model_validate(taken.model_dump(mode="json")) == taken


def test_a_key_with_nothing_behind_it_has_its_default() -> None:
    config = Config.model_validate(minimal(calibration=None, precision={"pin": None}))
    assert config == Config.model_validate(minimal())
    assert DataSet.model_validate({**ARRAYS, "labels": None}).labels is None


def test_a_compute_capability_may_be_a_number() -> None:
    backend = TensorRTRTX.model_validate(
        {"name": "tensorrt_rtx", "compute_capabilities": [8.9, 12.0]}
    )
    assert backend.compute_capabilities == ("8.9", "12.0")


def test_labels_of_backends() -> None:
    config = Config.model_validate(
        minimal(
            backends=[
                {"name": "onnxruntime", "lowering": "deploy"},
                {"name": "tensorrt_rtx"},
                {"name": "tensorrt"},
                {"name": "tensorrt", "typing": "strong", "workspace": "4GiB"},
            ]
        )
    )
    labels = [backend.label for backend in config.backends]
    assert labels == ["onnxruntime/deploy", "tensorrt_rtx", "tensorrt", "tensorrt/strong"]


CALIBRATION = {**IMAGES, "labels": "/l.csv", "take": 256, "skip": 1, "batch": 4, "on_error": "skip"}


@pytest.mark.parametrize(
    ("calibration", "evaluation", "expected"),
    [
        pytest.param(CALIBRATION, None, CALIBRATION, id="no section: the very same pictures"),
        pytest.param(
            CALIBRATION,
            {"skip": 256},
            {**IMAGES, "labels": "/l.csv", "skip": 256, "batch": 4, "on_error": "skip"},
            id="take and skip are not inherited, all else is",
        ),
        pytest.param(
            {**IMAGES, "sample": 5, "seed": 9}, {}, IMAGES, id="sample and seed are not inherited"
        ),
        pytest.param(
            CALIBRATION,
            {"path": "/test"},
            {"source": "images", "path": "/test", "batch": 4, "on_error": "skip"},
            id="pictures elsewhere have other labels",
        ),
        pytest.param(
            CALIBRATION,
            {"path": "/pics"},
            {**IMAGES, "labels": "/l.csv", "batch": 4, "on_error": "skip"},
            id="the same path written again has the same labels",
        ),
        pytest.param(
            {**ARRAYS, "labels": "y", "inputs": {"a": "b"}},
            {"path": "/t.npz"},
            {"source": "arrays", "path": "/t.npz", "labels": "y", "inputs": {"a": "b"}},
            id="arrays elsewhere have the same names",
        ),
        pytest.param(
            {**ARRAYS, "labels": "y", "batch": 2, "inputs": {"a": "b"}},
            {"source": "images", "path": "/pics"},
            {**IMAGES, "batch": 2},
            id="another source has other names",
        ),
        pytest.param(
            {"source": "python", "path": "m:calib", "args": {"n": 1}},
            {"path": "m:test"},
            {"source": "python", "path": "m:test"},
            id="another function has other arguments",
        ),
        pytest.param(
            {"source": "python", "path": "m:f", "args": {"n": 1}},
            {"args": {"n": 2}},
            {"source": "python", "path": "m:f", "args": {"n": 2}},
            id="the same function with other arguments",
        ),
        pytest.param(
            {**IMAGES, "preprocess": {"resize": 256, "crop": 224}},
            {"preprocess": {"crop": 200}},
            {**IMAGES, "preprocess": {"resize": 256, "crop": 200}},
            id="preprocessing is inherited key by key",
        ),
        pytest.param(
            CALIBRATION,
            {"labels": None, "take": 3},
            {**IMAGES, "labels": None, "take": 3, "batch": 4, "on_error": "skip"},
            id="null is not 'left out'",
        ),
    ],
)
def test_evaluation_inherits_what_it_leaves_out(
    calibration: dict[str, Any], evaluation: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    data = Data.model_validate({"calibration": calibration, "evaluation": evaluation})
    assert data.evaluation == DataSet.model_validate(expected)
    from_values = Data.model_validate(
        {"calibration": DataSet.model_validate(calibration), "evaluation": evaluation}
    )
    assert from_values == data
    if evaluation is not None:
        third = Data.model_validate({"calibration": calibration, "validation": evaluation})
        assert third.validation == data.evaluation
        assert third.evaluation == third.calibration


def test_without_validation_there_are_two_sections() -> None:
    data = Data.model_validate({"calibration": IMAGES, "evaluation": {"skip": 8}})
    assert data.validation is None
    assert list(data.sections) == ["calibration", "evaluation"]
    more = Data.model_validate({"calibration": IMAGES, "validation": {"skip": 9}})
    assert list(more.sections) == ["calibration", "evaluation", "validation"]


def test_pins_are_chosen_on_the_part_that_calibrates() -> None:
    data = Data.model_validate(
        {"calibration": {"path": "/coco/data.yaml", "take": 8}, "validation": {"skip": 8}}
    )
    assert data.validation is not None
    assert (data.validation.split, data.validation.skip, data.evaluation.split) == (
        "train", 8, "val",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"metric": "perplexity", "min": 3}, "less perplexity is better"),
        ({"metric": "top1", "max": 0.3}, "more top1 is better"),
        ({"metric": "perplexity", "max": 9, "max_drop": 1}, "one of them"),
        ({"metric": "ap", "max_drop": 2}, "a fraction from 0 to 1"),
        ({"metric": "detection_agreement", "max_drop": 0.1}, "give min, not max_drop"),
    ],
)
def test_bounds_that_do_not_fit_their_measure(target: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Target.model_validate(target)


def test_a_data_yaml_calibrates_with_train_and_measures_on_val() -> None:
    data = Data.model_validate({"calibration": {"path": "/coco/data.yaml", "take": 8}})
    assert (data.calibration.source, data.calibration.split) == ("yolo", "train")
    assert (data.evaluation.source, data.evaluation.split, data.evaluation.take) == (
        "yolo", "val", None,
    )  # fmt: skip


def test_letterbox_takes_the_place_of_resize() -> None:
    with pytest.raises(ValidationError, match="takes the place of resize"):
        Preprocess.model_validate({"resize": 8, "letterbox": {"size": 8}})
    found = Preprocess.model_validate({"letterbox": {"size": [4, 8], "color": 0}}).letterbox
    assert found is not None
    assert (found.size, found.color) == ((4, 8), (0,))
