"""The idx format of MNIST and its relatives: one array a file, perhaps gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def read_idx(path: Path) -> NDArray[Any]:
    """The array of an idx file, in native byte order; gzip is recognised by its first bytes.

    Raises DataError if the file is missing, not idx, or not as long as its header says.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}; `path` must be an idx or idx.gz file")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch the file again") from error
    return load_idx(data, where=str(path))


def load_idx(data: bytes, *, where: str = "idx data") -> NDArray[Any]:
    """Parse idx: two zero bytes, a dtype code, the rank, big-endian sizes, big-endian values.

    >>> load_idx(dump_idx(np.array([[1, -2]], np.int16))).tolist()
    [[1, -2]]
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise DataError(f"{where} is not an idx file: it begins with {data[:4].hex(' ')!r}")
    dtype, rank = np.dtype(_DTYPES[data[2]]), data[3]
    start = 4 + 4 * rank
    if rank == 0 or len(data) < start:
        raise DataError(f"{where} is not an idx file: its header is cut off")
    shape = struct.unpack(f">{rank}I", data[4:start])
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise DataError(
            f"{where} is {len(data)} bytes, and its header ({' x '.join(map(str, shape))} "
            f"{dtype.name}) says {wanted}; fetch the file again"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def dump_idx(array: NDArray[Any]) -> bytes:
    """`array` as idx; raises ValueError for a dtype the format has no code for."""
    codes = {np.dtype(name).newbyteorder("="): code for code, name in _DTYPES.items()}
    if array.dtype not in codes or not 1 <= array.ndim <= 255:
        raise ValueError(f"idx cannot hold {array.dtype} with {array.ndim} dimensions")
    code = codes[array.dtype]
    header = struct.pack(f">2xBB{array.ndim}I", code, array.ndim, *array.shape)
    return header + array.astype(_DTYPES[code]).tobytes()
