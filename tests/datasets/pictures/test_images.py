from __future__ import annotations

import csv
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from realdata import data_dir, needs_data

from trtune.configs.errors import DataError
from trtune.datasets.batches import Batch, InputSpec
from trtune.datasets.pictures.images import ImageSource, list_pictures
from trtune.datasets.pictures.preprocess import Preprocess
from trtune.datasets.selection import Selection

SPEC = [InputSpec("input", ("N", 3, 4, 4), "float32")]
PLAIN = Preprocess(scale=1)


def picture(path: Path, grey: int = 0, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five 4 x 4 pictures p0.png to p4.png, each of its number's grey."""
    for number in range(5):
        picture(tmp_path / "pictures" / f"p{number}.png", number)
    return tmp_path / "pictures"


def write_csv(folder: Path, text: str) -> Path:
    path = folder.parent / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def greys(batches: list[Batch]) -> list[int]:
    return [int(p[0, 0, 0]) for batch in batches for p in batch.feeds["input"]]


def data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("trtune-")]


def test_pictures_come_in_the_order_of_their_names(folder: Path) -> None:
    source = ImageSource(folder, SPEC, preprocess=PLAIN, batch=2)
    batches = list(source)
    assert [b.items for b in batches] == [("p0.png", "p1.png"), ("p2.png", "p3.png"), ("p4.png",)]
    assert greys(batches) == [0, 1, 2, 3, 4]
    assert all(b.labels is None for b in batches)
    assert (source.count, source.skipped) == (5, ())
    assert greys(list(source)) == [0, 1, 2, 3, 4]
    assert data_threads() == []


def test_subfolders_hidden_files_and_other_files(folder: Path) -> None:
    picture(folder / "deep" / "er" / "a.JPG")
    picture(folder / ".hidden.png")
    picture(folder / ".cache" / "x.png")
    (folder / "README.md").write_text("not a picture")
    (folder / "deep" / "up").symlink_to(folder)
    assert list(list_pictures(folder)) == ["deep/er/a.JPG", *[f"p{n}.png" for n in range(5)]]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(["dog/1.png", "cat/2.png"], [0, 1], id="names: sorted, cat is 0"),
        pytest.param(["10/a.png", "9/b.png"], [10, 9], id="numbers: themselves"),
        pytest.param(["dog/x/1.png", "cat/2.png"], [0, 1], id="the top folder is the class"),
        pytest.param(["dog/1.png", "2.png"], [None, None], id="a picture outside: no labels"),
    ],
)
def test_labels_from_folder_names(
    tmp_path: Path, files: list[str], expected: list[int | None]
) -> None:
    for file in files:
        picture(tmp_path / file)
    listed = list_pictures(tmp_path)
    assert list(listed) == sorted(files)
    assert [listed[file] for file in sorted(files)] == expected


def test_a_class_without_pictures_keeps_its_place(tmp_path: Path) -> None:
    picture(tmp_path / "b" / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / ".git").mkdir()
    assert list_pictures(tmp_path) == {"b/1.png": 1}
    assert list_pictures(tmp_path, None) == {"b/1.png": None}


def test_labels_from_a_csv(folder: Path) -> None:
    path = write_csv(folder, "\ufefffile,author,label\np3.png,x,7\np1.png,y,0\n")
    (batch,) = ImageSource(folder, SPEC, preprocess=PLAIN, labels=path)
    assert batch.items == ("p1.png", "p3.png")
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("file,lable\np1.png,1\n", "no column 'label'; did you mean 'lable'", id="col"),
        pytest.param("", "no column 'file'.*its first line is ''", id="empty file"),
        pytest.param("file,label\n", "no pictures in .*labels.csv", id="no rows"),
        pytest.param(
            "file,label\np1.png,1\np2.png,cat\n", "line 3: label 'cat' of 'p2.png'", id="no index"
        ),
        pytest.param("file,label\np1.png\n", "line 2: label '' of 'p1.png'", id="no label"),
        pytest.param("file,label\n,1\n", "line 2: no file is named", id="no file"),
        pytest.param("file,label\np1.png,1\np1.png,2\n", "'p1.png' is listed twice", id="twice"),
        pytest.param(
            "file,label\np1.png,1\np9.png,1\n",
            r"lists 'p9.png', which is not in .*did you mean 'p.\.png'\? \(1 of 2",
            id="file missing on disk",
        ),
    ],
)
def test_csv_errors(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageSource(folder, SPEC, labels=write_csv(folder, text))


def test_a_csv_that_is_no_text(folder: Path) -> None:
    path = folder.parent / "labels.csv"
    path.write_bytes(b"file,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not a CSV in UTF-8"):
        ImageSource(folder, SPEC, labels=path)


def test_no_such_csv(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*none.csv"):
        ImageSource(folder, SPEC, labels=folder / "none.csv")


def test_no_such_folder(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder: .*picture; did you mean 'pictures'"):
        list_pictures(folder.parent / "picture")
    with pytest.raises(DataError, match="is a file; `path` of `source: images` must be a folder"):
        list_pictures(folder / "p1.png")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pictures in .*; it needs \.bmp"):
        ImageSource(tmp_path, SPEC)


@pytest.fixture
def damaged(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("p1.png", "p3.jpg"):
        Image.fromarray(noise).save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not a picture")
    return folder


@pytest.mark.parametrize(
    ("skip", "name"),
    [pytest.param(0, "p1.png", id="png"), pytest.param(2, "p3.jpg", id="jpg")],
)
def test_a_corrupt_picture_stops_with_its_name(damaged: Path, skip: int, name: str) -> None:
    source = ImageSource(damaged, SPEC, preprocess=PLAIN, selection=Selection(skip=skip))
    with pytest.raises(DataError, match=rf"{name} cannot be read as a picture: .*on_error: skip"):
        list(source)
    assert data_threads() == []


def test_corrupt_pictures_are_left_out_and_counted(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ImageSource(damaged, SPEC, preprocess=PLAIN, batch=2, on_error="skip")
    assert source.count is None
    with caplog.at_level(logging.WARNING):
        batches = list(source)
    assert [b.items for b in batches] == [("p0.png", "p2.png"), ("p3.png", "p4.png")]
    assert source.skipped == ("p1.png", "p3.jpg", "text.png")
    assert source.count == 4
    assert len(caplog.messages) == 3
    assert greys(list(source)) == [0, 2, 3, 4]
    assert source.skipped == ("p1.png", "p3.jpg", "text.png")


def test_nothing_but_corrupt_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    source = ImageSource(tmp_path, SPEC, on_error="skip")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        list(source)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        pytest.param(PLAIN, r"takes N x 3 x 4 x 4, .*p5.png gives 1 x 3 x 6 x 5", id="shape"),
        pytest.param(Preprocess(crop=7), r"p0.png: 4 x 4 pixels are less than `crop`", id="crop"),
        pytest.param(
            Preprocess(crop=4, layout="NHWC"), "fit as NCHW .`preprocess.layout`", id="layout"
        ),
    ],
)
def test_pictures_that_do_not_fit(folder: Path, preprocess: Preprocess, message: str) -> None:
    picture(folder / "p5.png", 5, (5, 6))
    with pytest.raises(DataError, match=message):
        list(ImageSource(folder, SPEC, preprocess=preprocess, on_error="skip"))


def test_pictures_of_different_sizes_are_batches_of_their_own(folder: Path) -> None:
    picture(folder / "p5.png", 5, (5, 6))
    free = [InputSpec("input", ("N", 3, "h", "w"), "float32")]
    assert [len(batch) for batch in ImageSource(folder, free)] == [5, 1]
    assert [b.feeds["input"].shape[2] for b in ImageSource(folder, free, batch=1)] == [4] * 5 + [6]


def test_a_model_with_two_inputs_needs_other_data(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the model has 2: 'input', 'input'; give"):
        ImageSource(folder, SPEC * 2)


def test_on_error_is_one_of_two_words(folder: Path) -> None:
    with pytest.raises(ValueError, match="found 'ignore'"):
        ImageSource(folder, SPEC, on_error="ignore")


def test_stopping_early_ends_the_threads(folder: Path) -> None:
    batches = iter(ImageSource(folder, SPEC, batch=1))
    assert next(batches).items == ("p0.png",)
    del batches
    assert data_threads() == []


def test_identity_is_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        picture(tmp_path / "copy" / f"p{number}.png", number)
    base = ImageSource(folder, SPEC).identity
    assert base == ImageSource(tmp_path / "copy", SPEC, batch=3, workers=1).identity
    labels = write_csv(folder, "file,label\n" + "".join(f"p{n}.png,{n}\n" for n in range(5)))
    others = [
        ImageSource(folder, SPEC, selection=Selection(take=4)).identity,
        ImageSource(folder, SPEC, preprocess=Preprocess(resize=4)).identity,
        ImageSource(folder, SPEC, labels=labels).identity,
    ]
    picture(folder / "p4.png", 99)
    others.append(ImageSource(folder, SPEC).identity)
    assert len({base, *others}) == 5


def test_a_file_that_vanished_is_found_by_the_pass(folder: Path) -> None:
    source = ImageSource(folder, SPEC)
    (folder / "p2.png").unlink()
    assert len(source.identity) == 64
    with pytest.raises(DataError, match=r"p2.png cannot be read"):
        list(source)


MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)


def reference(path: Path) -> NDArray[np.float32]:
    """The usual ImageNet evaluation written out: short side 256, centre 224, the plain formula."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    if min(width, height) != 256:
        size = (
            (256, int(256 * height / width)) if width < height else (int(256 * width / height), 256)
        )
        image = image.resize(size, Image.Resampling.BILINEAR)
        width, height = image.size
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    array = np.asarray(image.crop((left, top, left + 224, top + 224))).astype(np.float32)
    result: NDArray[np.float32] = ((array / 255 - MEAN) / STD).transpose(2, 0, 1)
    return result


@needs_data
def test_photographs_equal_the_published_evaluation_bit_for_bit() -> None:
    images = data_dir() / "images"
    spec = [InputSpec("input", ("N", 3, 224, 224), "float32")]
    preprocess = Preprocess(
        256, 224, 0.00392156862745098, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    source = ImageSource(
        images / "nips17",
        spec,
        preprocess=preprocess,
        labels=images / "nips17_labels.csv",
        selection=Selection(skip=250, take=10),
    )
    with (images / "nips17_labels.csv").open(newline="") as handle:
        rows = sorted((row["file"], int(row["label"])) for row in csv.DictReader(handle))[250:260]
    batches = list(source)
    assert [item for b in batches for item in b.items] == [file for file, _ in rows]
    labels = [int(y) for b in batches if b.labels is not None for y in b.labels]
    assert labels == [label for _, label in rows]
    found = np.concatenate([b.feeds["input"] for b in batches])
    for (file, _), values in zip(rows, found, strict=True):
        assert np.array_equal(values, reference(images / "nips17" / file)), file


@needs_data
def test_photographs_of_any_shape_equal_the_published_evaluation_bit_for_bit() -> None:
    folder = data_dir() / "images" / "coco_val2017_128"
    spec = [InputSpec("input", ("N", 3, 224, 224), "float32")]
    preprocess = Preprocess(256, 224, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    source = ImageSource(folder, spec, preprocess=preprocess, selection=Selection(take=16))
    shapes = set()
    for batch in source:
        for item, values in zip(batch.items, batch.feeds["input"], strict=True):
            with Image.open(folder / item) as file:
                shapes.add(file.size)
            assert np.array_equal(values, reference(folder / item)), item
    assert len(shapes) > 3
