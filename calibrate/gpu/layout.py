"""How tensors are divided among the blocks of the kernel: by pictures, and into pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 17
"""Values a block counts: enough to hide that it then adds its own table to the large one."""


WHOLE_ROW = 1 << 14
"""Values of a picture from which on a piece holds one picture alone."""


KINDS: Mapping[str, tuple[int, type[Any]]] = {
    "tensor(float)": (0, np.float32),
    "tensor(float16)": (1, np.float16),
    "tensor(double)": (2, np.float64),
}


TENSOR = np.dtype([("data", "<u8"), ("inner", "<i8"), ("pictures", "<i4"), ("kind", "<i4")])


PIECE_OF = np.dtype([("start", "<i8"), ("length", "<i4"), ("tensor", "<i4")])
"""The structs of the same names in histogram.cu."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How the values of one tensor belong to pictures.

    Value i is of picture `(i // inner) % pictures`; `size` values in all, `kind` as in `KINDS`.
    """

    size: int
    inner: int
    pictures: int
    kind: int

    @classmethod
    def of(cls, shape: Sequence[int], axis: int | None, held: int, kind: int) -> Counted:
        """A tensor of `shape` in a batch of `held` pictures, which lie along `axis`.

        Without an axis the pictures cannot be told apart, and all of it counts as one.

        >>> Counted.of((2, 12, 5), 1, 4, 0)
        Counted(size=120, inner=15, pictures=4, kind=0)
        """
        size = math.prod(shape)
        if axis is None:
            return cls(size, max(size, 1), 1, kind)
        return cls(size, max(math.prod(shape[axis:]) // held, 1), held, kind)


def pieces(tensors: Sequence[Counted]) -> NDArray[Any]:
    """What each block counts: pieces that cover every tensor once, of dtype `PIECE_OF`.

    A picture that is long enough starts a piece of its own, since a block then keeps one maximum.
    """
    found: list[tuple[int, int, int]] = []
    for number, tensor in enumerate(tensors):
        unit = tensor.inner if tensor.inner >= WHOLE_ROW else tensor.size
        for begin in range(0, tensor.size, max(unit, 1)):
            end = min(begin + unit, tensor.size)
            found += [(at, min(PIECE, end - at), number) for at in range(begin, end, PIECE)]
    return np.array(found, PIECE_OF)
