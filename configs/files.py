"""Files that are either complete or absent, and the hashes that key them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` when the block ends, removed if it fails.

    The name given out keeps the suffix of `path` and lives in a fresh folder of its own, so that
    writers which put a second file beside the first (ONNX external data) stay atomic too: every
    file in that folder is moved, `path` last.

    Raises TrtuneError, naming the file, if the file system refuses (read-only, full). An OSError of
    the block that names a file elsewhere is the block's own and passes unchanged.
    """
    path = Path(path)
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        target = folder / path.name
        yield target
        for written in sorted(folder.iterdir(), key=lambda p: p == target):
            with written.open("rb+") as handle:
                os.fsync(handle.fileno())
            written.replace(path.parent / written.name)
    except OSError as error:
        if folder is not None and _names_a_file_outside(error, path.parent):
            raise
        raise TrtuneError(
            f"cannot write {path}: {error.strerror or error}; nothing was left behind. "
            "Choose another place with --out, or free some space"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _names_a_file_outside(error: OSError, folder: Path) -> bool:
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    return Path(os.path.abspath(folder)) not in Path(os.path.abspath(error.filename)).parents


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step: a reader sees the old file or the new one."""
    with atomic_path(path) as target:
        target.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in their own order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def hash_bytes(data: bytes) -> str:
    """SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of the file at `path`."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys, so that the order of keys does not matter.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("utf-8"))
