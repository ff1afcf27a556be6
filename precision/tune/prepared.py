"""A model prepared for quantization: moves tried together, and kept if pictures that nothing was
chosen on show that they help.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.collect import DEFAULT_MEMORY
from trtune.configs.progress import Progress, silent
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch, BatchSource, batch_size, fit_batch
from trtune.datasets.holdout import Without, hold_out, join
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.half_ranges import tensors_for_ranges
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.prepare.codes import with_codes
from trtune.precision.prepare.values import (
    CORRECT,
    ROUND_CODES,
    SCALE_CHANNELS,
    SHIFT_ALL,
    Codes,
    Moved,
    Prepared,
)
from trtune.precision.runtime.session import make_session
from trtune.precision.tune.judge import Judge, counted_outputs, gain, is_better, worst
from trtune.precision.tune.moments import rounded_weights
from trtune.precision.tune.preparing import (
    Move,
    apply_moves,
    channel_tensors,
    choose_moves,
    extended_plan,
    reaches,
)
from trtune.precision.tune.scales import (
    AUTO_METHOD,
    Calibrated,
    calibrate_model,
    held_batches,
    without_zero_ranges,
)

log = logging.getLogger(__name__)

AUTO_MOVES = (SCALE_CHANNELS, SHIFT_ALL, ROUND_CODES)
"""What is tried by default. Bias correction adds nothing measurable once codes are rounded."""


JUDGED = 3
"""Pictures held out in all by those that choose: the others judge what was chosen."""

FEWEST = 8
"""Held-out pictures, at least, to choose and to judge by."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A prepared model with its plan and table, which replace those it was made from.

    `plan` holds the nodes that were added too. `tried` maps each set of moves that was tried to
    the error of the worst output, and to the gain over none with its standard error, both as parts
    of the error without any.
    """

    prepared: Prepared
    plan: PrecisionPlan
    calibrated: Calibrated
    tried: Mapping[str, tuple[float, float, float]]
    moves: tuple[Move, ...] = ()

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
    lowerings: Iterable[str] = ("emulate",),
    method: str = AUTO_METHOD,
    percentile: float = 99.99,
    holdout: int = 24,
    memory: int = DEFAULT_MEMORY,
    halves: bool = False,
    device: str = "cpu",
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Ready:
    """`model` prepared as calibration pictures show that it quantizes best.

    `base` is its calibration without any move. Each tensor's scale and shift is chosen on
    `holdout` pictures (those of method auto); the moves together, and rounding, are judged on up to
    twice as many others, which take no part in choosing. With `moves` None a move is kept only if
    those show a gain beyond its noise; otherwise exactly `moves` are made, still with what is best
    for each tensor. `device` is where the network runs.
    """
    kinds = AUTO_MOVES if moves is None else tuple(moves)
    start = _Variant("none", model, without_zero_ranges(view, plan, base.table), base)
    if not start.plan.int8_nodes or not kinds:
        return Ready(Prepared(model), plan, base, {})
    found = hold_out(source, JUDGED * holdout)
    half = min(holdout, (len(found) + 1) // 2)
    chosen_on, judged_on, fitted, seen = found[:half], found[half:], source, source
    if len(found) >= FEWEST:
        fitted = Without(source, frozenset(i for b in judged_on for i in b.items))
        seen = Without(fitted, frozenset(i for b in chosen_on for i in b.items))
    elif moves is None:
        log.info("not prepared: %d pictures to judge by are too few", len(found))
        return Ready(Prepared(model), plan, base, {})
    else:
        chosen_on = judged_on = found
    variants = [start]
    if SCALE_CHANNELS in kinds or SHIFT_ALL in kinds:
        moved = _moved(
            start, view, fitted, seen, chosen_on, kinds,
            lowerings=lowerings, method=method, percentile=percentile, holdout=holdout,
            memory=memory, halves=halves, device=device, provenance=provenance, progress=progress,
        )  # fmt: skip
        variants += [moved] if moved is not None else []
    if ROUND_CODES in kinds or CORRECT in kinds:
        variants += [_rounded(v, seen, kinds, memory, device, progress) for v in list(variants)]
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


def _moved(
    start: _Variant,
    view: GraphView,
    fitted: BatchSource,
    seen: BatchSource,
    chosen_on: Sequence[Batch],
    kinds: Sequence[str],
    *,
    lowerings: Iterable[str],
    method: str,
    percentile: float,
    holdout: int,
    memory: int,
    halves: bool,
    device: str,
    provenance: Mapping[str, Any] | None,
    progress: Progress,
) -> _Variant | None:
    """The model with its channels scaled and shifted, calibrated again; None if none is better."""
    model, placement = start.model, place(view, start.plan)
    axes = channel_tensors(view, placement)
    reach = reaches(model, axes, seen, device=device, progress=progress)
    pictures = held_batches(model, view, placement, tuple(chosen_on), memory=memory)
    rounded = ROUND_CODES in kinds
    moves = choose_moves(
        model, view, placement, start.calibrated.table, reach, axes, pictures, kinds,
        rounded=rounded, device=device, progress=progress,
    )  # fmt: skip
    rewritten, moved = apply_moves(model, moves)
    if not moved:
        return None
    new = GraphView.of(rewritten)
    plan = extended_plan(start.plan, new)
    calibrated = calibrate_model(
        rewritten, new, plan, fitted,
        lowerings=lowerings, method=method, percentile=percentile, holdout=holdout, memory=memory,
        also=tensors_for_ranges(new) if halves else (),
        device=device, provenance=provenance, progress=progress,
    )  # fmt: skip
    plan = without_zero_ranges(new, plan, calibrated.table)
    name = "+".join(kind for kind in kinds if kind in (SCALE_CHANNELS, SHIFT_ALL))
    return _Variant(name, rewritten, plan, calibrated, moved, tuple(moves))


def _rounded(
    variant: _Variant,
    seen: BatchSource,
    kinds: Sequence[str],
    memory: int,
    device: str,
    progress: Progress,
) -> _Variant:
    codes = rounded_weights(
        variant.model, variant.plan, variant.calibrated.table, seen,
        kinds=kinds, memory=memory, device=device, progress=progress,
    )  # fmt: skip
    done = "+".join(k for k in kinds if k in (ROUND_CODES, CORRECT))
    name = done if variant.name == "none" else f"{variant.name}+{done}"
    return replace(variant, name=name, codes=codes)


def _best(
    variants: Sequence[_Variant],
    pictures: Sequence[Batch],
    model: Model,
    *,
    forced: bool,
    device: str,
    progress: Progress,
) -> tuple[_Variant, dict[str, tuple[float, float, float]]]:
    """The variant with the least error whose gain is beyond its noise; the last if `forced`."""
    batches = join(tuple(pictures), batch_size(model.inputs, 4))
    batches[-1] = fit_batch(batches[-1], batch_size(model.inputs, len(batches[-1])))
    names = [output.name for output in model.outputs]
    exact = make_session(model.proto, external_dir=model.external_dir, device=device)
    references = [exact.run(names, dict(batch.feeds)) for batch in batches]
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
    tried = {name: (worst(errors), *gain(none, errors)) for name, errors in found.items()}
    if forced:
        return variants[-1], tried
    better = [v for v in variants if is_better(none, found[v.name])]
    return min([variants[0], *better], key=lambda v: tried[v.name][0]), tried
