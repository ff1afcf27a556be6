"""Files are complete or absent; hashes do not depend on what does not matter."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from trtune.configs.errors import TrtuneError
from trtune.configs.files import (
    atomic_path,
    hash_bytes,
    hash_file,
    hash_json,
    write_bytes,
    write_json,
    write_text,
)


def test_a_written_file_is_alone_in_its_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.txt", "grün\n")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "grün\n".encode()
    assert os.listdir(tmp_path / "deep" / "er") == ["a.txt"]


def replace(path: Path, text: str, error: BaseException) -> None:
    """Write `text` in place of the file at `path`, and fail before the end."""
    with atomic_path(path) as target:
        target.write_text(text)
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "ctrl-c"])
def test_a_failed_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with pytest.raises(error):
        replace(path, "half", error("stop"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_files_written_beside_the_target_are_moved_too(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "model.onnx") as target:
        assert target.name == "model.onnx"
        target.write_bytes(b"graph")
        target.with_name("model.onnx.data").write_bytes(b"weights")
        assert not (tmp_path / "model.onnx.data").exists()
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(TrtuneError) as caught:
        write_text(path, "x")
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert "--out" in str(caught.value)
    assert caught.value.exit_code == 1


def fill_the_disk(path: Path) -> None:
    """Write to `path` where every write fails as on a full disk."""
    with atomic_path(path) as target:
        target.symlink_to("/dev/full")
        target.write_bytes(b"x" * 100_000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrtuneError, match="No space left on device; nothing was left behind"):
        fill_the_disk(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    elsewhere = FileNotFoundError(2, "No such file or directory", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        replace(tmp_path / "out" / "a.txt", "half", elsewhere)
    assert os.listdir(tmp_path / "out") == []


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [0.5, "ü"]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["b", "a"]
    assert "ü" in text
    assert text.endswith("}\n")


def test_hashes(tmp_path: Path) -> None:
    data = b"x" * 3_000_000
    write_bytes(tmp_path / "big", data)
    assert hash_file(tmp_path / "big") == hash_bytes(data) == hashlib.sha256(data).hexdigest()
    assert hash_json({"a": [1, 2], "b": None}) == hash_json({"b": None, "a": [1, 2]})
    assert hash_json([1, 2]) != hash_json([2, 1])
