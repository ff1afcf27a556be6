"""Functions compiled to machine code, kept on disk wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable

import numba


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """`function` compiled by Numba on its first call; it releases the GIL.

    The code is cached beside the source file, else in the user's cache folder, else (a read-only
    installation without a home, where Numba would refuse the function) compiled in each process.
    """
    kept: Callable[..., None]
    try:
        kept = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        kept = numba.njit(nogil=True)(function)
    return kept
