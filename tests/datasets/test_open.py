from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtune.configs.errors import DataError
from trtune.datasets import Batch, BatchSource, InputSpec, Preprocess, dump_idx, open_source

GREY = [InputSpec("input", ("N", 1, 4, 4), "float32")]
PREPROCESS = Preprocess(scale=1, channels="GRAY")
PICTURES = np.arange(6, dtype=np.uint8).repeat(16).reshape(6, 4, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same six grey pictures as a folder, an array, idx and a function, with labels."""
    (tmp_path / "pictures").mkdir()
    lines = ["file,label"]
    for number, pixels in enumerate(PICTURES):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
        lines.append(f"{number}.png,{number}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    np.savez(tmp_path / "data.npz", images=PICTURES, labels=np.arange(6))
    (tmp_path / "images.idx.gz").write_bytes(gzip.compress(dump_idx(PICTURES)))
    (tmp_path / "labels.idx").write_bytes(dump_idx(np.arange(6, dtype=np.uint8)))
    (tmp_path / "trtune_test_six.py").write_text(
        "import numpy as np\n"
        "def six(name='labels'):\n"
        "    for n in range(6):\n"
        "        yield {'images': np.full((1, 4, 4), n, np.uint8), name: [n]}\n"
    )
    return tmp_path


KINDS: dict[str, dict[str, Any]] = {
    "images": {"path": "pictures", "labels": "labels.csv"},
    "arrays": {"path": "data.npz"},
    "idx": {"path": "images.idx.gz", "labels": "labels.idx"},
    "python": {"path": "trtune_test_six:six"},
}


def opened(folder: Path, kind: str, **options: Any) -> BatchSource:
    given = {"preprocess": PREPROCESS, **KINDS[kind], **options}
    return open_source(kind, inputs=GREY, base_dir=folder, **given)


def flat(batches: list[Batch]) -> tuple[list[int], list[int]]:
    values = [int(p.flat[0]) for b in batches for p in b.feeds["input"]]
    return values, [int(y) for b in batches if b.labels is not None for y in b.labels]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_batches(folder: Path, kind: str) -> None:
    source = opened(folder, kind, skip=1, take=4, batch=3)
    batches = list(source)
    assert [len(b) for b in batches] == [3, 1]
    assert batches[0].feeds["input"].shape == (3, 1, 4, 4)
    assert flat(batches) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert flat(list(source)) == flat(batches)
    assert source.count in (4, None)
    assert source.skipped == ()


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_stable_and_ignores_the_batch_size(folder: Path, kind: str) -> None:
    one, other = opened(folder, kind, batch=2), opened(folder, kind, batch=5)
    assert one.identity == other.identity
    assert one.identity != opened(folder, kind, sample=5).identity
    assert one.identity != opened(folder, kind, labels=None).identity


@pytest.mark.parametrize("kind", KINDS)
def test_labels_can_be_left_out(folder: Path, kind: str) -> None:
    assert flat(list(opened(folder, kind, labels=None))) == ([0, 1, 2, 3, 4, 5], [])


@pytest.mark.parametrize("kind", KINDS)
def test_resizing_runs_for_every_kind(folder: Path, kind: str) -> None:
    preprocess = Preprocess(resize=(8, 8), crop=4, scale=1, channels="GRAY")
    assert flat(list(opened(folder, kind, preprocess=preprocess)))[0] == [0, 1, 2, 3, 4, 5]


def test_names_and_args_are_passed_on(folder: Path) -> None:
    options = {"input_names": {"input": "images"}, "args": {"name": "extra"}}
    assert flat(list(opened(folder, "python", **options)))[0] == [0, 1, 2, 3, 4, 5]
    missing = {"input_names": {"input": "image"}}
    with pytest.raises(DataError, match=r"no array 'image'.*did you mean 'images'"):
        opened(folder, "arrays", **missing)


def test_on_error_is_passed_on(folder: Path) -> None:
    (folder / "pictures" / "3.png").write_text("not a picture")
    source = opened(folder, "images", on_error="skip")
    assert flat(list(source))[0] == [0, 1, 2, 4, 5]
    assert source.skipped == ("3.png",)


def test_idx_labels_of_another_length(folder: Path) -> None:
    (folder / "labels.idx").write_bytes(dump_idx(np.arange(5, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"'idx' 6, 'labels' 5"):
        opened(folder, "idx")


def test_an_unknown_source_is_a_callers_bug(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown source 'array'; did you mean 'arrays'"):
        open_source("array", "x", inputs=GREY)
