"""From a model and its calibration pictures to the table: which tensors, which ranges, which amax.

Here the graph meets the histograms: tensors that moving operators connect share one range, and
method `auto` tries ranges on the network itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trtune.calibrate.collect import DEFAULT_MEMORY, collect, measure
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import choose
from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource, batch_size, fit_batch
from trtune.datasets.holdout import WholeBatches, Without, hold_out, join
from trtune.precision.auto import Choice, choose_by_output
from trtune.precision.deploy import deploy_tensors
from trtune.precision.graph import GraphView, Model
from trtune.precision.placement import Edge, Placement, place, shared_ranges
from trtune.precision.plan import PrecisionPlan
from trtune.precision.sensitivity import Alone

log = logging.getLogger(__name__)

AUTO = "auto"
PICTURES_AT_ONCE = 4
"""Held-out pictures a batch: small, so that several tensors are tried at a time."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A table, the histograms of its ranges, and what it cost.

    `seconds` is everything, `search_seconds` the part of method `auto`.
    """

    table: CalibrationTable
    histograms: Mapping[str, Histogram]
    pictures: int
    passes: int
    seconds: float
    inference_seconds: float
    search_seconds: float


def carried_tensors(view: GraphView, plan: PrecisionPlan, lowerings: Iterable[str]) -> list[str]:
    """The tensors that need a scale for `plan` in any of `lowerings`, in graph order."""
    if "deploy" in lowerings:
        return list(deploy_tensors(view, plan))
    return list(place(view, plan).activations)


def calibrate_model(
    model: Model,
    view: GraphView,
    plan: PrecisionPlan,
    source: BatchSource,
    *,
    lowerings: Iterable[str] = ("emulate",),
    method: str = "entropy",
    percentile: float = 99.99,
    holdout: int = 24,
    memory: int = DEFAULT_MEMORY,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Scales for every tensor that `plan` quantizes, from one pass over `source`.

    `method` is a key of `AMAX_METHODS` or `auto`, which holds out `holdout` pictures, takes the
    histograms from the others, and chooses for each range the amax that hurts the output least on
    the held-out ones.
    """
    started = time.perf_counter()
    tensors = carried_tensors(view, plan, lowerings)
    roots = shared_ranges(view, set(tensors))
    ranges = list(dict.fromkeys(roots[tensor] for tensor in tensors))
    held = hold_out(source, holdout) if method == AUTO and ranges else ()
    seen = Without(source, frozenset(b.items[0] for b in held)) if held else source
    seen = source if held and seen.count == 0 else seen  # a single picture has to do for both
    fixed = batch_size(model.inputs, 1)
    seen = WholeBatches(seen, fixed) if fixed > 1 else seen
    found = collect(
        model.proto, ranges, seen, memory=memory, external_dir=model.external_dir, progress=progress
    )
    search = time.perf_counter()
    if method == AUTO:
        placement = with_deploy(view, plan, tensors)
        alone = alone_on(model, view, placement, held, memory=memory)
        choices = choose_by_output(
            alone, found.histograms, _readers(placement, roots), progress=progress
        )
    else:
        amaxes = choose(found.histograms, method, percentile=percentile)
        choices = {name: Choice(amax, method, 0.0) for name, amax in amaxes.items()}
    table = CalibrationTable.from_amax(
        {tensor: choices[roots[tensor]].amax for tensor in tensors},
        methods={tensor: choices[roots[tensor]].method for tensor in tensors},
        provenance=provenance,
    )
    finished = time.perf_counter()
    return Calibrated(
        table,
        found.histograms,
        found.pictures,
        found.passes,
        finished - started,
        found.inference_seconds,
        finished - search if method == AUTO else 0.0,
    )


def with_deploy(view: GraphView, plan: PrecisionPlan, tensors: Iterable[str]) -> Placement:
    """The placement of `plan` and of those `tensors` that only `deploy` quantizes.

    The latter are read quantized by everything that reads them.
    """
    placement = place(view, plan)
    edges: dict[str, tuple[Edge, ...]] = {}
    for tensor in tensors:
        readers = tuple(
            edge
            for edge in view.consumers.get(tensor, ())
            if edge[1] < len(view.by_name[edge[0]].input)
        )
        edges[tensor] = placement.activations.get(tensor) or readers
    return Placement(edges, placement.weights)


def _readers(
    placement: Placement, roots: Mapping[str, str]
) -> dict[str, dict[str, tuple[Edge, ...]]]:
    readers: dict[str, dict[str, tuple[Edge, ...]]] = {}
    for tensor, edges in placement.activations.items():
        readers.setdefault(roots[tensor], {})[tensor] = edges
    return readers


def alone_on(
    model: Model,
    view: GraphView,
    placement: Placement,
    pictures: tuple[Batch, ...],
    *,
    memory: int,
) -> Alone:
    """An `Alone` on as many of `pictures` as keep its stored activations within `memory` bytes."""
    size = batch_size(model.inputs, PICTURES_AT_ONCE)
    batches = join(pictures, size)
    batches[-1] = fit_batch(batches[-1], batch_size(model.inputs, len(batches[-1])))
    extents = measure(
        model.proto, list(placement.activations), batches[0], external_dir=model.external_dir
    )
    each = max(sum(extent.bytes for extent in extents.values()), 1) * len(batches[0])
    count = max(1, min(len(batches), memory // each))
    if count < len(batches):
        log.info("%d of %d held-out batches, to stay within %d bytes", count, len(batches), memory)
    return Alone(model, view, placement, batches[:count])


def without_zero_ranges(
    view: GraphView, plan: PrecisionPlan, table: CalibrationTable
) -> PrecisionPlan:
    """`plan` less the nodes whose input was never anything but zero: no scale is right for them."""
    changed = dict(plan.nodes)
    for tensor, edges in place(view, plan).activations.items():
        if tensor in table.scales and table.scales[tensor] == 0:
            for name, _ in edges:
                if plan.is_int8(name):
                    reason = f"its input {tensor!r} was zero in every calibration picture"
                    changed[name] = replace(changed[name], precision=plan.fallback, reason=reason)
    return replace(plan, nodes=changed)
