from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from realdata import data_dir, needs_data

from trtune.configs.errors import DataError
from trtune.datasets.arrays import ArraySource, load_arrays
from trtune.datasets.batches import InputSpec
from trtune.datasets.pictures.preprocess import Preprocess
from trtune.datasets.selection import Selection

ROW = [InputSpec("x", ("N", 2), "float32")]
PICTURE = [InputSpec("input", (None, 3, 8, 8), "float32")]


def rows(count: int = 10) -> NDArray[np.float32]:
    return np.arange(2 * count, dtype=np.float32).reshape(count, 2)


def test_a_pass_gives_every_row_and_a_short_last_batch() -> None:
    source = ArraySource({"anything": rows(), "labels": np.arange(10)}, ROW, batch=4)
    batches = list(source)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate([b.feeds["x"] for b in batches]), rows())
    assert [int(y) for b in batches if b.labels is not None for y in b.labels] == list(range(10))
    assert batches[2].items == ("8", "9")
    assert (source.count, source.skipped) == (10, ())
    assert [b.items for b in source] == [b.items for b in batches]


def test_a_fixed_batch_overrides_the_wanted_one() -> None:
    source = ArraySource({"x": rows(5)}, [InputSpec("x", (2, 2), "float32")], batch=32)
    assert [len(b) for b in source] == [2, 2, 1]


@pytest.mark.parametrize(
    ("selection", "items"),
    [
        pytest.param(Selection(skip=7), ("7", "8", "9"), id="skip"),
        pytest.param(Selection(skip=1, take=2), ("1", "2"), id="skip and take"),
        pytest.param(Selection(sample=3, seed=3), ("4", "5", "8"), id="sample"),
    ],
)
def test_items_are_row_numbers_of_the_file(selection: Selection, items: tuple[str, ...]) -> None:
    source = ArraySource({"x": rows()}, ROW, selection=selection)
    (batch,) = source
    assert batch.items == items
    assert batch.feeds["x"][:, 0].tolist() == [2 * float(item) for item in items]


def test_labels_can_be_left_out() -> None:
    (batch,) = ArraySource({"x": rows(2), "labels": np.arange(2)}, ROW, labels=None)
    assert batch.labels is None


def test_several_inputs() -> None:
    specs = [InputSpec("ids", (None, 3), "int64"), InputSpec("scale", (None,), "float32")]
    source = ArraySource(
        {"tokens": np.ones((4, 3), np.int32), "scale": np.ones(4), "unused": np.zeros(9)},
        specs,
        names={"ids": "tokens"},
        batch=3,
    )
    first, last = source
    assert {n: (a.dtype.name, a.shape) for n, a in first.feeds.items()} == {
        "ids": ("int64", (3, 3)),
        "scale": ("float32", (3,)),
    }
    assert len(last) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({"x": rows(), "y": np.arange(9)}, "'x' 10, 'y' 9", id="lengths differ"),
        pytest.param({"x": rows(0)}, "data.npz is empty", id="no rows"),
        pytest.param({"x": rows().reshape(5, 4)}, "gives 1 x 4", id="wrong shape"),
        pytest.param({"x": np.ones((3, 2), np.int32)}, "has int32", id="wrong dtype"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_batch(
    arrays: dict[str, NDArray[Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(arrays, ROW, where="data.npz")


def test_a_nan_is_found_by_its_row_number() -> None:
    broken = rows()
    broken[6, 1] = np.nan
    source = ArraySource({"x": broken}, ROW, where="data.npz", selection=Selection(skip=1), batch=4)
    batches = iter(source)
    assert len(next(batches)) == 4
    with pytest.raises(DataError, match=r"data.npz, item 6: NaN in 1 of 2 values for input 'x'"):
        next(batches)


def identity(
    array: NDArray[Any],
    *,
    batch: int = 8,
    selection: Selection = Selection(),  # noqa: B008
    preprocess: Preprocess | None = None,
    labels: NDArray[Any] | None = None,
) -> str:
    arrays = {"x": array} if labels is None else {"x": array, "labels": labels}
    inputs = ROW if preprocess is None else PICTURE
    options: dict[str, Any] = {"batch": batch, "selection": selection, "preprocess": preprocess}
    return ArraySource(arrays, inputs, **options).identity


def test_identity_is_content_and_not_batch_size() -> None:
    base = identity(rows())
    assert base == identity(rows(), batch=3)
    assert base == identity(rows(12), selection=Selection(take=10))
    changed = rows()
    changed[9, 1] += 1
    others = [
        identity(changed),
        identity(rows(), selection=Selection(take=9)),
        identity(rows(), selection=Selection(sample=9)),
        identity(rows(), labels=np.arange(10)),
        identity(rows().astype(np.float64)),
    ]
    assert len({base, *others}) == 6


def test_identity_holds_the_preprocessing() -> None:
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    options = [Preprocess(), Preprocess(scale=1), Preprocess(mean=(0.5,))]
    assert len({identity(pictures, preprocess=p) for p in options}) == 3


SAVERS: dict[str, Callable[..., None]] = {
    "savez": np.savez,
    "savez_compressed": np.savez_compressed,
}


@pytest.mark.parametrize("save", SAVERS)
def test_npz(tmp_path: Path, save: str) -> None:
    path = tmp_path / "a.npz"
    given = {
        "x": np.asfortranarray(rows(3)),
        "big": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 2)),
        "one": np.array(5),
    }
    SAVERS[save](path, **given)
    (tmp_path / "unrelated.txt").write_text("x")
    loaded = load_arrays(path)
    assert list(loaded) == list(given)
    for name, array in given.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert isinstance(loaded["x"], np.memmap) == (save == "savez")


def test_npy_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3))
    loaded = load_arrays(tmp_path / "a.npy")
    assert isinstance(loaded["a"], np.memmap)
    (batch,) = ArraySource(loaded, ROW)
    np.testing.assert_array_equal(batch.feeds["x"], rows(3))
    assert batch.feeds["x"].flags.aligned


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.npy", b"\x93NUMPY\1\0", id="npy cut off"),
        pytest.param("a.npy", b"hello", id="no npy"),
        pytest.param("a.npz", b"PK\3\4hello", id="zip cut off"),
        pytest.param("a.npz", b"", id="empty file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read as .npz or .npy.*numpy.savez"):
        load_arrays(tmp_path / name)


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_pickled_objects_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    with path.open("wb") as handle:
        save(handle, np.array([{}], object))
    with pytest.raises(DataError, match="save numeric arrays"):
        load_arrays(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*a.npz; `path` must be an .npz"):
        load_arrays(tmp_path / "a.npz")


@needs_data
def test_cifar_pictures_equal_the_plain_formula_bit_for_bit() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    path = data_dir() / "cifar10_calib512.npz"
    inputs = [InputSpec("input", ("N", 3, 32, 32), "float32")]
    source = ArraySource(
        load_arrays(path), inputs, preprocess=Preprocess(mean=mean, std=std), batch=100
    )
    with np.load(path) as given:
        images, labels = given["images"], given["labels"]
    plain = (images.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(
        std, np.float32
    )
    batches = list(source)
    assert [len(b) for b in batches] == [100] * 5 + [12]
    found = np.concatenate([b.feeds["input"] for b in batches])
    assert np.array_equal(found, plain.transpose(0, 3, 1, 2))
    assert [int(y) for b in batches if b.labels is not None for y in b.labels] == labels.tolist()
