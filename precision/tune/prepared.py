"""A model prepared for quantization: moves tried together, and kept if pictures that nothing was
chosen on show that they help.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trtune.calibrate.collect import DEFAULT_MEMORY
from trtune.configs.progress import Progress, silent
from trtune.configs.values import HELD_OUT, PERCENTILE
from trtune.datasets.batches import Batch, BatchSource
from trtune.datasets.holdout import Without, fitting_pictures, hold_out_more
from trtune.precision.compare.alone import Alone
from trtune.precision.compare.batches import exact_outputs, held_batches, in_batches
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.half_ranges import tensors_for_ranges
from trtune.precision.plan.placement import place, without_zero_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.prepare.codes import with_codes
from trtune.precision.prepare.values import (
    ALL_MOVES,
    CORRECT,
    ROUND_CODES,
    SCALE_CHANNELS,
    SHIFT_ALL,
    Codes,
    Moved,
    Prepared,
)
from trtune.precision.runtime.session import ahead, make_session, threads_each
from trtune.precision.tune.again import Again
from trtune.precision.tune.auto.company import Errors
from trtune.precision.tune.auto.search import (
    BESIDE_AUTO,
    READ,
    RUN_HELD,
    enough_pictures,
    held_extents,
)
from trtune.precision.tune.auto.standing import race_of_gains
from trtune.precision.tune.judge import Judge, counted_outputs, level
from trtune.precision.tune.moments import observed, rounded_codes_of, rounded_weights
from trtune.precision.tune.preparing import (
    Chooser,
    Move,
    apply_moves,
    channel_tensors,
    extended_plan,
    reaches,
)
from trtune.precision.tune.scales import (
    AUTO_METHOD,
    Calibrated,
    Ranges,
    calibrate_model,
    ranged_alike,
)

log = logging.getLogger(__name__)

AUTO_MOVES = ALL_MOVES
"""What is tried by default. A shift needs the bias correction: what codes do to a mean that the
shift has made large is worse than what it saves."""

JUDGED = 2
"""Pictures that judge what was chosen, at least, by those that it was chosen on."""

MOST_JUDGED = 320
HELD_BYTES = 256 << 20
"""More of them judge where the pictures take no more bytes than this, up to `MOST_JUDGED`."""

APART = 0.7
"""The part of all pictures that choose and judge; the others are what rounding is fitted to."""

BEHIND = 1.0
"""One method for all ranges is tried to the end unless it is this many decibels behind."""

FIRST_JUDGED = 32
"""Pictures that all variants are judged on; the others only while it is not certain yet."""

FEWEST = 8
"""Held-out pictures, at least, to choose and to judge by."""


@dataclass(frozen=True, slots=True)
class MoveCosts:
    """The tensors whose rewrites were dropped, with what they cost; the kernels of the engines
    without any rewrite and with those that are left, 0 where none stays as a node; why nothing
    could be told, if so."""

    dropped: Mapping[str, str] = field(default_factory=dict)
    kernels: tuple[int, int] = (0, 0)
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A prepared model with its plan and table, which replace those it was made from.

    `plan` holds the nodes that were added too. `tried` maps each set of moves that was tried to
    the error of the worst output, and to the likely gain over none (`judge.Improvement`) with its
    standard error, in decibels averaged over the outputs. `costs` is what a compiler says of
    the rewrites, if it was asked.
    """

    prepared: Prepared
    plan: PrecisionPlan
    calibrated: Calibrated
    tried: Mapping[str, tuple[float, float, float]]
    moves: tuple[Move, ...] = ()
    costs: MoveCosts = field(default_factory=MoveCosts)

    def model_for(self, plan: PrecisionPlan) -> Model:
        """The model to lower for `plan`: the weights of its int8 nodes carry their codes."""
        return with_codes(self.prepared.model, plan, self.prepared.codes)


@dataclass(frozen=True, slots=True)
class _Variant:
    name: str
    model: Model
    plan: PrecisionPlan
    calibrated: Calibrated
    moved: tuple[Moved, ...] = ()
    moves: tuple[Move, ...] = ()
    codes: Mapping[str, Codes] | None = None


def prepare_model(
    model: Model,
    view: GraphView,
    plan: PrecisionPlan,
    source: BatchSource,
    base: Calibrated,
    *,
    moves: Sequence[str] | None = None,
    leave: Collection[str] = (),
    lowerings: Iterable[str] = ("emulate",),
    method: str = AUTO_METHOD,
    percentile: float = PERCENTILE,
    holdout: int = HELD_OUT,
    memory: int = DEFAULT_MEMORY,
    halves: bool = False,
    device: str = "cpu",
    float8: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Ready:
    """`model` prepared as calibration pictures show that it quantizes best.

    `base` is its calibration without any move. Each tensor's scale and shift is chosen on
    `holdout` pictures (those of method auto); the moves together, and rounding, are judged on
    others, twice as many or more, of which only histograms know. With `moves` None a move is kept
    only if those show a gain beyond its noise; otherwise exactly `moves` are made, still with what
    is best for each tensor. Channels of the tensors in `leave` stay as they are. `device` is where
    the network runs.
    """
    kinds = AUTO_MOVES if moves is None else tuple(moves)
    start = _Variant("none", model, without_zero_ranges(view, plan, base.table), base)
    if not start.plan.int8_nodes or not kinds:
        return Ready(Prepared(model), plan, base, {})
    progress(READ, 0, None)
    placement = place(view, start.plan)
    extents = held_extents(model, view, placement, source)
    count = enough_pictures(model, view, placement, source, holdout, extents=extents)
    chosen_on, judged_on = hold_out_more(source, count, _judged(source, count), part=APART)
    found, seen = chosen_on + judged_on, source
    if len(found) >= FEWEST and judged_on:
        seen = Without(source, frozenset(i for b in found for i in b.items))
    elif moves is None:
        log.info("not prepared: %d pictures to judge by are too few", len(found))
        return Ready(Prepared(model), plan, base, {})
    else:
        chosen_on = judged_on = found
    job = _Job(
        view, kinds, leave=frozenset(leave), lowerings=tuple(lowerings), method=method,
        percentile=percentile, holdout=holdout, memory=memory, halves=halves, float8=float8,
        device=device, provenance=provenance, progress=progress,
    )  # fmt: skip
    variants = _variants(start, job, source, seen, chosen_on)
    progress("judge moves", 0, len(variants))
    judged = _Judged(model, judged_on, device)
    best, tried = _best(variants, judged, forced=moves is not None, progress=progress)
    gained = tried[best.name][1] if math.isfinite(tried[best.name][1]) else 0.0
    log.info("prepared with %s (%+.1f dB); tried: %s", best.name, gained, tried)
    result = Prepared(best.model, best.codes or {}, best.moved, gained)
    whole = plan if best.model is model else extended_plan(plan, GraphView.of(best.model))
    return Ready(result, whole, best.calibrated, tried, best.moves)


def _judged(source: BatchSource, count: int) -> int:
    """How many pictures are to judge what `count` others chose."""
    return max(JUDGED * count, min(fitting_pictures(source, HELD_BYTES), MOST_JUDGED))


@dataclass(frozen=True, slots=True)
class _Job:
    """How variants are made: what `prepare_model` was asked for."""

    view: GraphView
    kinds: Sequence[str]
    leave: frozenset[str]
    lowerings: tuple[str, ...]
    method: str
    percentile: float
    holdout: int
    memory: int
    halves: bool
    float8: bool
    device: str
    provenance: Mapping[str, Any] | None
    progress: Progress

    def calibrated(
        self,
        model: Model,
        view: GraphView,
        plan: PrecisionPlan,
        source: BatchSource,
        method: str,
        ranges: Ranges | None = None,
    ) -> Calibrated:
        """A rewritten model's own ranges."""
        return calibrate_model(
            model, view, plan, source,
            lowerings=self.lowerings, method=method, percentile=self.percentile,
            holdout=self.holdout, memory=self.memory,
            also=tensors_for_ranges(view) if self.halves else (), ranges=ranges,
            float8=self.float8, device=self.device, provenance=self.provenance,
            progress=self.progress,
        )  # fmt: skip

    @property
    def moves(self) -> str:
        """scale, shift, both or nothing."""
        return "+".join(kind for kind in self.kinds if kind in (SCALE_CHANNELS, SHIFT_ALL))

    @property
    def rounding(self) -> str:
        """round, bias, both or nothing."""
        return "+".join(kind for kind in self.kinds if kind in (ROUND_CODES, CORRECT))


def _variants(
    start: _Variant,
    job: _Job,
    source: BatchSource,
    seen: BatchSource,
    chosen_on: Sequence[Batch],
) -> list[_Variant]:
    """What is to be compared: `start`, its codes rounded, moved, and both.

    One look at the layers of the quantized network serves the choice of moves and the rounding of
    the model as it is.
    """
    model, table, view = start.model, start.calibrated.table, job.view
    chooser, axes = None, {}
    if job.moves:
        placement = place(view, start.plan)
        every = channel_tensors(view, placement)
        axes = {tensor: axis for tensor, axis in every.items() if tensor not in job.leave}
        reach = reaches(model, axes, seen, device=job.device, progress=job.progress)
        job.progress(RUN_HELD, 0, None)
        batches = held_batches(
            model, view, placement, tuple(chosen_on), memory=job.memory, device=job.device
        )
        alone = Alone(model, view, placement, batches, device=job.device)
        chooser = Chooser(alone, view, placement, table, reach, axes, job.kinds)
    moves: list[Move] = []
    codes: dict[str, Codes] = {}
    for part in observed(
        model, start.plan, table, seen,
        axes=axes, memory=job.memory, device=job.device, progress=job.progress,
    ):  # fmt: skip
        moves += [] if chooser is None else chooser.moves(part, progress=job.progress)
        codes |= rounded_codes_of(view, part.seen, job.kinds) if job.rounding else {}
    variants = [start]
    if job.rounding:
        variants.append(replace(start, name=job.rounding, codes=codes))
    return variants + _moved(start, job, moves, source, seen, chosen_on)


def _moved(
    start: _Variant,
    job: _Job,
    moves: Sequence[Move],
    source: BatchSource,
    seen: BatchSource,
    chosen_on: Sequence[Batch],
) -> list[_Variant]:
    """The model with its channels scaled and shifted, calibrated again, without and with rounded
    codes; nothing if there are no moves.

    Ranges are chosen again in company; method auto stands beside the least square error for all,
    which is the better one where few pictures cannot tell ranges apart.
    """
    job.progress("rewrite", 0, None)
    model, moved = apply_moves(start.model, moves)
    if not moved:
        return []
    view = GraphView.of(model)
    plan = extended_plan(start.plan, view)
    again = Again(
        model, start.calibrated, moves, moved, seen,
        kinds=job.kinds if job.rounding else (), memory=job.memory, device=job.device,
        progress=job.progress,
    )  # fmt: skip
    calibrated = job.calibrated(model, view, plan, source, job.method, again.ranges)
    plan = without_zero_ranges(view, plan, calibrated.table)
    found = [_Variant(job.moves, model, plan, calibrated, moved, tuple(moves), again.codes)]
    if job.method == AUTO_METHOD and _is_close(
        found[0], view, job, _Judged(start.model, chosen_on, job.device)
    ):
        beside = job.calibrated(model, view, plan, source, BESIDE_AUTO)
        name = f"{job.moves} ({BESIDE_AUTO})"
        found.append(replace(found[0], name=name, calibrated=beside, codes=None))
    return [_rounded(variant, job, seen) for variant in found] if job.rounding else found


def _is_close(variant: _Variant, view: GraphView, job: _Job, judged: _Judged) -> bool:
    """Whether one method for all ranges may be as good as those of `variant`, with its codes: what
    nearest codes lose hides what ranges do."""
    calibrated = ranged_alike(variant.calibrated, view, variant.plan, job.lowerings)
    found = [level(judged.errors(v)) for v in (variant, replace(variant, calibrated=calibrated))]
    log.info("ranges alike: %+.2f dB", found[1] - found[0])
    return found[1] < found[0] + BEHIND


def _rounded(variant: _Variant, job: _Job, seen: BatchSource) -> _Variant:
    """`variant` with the codes it has, or its weights rounded if it has none."""
    codes = variant.codes or rounded_weights(
        variant.model, variant.plan, variant.calibrated.table, seen,
        kinds=job.kinds, memory=job.memory, device=job.device, progress=job.progress,
    )  # fmt: skip
    name = variant.name.replace(job.moves, f"{job.moves}+{job.rounding}")
    return replace(variant, name=name, codes=codes)


class _Judged:
    """What variants of `model` do to its outputs on `pictures`, against FP32."""

    def __init__(self, model: Model, pictures: Sequence[Batch], device: str) -> None:
        self._model, self._device = model, device
        self._names = [output.name for output in model.outputs]
        self._batches = in_batches(model, pictures, device=device)
        references = exact_outputs(model, self._batches, device=device)
        self.pictures = [len(batch) for batch in self._batches]
        self._judge = Judge(references, self.pictures, counted_outputs(model))

    def errors(self, variant: _Variant, batches: range | None = None) -> Errors:
        """Of each batch, or of some, as `Judge` gives them."""
        which = range(len(self._batches)) if batches is None else batches
        rounded = with_codes(variant.model, variant.plan, variant.codes or {})
        session = make_session(
            lower_emulate(rounded, variant.plan, variant.calibrated.table),
            threads=threads_each(self._device),
            external_dir=self._model.external_dir, device=self._device,
        )  # fmt: skip

        def run(number: int) -> list[Any]:
            found: list[Any] = session.run(self._names, dict(self._batches[number].feeds))
            return found

        runs = ahead(run, which, device=self._device)
        return [self._judge.errors(number, outputs) for number, outputs in runs]


def _best(
    variants: Sequence[_Variant], judged: _Judged, *, forced: bool, progress: Progress
) -> tuple[_Variant, dict[str, tuple[float, float, float]]]:
    """The variant that likely gains most of those whose gain is shown, or if `forced` of those with
    all that was asked for.

    All are tried on some pictures, and on twice as many each time those that are not yet certainly
    behind the one that leads: its gain and noise are of the pictures that a variant was tried on.
    """
    named = {variant.name: variant for variant in variants}
    asked = [v.name for v in (_forced(variants) if forced else variants)]
    trials = 0

    def errors(name: str, batches: range) -> Errors:
        nonlocal trials
        trials += 1
        found = judged.errors(named[name], batches)
        progress("judge moves", trials, None)
        return found

    gains, worsts = race_of_gains(list(named), errors, judged.pictures, asked, first=FIRST_JUDGED)
    tried = {n: (worsts[n], g.likely, g.likely_noise) for n, (g, _) in gains.items()}
    none = variants[0].name
    left = [n for n, (g, in_race) in gains.items() if in_race and (forced or g.is_shown)]
    best = max(left if forced else [none, *left], key=lambda n: gains[n][0].likely)
    return named[best], tried


def _forced(variants: Sequence[_Variant]) -> Sequence[_Variant]:
    """Those with all that was asked for: if channels could be moved, with each kind of ranges."""
    return [v for v in variants if v.moved] or variants[-1:]
