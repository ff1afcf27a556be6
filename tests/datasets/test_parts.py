"""Parts of a source hold what the source holds, each sample once and by its name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtune.datasets.arrays import ArraySource
from trtune.datasets.batches import BatchSource, InputSpec
from trtune.datasets.holdout import WholeBatches, Without
from trtune.datasets.pictures.images import ImageSource
from trtune.datasets.pictures.prefetch import prefetched
from trtune.datasets.samples import NpyFolder
from trtune.datasets.selection import Selection
from trtune.datasets.wrapped import Shifted, WithValues, divisible_rows, in_parts

SPEC = InputSpec("x", ("n", 2), "float32")
SELECTION = Selection(skip=1, take=7)


def arrays() -> ArraySource:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    held = {"x": rows, "labels": np.arange(10)}
    return ArraySource(held, [SPEC], batch=3, selection=SELECTION)


def files(folder: Path) -> NpyFolder:
    for number in range(10):
        np.save(folder / f"{number}.npy", np.float32([number, -number]))
    return NpyFolder(folder, [SPEC], batch=3, selection=SELECTION)


def pictures(folder: Path) -> ImageSource:
    for number in range(10):
        Image.new("RGB", (4, 4), (20 * number, 0, 0)).save(folder / f"{number}.png")
    spec = InputSpec("x", ("n", 3, 4, 4), "float32")
    return ImageSource(folder, [spec], batch=3, selection=SELECTION)


def held(source: BatchSource) -> dict[str, tuple[bytes, object]]:
    found: dict[str, tuple[bytes, object]] = {}
    for batch in source:
        for row, item in enumerate(batch.items):
            (array,) = (a for n, a in batch.feeds.items() if n == "x")
            assert item not in found
            label = None if batch.labels is None else batch.labels[row]
            found[item] = array[row].tobytes(), label
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "kind",
    ["arrays", "files", "pictures", "prefetched", "shifted", "without", "values", "whole", "read"],
)
def test_parts_are_the_whole(kind: str, size: int, tmp_path: Path) -> None:
    made = {"files": files, "pictures": pictures}.get(kind)
    source: BatchSource = arrays() if made is None else made(tmp_path)
    if kind == "prefetched":
        source = prefetched(source)
    if kind == "shifted":
        source = Shifted(source, 1)
    if kind == "without":
        source = Without(source, frozenset({"2", "5"}))
    if kind == "values":
        source = WithValues(source, {"gain": (np.float32(2), None)})
    if kind == "whole":
        source = WholeBatches(source, 3)
    found = [pickle.loads(pickle.dumps(p)) for p in in_parts(source, size, whole=kind == "read")]
    together: dict[str, tuple[bytes, object]] = {}
    for part in found:
        together |= held(part)
    assert together == held(source)
    assert list(together) == list(held(source))


def test_a_part_of_arrays_holds_its_rows_alone() -> None:
    whole, (first, *_) = arrays(), in_parts(arrays(), 2)
    assert len(pickle.dumps(first)) < len(pickle.dumps(whole))
    assert divisible_rows(whole) == 7
    assert divisible_rows(WholeBatches(whole, 3)) is None
