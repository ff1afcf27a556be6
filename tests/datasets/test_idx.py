from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trtune.configs.errors import DataError
from trtune.datasets.idx import dump_idx, load_idx, read_idx

DTYPES = ["uint8", "int8", "int16", "int32", "float32", "float64"]


@given(
    arrays.arrays(
        st.sampled_from([np.dtype(name) for name in DTYPES]),
        arrays.array_shapes(max_dims=4, min_side=0, max_side=4),
    )
)
def test_round_trip(array: np.ndarray) -> None:  # type: ignore[type-arg]
    result = load_idx(dump_idx(array))
    assert result.dtype == array.dtype
    assert result.dtype.isnative
    np.testing.assert_array_equal(result, array)


def test_numbers_are_big_endian() -> None:
    data = bytes([0, 0, 0x0B, 1, 0, 0, 0, 2, 0x01, 0x02, 0xFF, 0xFE])
    assert load_idx(data).tolist() == [258, -2]


@pytest.mark.parametrize("packed", [False, True], ids=["idx", "idx.gz"])
def test_read_idx(tmp_path: Path, packed: bool) -> None:
    data = dump_idx(np.arange(6, dtype=np.uint8).reshape(1, 2, 3))
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_idx(path).tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"\x89PNG....", "begins with '89 50 4e 47'", id="something else"),
        pytest.param(b"", "begins with ''", id="empty"),
        pytest.param(b"\0\0\x07\1\0\0\0\0", "begins with '00 00 07 01'", id="unknown dtype"),
        pytest.param(b"\0\0\x08\2\0\0\0\1", "header is cut off", id="header cut off"),
        pytest.param(b"\0\0\x08\0", "header is cut off", id="no dimensions"),
        pytest.param(
            b"\0\0\x08\1\0\0\0\5ab", r"10 bytes.*\(5 uint8\) says 13", id="values cut off"
        ),
        pytest.param(gzip.compress(b"\0\0\x08\1")[:-6], "cannot be read", id="gzip cut off"),
    ],
)
def test_files_that_are_not_idx(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_idx(tmp_path / "x")


def test_what_idx_cannot_hold() -> None:
    with pytest.raises(ValueError, match="int64"):
        dump_idx(np.zeros(3, np.int64))
