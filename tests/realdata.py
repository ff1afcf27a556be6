"""Real models and data for the tests that need them, and the mark that skips them elsewhere.

`DATA` is the folder that `TRTUNE_DATA` names, or `shared/data` beside the checkout; None if it is
not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_PLACE = Path(
    os.environ.get("TRTUNE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
)
DATA: Path | None = _PLACE if (_PLACE / "models").is_dir() else None

needs_data = pytest.mark.skipif(
    DATA is None, reason=f"no models and pictures in {_PLACE} (set TRTUNE_DATA)"
)


def data_dir() -> Path:
    """The data folder, for tests marked `needs_data`."""
    assert DATA is not None
    return DATA


def shared_case(name: str) -> Path:
    """A small model that fell short once, in `cases` beside the data; skips the test without."""
    path = _PLACE.parent / "cases" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


def trace(*parts: str) -> Path:
    """A file that a real TensorRT left, below `data/trt`; skips the test where it is absent."""
    path = data_dir().joinpath("trt", *parts)
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path
