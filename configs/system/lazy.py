"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

Lookup = tuple[Callable[[str], Any], Callable[[], list[str]]]


def lazy_names(package: str, names: Mapping[str, str]) -> Lookup:
    """`__getattr__` and `__dir__` for `package`, whose public names stand in its modules.

    `names` says which: module, relative to the package -> the names in it, with spaces between.
    Beside it the package says the same to type checkers, below `if TYPE_CHECKING`.

        __getattr__, __dir__ = lazy_names(__name__, {"cache": "Cache read_cache"})
    """
    module_of = {name: module for module, text in names.items() for name in text.split()}

    def find(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return find, listing
