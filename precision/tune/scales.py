"""From a model and its calibration pictures to the table: which tensors, which ranges, which amax.

Here the graph meets the histograms: tensors that moving operators connect share one range, and
method `auto` tries ranges on the network itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import onnxruntime as ort

from trtune.calibrate.collect import DEFAULT_MEMORY, collect
from trtune.calibrate.extents import Extent, measure
from trtune.calibrate.float8 import float8_amaxes, with_float8
from trtune.calibrate.histogram import Histogram, quantile
from trtune.calibrate.methods import better_methods, choose
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
from trtune.precision.compare.alone import Alone, held_tensors
from trtune.precision.compare.alone_float8 import choose_float8
from trtune.precision.compare.batches import exact_outputs, held_batches, in_batches
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.deploy import deploy_tensors
from trtune.precision.lower.implicit import implicit_tensors, in_cache_order, with_clamped
from trtune.precision.plan.placement import (
    Edge,
    Placement,
    is_move,
    place,
    served_by,
    shared_ranges,
)
from trtune.precision.plan.plan import RANGE, PrecisionPlan
from trtune.precision.tune.company import Company
from trtune.precision.tune.ranges import (
    USUAL,
    Choice,
    choose_by_output,
    pictures_within,
    ranges_within,
    trial_macs,
)
from trtune.precision.tune.standing import Standing

log = logging.getLogger(__name__)

AUTO_METHOD = "auto"
UNIFORM = ("entropy", "mse", "percentile", "max")
"""The methods that `auto` must not be behind of: each for all ranges is tried as a whole."""

OTHERS = 2
"""Pictures that tables are first compared on, by those that a range is chosen on."""

MOST_OTHERS = 256
"""Pictures, at most, that they are compared on."""

OTHERS_BYTES = 512 << 20
"""... of so many bytes at most, with the network's outputs."""

MOST_SHOWN = 3
LIGHT = 256 << 20
"""Held-out pictures may be more than asked for while their tensors take no more bytes than this."""

PLENTY = 4
"""... but not more than this many times as many."""

IMPLICIT = "implicit"
"""The lowering of weakly typed TensorRT 10: scales for every tensor, no Q/DQ."""
BESIDE_AUTO = "mse"
READ, RUN_HELD = "read pictures", "run held-out pictures"
"""What progress is told before the first picture of a search is done."""


_Made = TypeVar("_Made")
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
    chosen = _chosen_alike({t: histograms[t] for t in alone}, kind, percentile)
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
    lowerings = tuple(lowerings)
    started = time.perf_counter()
    tensors = carried_tensors(view, plan, lowerings)
    roots = shared_ranges(view, dict.fromkeys(tensors))
    names = list(dict.fromkeys(roots.values()))
    placement = with_deploy(view, plan, tensors)
    beside = implicit_only(view, plan, lowerings)
    moved = with_clamped(view, dict.fromkeys(tensors, 1.0))
    alone = [tensor for tensor in beside if tensor not in moved]
    wanted = list(dict.fromkeys([*names, *also]))
    held: tuple[Batch, ...] = ()
    others: tuple[Batch, ...] = ()
    extents: Mapping[str, Extent] = {}
    if method == AUTO_METHOD and names:
        progress(READ, 0, None)
        extents = held_extents(model, view, placement, source, also=[*wanted, *alone])
        count = enough_pictures(model, view, placement, source, holdout, extents=extents)
        beyond = _most_others(source, memory) if ranges is None else 0
        held, others = hold_out_more(source, count, beyond, part=1.0)
    seen = seen_pictures(source, held, batch_size(model.inputs, 1))
    batches = (
        held_batches(model, view, placement, held, memory=memory, extents=extents, device=device)
        if held
        else []
    )
    held_out = _HeldOut(model, view, placement, batches, others, device)
    searching = bool(batches) and ranges is None
    with _meanwhile(held_out.get_ready if searching else _nothing, device) as ready:
        found = collect(
            model.proto,
            wanted,
            seen,
            beside=[tensor for tensor in alone if tensor not in wanted],
            extents=extents,
            memory=memory,
            device=device,
            cluster=cluster,
            external_dir=model.external_dir,
            progress=progress,
        )
        search = time.perf_counter()
        if held:
            progress(RUN_HELD, 0, None)
        ready()
    counted = _Counted(
        model, view, plan, roots, found.histograms, batches, method, percentile, device, progress
    )
    choices = _choices(counted, held_out, ranges)
    table = choices_table({t: choices[root] for t, root in roots.items()}, provenance)
    if float8:
        amaxes = _float8_choices(counted)
        table = with_float8(table, {t: amaxes[r] for t, r in roots.items() if r in amaxes})
    if beside:
        more = _implicit_choices(view, alone, found.histograms, method, percentile)
        table = _whole(view, table, choices_table(more, None), beside)
    ended = time.perf_counter()
    took = ended - search if held else 0.0
    calibrated = Calibrated(
        table, found.histograms, found.pictures, found.passes, ended - started,
        found.inference_seconds, took,
    )  # fmt: skip
    for line in better_ranges(calibrated) if method != AUTO_METHOD else ():
        log.warning("%s", line)
    return calibrated


def _most_others(source: BatchSource, memory: int) -> int:
    """How many pictures tables are compared on, at most: `MOST_OTHERS`, or what takes no more than
    `OTHERS_BYTES` and a quarter of `memory`."""
    return min(MOST_OTHERS, max(fitting_pictures(source, min(OTHERS_BYTES, memory / 4)), 1))


@dataclass(frozen=True, slots=True)
class _Counted:
    """What ranges are chosen by: the histograms of those in `roots`, and held-out pictures, if any.

    `roots` maps each tensor that is quantized to its range.
    """

    model: Model
    view: GraphView
    plan: PrecisionPlan
    roots: Mapping[str, str]
    histograms: Mapping[str, Histogram]
    held: Sequence[Batch]
    method: str
    percentile: float
    device: str
    progress: Progress

    @property
    def ranged(self) -> dict[str, Histogram]:
        """The histogram of each range."""
        return {name: self.histograms[name] for name in dict.fromkeys(self.roots.values())}


def _nothing() -> None:
    """Where there is nothing to make."""


@contextmanager
def _meanwhile(make: Callable[[], _Made], device: str) -> Iterator[Callable[[], _Made]]:
    """A function that gives what `make` makes: a GPU, which has room for it, makes it meanwhile."""
    if device == "cpu":
        yield make
        return
    with ThreadPoolExecutor(1, thread_name_prefix="auto") as pool:
        yield pool.submit(make).result


class _HeldOut:
    """What method `auto` runs: activations of the `held` pictures, FP32 outputs of them and of
    `others`."""

    def __init__(
        self,
        model: Model,
        view: GraphView,
        placement: Placement,
        held: Sequence[Batch],
        others: Sequence[Batch],
        device: str,
    ) -> None:
        self.placement, self.held = placement, held
        self.others: Sequence[Batch] = in_batches(
            model, others, device=device, like=len(held[0]) if held else 0
        )
        self.alone: Alone | None = None
        self.references: list[list[Any]] = []
        self.exact: list[list[Any]] = []
        self._model, self._view, self._device = model, view, device

    def get_ready(self) -> None:
        """Make it all; but outputs of the others, which need no activations, when those are freed,
        unless the same session gives them."""
        alone = Alone(self._model, self._view, self.placement, self.held, device=self._device)
        alone.side_by_side(self.placement.activations)
        self.alone = alone
        self.references = [alone.reference(batch) for batch in range(alone.batches)]
        if alone.whole is not None:
            self._run_others(alone.whole)

    def free(self) -> None:
        """Let the activations go: they make room for those of the quantized network."""
        self.alone = None
        if not self.exact:
            self._run_others(None)

    def _run_others(self, session: ort.InferenceSession | None) -> None:
        if self.others:
            self.exact = exact_outputs(
                self._model, self.others, device=self._device, most=OTHERS_BYTES, session=session
            )
        self.others = self.others[: len(self.exact)]


def _choices(counted: _Counted, held_out: _HeldOut, ranges: Ranges | None) -> dict[str, Choice]:
    """The choice for each range: on held-out pictures where there are some, else by the method."""
    if not counted.held:
        return _chosen_alike(counted.ranged, counted.method, counted.percentile)
    if ranges is not None:
        return ranges(
            counted.view, counted.plan, held_out.placement, counted.roots, counted.held,
            counted.histograms,
        )  # fmt: skip
    return _auto_ranges(counted, held_out)


def _float8_choices(counted: _Counted) -> dict[str, float]:
    """The largest magnitude for FP8 of each range that does not take that of INT8."""
    if not counted.held:
        return float8_amaxes(counted.ranged, counted.method, percentile=counted.percentile)
    placement = place(counted.view, counted.plan)
    placed = {tensor: counted.roots[tensor] for tensor in placement.activations}
    return choose_float8(
        counted.model, counted.view, placement, placed, counted.held, counted.histograms,
        device=counted.device, progress=counted.progress,
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
    chosen = _chosen_alike(held, method, PERCENTILE)
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


def _auto_ranges(counted: _Counted, held_out: _HeldOut) -> dict[str, Choice]:
    """Method `auto`: each range alone, the best of that and of each method for all, then company.

    First every range by what it does alone (`choose_by_output`); of those ranges and the tables
    that `UNIFORM` give the one with the least error of the whole quantized network; from there
    every range once more with all the others quantized (`Company.round`), which is kept if it has
    less error. Both are decided on `held_out.others`, pictures that no range was chosen on, if
    there are any: what a search finds on a few pictures is too good there. They are as many as it
    takes to tell the tables apart (`standing.race`), so that what is found is not behind one method
    for all ranges.
    """
    histograms, progress, pictures = counted.histograms, counted.progress, counted.held
    assert held_out.alone is not None
    readers = _edges(held_out.placement, counted.roots)
    costs = trial_macs(counted.model, counted.view, readers, pictures[0])
    searched = ranges_within(costs, histograms, sum(map(len, pictures)))
    unsearched = {name: histograms[name] for name in readers if name not in searched}
    with _meanwhile(partial(_company, counted, held_out), counted.device) as quantized:
        choices = choose_by_output(
            held_out.alone,
            histograms,
            {n: r for n, r in readers.items() if n in searched},
            progress=progress,
        ) | _chosen_alike(unsearched, BESIDE_AUTO, PERCENTILE)
        progress(RUN_HELD, 0, None)
        held_out.free()
        company = quantized()
    if company is None:
        return choices
    judging = company
    if held_out.others:
        judging = company.on(held_out.others, held_out.exact, alike=True)
    standing = Standing(judging, OTHERS * sum(map(len, pictures)), progress)
    starts = _starts(choices, histograms)
    start = standing.best(starts)
    limits = {
        n: range_limits(histograms[n], starts[start][n].amax)
        for n in company.ranges
        if n in searched
    }
    found = company.round(starts[start], limits, progress=progress)
    finished = standing.best({start: starts[start], "in company": found})
    log.info("ranges: from %s, %s is kept", start, finished)
    return found if finished != start else starts[start]


def _company(counted: _Counted, held_out: _HeldOut) -> Company | None:
    """The quantized network on the held-out pictures, if anything in it is; its amaxes are to be
    given for each run."""
    reaching = _chosen_alike(counted.ranged, "max", PERCENTILE)
    table = choices_table({t: reaching[root] for t, root in counted.roots.items()}, None)
    plan = without_zero_ranges(counted.view, counted.plan, table)
    ranges: dict[str, list[str]] = {}
    for tensor in place(counted.view, plan).activations:
        ranges.setdefault(counted.roots[tensor], []).append(tensor)
    if not ranges:
        return None
    company = Company(
        counted.model, plan, table, ranges, counted.held, held_out.references,
        device=counted.device,
    )  # fmt: skip
    if counted.device != "cpu":
        company.errors({}, range(1))  # a GPU's first run plans the convolutions
    return company


def _starts(
    choices: dict[str, Choice], histograms: Mapping[str, Histogram]
) -> dict[str, dict[str, Choice]]:
    """What a search in company may start from: `choices`, and one method for all ranges."""
    held = {name: histograms[name] for name in choices}
    found = {"each range alone": choices}
    for method in UNIFORM:
        alike = _chosen_alike(held, method, PERCENTILE)
        found[method] = {n: c if choices[n].amax > 0 else choices[n] for n, c in alike.items()}
    return found


def range_limits(histogram: Histogram, amax: float) -> tuple[float, float]:
    """Where a range may go: from what most pictures reach, unless `amax` is below it, to the
    maximum."""
    return min(quantile(histogram.pictures.counts, USUAL), amax), max(histogram.maximum, amax)


def _chosen_alike(
    histograms: Mapping[str, Histogram], method: str, percentile: float
) -> dict[str, Choice]:
    """The same method for every range; nothing if there is none to choose for."""
    amaxes = choose(histograms, method, percentile=percentile) if histograms else {}
    return {name: Choice(amax, method, 0.0) for name, amax in amaxes.items()}


def choices_table(
    chosen: Mapping[str, Choice], provenance: Mapping[str, Any] | None
) -> CalibrationTable:
    """The table of these choices, with their methods and factors."""
    return CalibrationTable.from_amax(
        {tensor: choice.amax for tensor, choice in chosen.items()},
        methods={tensor: choice.method for tensor, choice in chosen.items()},
        provenance=provenance,
        factors={tensor: c.factor for tensor, c in chosen.items() if c.factor != 1},
    )


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


def _edges(
    placement: Placement, roots: Mapping[str, str]
) -> dict[str, dict[str, tuple[Edge, ...]]]:
    readers: dict[str, dict[str, tuple[Edge, ...]]] = {}
    for tensor, edges in placement.activations.items():
        readers.setdefault(roots[tensor], {})[tensor] = edges
    return readers


def held_extents(
    model: Model,
    view: GraphView,
    placement: Placement,
    source: BatchSource,
    *,
    also: Iterable[str] = (),
) -> dict[str, Extent]:
    """How large the tensors are that an `Alone` holds, and those in `also`; nothing where `source`
    is empty."""
    first = next((batch for batch in source if len(batch)), None)
    if first is None:
        return {}
    tensors = list(dict.fromkeys([*held_tensors(view, placement), *also]))
    return measure(model.proto, tensors, first, external_dir=model.external_dir)


def enough_pictures(
    model: Model,
    view: GraphView,
    placement: Placement,
    source: BatchSource,
    holdout: int,
    *,
    extents: Mapping[str, Extent],
) -> int:
    """`holdout`, or up to `PLENTY` times as many where the network is small (`LIGHT`).

    A few pictures decide much of the error of a small network, and there more cost little. Where a
    search would take too much, fewer (`ranges.SEARCH`). `extents` are those of `held_extents`.
    """
    size = batch_size(model.inputs, 1)
    first = next(iter(rebatch(source, size)), None)
    if first is None:
        return holdout
    each = max(sum(extents[tensor].bytes for tensor in held_tensors(view, placement)), 1)
    wanted = min(max(holdout, LIGHT // each), PLENTY * holdout)
    costs = trial_macs(model, view, {t: [t] for t in placement.activations}, first)
    found = pictures_within(costs, wanted)
    if found < holdout:
        log.warning(
            "calibration.holdout: ranges are searched on %d pictures instead of %d: one trial of "
            "each takes %.0f GMAC a picture",
            found, holdout, sum(costs.values()) / 1e9,
        )  # fmt: skip
    return found


def without_zero_ranges(
    view: GraphView, plan: PrecisionPlan, table: CalibrationTable
) -> PrecisionPlan:
    """`plan` less the nodes that read a tensor which was never anything but zero: no scale is right
    for it.

    A skip input is read in float instead: the convolution that it is added to is alive.
    """
    reasons: dict[str, str] = {}
    skips: list[Edge] = []
    for tensor, edges in place(view, plan).activations.items():
        if table.scales.get(tensor) != 0:
            continue
        for edge in edges:
            if plan.leader(edge[0]) != edge[0]:
                skips.append(edge)
            else:
                reason = f"its input {tensor!r} was zero in every calibration picture"
                reasons.update(dict.fromkeys(served_by(plan, edge), reason))
    return plan.without_int8(reasons, origin=RANGE).reading_float(skips)
