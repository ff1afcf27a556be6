"""Does the set-up make sense? Findings before anything takes long, from values alone.

A wrong set-up computes as well as a right one, and then "target met" means nothing: FP32 near
chance after the wrong preprocessing, the same pictures for calibration and evaluation, a black
picture, labels of other classes. Each question is a plain function; nothing here reads files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtune.datasets.batches import Batch
from trtune.reports.measures.find import TASK_MEASURES

_NEAR_CHANCE = 3.0
_LEAST_AP = 0.01
_LARGEST_INPUT = 1000.0
_FAR = 10.0


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something that does not make sense: a word for code, a sentence, and whether it stops."""

    what: str
    text: str
    stops: bool = False


def chance(metric: str, classes: int | None) -> float | None:
    """The value of guessing, where there is one.

    >>> chance("top1", 1000), chance("top5", 10), chance("ap", 80), chance("sqnr_db", None)
    (0.001, 0.5, 0.01, None)
    """
    if metric in ("ap", "ap50"):
        return _LEAST_AP
    if metric in ("top1", "top5") and classes:
        return min(1.0, (1 if metric == "top1" else 5) / classes)
    if metric == "miou" and classes:
        return 1 / (2 * classes)
    return None


def near_chance(
    metric: str | None, value: float | None, classes: int | None, samples: int
) -> list[Oddity]:
    """A finding that stops, if the FP32 model's value is hardly better than guessing.

    Below chance and three of its standard errors, or not a number. With so few samples that even
    a right model could be there, it does not stop.
    """
    if metric is None or value is None or metric not in TASK_MEASURES:
        return []
    guess = chance(metric, classes)
    if math.isnan(value):
        return [Oddity("no_value", f"the FP32 model has no {metric}: nothing to count", True)]
    if guess is None:
        return []
    spread = _NEAR_CHANCE * math.sqrt(guess * (1 - guess) / max(samples, 1))
    if value > guess + (0 if metric in ("ap", "ap50") else spread):
        return []
    text = (
        f"the FP32 model's {metric} is {100 * value:.2f} %, where guessing gives {100 * guess:.2g}"
        f" % (on {samples} samples): the preprocessing or the labels do not belong to this model. "
        "Look at preprocess (RGB or BGR, scale, mean, resize or letterbox), label_offset and "
        "classes; `trtune init MODEL --data FOLDER` tries the usual ones. `--force` goes on"
    )
    return [Oddity("near_chance", text, samples >= 20 or guess < 0.2)]


def threshold_below_zero(metric: str, threshold: float | None) -> list[Oddity]:
    """A finding that stops, if the target asks for less than nothing."""
    if threshold is None or threshold >= 0 or metric not in TASK_MEASURES:
        return []
    return [Oddity(
        "negative_threshold",
        f"the target allows {metric} to fall to {threshold:.4g}, below 0: any model meets that; "
        "the FP32 model's own value is less than max_drop", True,
    )]  # fmt: skip


def same_pictures(
    earlier: Sequence[str],
    later: Sequence[str],
    *,
    first: str = "data.calibration",
    second: str = "data.evaluation",
) -> list[Oddity]:
    """A finding, if two sections of the data share items (their hashes, or their names).

    `first` and `second` are what the sections are called.
    """
    shared = len(set(earlier) & set(later))
    if not shared:
        return []
    return [Oddity(
        "same_pictures",
        f"{shared} of {len(set(later))} samples of {second} are in {first} too: what is measured "
        f"on them is on the bright side; give {second} others (skip, or another path)",
    )]  # fmt: skip


def odd_inputs(batches: Sequence[Batch]) -> list[Oddity]:
    """Findings about what is fed: constant samples, and values far from what networks expect.

    Networks are trained on inputs of about -10 to 10, on bytes, or on whole numbers (tokens); a
    float input beyond 1000 in magnitude hints at a missing scale.
    """
    found: list[Oddity] = []
    flat: list[str] = []
    count, largest = 0, 0.0
    for batch in batches:
        rows = [
            np.moveaxis(array, axis, 0).reshape(len(batch), -1)
            for name, array in batch.feeds.items()
            if (axis := batch.axis(name)) is not None
            and array.dtype.kind in "fiu" and array[:1].size > 16
        ]  # fmt: skip
        if not rows:
            continue
        even = np.all([row.max(axis=1) == row.min(axis=1) for row in rows], axis=0)
        flat += [batch.items[place] for place in np.flatnonzero(even)]
        count += len(batch)
        floats = [np.abs(row).max() for row in rows if row.dtype.kind == "f"]
        largest = max([largest, *map(float, floats)])
    if flat:
        whole = len(flat) == count
        names = ", ".join(flat[:3]) + (", ..." if len(flat) > 3 else "")
        text = f"{len(flat)} of {count} samples are constant ({names}), black pictures say"
        found.append(Oddity("constant_inputs", text, stops=whole))
    if largest > _LARGEST_INPUT:
        found.append(Oddity(
            "large_inputs",
            f"inputs reach {largest:.4g} in magnitude; is preprocess.scale right?",
        ))  # fmt: skip
    return found


def unlike_range(batches: Sequence[Batch], expected: Mapping[str, float]) -> list[Oddity]:
    """A finding for each input whose largest magnitude is not within ten times of `expected`.

    `expected` maps input name -> amax, as a calibration cache or a quantized model has it: pixels
    of 0 to 255 for a model made for 0 to 1 show here, and the other way round.
    """
    found = []
    for name, amax in expected.items():
        arrays = [batch.feeds[name] for batch in batches if name in batch.feeds]
        most = max((float(np.abs(a).max()) for a in arrays if a.size), default=0.0)
        if not 0 < amax < math.inf or most <= 0 or amax / _FAR <= most <= amax * _FAR:
            continue
        found.append(Oddity(
            "unlike_range",
            f"input {name!r} reaches {most:.4g} in magnitude, and {amax:.4g} where its scale was "
            "made; is preprocess.scale right?",
        ))  # fmt: skip
    return found


def unlike_classes(found: int | None, classes: int | None) -> list[Oddity]:
    """A finding that stops, if names counted in sorted order are not as many as `classes`.

    Their places are then not those of the model's. `found` None: the indices were given.
    """
    if not found or not classes or found == classes:
        return []
    return [Oddity(
        "unlike_classes",
        f"the data has {found} classes, counted in the order of their names, and the model "
        f"{classes}: say which of the model's they are with `classes` (a list of the model's "
        "classes in its order, or a file with one a line)", True,
    )]  # fmt: skip
