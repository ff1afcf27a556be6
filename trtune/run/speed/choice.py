"""Which model to deploy on a CPU, decided by time: as planned, partly in float, or FP32.

Integer kernels are not always faster: small layers gain little, and what stands between them can
cost more than they save. A run gives its user no slower model than the one that it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from trtune.reports.record import Latency, Speedup
from trtune.run.speed.latency import Speed
from trtune.run.stages.engines import TUNED

INTEGER_MODEL: Final = "quantized"
PARTLY_MODEL: Final = "partly"
FLOAT_MODEL: Final = "fp32"


@dataclass(frozen=True, slots=True)
class Deployment:
    """The model to deploy, the nodes left in float for it, and what was timed; without `speedups`
    it was not decided by time.

    `latency` has what FP32 and the chosen model took beside each other, where that was measured
    once more for the choice.
    """

    model: Literal["quantized", "partly", "fp32"] = INTEGER_MODEL
    floats: tuple[str, ...] = ()
    speedups: Mapping[str, Speedup] = field(default_factory=dict)
    latency: Mapping[str, Latency] = field(default_factory=dict)


def by_speed(speed: Speed) -> Deployment:
    """The tuned model, unless it is slower than FP32 by more than its turns leave open.

    Of too few turns nothing is known, and nothing is said.
    """
    found = speed.speedups.get(TUNED)
    if found is None or found.low is None:
        return Deployment()
    return Deployment(
        FLOAT_MODEL if is_slower(found) else INTEGER_MODEL, (), {INTEGER_MODEL: found}
    )


def is_slower(found: Speedup) -> bool:
    """Whether it takes longer than FP32 with 95 % confidence.

    >>> is_slower(Speedup(median=0.9, low=0.8, high=0.95, turns=10))
    True
    >>> is_slower(Speedup(median=0.9, turns=2)), is_slower(Speedup(median=0.9, low=0.8, high=1.1))
    (False, False)
    """
    return found.high is not None and found.high < 1
