"""What was chosen for a range, and how to call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Named = tuple[str, float]
"""A method, and the factor from its amax to another."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The amax chosen for a range, which method it is (or near to), and its output error.

    `factor` is the amax by that of the method, 1 where they are the same. `error` is that of the
    worst output, as `judge.worst` has it.
    """

    amax: float
    method: str
    error: float
    factor: float = 1.0


def nearest_name(amax: float, names: Mapping[float, Named]) -> Named:
    """How to call an amax that no method gave: the nearest method and the factor.

    >>> nearest_name(1.25, {1.0: ("mse", 1.0), 4.0: ("max", 1.0)})
    ('mse', 1.25)
    """
    named = {known: name for known, (name, factor) in names.items() if factor == 1}
    known = min(named, key=lambda other: abs(np.log(amax / other)))
    return named[known], amax / known
