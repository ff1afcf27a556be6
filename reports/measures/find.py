"""Every measure by its name, and a user's own as `module:function` or `module:Class`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.configs.errors import ConfigError, did_you_mean
from trtune.configs.schema import Target
from trtune.datasets.code import load_function
from trtune.reports.measures.base import FunctionMean, OwnMeasure, metric_name
from trtune.reports.measures.classification import TopK
from trtune.reports.measures.detection import (
    THRESHOLDS,
    AveragePrecision,
    DetectionAgreement,
    Reading,
)
from trtune.reports.measures.fidelity import FIDELITY_METRICS
from trtune.reports.measures.segmentation import MeanIoU, PixelAgreement
from trtune.reports.measures.text import NextToken, Perplexity, TokenAgreement


@dataclass(frozen=True, slots=True)
class Asked:
    """What the config says about the target's metric beside its name.

    output: the output that is scored; None: the one that fits. decoder, score, iou: how detections
    are read; None: by the outputs' shapes, and the measure's own thresholds.
    """

    output: str | None = None
    decoder: str | None = None
    score: float | None = None
    iou: float | None = None

    @classmethod
    def of(cls, target: Target | None) -> Asked:
        """What a config's target says."""
        if target is None:
            return cls()
        return cls(target.output, target.decoder, target.score, target.iou)

    @property
    def reading(self) -> Reading:
        """How detections are read."""
        return Reading(self.decoder, self.score, self.iou, self.output)


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a built-in measure before it is made.

    task: classification, detection, segmentation or text; higher: more is better; labels: it needs
    them; fraction: its values lie between 0 and 1.
    """

    make: Callable[[Asked], Any]
    task: str
    higher: bool = True
    labels: bool = True
    fraction: bool = True


TASK_MEASURES: Mapping[str, About] = {
    "top1": About(lambda asked: TopK(1, asked.output), "classification"),
    "top5": About(lambda asked: TopK(5, asked.output), "classification"),
    "ap": About(lambda asked: AveragePrecision(THRESHOLDS, asked.reading, "ap"), "detection"),
    "ap50": About(
        lambda asked: AveragePrecision(THRESHOLDS[:1], asked.reading, "ap50"), "detection"
    ),
    "miou": About(lambda asked: MeanIoU(asked.output), "segmentation"),
    "perplexity": About(
        lambda asked: Perplexity(asked.output), "text", higher=False, labels=False, fraction=False
    ),
    "next_token": About(lambda asked: NextToken(asked.output), "text", labels=False),
    "detection_agreement": About(
        lambda asked: DetectionAgreement(asked.reading), "detection", labels=False
    ),
    "pixel_agreement": About(
        lambda asked: PixelAgreement(asked.output), "segmentation", labels=False
    ),
    "token_agreement": About(lambda asked: TokenAgreement(asked.output), "text", labels=False),
}
TOP1 = "top1"
METRICS = (*TASK_MEASURES, *FIDELITY_METRICS)


def find_metric(name: str, *, base_dir: Path | None = None) -> Any:
    """What `evaluate` takes as `metric`: `name` if it is in `METRICS`, or what it names.

    `module:function` and `file.py:Class` are looked for in `base_dir` first.

    Raises ConfigError for an unknown name, with the nearest one; DataError if the function cannot
    be imported.
    """
    if name in METRICS:
        return name
    if ":" in name:
        return load_function(name, base_dir)
    raise ConfigError(
        f"unknown metric {name!r}{did_you_mean(name, METRICS)} "
        f"(known: {', '.join(METRICS)}, or a function or class of yours as module:name)"
    )


def make_measure(metric: Any, asked: Asked) -> Any:
    """The measure for a task metric's name, a user's function, or a user's class.

    Raises ConfigError for a class without start, update and result.
    """
    if isinstance(metric, str):
        return TASK_MEASURES[metric].make(asked)
    if not inspect.isclass(metric):
        return FunctionMean(metric)
    missing = [m for m in ("start", "update", "result") if not callable(getattr(metric, m, None))]
    if missing:
        raise ConfigError(
            f"measure {metric_name(metric)} has no {', '.join(missing)}; a class needs start(), "
            "update(outputs, batch) and result()"
        )
    made: Any = metric()
    return OwnMeasure(made, metric_name(metric))


def higher_is_better(metric: Any) -> bool:
    """Whether more of a metric is better; a user's says so with `higher_is_better = False`."""
    if isinstance(metric, str):
        return TASK_MEASURES[metric].higher if metric in TASK_MEASURES else True
    return bool(getattr(metric, "higher_is_better", True))
