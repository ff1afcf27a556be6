"""The errors a user can meet, and how to suggest a nearby word.

The lowest module of the project. Layers, top to bottom, each importing only what stands
above it: `configs`, `datasets`, `calibrate`, `precision`, `reports`, `trtune` itself.

    TrtuneError             anything the user should read without a traceback; exit status 1
    └── InputError          what the user gave is wrong; exit status 2
        ├── ConfigError     the YAML file or `--set`
        ├── DataError       pictures, arrays, labels
        ├── ModelError      the ONNX file
        └── CacheError      a calibration cache

A caller's bug is a `ValueError`; the command line shows that with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrtuneError(Exception):
    """Something the user can act on: what, where, what was found, what to do."""

    exit_code = 1


class InputError(TrtuneError):
    """The config, the data, or the model is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """The YAML file, an override, or an option is wrong."""


class DataError(InputError):
    """Pictures, arrays or labels are missing, broken or do not fit the model."""


class ModelError(InputError):
    """The ONNX file is missing, broken, or holds something that cannot be handled."""


class CacheError(InputError):
    """A calibration cache cannot be read, or belongs to something else."""


def nearest(word: str, words: Iterable[str], *, count: int = 1) -> list[str]:
    """The `count` entries of `words` most like `word`, best first; empty if none is close.

    >>> nearest("metod", ["method", "cache", "memory"])
    ['method']
    """
    options = list(dict.fromkeys(words))
    folded = {option.casefold(): option for option in reversed(options)}
    given = word.casefold()
    alike = difflib.get_close_matches(given, folded, n=4 * count, cutoff=0.5)
    return [folded[match] for match in alike if _is_near(given, match)][:count]


def _is_near(a: str, b: str) -> bool:
    """Whether one could be meant by the other: it goes on where the other ends, or a third of its
    characters are typing errors (a wrong, missing or added one, or two neighbours swapped)."""
    if min(len(a), len(b)) >= 3 and (a in b or b in a):
        return True
    return _typing_errors(a, b) <= max(1, max(len(a), len(b)) // 3)


def _typing_errors(a: str, b: str) -> int:
    """The optimal string alignment distance."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def did_you_mean(word: str, words: Iterable[str], *, count: int = 1) -> str:
    """'; did you mean 'x'?' for the nearest of `words`, or an empty string.

    >>> did_you_mean("metod", ["method"])
    "; did you mean 'method'?"
    """
    close = nearest(word, words, count=count)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
