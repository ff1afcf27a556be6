"""Functions compiled to machine code, kept on disk wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(
    *, fastmath: tuple[str, ...] = (), error_model: Literal["python", "numpy"] = "python"
) -> Callable[[Function], Function]:
    """A decorator: the function compiled by Numba on its first call; it releases the GIL.

    `fastmath` are LLVM's flags for what it may assume of floats, none by default; with the
    `error_model` "numpy" a division by zero gives infinity and no error.

    The code is cached beside the source file, else in the user's cache folder, else (a read-only
    installation without a home, where Numba would refuse the function) compiled in each process.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": error_model}
    if fastmath:
        options["fastmath"] = set(fastmath)

    def compile_lazily(function: Function) -> Function:
        kept: Function
        try:
            kept = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            kept = numba.njit(**options)(function)
        return kept

    return compile_lazily
