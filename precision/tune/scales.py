"""From a model and its calibration pictures to the table: which tensors, which ranges, which amax.

Here the graph meets the histograms: tensors that moving operators connect share one range, and
method `auto` tries ranges on the network itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from trtune.calibrate.collect import DEFAULT_MEMORY, collect
from trtune.calibrate.extents import Extent
from trtune.calibrate.float8 import float8_amaxes, with_float8
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import better_methods
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import DataError
from trtune.configs.progress import Progress, silent
from trtune.configs.system.cluster import Cluster
from trtune.configs.values import HELD_OUT, PERCENTILE
from trtune.datasets.batches import Batch, BatchSource, batch_size, rebatch
from trtune.datasets.holdout import (
    WholeBatches,
    Without,
    fitting_pictures,
    hold_out_more,
)
from trtune.precision.compare.alone_float8 import choose_float8
from trtune.precision.compare.batches import held_batches
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.deploy import deploy_tensors
from trtune.precision.lower.implicit import implicit_tensors, in_cache_order, with_clamped
from trtune.precision.plan.placement import (
    Edge,
    Placement,
    is_move,
    place,
    shared_ranges,
)
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.tune.auto.ranges import Choice
from trtune.precision.tune.auto.search import (
    BESIDE_AUTO,
    OTHERS_BYTES,
    READ,
    RUN_HELD,
    Searching,
    SetApart,
    auto_ranges,
    choices_table,
    chosen_alike,
    enough_pictures,
    held_extents,
    meanwhile,
)

log = logging.getLogger(__name__)

AUTO_METHOD = "auto"


MOST_OTHERS = 256
"""Pictures, at most, that they are compared on."""


MOST_SHOWN = 3


IMPLICIT = "implicit"
"""The lowering of weakly typed TensorRT 10: scales for every tensor, no Q/DQ."""


Ranges = Callable[
    [
        GraphView,
        PrecisionPlan,
        Placement,
        Mapping[str, str],
        Sequence[Batch],
        Mapping[str, Histogram],
    ],
    dict[str, Choice],
]
"""The view, plan, placement, roots, held-out pictures and histograms of `auto_ranges`."""


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


def implicit_only(view: GraphView, plan: PrecisionPlan, lowerings: Iterable[str]) -> list[str]:
    """The tensors whose scales TensorRT 10 alone asks for, in graph order; none unless `implicit`
    is among `lowerings`.

    No Q/DQ model has them: they stand in the cache.
    """
    names = tuple(lowerings)
    if IMPLICIT not in names:
        return []
    carried = set(carried_tensors(view, plan, names))
    return [tensor for tensor in implicit_tensors(view, plan) if tensor not in carried]


def _implicit_choices(
    view: GraphView,
    alone: Iterable[str],
    histograms: Mapping[str, Histogram],
    method: str,
    percentile: float,
) -> dict[str, Choice]:
    """Ranges of what nothing reads quantized in a Q/DQ model.

    There is no output to judge them by, so `auto` takes the least square error. As TensorRT does,
    what an operator only moves has the range of what it gives.
    """
    kind = BESIDE_AUTO if method == AUTO_METHOD else method
    chosen = chosen_alike({t: histograms[t] for t in alone}, kind, percentile)
    found = {tensor: c for tensor, c in chosen.items() if math.isfinite(c.amax)}
    for node in reversed(view.nodes):
        if node.op_type != "Concat" and node.output[0] in found:
            for index, tensor in enumerate(node.input):
                if tensor in found and is_move(node, index):
                    found[tensor] = found[node.output[0]]
    return found


def calibrate_model(
    model: Model,
    view: GraphView,
    plan: PrecisionPlan,
    source: BatchSource,
    *,
    lowerings: Iterable[str] = ("emulate",),
    method: str = AUTO_METHOD,
    percentile: float = PERCENTILE,
    holdout: int = HELD_OUT,
    memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
    cluster: Cluster | None = None,
    also: Sequence[str] = (),
    ranges: Ranges | None = None,
    float8: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Scales for every tensor that `plan` quantizes, from one pass over `source`.

    `method` is a key of `AMAX_METHODS`, or `auto`: histograms of all but `holdout` pictures, and
    `auto_ranges` on those, or `ranges` in its place. Histograms are made of the tensors `also` too,
    in the same pass. With `implicit` among `lowerings` the table also holds what TensorRT 10 alone
    asks for; all other entries stay as they are. With `float8` it has scales for that too, where
    those of int8 do not serve. `device` is where the network runs, and a `cluster` makes the
    histograms. Raises DataError for too few pictures.
    """
    started = time.perf_counter()
    tensors = _Tensors.of(view, plan, tuple(lowerings), also)
    held: tuple[Batch, ...] = ()
    others: tuple[Batch, ...] = ()
    extents: Mapping[str, Extent] = {}
    if method == AUTO_METHOD and tensors.roots:
        progress(READ, 0, None)
        extents = held_extents(model, view, tensors.placement, source, also=tensors.counted)
        count = enough_pictures(model, view, tensors.placement, source, holdout, extents=extents)
        beyond = _most_others(source, memory) if ranges is None else 0
        held, others = hold_out_more(source, count, beyond, part=1.0)
    batches = (
        held_batches(
            model, view, tensors.placement, held, memory=memory, extents=extents, device=device
        )
        if held
        else []
    )
    held_out = SetApart(model, view, tensors.placement, batches, others, device)
    with meanwhile(held_out.get_ready if batches and not ranges else _nothing, device) as ready:
        found = collect(
            model.proto,
            tensors.wanted,
            seen_pictures(source, held, batch_size(model.inputs, 1)),
            beside=[tensor for tensor in tensors.alone if tensor not in tensors.wanted],
            extents=extents,
            memory=memory,
            device=device,
            cluster=cluster,
            external_dir=model.external_dir,
            progress=progress,
        )
        counted = time.perf_counter()
        if held:
            progress(RUN_HELD, 0, None)
        ready()
    searching = Searching(
        model, view, plan, tensors.roots, found.histograms, batches, method, percentile, device,
        progress,
    )  # fmt: skip
    choices = _choices(searching, held_out, ranges)
    table = _table(searching, tensors, choices, provenance, float8=float8)
    ended = time.perf_counter()
    calibrated = Calibrated(
        table, found.histograms, found.pictures, found.passes, ended - started,
        found.inference_seconds, ended - counted if held else 0.0,
    )  # fmt: skip
    for line in better_ranges(calibrated) if method != AUTO_METHOD else ():
        log.warning("%s", line)
    return calibrated


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a calibration is of: `roots` maps each tensor that is quantized to its range, `wanted`
    are the ranges and what else gets a histogram, `beside` is what TensorRT 10 alone asks for, and
    `alone` the part of it that is not moved from a quantized one.
    """

    roots: Mapping[str, str]
    placement: Placement
    wanted: Sequence[str]
    beside: Sequence[str]
    alone: Sequence[str]

    @classmethod
    def of(
        cls, view: GraphView, plan: PrecisionPlan, lowerings: Sequence[str], also: Sequence[str]
    ) -> _Tensors:
        tensors = carried_tensors(view, plan, lowerings)
        roots = shared_ranges(view, dict.fromkeys(tensors))
        beside = implicit_only(view, plan, lowerings)
        moved = with_clamped(view, dict.fromkeys(tensors, 1.0))
        return cls(
            roots,
            with_deploy(view, plan, tensors),
            list(dict.fromkeys([*roots.values(), *also])),
            beside,
            [tensor for tensor in beside if tensor not in moved],
        )

    @property
    def counted(self) -> list[str]:
        """All that get a histogram."""
        return [*self.wanted, *self.alone]


def _table(
    searching: Searching,
    tensors: _Tensors,
    choices: Mapping[str, Choice],
    provenance: Mapping[str, Any] | None,
    *,
    float8: bool,
) -> CalibrationTable:
    """The table of `choices`, with scales for FP8 and for what TensorRT 10 asks for, if wanted."""
    roots, view = tensors.roots, searching.view
    table = choices_table({t: choices[root] for t, root in roots.items()}, provenance)
    if float8:
        amaxes = _float8_choices(searching)
        table = with_float8(table, {t: amaxes[r] for t, r in roots.items() if r in amaxes})
    if tensors.beside:
        more = _implicit_choices(
            view, tensors.alone, searching.histograms, searching.method, searching.percentile
        )
        table = _whole(view, table, choices_table(more, None), tensors.beside)
    return table


def _most_others(source: BatchSource, memory: int) -> int:
    """How many pictures tables are compared on, at most: `MOST_OTHERS`, or what takes no more than
    `OTHERS_BYTES` and a quarter of `memory`."""
    return min(MOST_OTHERS, max(fitting_pictures(source, min(OTHERS_BYTES, memory / 4)), 1))


def _nothing() -> None:
    """Where there is nothing to make."""


def _choices(searching: Searching, held_out: SetApart, ranges: Ranges | None) -> dict[str, Choice]:
    """The choice for each range: on held-out pictures where there are some, else by the method."""
    if not searching.held:
        return chosen_alike(searching.ranged, searching.method, searching.percentile)
    if ranges is not None:
        return ranges(
            searching.view, searching.plan, held_out.placement, searching.roots, searching.held,
            searching.histograms,
        )  # fmt: skip
    return auto_ranges(searching, held_out)


def _float8_choices(searching: Searching) -> dict[str, float]:
    """The largest magnitude for FP8 of each range that does not take that of INT8."""
    if not searching.held:
        return float8_amaxes(searching.ranged, searching.method, percentile=searching.percentile)
    placement = place(searching.view, searching.plan)
    placed = {tensor: searching.roots[tensor] for tensor in placement.activations}
    return choose_float8(
        searching.model, searching.view, placement, placed, searching.held, searching.histograms,
        device=searching.device, progress=searching.progress,
    )  # fmt: skip


def _whole(
    view: GraphView, table: CalibrationTable, more: CalibrationTable, beside: Iterable[str]
) -> CalibrationTable:
    """`table`, unchanged, and beside it `more` and what is moved from one of both."""
    moved = with_clamped(view, {**more.scales, **table.scales})
    scales = {**{t: moved[t] for t in beside if t in moved}, **table.scales}
    common = Counter(table.methods.values()).most_common(1)
    methods = dict.fromkeys(scales, common[0][0] if common else "") | dict(more.methods)
    return replace(
        table,
        scales=in_cache_order(view, scales),
        methods={t: {**methods, **table.methods}[t] for t in scales},
    )


def ranged_alike(
    calibrated: Calibrated,
    view: GraphView,
    plan: PrecisionPlan,
    lowerings: Iterable[str],
    method: str = BESIDE_AUTO,
) -> Calibrated:
    """The same histograms with `method`, a key of `AMAX_METHODS`, for every range of int8."""
    tensors = carried_tensors(view, plan, tuple(lowerings))
    roots = shared_ranges(view, dict.fromkeys(tensors))
    held = {root: calibrated.histograms[root] for root in dict.fromkeys(roots.values())}
    chosen = chosen_alike(held, method, PERCENTILE)
    fresh = choices_table({tensor: chosen[root] for tensor, root in roots.items()}, None)
    table = replace(
        calibrated.table,
        scales={**calibrated.table.scales, **fresh.scales},
        methods={**calibrated.table.methods, **fresh.methods},
        factors={t: f for t, f in calibrated.table.factors.items() if t not in fresh.scales},
    )
    return replace(calibrated, table=table)


def better_ranges(calibrated: Calibrated) -> list[str]:
    """What one method for all lost, in words: nothing where none or few decibels are lost.

    See `methods.better_methods`: by the tensors themselves, not by the output.
    """
    scales = calibrated.table.scales
    amaxes = {t: calibrated.table.amax(t) for t in calibrated.histograms if t in scales}
    better = better_methods(calibrated.histograms, amaxes)
    if not better:
        return []
    most = ", ".join(f"{b.tensor!r} ({b.method} {b.gain_db:+.1f} dB)" for b in better[:MOST_SHOWN])
    return [
        f"{len(better)} of {len(amaxes)} ranges lose 3 dB and more against another method, "
        f"most of all {most}; method auto chooses for each"
    ]


def seen_pictures(source: BatchSource, held: Sequence[Batch], fixed: int) -> BatchSource:
    """What the histograms are made of: `source` less the pictures `held` out, in whole batches.

    Where those would be too few for one batch of `fixed`, which the model takes, all are seen.
    Raises DataError if even they are too few.
    """
    others = Without(source, frozenset(item for batch in held for item in batch.items))
    seen = others if held and _has_batch(others, fixed) else source
    if fixed == 1:
        return seen
    if not _has_batch(seen, fixed):
        raise DataError(
            f"the model takes {fixed} pictures at a time, and the calibration data has fewer: "
            "give more, or export the model with a free batch dimension"
        )
    return WholeBatches(seen, fixed)


def _has_batch(source: BatchSource, size: int) -> bool:
    return any(len(batch) == size for batch in islice(rebatch(source, size), 1))


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
