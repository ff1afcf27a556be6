"""A model prepared for quantization: moves tried together, and kept if pictures that nothing was
chosen on show that they help.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.collect import DEFAULT_MEMORY
from trtune.configs.progress import Progress, silent
from trtune.configs.system.machine import usable_cores
from trtune.configs.values import HELD_OUT, PERCENTILE
from trtune.datasets.batches import Batch, BatchSource
from trtune.datasets.holdout import Without, hold_out_more
from trtune.precision.compare.alone import Alone
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.half_ranges import tensors_for_ranges
from trtune.precision.plan.placement import place
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
from trtune.precision.runtime.session import make_session
from trtune.precision.tune.again import Again
from trtune.precision.tune.judge import Judge, counted_outputs, improvement, level, worst
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
    calibrate_model,
    enough_pictures,
    exact_outputs,
    held_batches,
    in_batches,
    without_zero_ranges,
)

log = logging.getLogger(__name__)

AUTO_MOVES = ALL_MOVES
"""What is tried by default. A shift needs the bias correction: what codes do to a mean that the
shift has made large is worse than what it saves."""

JUDGED = 2
"""Pictures that judge what was chosen, by those that it was chosen on."""

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
    the error of the worst output, and to the gain over none with its standard error, in decibels
    averaged over the outputs. `costs` is what a compiler says of the rewrites, if it was asked.
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
    `holdout` pictures (those of method auto); the moves together, and rounding, are judged on up to
    twice as many others, which take no part in choosing. With `moves` None a move is kept only if
    those show a gain beyond its noise; otherwise exactly `moves` are made, still with what is best
    for each tensor. Channels of the tensors in `leave` stay as they are. `device` is where the
    network runs.
    """
    kinds = AUTO_MOVES if moves is None else tuple(moves)
    start = _Variant("none", model, without_zero_ranges(view, plan, base.table), base)
    if not start.plan.int8_nodes or not kinds:
        return Ready(Prepared(model), plan, base, {})
    count = enough_pictures(model, view, place(view, start.plan), source, holdout)
    chosen_on, judged_on = hold_out_more(source, count, JUDGED * count)
    found, fitted, seen = chosen_on + judged_on, source, source
    if len(found) >= FEWEST and judged_on:
        fitted = Without(source, frozenset(i for b in judged_on for i in b.items))
        seen = Without(fitted, frozenset(i for b in chosen_on for i in b.items))
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
    variants = _variants(start, job, fitted, seen, chosen_on)
    best, tried = _best(
        variants, judged_on, model, forced=moves is not None, device=device, progress=progress
    )
    error = tried["none"][0]
    left = tried[best.name][0]
    gained = 10 * math.log10(error / left) if 0 < left < math.inf > error > 0 else 0.0
    log.info("prepared with %s (%+.1f dB); tried: %s", best.name, gained, tried)
    result = Prepared(best.model, best.codes or {}, best.moved, gained)
    whole = plan if best.model is model else extended_plan(plan, GraphView.of(best.model))
    return Ready(result, whole, best.calibrated, tried, best.moves)


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
    fitted: BatchSource,
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
        batches = held_batches(model, view, placement, tuple(chosen_on), memory=job.memory)
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
    return variants + _moved(start, job, moves, fitted, seen)


def _moved(
    start: _Variant, job: _Job, moves: Sequence[Move], fitted: BatchSource, seen: BatchSource
) -> list[_Variant]:
    """The model with its channels scaled and shifted, calibrated again, without and with rounded
    codes; nothing if there are no moves."""
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
    calibrated = calibrate_model(
        model, view, plan, fitted,
        lowerings=job.lowerings, method=job.method, percentile=job.percentile,
        holdout=job.holdout, memory=job.memory, also=tensors_for_ranges(view) if job.halves else (),
        ranges=again.ranges, float8=job.float8, device=job.device,
        provenance=job.provenance, progress=job.progress,
    )  # fmt: skip
    plan = without_zero_ranges(view, plan, calibrated.table)
    plain = _Variant(job.moves, model, plan, calibrated, moved, tuple(moves))
    if not job.rounding:
        return [plain]
    codes = again.codes
    if not codes:
        codes = rounded_weights(
            model, plan, calibrated.table, seen,
            kinds=job.kinds, memory=job.memory, device=job.device, progress=job.progress,
        )  # fmt: skip
    return [replace(plain, name=f"{job.moves}+{job.rounding}", codes=codes)]


def _best(
    variants: Sequence[_Variant],
    pictures: Sequence[Batch],
    model: Model,
    *,
    forced: bool,
    device: str,
    progress: Progress,
) -> tuple[_Variant, dict[str, tuple[float, float, float]]]:
    """The variant with the least error of those whose gain is shown; the last if `forced`."""
    batches = in_batches(model, pictures)
    names = [output.name for output in model.outputs]
    references = exact_outputs(model, batches, device=device)
    judge = Judge(references, [len(batch) for batch in batches], counted_outputs(model))
    found: dict[str, list[NDArray[np.float64]]] = {}
    for number, variant in enumerate(variants):
        rounded = with_codes(variant.model, variant.plan, variant.codes or {})
        proto = lower_emulate(rounded, variant.plan, variant.calibrated.table)
        session = make_session(
            proto, threads=usable_cores(), external_dir=model.external_dir, device=device
        )
        found[variant.name] = [
            judge.errors(k, session.run(names, dict(batch.feeds)))
            for k, batch in enumerate(batches)
        ]
        progress("judge moves", number + 1, len(variants))
    none = found[variants[0].name]
    gains = {name: improvement(none, errors) for name, errors in found.items()}
    tried = {n: (worst(found[n]), g.decibels, g.noise) for n, g in gains.items()}
    if forced:
        return variants[-1], tried
    better = [v for v in variants if gains[v.name].is_shown]
    return min([variants[0], *better], key=lambda v: level(found[v.name])), tried
