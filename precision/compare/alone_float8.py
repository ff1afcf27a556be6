"""Ranges for float8, chosen by what quantizing a tensor alone does to the output."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from trtune.calibrate.float8 import amax_float8, through_float8
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import amax_percentile
from trtune.calibrate.table import FLOAT8_MAX
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import Alone, Change, in_parallel
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.placement import Edge, Placement
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.output_groups import worst_output

log = logging.getLogger(__name__)

CLEARLY = 0.13
"""A smaller range than the maximum has to be better by so many decibels at the output."""


def choose_float8(
    model: Model,
    view: GraphView,
    placement: Placement,
    roots: Mapping[str, str],
    pictures: Sequence[Batch],
    histograms: Mapping[str, Histogram],
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, float]:
    """Method `auto` for float8: for each range the amax whose quantization hurts the output least.

    Tried are the maximum, the least square error, and the percentiles 99.99 and 99.9 where they
    differ by 10 % at least; a smaller one than the maximum has to be clearly better. `roots` maps
    each tensor of `placement` to its range, a key of `histograms`; nothing else is quantized.
    """
    alone = Alone(model, view, placement, pictures, device=device)
    readers: dict[str, dict[str, tuple[Edge, ...]]] = {}
    for tensor, edges in placement.activations.items():
        readers.setdefault(roots[tensor], {})[tensor] = edges
    names = [name for name in readers if histograms[name].maximum > 0]

    def best(name: str) -> float:
        losses = _losses(alone, readers[name], _candidates(histograms[name]))
        largest = max(losses)
        least = min(losses, key=lambda amax: (losses[amax], -amax))
        return least if losses[least] < losses[largest] - CLEARLY else largest

    found = in_parallel(best, names, what="choose float8 ranges", progress=progress)
    chosen = {name: histograms[name].maximum for name in readers}
    chosen.update(zip(names, found, strict=True))
    clipped = sum(chosen[name] < histograms[name].maximum for name in names)
    log.info("float8: %d of %d ranges end below the maximum", clipped, len(names))
    return chosen


def _candidates(histogram: Histogram) -> list[float]:
    """Amaxes that differ, the largest first."""
    found = [histogram.maximum]
    others = [amax_float8(histogram)]
    others += [amax_percentile(histogram, percentile=p) for p in (99.99, 99.9)]
    for amax in sorted(others, reverse=True):
        if 0 < amax < 0.9 * found[-1]:
            found.append(amax)
    return found


def _losses(
    alone: Alone, tensors: Mapping[str, tuple[Edge, ...]], amaxes: Sequence[float]
) -> dict[float, float]:
    """amax -> noise in dB of the output that suffers most, with all `tensors` in float8."""
    if len(amaxes) == 1:
        return {amaxes[0]: 0.0}
    run = alone.session(Change(tuple(edge for edges in tensors.values() for edge in edges)))
    found: dict[float, float] = {}
    for amax in amaxes:
        scale = float(np.float32(amax) / np.float32(FLOAT8_MAX))
        sums: dict[str, ErrorSums] = {}
        for batch in range(alone.batches):
            changed = {t: through_float8(alone.stored(batch, t), scale) for t in tensors}
            sums = alone.compared(sums, batch, run(batch, changed))
        found[amax] = -worst_output(sums).sqnr_db
    return found
