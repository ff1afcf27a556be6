from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtune.configs.errors import DataError
from trtune.configs.sources import DataSet
from trtune.datasets.batches import Batch, InputSpec
from trtune.datasets.open import open_section
from trtune.datasets.wrapped import Shifted, WithValues, same_for_all

PICTURE = InputSpec("image", ("N", 3, 8, 6), "float32")
SHAPE = InputSpec("im_shape", ("N", 2), "float32")
CAMERA = InputSpec("camera", (3, 3), "float32")
SIZE = InputSpec("size", (1, 2), "int64")


def pictures(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        colour = (number * 40, 10, 20)
        place = folder / "pics" / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 8), colour).save(place)
    return folder / "pics"


@pytest.mark.parametrize(
    ("spec", "value", "expected", "axis"),
    [
        pytest.param(SHAPE, [8, 6], [[8, 6]], 0, id="one sample's"),
        pytest.param(SHAPE, [[8, 6]], [[8, 6]], 0, id="a row"),
        pytest.param(SHAPE, 1, [[1, 1]], 0, id="one number"),
        pytest.param(CAMERA, np.eye(3).tolist(), np.eye(3).tolist(), None, id="the whole input"),
        pytest.param(CAMERA, 2.5, np.full((3, 3), 2.5).tolist(), None, id="a number for all of it"),
    ],
)
def test_same_for_all(spec: InputSpec, value: Any, expected: Any, axis: int | None) -> None:
    array, found = same_for_all({spec.name: value}, [PICTURE, spec])[spec.name]
    assert (array.tolist(), found, array.dtype) == (expected, axis, np.float32)


def test_the_axis_may_be_given() -> None:
    state = InputSpec("state", (2, "batch", 4), "float32")
    given = np.ones((2, 4)).tolist()
    array, axis = same_for_all({"state": given}, [PICTURE, state], {"state": 1})["state"]
    assert (array.shape, axis) == ((2, 1, 4), 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"im_shap": [1, 2]}, "did you mean 'im_shape'"),
        ({"im_shape": [1, 2, 3]}, "input 'im_shape' takes N x 2"),
        ({"im_shape": "640"}, "numbers are expected"),
        ({"im_shape": [[1], [1, 2]]}, "numbers are expected"),
        ({"im_shape": [1, float("nan")]}, "NaN"),
        ({"size": [1.5, 2]}, "takes int64"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        same_for_all(given, [PICTURE, SHAPE, SIZE])


def test_pictures_beside_their_size(tmp_path: Path) -> None:
    keys = {"path": str(pictures(tmp_path)), "source": "images", "batch": 2,
            "feed": {"im_shape": [8, 6]}}  # fmt: skip
    section = DataSet.model_validate(keys)
    source = open_section(section, [SHAPE, PICTURE])
    batches = list(source)
    assert [len(batch) for batch in batches] == [2, 1]
    for batch in batches:
        assert batch.feeds["im_shape"].tolist() == [[8, 6]] * len(batch)
        assert batch.feeds["image"].shape == (len(batch), 3, 8, 6)
        assert batch.axis("im_shape") == 0
    other = DataSet.model_validate({**keys, "feed": {"im_shape": [8, 7]}})
    assert source.identity != open_section(other, [SHAPE, PICTURE]).identity
    assert [Path(name).name for name in getattr(source, "names", ())] == ["0.png", "2.png", "1.png"]


def test_one_array_for_all_samples_is_not_repeated(tmp_path: Path) -> None:
    keys = {"path": str(pictures(tmp_path)), "source": "images", "feed": {"camera": 1}}
    (batch,) = open_section(DataSet.model_validate(keys), [PICTURE, CAMERA])
    assert batch.feeds["camera"].shape == (3, 3)
    assert batch.axis("camera") is None


def test_an_offset_moves_labels_and_the_classes_of_boxes() -> None:
    boxes = (np.array([[1.0, 2, 3, 4, 5, 0]]), np.zeros((0, 6)))
    fed = {"x": np.zeros((2, 1), np.float32)}
    for labels, expected in [
        (np.array([0, 4]), [1, 5]),
        (boxes, [[[2, 2, 3, 4, 5, 0]], []]),
        (None, None),
    ]:
        source: Any = _Fixed(Batch(fed, ("a", "b"), labels))
        (batch,) = Shifted(source, 1)
        found = batch.labels
        told = None if found is None else [np.asarray(row).tolist() for row in found]
        assert told == expected


def test_names_counted_in_order_are_known_until_an_offset_says_otherwise(tmp_path: Path) -> None:
    plain = {"path": str(pictures(tmp_path)), "source": "images"}
    for keys, expected in [
        ({}, 2),
        ({"label_offset": 1}, None),
        ({"classes": ["class1", "class0", "class2"]}, None),
        ({"labels": None}, None),
    ]:
        source = open_section(DataSet.model_validate({**plain, **keys}), [PICTURE])
        assert getattr(source, "sorted_classes", None) == expected
    wrapped = WithValues(open_section(DataSet.model_validate(plain), [PICTURE]), {})
    assert wrapped.sorted_classes == 2


class _Fixed:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.count, self.skipped, self.identity = len(batch), (), "fixed"

    def __iter__(self) -> Any:
        return iter([self._batch])
