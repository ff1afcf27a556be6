"""How sure a value is: standard errors of means and of set-level measures, alone and paired.

A mean has the textbook error, s / sqrt(n) with n - 1 degrees of freedom. A set-level measure is
drawn again: samples with replacement (Efron's bootstrap), the same draws for both models of a
pair, so that what both get right or wrong cancels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.reports.measures.base import Resampled

DRAWS = 64
_SEED = 0

FEWEST = 64
"""Pictures before which no mean is trusted to stay where it is."""
CERTAIN = 4.5
"""Standard errors by which a mean must miss: below one in 10^5 that it would not, at each look."""
DIRECTIONS = 16
"""Random directions in which outputs are looked at, to see whether pictures come in mixed order."""


def mean_error(scores: NDArray[np.float64]) -> float | None:
    """The standard error of the mean of `scores`; None for fewer than two.

    >>> mean_error(np.array([0.0, 1.0, 0.0, 1.0]))
    0.28867513459481287
    """
    if len(scores) < 2:
        return None
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def sqnr_error(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> float | None:
    """The standard error of 10 * log10(sum(signal) / sum(noise)) over samples, in decibels.

    One entry a sample; the delta method for a ratio of means. None for fewer than two samples, or
    where a sum is zero or not finite.

    >>> round(sqnr_error(np.array([4.0, 4.0]), np.array([1.0, 3.0])), 3)
    2.171
    """
    size, total = float(noise.sum()), float(signal.sum())
    if len(noise) < 2 or not (size > 0 and total > 0 and math.isfinite(size + total)):
        return None
    parts = noise / (size / len(noise)) - signal / (total / len(signal))
    error = mean_error(parts)
    return None if error is None else 10 / math.log(10) * error


def share_error(share: float, samples: int) -> float | None:
    """The standard error of a share of `samples`; None for fewer than two.

    >>> share_error(0.5, 101)
    0.05
    """
    return math.sqrt(share * (1 - share) / (samples - 1)) if samples > 1 else None


def standard_error(measure: Any) -> float | None:
    """The standard error of a measure's value, in its unit; None if it cannot tell.

    Of one with `scores`, that of their mean; of one that is `Resampled`, the standard deviation
    over `DRAWS` draws.
    """
    if hasattr(measure, "scores"):
        return mean_error(measure.scores)
    return _spread([measure.weighted(w) for w in draws(measure.count)]) if _can(measure) else None


def paired_error(reference: Any, measure: Any) -> float | None:
    """The standard error of (value of `measure` - value of `reference`), both on the same samples.

    None if the measures cannot tell, or saw another number of samples.
    """
    if hasattr(measure, "scores") and hasattr(reference, "scores"):
        ours, theirs = measure.scores, reference.scores
        return mean_error(ours - theirs) if len(ours) == len(theirs) else None
    if not _can(measure) or not _can(reference) or measure.count != reference.count:
        return None
    return _spread([measure.weighted(w) - reference.weighted(w) for w in draws(measure.count)])


def misses_for_good(scores: NDArray[np.float64], total: int, needed: float) -> bool:
    """Whether a mean over `total` samples, of which `scores` are the first, stays below `needed`.

    By `CERTAIN` standard errors of a draw without replacement, so the samples have to come in
    mixed order (`is_mixed`). Looked at when their number has doubled, from `FEWEST` on, so that
    many looks do not find by chance what is not there (Wald, Sequential analysis, 1947, with
    fixed looks instead of boundaries).

    >>> misses_for_good(np.tile([0.0, 1.0], 64), 50000, 0.8)
    True
    """
    count = len(scores)
    if count < FEWEST or count >= total:
        return False
    error = mean_error(scores) or 0.0
    spread = max(error, 1 / count) * math.sqrt(1 - count / total)
    return float(scores.mean()) + CERTAIN * spread < needed


def is_mixed(features: NDArray[np.float64], count: int) -> bool:
    """Whether the first `count` rows of `features` (samples x values) look like all of them.

    Pictures in folders come class by class, and then the first say nothing about the others. The
    rows are projected on `DIRECTIONS` random directions; the mean of the first must lie within
    `CERTAIN` standard errors of that of all in each.
    """
    rows = np.nan_to_num(features.reshape(len(features), -1), posinf=0.0, neginf=0.0)
    if not 1 < count < len(rows) or not rows.shape[1]:
        return False
    generator = np.random.default_rng(_SEED)
    seen = rows @ generator.standard_normal((rows.shape[1], DIRECTIONS))
    spread = seen.std(axis=0, ddof=1) / math.sqrt(count) * math.sqrt(1 - count / len(rows))
    apart = np.abs(seen[:count].mean(axis=0) - seen.mean(axis=0))
    return bool((apart <= CERTAIN * spread).all())


def draws(count: int, times: int = DRAWS) -> list[NDArray[np.float64]]:
    """How often each of `count` samples is drawn, in `times` draws with replacement.

    The same draws every time.
    """
    generator = np.random.default_rng(_SEED)
    chosen = (generator.integers(0, count, count) for _ in range(times)) if count else ()
    return [np.bincount(rows, minlength=count).astype(np.float64) for rows in chosen]


def _can(measure: Any) -> bool:
    return isinstance(measure, Resampled) and measure.count > 1


def _spread(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else None
