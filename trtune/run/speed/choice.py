"""Which model to deploy on a CPU, decided by time: as planned, partly in float, or FP32.

Integer kernels are not always faster: small layers gain little, and what stands between them can
cost more than they save. A run gives its user no slower model than the one that it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from trtune.reports.latency import Turns, in_all, speedup_of
from trtune.reports.record import Latency, Speedup
from trtune.run.speed.latency import Speed
from trtune.run.stages.engines import FP32, TUNED, UNTUNED

INTEGER_MODEL: Final = "quantized"
PARTLY_MODEL: Final = "partly"
FLOAT_MODEL: Final = "fp32"


@dataclass(frozen=True, slots=True)
class Deployment:
    """The model to deploy, the nodes left in float for it, and what was timed; without `speedups`
    it was not decided by time.

    `latency` has what the variants took beside each other, where that was measured once more for
    the choice.
    """

    model: Literal["quantized", "partly", "fp32"] = INTEGER_MODEL
    floats: tuple[str, ...] = ()
    speedups: Mapping[str, Speedup] = field(default_factory=dict)
    latency: Mapping[str, Latency] = field(default_factory=dict)


def plainly(speed: Speed) -> Deployment:
    """The tuned model, with what its turns say of it; of too few turns nothing is said."""
    found = speed.speedups.get(TUNED)
    return Deployment(speedups={INTEGER_MODEL: found} if found and found.low is not None else {})


def decided(turns: Turns, tried: Mapping[str, tuple[str, ...]], *, batch: int) -> Deployment:
    """The choice among FP32, the quantized model and those that were `tried`, by name with the
    nodes that each leaves in float, from turns that all took.

    One of the latter is taken if it is faster than the quantized one: beyond the noise, or by its
    median where the quantized one's is slower than FP32's. FP32 is taken if what was is slower than
    that beyond the noise.
    """
    found = {name: speedup_of(turns[name], turns[FP32]) for name in (INTEGER_MODEL, *tried)}
    speedups = {name: speedup for name, speedup in found.items() if speedup is not None}
    best: str = INTEGER_MODEL
    for name in tried:
        over = speedup_of(turns[name], turns[best])
        doubtful = speedups[best].median < 1
        if over is not None and over.low is not None:
            best = name if over.low > 1 or (doubtful and over.median > 1) else best
    taken = best
    if is_slower(speedups[best]):
        taken, best = FLOAT_MODEL, INTEGER_MODEL
    taking = {FP32: FP32, TUNED: best, UNTUNED: UNTUNED if UNTUNED in turns else INTEGER_MODEL}
    latency = {name: in_all(turns[which], batch=batch) for name, which in taking.items()}
    if taken not in tried:
        return Deployment(
            FLOAT_MODEL if taken == FLOAT_MODEL else INTEGER_MODEL, (), speedups, latency
        )
    whole = speedups[INTEGER_MODEL]
    return Deployment(
        PARTLY_MODEL, tried[best], {INTEGER_MODEL: whole, PARTLY_MODEL: speedups[best]}, latency
    )


def is_slower(found: Speedup) -> bool:
    """Whether it takes longer than FP32 with 95 % confidence.

    >>> is_slower(Speedup(median=0.9, low=0.8, high=0.95, turns=10))
    True
    >>> is_slower(Speedup(median=0.9, turns=2)), is_slower(Speedup(median=0.9, low=0.8, high=1.1))
    (False, False)
    """
    return found.high is not None and found.high < 1
