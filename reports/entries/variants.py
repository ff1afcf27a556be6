"""What a variant is worth and what its engine told of itself, as the record has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from trtune.precision.graph.file import Model
from trtune.precision.graph.proto import tensor_bytes
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import UNKNOWN, BuildInfo
from trtune.reports.accuracy import Evaluation
from trtune.reports.measures.find import TOP1

CONFIDENCE = 1.96
"""Standard errors to either side that hold 95 %."""


def interval_of(reached: float | None, error: float | None) -> tuple[float, float] | None:
    """Where a value lies with 95 % confidence, by its standard error."""
    if error is None or reached is None or not math.isfinite(reached):
        return None
    return reached - CONFIDENCE * error, reached + CONFIDENCE * error


def own_calibration(details: Mapping[str, Any] | None) -> list[str]:
    """How far TensorRT's own calibration is from the table, if it made one.

    >>> own_calibration({"calibrator": "minmax", "tensors": 3, "log2_ratios": {"a": 1.0, "b": 0}})
    ["TensorRT's own calibration (minmax) gave 3 scales; ours differ by a factor of 1.41 in the \
median and 2 at most (a)"]
    """
    ratios = (details or {}).get("log2_ratios")
    if not details or not ratios:
        return []
    apart = {tensor: abs(ratio) for tensor, ratio in ratios.items()}
    worst = max(apart, key=lambda tensor: apart[tensor])
    return [
        f"TensorRT's own calibration ({details['calibrator']}) gave {details['tensors']} scales; "
        f"ours differ by a factor of {2 ** median(apart.values()):.3g} in the median and "
        f"{2 ** apart[worst]:.3g} at most ({worst})"
    ]


def accounted(plan: PrecisionPlan, info: BuildInfo) -> dict[str, int]:
    """How many compute nodes run in each precision by the runtime's own account."""
    found = [info.precisions.get(name, UNKNOWN) for name in plan.compute_nodes]
    return {precision: found.count(precision) for precision in sorted(set(found))}


def fp32_bytes(model: Model, path: Path) -> int:
    """Size of the user's model at `path`, whose weights may lie in files beside it."""
    weights = sum(tensor_bytes(tensor) for tensor in model.proto.graph.initializer)
    return max(path.stat().st_size, weights)


def top1_of(found: Evaluation) -> float | None:
    """top-1 if that is what was counted."""
    return found.value if found.metric == TOP1 else None
