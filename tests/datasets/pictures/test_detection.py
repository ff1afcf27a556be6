"""YOLO's and COCO's files, list files, masks, and what `auto` makes of a path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtune.configs.errors import DataError
from trtune.datasets.batches import InputSpec
from trtune.datasets.open import open_source, source_on_disk
from trtune.datasets.pictures.detection import list_coco, list_yolo
from trtune.datasets.pictures.geometry import Frame
from trtune.datasets.pictures.images import ImageSource
from trtune.datasets.pictures.listing import Boxes, list_folder, read_classes
from trtune.datasets.pictures.preprocess import Preprocess

SPEC = [InputSpec("x", (1, 3, 64, 64), "float32")]
LETTERBOX = Preprocess(letterbox=Frame(64))


def picture(path: Path, width: int = 100, height: int = 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 100, 50)).save(path)
    return path


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Pictures a, b, c; a has a box, b a polygon, c nothing."""
    root = tmp_path / "set"
    for name in "abc":
        picture(root / "images" / "val" / f"{name}.png")
    labels = root / "labels" / "val"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("2 0.5 0.5 0.2 0.4\n")
    (labels / "b.txt").write_text("1 0.1 0.2 0.5 0.2 0.5 0.6\n\n0 0.5 0.5 1 1\n")
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/val\nval: images/val\nnames: {0: cat, 1: dog, 2: cow}\n"
    )
    return root


def rows(boxes: object) -> list[list[float]]:
    assert isinstance(boxes, Boxes)
    return [[round(value, 6) for value in row] for row in boxes.rows.tolist()]


def test_yolo_boxes_and_polygons(yolo: Path) -> None:
    listing = list_yolo(yolo / "data.yaml")
    assert listing.classes == ("cat", "dog", "cow")
    assert rows(listing.files["a.png"]) == [[2, 0.4, 0.3, 0.6, 0.7, 0]]
    assert rows(listing.files["b.png"])[0] == [1, 0.1, 0.2, 0.5, 0.6, 0]
    assert rows(listing.files["c.png"]) == []


@pytest.mark.parametrize("place", [".", "images/val", "data.yaml", "val.txt"])
def test_every_door_to_the_same_pictures(yolo: Path, place: str) -> None:
    lines = "\n".join(f"images/val/{name}.png" for name in "abc")
    (yolo / "val.txt").write_text(lines + "\n")
    listing = list_yolo(yolo / place)
    assert [Path(file).name for file in listing.files] == ["a.png", "b.png", "c.png"]
    assert all(isinstance(label, Boxes) for label in listing.files.values())


def test_boxes_come_in_pixels_of_the_input(yolo: Path) -> None:
    source = open_source("yolo", yolo / "data.yaml", inputs=SPEC, preprocess=LETTERBOX)
    first = next(iter(source))
    assert isinstance(first.labels, tuple)
    # 100 x 50 becomes 64 x 32, 16 pixels of frame above.
    assert first.labels[0].round(3).tolist() == [[2, 25.6, 25.6, 38.4, 38.4, 0]]
    plain = open_source("yolo", yolo, inputs=SPEC, preprocess=LETTERBOX, labels=None)
    assert next(iter(plain)).labels is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "a.txt, line 1: 3 numbers behind the class"),
        ("cat 0.5 0.5 0.2 0.2", "is not `class cx cy w h`"),
        ("0.5 0.5 0.5 0.2 0.2", "no index or a place outside"),
        ("0 50 50 20 20", "no index or a place outside 0 to 1"),
    ],
)
def test_wrong_lines_are_named(yolo: Path, line: str, message: str) -> None:
    (yolo / "labels" / "val" / "a.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        list_yolo(yolo)


def test_a_split_that_is_not_there(yolo: Path) -> None:
    with pytest.raises(DataError, match=r"names no pictures for 'vall'; did you mean 'val'"):
        list_yolo(yolo / "data.yaml", "vall")


def test_a_box_may_reach_over_the_edge_and_a_file_may_be_of_windows(yolo: Path) -> None:
    path = yolo / "labels" / "val" / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf2 0.95 0.5 0.2 0.4\r\n1 0.5 0.5 1 1\r\n")
    found = rows(list_yolo(yolo).files["a.png"])
    assert found == [[2, 0.85, 0.3, 1.05, 0.7, 0], [1, 0, 0, 1, 1, 0]]


def test_an_export_whose_yaml_points_beside_its_folder(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        picture(tmp_path / "set" / part / "images" / "A.PNG")
        (tmp_path / "set" / part / "labels").mkdir()
        (tmp_path / "set" / part / "labels" / "A.txt").write_text("1 0.5 0.5 0.5 0.5")
    told = "train: ../train/images\r\nvalid: ../valid/images\r\nnames: [cat, dog]\r\n"
    (tmp_path / "set" / "data.yaml").write_bytes(told.encode())
    assert source_on_disk(tmp_path / "set") == "yolo"
    for place, split in ((".", None), ("data.yaml", "train"), ("data.yaml", "val")):
        listing = list_yolo(tmp_path / "set" / place, split)
        assert rows(listing.files["A.PNG"]) == [[1, 0.25, 0.25, 0.75, 0.75, 0]]
    (tmp_path / "set" / "data.yaml").unlink()
    assert source_on_disk(tmp_path / "set") == "yolo"
    assert len(list_yolo(tmp_path / "set").files) == 2


def test_a_list_written_on_windows_and_seen_from_the_set(yolo: Path) -> None:
    (yolo / "lists").mkdir()
    lines = "\r\n".join(f"images\\val\\{name}.png" for name in "ab")
    (yolo / "lists" / "val.txt").write_bytes(lines.encode())
    listing = list_yolo(yolo / "lists" / "val.txt")
    assert list(listing.files) == ["a.png", "b.png"]
    with pytest.raises(DataError, match="is no list of pictures"):
        list_yolo(yolo / "images" / "val" / "a.png")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    picture(tmp_path / "val2017" / "1.jpg")
    picture(tmp_path / "val2017" / "2.jpg")
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "2.jpg"}, {"id": 3, "file_name": "1.jpg"},
                           {"id": 9, "file_name": "gone.jpg"}],
                "categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}],
                "annotations": [
                    {"image_id": 7, "category_id": 90, "bbox": [10, 20, 30, 40], "iscrowd": 1},
                    {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5]},
                ],
            }
        )
    )  # fmt: skip
    return path


def test_coco_counts_categories_in_the_order_of_their_ids(coco: Path) -> None:
    listing = list_coco(coco)
    assert listing.folder == coco.parent.parent / "val2017"
    assert listing.classes == ("person", "brush")
    assert rows(listing.files["2.jpg"]) == [[1, 10, 20, 40, 60, 1], [0, 0, 0, 5, 5, 0]]
    assert rows(listing.files["1.jpg"]) == []
    assert "2 of the 3 pictures" in listing.notes[0]


def test_coco_counts_by_the_ids_themselves(coco: Path) -> None:
    for place in (coco, coco.parent.parent):
        listing = list_coco(place, by_id=True)
        assert rows(listing.files["2.jpg"]) == [[90, 10, 20, 40, 60, 1], [1, 0, 0, 5, 5, 0]]
        assert (listing.classes[1], listing.classes[90]) == ("person", "brush")
        assert listing.named == {"person": 1, "brush": 90}
    assert source_on_disk(coco.parent.parent) == "coco"


def test_coco_of_windows_with_boxes_of_pictures_that_are_not_listed(coco: Path) -> None:
    value = json.loads(coco.read_text())
    value["annotations"].append({"image_id": 1234, "category_id": 1, "bbox": [0, 0, 5, 5]})
    for entry in value["images"]:
        entry["file_name"] = "val2017\\" + entry["file_name"]
    coco.write_text(json.dumps(value), encoding="utf-8-sig")
    listing = list_coco(coco)
    assert list(listing.files) == ["val2017/1.jpg", "val2017/2.jpg"]
    assert "left out 1 of the boxes" in listing.notes[1]


def test_a_file_that_is_no_coco(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="not a COCO instances file"):
        list_coco(tmp_path / "x.json")


def test_a_list_with_labels(tmp_path: Path) -> None:
    for name in ("a b.png", "c.png"):
        picture(tmp_path / "val" / name)
    path = tmp_path / "val.txt"
    path.write_text("val/c.png 3\nval/a b.png 0\n")
    assert list_folder(path).files == {"val/a b.png": 0, "val/c.png": 3}
    path.write_text("val/c.png dog\nval/a b.png cat\n")
    assert list_folder(path, classes=("cat", "dog")).files == {"val/a b.png": 0, "val/c.png": 1}
    with pytest.raises(DataError, match=r"label 'dog' of 'val/c.png' is not a class index"):
        list_folder(path)


def test_class_folders_by_synset_and_a_file_of_classes(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537"):
        picture(tmp_path / name / "1.png")
    classes = tmp_path / "synsets.txt"
    classes.write_text("n00000001 thing\nn01443537 goldfish\nn01440764 tench\n")
    listing = list_folder(tmp_path, classes=read_classes(classes))
    assert listing.files == {"n01440764/1.png": 2, "n01443537/1.png": 1}
    assert listing.mapping == "n01440764 = 2, n01443537 = 1"
    with pytest.raises(DataError, match="'n01440764' is none of the 1 classes"):
        list_folder(tmp_path, classes=("n5 what",))


def test_a_csv_of_names_and_of_fewer_pictures_than_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcd":
        picture(tmp_path / "p" / f"{name}.png", 64, 64)
    csv = tmp_path / "labels.csv"
    csv.write_text("file,label\na.png,dog\nc.png,cat\n")
    source = ImageSource(tmp_path / "p", SPEC, labels=csv)
    assert [int(np.asarray(batch.labels)[0]) for batch in source] == [1, 0]
    assert "2 of 4 pictures: " in caplog.text
    assert source.notes[-1] == "classes: cat = 0, dog = 1"


def test_masks_are_laid_into_the_frame_like_their_picture(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    mask = np.zeros((50, 100), np.uint8)
    mask[:, 50:] = 3
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    source = open_source("images", tmp_path / "images", inputs=SPEC, preprocess=LETTERBOX,
                         labels=tmp_path / "masks")  # fmt: skip
    labels = next(iter(source)).labels
    assert isinstance(labels, tuple)
    assert labels[0].shape == (64, 64)
    assert labels[0][0, 0] == 255
    assert labels[0][32, [10, 60]].tolist() == [0, 3]


def test_npy_folders_feed_one_sample_a_file(tmp_path: Path) -> None:
    inputs = [InputSpec("x", ("n", 4), "float32"), InputSpec("h", (2, "n", 3), "float32"),
              InputSpec("k", (5,), "float32")]  # fmt: skip
    for name, shape in [("x", (4,)), ("h", (2, 1, 3)), ("labels", (2, 5))]:
        (tmp_path / name).mkdir()
        for number in range(3):
            np.save(tmp_path / name / f"{number}.npy", np.full(shape, number, np.float32))
    np.save(tmp_path / "k.npy", np.ones(5, np.float32))
    assert source_on_disk(tmp_path) == "npy"
    source = open_source("auto", tmp_path, inputs=inputs, batch=2)
    batches = list(source)
    assert [len(batch) for batch in batches] == [2, 1]
    assert batches[0].feeds["x"].tolist() == [[0] * 4, [1] * 4]
    assert batches[0].feeds["h"].shape == (2, 2, 3)
    assert batches[0].feeds["k"].shape == (5,)


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["images/a.png", "labels/a.txt"], "yolo"),
        (["a.png"], "images"),
        (["cat/a.png"], "images"),
        (["a.npy"], "npy"),
    ],
)
def test_what_a_folder_holds_says_its_source(tmp_path: Path, names: list[str], source: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert source_on_disk(tmp_path) == source
