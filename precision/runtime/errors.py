"""How far a tensor is from its reference: pure measures, and sums that stream over batches.

Every measure is a ratio of the same few sums over elements, so `ErrorSums` keeps those in float64
and never the tensors: its size does not depend on the number of pictures. The functions at the
end are the same measures of one pair of arrays.

Edge cases are the same everywhere. No epsilon is added anywhere. A NaN in the *reference* is an
error (`NotFiniteError`), because nothing can be measured against it. An infinity that both hold,
as masks of attention do, is left out. Any other NaN or Inf is a result: it is counted in
`not_finite`, and makes the error infinite (SQNR -inf, cosine 0, the others +inf). Arrays without
elements do not differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.system.compiled import compiled


class NotFiniteError(ValueError):
    """The reference holds NaN; `index` is the first such element of the flat array."""

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"the reference holds {value} at flat index {index}")
        self.index = index
        self.value = value


# Reassociation lets LLVM add in vector lanes; it still has to respect NaN and Inf.
@compiled(error_model="numpy", fastmath=("reassoc", "contract", "nsz"))
def _sums(
    reference: NDArray[Any], test: NDArray[Any]
) -> tuple[float, float, float, float, float, float]:  # pragma: no cover - compiled
    signal = noise = dot = energy = relative = worst = 0.0
    for i in range(reference.size):
        r = np.float64(reference[i])
        t = np.float64(test[i])
        error = abs(r - t)
        signal += r * r
        noise += error * error
        dot += r * t
        energy += t * t
        if r != 0.0:
            relative += error / abs(r)
        elif t != 0.0:
            relative += 1.0
        worst = max(worst, error)
    return signal, noise, dot, energy, relative, worst


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    """One-dimensional and contiguous, float32 where that is exact, else float64."""
    exact = array.dtype in (np.float32, np.float16, np.bool_, np.int8, np.uint8)
    flat: NDArray[Any] = np.ascontiguousarray(array, np.float32 if exact else np.float64).ravel()
    return flat


def _refuse_nan(reference: NDArray[Any]) -> None:
    missing = np.isnan(reference)
    if missing.any():
        index = int(np.argmax(missing))
        raise NotFiniteError(index, float(reference[index]))


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over the elements of a reference r and a test t, from which every measure follows.

    `signal` sum(r^2); `noise` sum((r-t)^2); `dot` sum(r*t); `energy` sum(t^2); `relative`
    sum(|r-t|/|r|), where an element with r == 0 counts 0 if t == 0 and 1 if not; `max_abs`
    max(|r-t|); all float64. `count` elements were added; in no sum are `equal_infinities` of them,
    and `not_finite` where one side is infinite or t is NaN.

    >>> sums = ErrorSums().add(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    >>> sums.sqnr_db, sums.max_abs, sums.relative_l2
    (20.0, 0.5, 0.1)
    """

    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    energy: float = 0.0
    relative: float = 0.0
    max_abs: float = 0.0
    count: int = 0
    not_finite: int = 0
    equal_infinities: int = 0

    def add(self, reference: NDArray[Any], test: NDArray[Any]) -> ErrorSums:
        """The sums with `test` against `reference` added: same shape, any rank, any real dtype.

        One pass without temporaries where both are float32; float16 and 8-bit integers are widened
        to float32, everything else to float64 first. Both arrays are left as they are.

        Raises ValueError if the shapes differ, NotFiniteError for NaN in the reference.
        """
        if reference.shape != test.shape:
            raise ValueError(f"shapes differ: reference {reference.shape}, test {test.shape}")
        r, t = _flat(reference), _flat(test)
        bad = equal = 0
        sums = _sums(r, t)
        if not math.isfinite(sum(sums)):
            _refuse_nan(r)
            finite = np.isfinite(r) & np.isfinite(t)
            equal = int(np.count_nonzero((r == t) & ~finite))
            bad = int(t.size - np.count_nonzero(finite)) - equal
            sums = _sums(r[finite], t[finite])
        return self.merge(ErrorSums(*sums, count=r.size, not_finite=bad, equal_infinities=equal))

    def merge(self, other: ErrorSums) -> ErrorSums:
        """The sums over the elements of both."""
        return ErrorSums(
            signal=self.signal + other.signal,
            noise=self.noise + other.noise,
            dot=self.dot + other.dot,
            energy=self.energy + other.energy,
            relative=self.relative + other.relative,
            max_abs=math.inf
            if self.not_finite + other.not_finite
            else max(self.max_abs, other.max_abs),
            count=self.count + other.count,
            not_finite=self.not_finite + other.not_finite,
            equal_infinities=self.equal_infinities + other.equal_infinities,
        )

    @property
    def sqnr_db(self) -> float:
        """10*log10(sum(r^2) / sum((r-t)^2)), in decibels; see `sqnr_db`."""
        if self.not_finite:
            return -math.inf
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0:
            return -math.inf
        return 10.0 * (math.log10(self.signal) - math.log10(self.noise))

    @property
    def cosine(self) -> float:
        """sum(r*t) / sqrt(sum(r^2) * sum(t^2)), within [-1, 1]; see `cosine`."""
        if self.not_finite:
            return 0.0
        if self.noise == 0.0:
            return 1.0
        lengths = math.sqrt(self.signal) * math.sqrt(self.energy)
        return max(-1.0, min(1.0, self.dot / lengths)) if lengths else 0.0

    @property
    def relative_l2(self) -> float:
        """sqrt(sum((r-t)^2) / sum(r^2)); see `relative_l2`."""
        return self._over(math.sqrt(self.noise), math.sqrt(self.signal))

    @property
    def mean_relative(self) -> float:
        """The mean of |r-t|/|r| over all elements; see `mean_relative`."""
        return self._over(self.relative, self.count)

    def _over(self, error: float, size: float) -> float:
        if self.not_finite:
            return math.inf
        if error == 0.0:
            return 0.0
        return error / size if size else math.inf


def sqnr_db(reference: NDArray[Any], test: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio of `test` against `reference`, in decibels.

    10*log10(sum(r^2) / sum((r-t)^2)), summed in float64 over all elements. Same shape, any rank.
    Equal arrays give +inf; an all-zero reference with a non-zero test gives -inf.

    Raises ValueError if the shapes differ, NotFiniteError for NaN in `reference`.

    >>> sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    20.0
    """
    return ErrorSums().add(reference, test).sqnr_db


def cosine(reference: NDArray[Any], test: NDArray[Any]) -> float:
    """Cosine of the angle between the two arrays seen as vectors, between -1 and 1.

    sum(r*t) / (|r| * |t|) in float64. Equal arrays, all-zero ones too, give 1; one all-zero
    array against another gives 0. Same shape, any rank; blind to a common factor.

    Raises ValueError if the shapes differ, NotFiniteError for NaN in `reference`.

    >>> cosine(np.array([1.0, 0.0]), np.array([0.0, 2.0]))
    0.0
    """
    return ErrorSums().add(reference, test).cosine


def relative_l2(reference: NDArray[Any], test: NDArray[Any]) -> float:
    """|r-t| / |r| in the Euclidean norm, float64; 0.1 is an SQNR of 20 dB.

    Equal arrays give 0; an all-zero reference with a non-zero test gives +inf.

    Raises ValueError if the shapes differ, NotFiniteError for NaN in `reference`.

    >>> relative_l2(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    0.1
    """
    return ErrorSums().add(reference, test).relative_l2


def mean_relative(reference: NDArray[Any], test: NDArray[Any]) -> float:
    """The mean over all elements of |r-t|/|r|, float64.

    Where r == 0 an element counts 0 if t == 0 too, else 1 (all of it is error). Small |r| weigh
    heavily: this is the measure for "the same up to float noise", not for quantization.

    Raises ValueError if the shapes differ, NotFiniteError for NaN in `reference`.

    >>> mean_relative(np.array([2.0, 0.0, 0.0, 4.0]), np.array([3.0, 0.0, 9.0, 4.0]))
    0.375
    """
    return ErrorSums().add(reference, test).mean_relative


def max_abs(reference: NDArray[Any], test: NDArray[Any]) -> float:
    """The largest |r-t|, in the unit of the arrays; 0 for equal arrays and for empty ones.

    Raises ValueError if the shapes differ, NotFiniteError for NaN in `reference`.

    >>> max_abs(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    0.5
    """
    return ErrorSums().add(reference, test).max_abs
