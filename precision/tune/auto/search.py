"""Method `auto`, from histograms to ranges: each alone, then whole tables, then in company."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import onnxruntime as ort

from trtune.calibrate.extents import Extent, measure
from trtune.calibrate.histogram import Histogram, quantile
from trtune.calibrate.methods import choose
from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress
from trtune.configs.values import PERCENTILE
from trtune.datasets.batches import Batch, BatchSource, batch_size, rebatch
from trtune.precision.compare.alone import Alone, held_tensors
from trtune.precision.compare.batches import exact_outputs, in_batches
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.placement import Edge, Placement, place, without_zero_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.tune.auto.company import Company
from trtune.precision.tune.auto.ranges import (
    USUAL,
    Choice,
    choose_by_output,
    pictures_within,
    ranges_within,
    trial_macs,
)
from trtune.precision.tune.auto.standing import Standing

log = logging.getLogger(__name__)

UNIFORM = ("entropy", "mse", "percentile", "max")
"""The methods that `auto` must not be behind of: each for all ranges is tried as a whole."""

OTHERS = 2
"""Pictures that tables are first compared on, by those that a range is chosen on."""

OTHERS_BYTES = 512 << 20
"""... of so many bytes at most, with the network's outputs."""

LIGHT = 256 << 20
"""Held-out pictures may be more than asked for while their tensors take no more bytes than this."""

PLENTY = 4
"""... but not more than this many times as many."""

BESIDE_AUTO = "mse"
READ, RUN_HELD = "read pictures", "run held-out pictures"
"""What progress is told before the first picture of a search is done."""

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Searching:
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


@contextmanager
def meanwhile(make: Callable[[], _Made], device: str) -> Iterator[Callable[[], _Made]]:
    """A function that gives what `make` makes: a GPU, which has room for it, makes it meanwhile."""
    if device == "cpu":
        yield make
        return
    with ThreadPoolExecutor(1, thread_name_prefix="auto") as pool:
        yield pool.submit(make).result


class SetApart:
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


def auto_ranges(searching: Searching, held_out: SetApart) -> dict[str, Choice]:
    """Method `auto`: each range alone, the best of that and of each method for all, then company.

    First every range by what it does alone (`choose_by_output`); of those ranges and the tables
    that `UNIFORM` give the one with the least error of the whole quantized network; from there
    every range once more with all the others quantized (`Company.round`), which is kept if it has
    less error. Both are decided on `held_out.others`, pictures that no range was chosen on, if
    there are any: what a search finds on a few pictures is too good there. They are as many as it
    takes to tell the tables apart (`standing.race`), so that what is found is not behind one method
    for all ranges.
    """
    histograms, progress, pictures = searching.histograms, searching.progress, searching.held
    assert held_out.alone is not None
    readers = _edges(held_out.placement, searching.roots)
    costs = trial_macs(searching.model, searching.view, readers, pictures[0])
    searched = ranges_within(costs, histograms, sum(map(len, pictures)))
    unsearched = {name: histograms[name] for name in readers if name not in searched}
    with meanwhile(partial(_company, searching, held_out), searching.device) as quantized:
        choices = choose_by_output(
            held_out.alone,
            histograms,
            {n: r for n, r in readers.items() if n in searched},
            progress=progress,
        ) | chosen_alike(unsearched, BESIDE_AUTO, PERCENTILE)
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


def _company(searching: Searching, held_out: SetApart) -> Company | None:
    """The quantized network on the held-out pictures, if anything in it is; its amaxes are to be
    given for each run."""
    reaching = chosen_alike(searching.ranged, "max", PERCENTILE)
    table = choices_table({t: reaching[root] for t, root in searching.roots.items()}, None)
    plan = without_zero_ranges(searching.view, searching.plan, table)
    ranges: dict[str, list[str]] = {}
    for tensor in place(searching.view, plan).activations:
        ranges.setdefault(searching.roots[tensor], []).append(tensor)
    if not ranges:
        return None
    company = Company(
        searching.model, plan, table, ranges, searching.held, held_out.references,
        device=searching.device,
    )  # fmt: skip
    if searching.device != "cpu":
        company.errors({}, range(1))  # a GPU's first run plans the convolutions
    return company


def _starts(
    choices: dict[str, Choice], histograms: Mapping[str, Histogram]
) -> dict[str, dict[str, Choice]]:
    """What a search in company may start from: `choices`, and one method for all ranges."""
    held = {name: histograms[name] for name in choices}
    found = {"each range alone": choices}
    for method in UNIFORM:
        alike = chosen_alike(held, method, PERCENTILE)
        found[method] = {n: c if choices[n].amax > 0 else choices[n] for n, c in alike.items()}
    return found


def _edges(
    placement: Placement, roots: Mapping[str, str]
) -> dict[str, dict[str, tuple[Edge, ...]]]:
    readers: dict[str, dict[str, tuple[Edge, ...]]] = {}
    for tensor, edges in placement.activations.items():
        readers.setdefault(roots[tensor], {})[tensor] = edges
    return readers


def range_limits(histogram: Histogram, amax: float) -> tuple[float, float]:
    """Where a range may go: from what most pictures reach, unless `amax` is below it, to the
    maximum."""
    return min(quantile(histogram.pictures.counts, USUAL), amax), max(histogram.maximum, amax)


def chosen_alike(
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
