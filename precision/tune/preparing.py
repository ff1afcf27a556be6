"""Which moves a model is prepared with: each tensor's by what it does at the output, all together
by pictures that nothing was chosen on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, batch_size, rebatch
from trtune.precision.compare.alone import (
    Alone,
    Change,
    fake_quantize,
    fake_quantize_weights,
    in_parallel,
)
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.fusion import fusion_groups
from trtune.precision.plan.placement import Edge, Placement
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan, weight_axis
from trtune.precision.prepare.affine import (
    Affine,
    apply_affine,
    input_channels,
    is_depthwise,
    may_shift,
    reader_axis,
    rescaled,
    weights_by_channel,
)
from trtune.precision.prepare.draft import Draft
from trtune.precision.prepare.scale import balanced_factors, depthwise_factors
from trtune.precision.prepare.statistics import Reach, merged, reach_of
from trtune.precision.prepare.values import SCALE_CHANNELS, SHIFT_ALL, Moved
from trtune.precision.runtime.session import make_session, named_values
from trtune.precision.tune.judge import Judge, gain, judge_of, worst
from trtune.precision.tune.ranges import screening_batches

log = logging.getLogger(__name__)

Array = NDArray[Any]

POWERS = (0.3, 0.6, 1.0)
RANGES = (0.75, 1.0, 1.3)
"""How the range of a rewritten tensor is tried, by its present one and the channels' reach."""

ROUNDED = 0.35
"""What rounding leaves of the error of nearest codes, roughly."""

PICTURES = 512
FINALISTS = 3
LEAST = 0.03
"""A move on a tensor has to take away this part of the error that its quantization makes."""


@dataclass(frozen=True, slots=True)
class Move:
    """An affine rewrite of a tensor with the amax of what it becomes, and its gain in dB."""

    affine: Affine
    amax: float
    gain_db: float = 0.0


def reaches(
    model: Model,
    axes: Mapping[str, int],
    source: Iterable[Batch],
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Reach]:
    """What the channels of each tensor (with their axis) reach, over at most `PICTURES`."""
    inner = [t for t in axes if t not in {i.name for i in model.inputs}]
    session = make_session(
        model.proto, outputs=inner, external_dir=model.external_dir, device=device
    )
    parts: dict[str, list[Reach]] = {t: [] for t in axes}
    seen = 0
    for batch in rebatch(source, batch_size(model.inputs, 8)):
        if len(batch) < batch_size(model.inputs, 1):
            break
        values = named_values(session, inner, batch.feeds)
        for tensor, axis in axes.items():
            value = values[tensor] if tensor in values else batch.feeds[tensor]
            found = reach_of(value, len(batch), axis)
            if found is not None:
                parts[tensor].append(found)
        seen += len(batch)
        progress("look at channels", min(seen, PICTURES), PICTURES)
        if seen >= PICTURES:
            break
    return {tensor: merged(found) for tensor, found in parts.items() if found}


def channel_tensors(view: GraphView, placement: Placement) -> dict[str, int]:
    """The quantized tensors whose channels can be rewritten, with their axis."""
    axes = {t: reader_axis(view, edges) for t, edges in placement.activations.items()}
    return {tensor: axis for tensor, axis in axes.items() if axis is not None}


def choose_moves(
    model: Model,
    view: GraphView,
    placement: Placement,
    table: CalibrationTable,
    reach: Mapping[str, Reach],
    axes: Mapping[str, int],
    pictures: Sequence[Batch],
    kinds: Sequence[str],
    *,
    rounded: bool,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Move]:
    """For each tensor the rewrite that leaves the least error at the output, if any is better.

    `kinds` are scale, shift or both; `rounded` says that codes will be rounded on the data, so
    that errors of weights count less. Tensors whose range is zero are left alone.
    """
    alone = Alone(model, view, placement, pictures, device=device)
    judge = judge_of(alone)
    blend = ROUNDED if rounded else 1.0
    names = [t for t in axes if t in reach and table.scales.get(t, 0) > 0]

    def best(tensor: str) -> Move | None:
        edges = placement.activations[tensor]
        moves = candidates(model, view, edges, tensor, axes[tensor], reach[tensor], table, kinds)
        if not moves:
            return None
        return _Trial(alone, judge, view, edges, blend).best(
            moves, table.amax(tensor), axes[tensor]
        )

    found = in_parallel(best, names, what="choose moves", progress=progress)
    return [move for move in found if move is not None]


def candidates(
    model: Model,
    view: GraphView,
    edges: tuple[Edge, ...],
    tensor: str,
    axis: int,
    reach: Reach,
    table: CalibrationTable,
    kinds: Sequence[str],
) -> list[Move]:
    """The rewrites worth trying for a tensor that the model allows."""
    nodes = [view.by_name[name] for name, _ in edges]
    channels = input_channels(view, nodes[0])
    maxima = reach.maxima
    if maxima.size != channels or not np.any(maxima > 0):
        return []
    factors = [np.ones(channels, np.float32)]
    if SCALE_CHANNELS in kinds:
        if all(is_depthwise(view, node) for node in nodes):
            factors.append(depthwise_factors(maxima))
        else:
            parts = [
                np.abs(weights_by_channel(view, n, view.constant(n.input[1]))).max(axis=1)
                for n in nodes
            ]
            weights = np.max(parts, axis=0)
            factors += [balanced_factors(maxima, weights, power) for power in POWERS]
    shifts = SHIFT_ALL in kinds and may_shift(view, edges)
    moves = []
    for scale in factors:
        plain = Affine(tensor, edges, scale, 0.0, axis)
        if np.any(scale != 1) and apply_affine(Draft(model), plain) is None:
            continue
        ratio = table.amax(tensor) / float(maxima.max())
        top = ratio * float((maxima * scale).max())
        for part in RANGES:
            amax = part * top
            if np.any(scale != 1):
                moves.append(Move(plain, amax))
            low = float((reach.low.min(axis=0) * scale).min())
            low = max(min(low, 0.0), -amax)
            if shifts and amax + low > 0.5 * amax:
                shifted = replace(plain, shift=(amax + low) / 2)
                moves.append(Move(shifted, (amax - low) / 2))
    if shifts and apply_affine(Draft(model), Affine(tensor, edges, factors[0], 1.0, axis)) is None:
        moves = [move for move in moves if not move.affine.shift]
    return moves


class _Trial:
    """What rewrites of one tensor do at the output, its readers' weights quantized too."""

    def __init__(
        self, alone: Alone, judge: Judge, view: GraphView, edges: tuple[Edge, ...], blend: float
    ) -> None:
        self._alone, self._judge, self._view = alone, judge, view
        self._edges, self._blend = edges, blend
        (self._tensor,) = {view.by_name[name].input[index] for name, index in edges}
        self._screening = screening_batches([alone.pictures(b) for b in range(alone.batches)])

    def best(self, moves: Sequence[Move], amax: float, axis: int) -> Move | None:
        """The best of `moves`, with its gain over leaving the tensor as it is with `amax`."""
        size = moves[0].affine.scale.size
        none = Move(Affine(self._tensor, self._edges, np.ones(size, np.float32), 0.0, axis), amax)
        first = {k: self._errors(m, range(self._screening)) for k, m in enumerate([none, *moves])}
        ranked = sorted((k for k in first if k), key=lambda k: (worst(first[k]), k))[:FINALISTS]
        rest = range(self._screening, self._alone.batches)
        before = [*first[0], *self._errors(none, rest)]
        best: Move | None = None
        least = math.inf
        for k in ranked:
            after = [*first[k], *self._errors(moves[k - 1], rest)]
            part, noise = gain(before, after)
            if part > max(noise, LEAST) and worst(after) < least:
                least = worst(after)
                better = 10 * math.log10(max(worst(before), 1e-300) / max(least, 1e-300))
                best = replace(moves[k - 1], gain_db=better)
        return best

    def _errors(self, move: Move, batches: Iterable[int]) -> list[NDArray[np.float64]]:
        batches = list(batches)
        if not batches:
            return []
        run = self._alone.session(Change(self._edges, values=self._weights(move.affine)))
        found = []
        for batch in batches:
            changed = {self._tensor: self._seen(move, self._alone.stored(batch, self._tensor))}
            found.append(self._judge.errors(batch, run(batch, changed)))
        return found

    def _seen(self, move: Move, values: Array) -> NDArray[np.float32]:
        """What readers with the old weights would have to read to see the rewritten tensor."""
        scale = np.float32(move.amax) / np.float32(127)
        affine = move.affine
        if not affine.shift and not np.any(affine.scale != 1):
            return fake_quantize(values, float(scale))
        shape = [1] * values.ndim
        shape[affine.axis] = -1
        by = affine.scale.reshape(shape)
        quantized = fake_quantize(values * by - np.float32(affine.shift), float(scale))
        return ((quantized + np.float32(affine.shift)) / by).astype(np.float32)

    def _weights(self, affine: Affine) -> dict[Edge, Array]:
        found: dict[Edge, Array] = {}
        for name, _ in self._edges:
            node = self._view.by_name[name]
            exact = self._view.constant(node.input[1]).astype(np.float32)
            moved = rescaled(node, exact, affine.scale)
            codes = fake_quantize_weights(moved, weight_axis(node))
            back = rescaled(node, codes, (1 / affine.scale).astype(np.float32))
            found[(name, 1)] = exact + np.float32(self._blend) * (back - exact)
        return found


def apply_moves(model: Model, moves: Iterable[Move]) -> tuple[Model, tuple[Moved, ...]]:
    """The rewritten model, and what was done."""
    draft = Draft(model)
    done: list[Moved] = []
    for move in moves:
        affine = move.affine
        before = draft.size
        name = apply_affine(draft, affine)
        if name is None:
            continue
        scales = (float(affine.scale.min()), float(affine.scale.max()))
        folded = draft.size == before
        done.append(Moved(affine.tensor, name, scales, affine.shift, folded, move.gain_db))
    return draft.finish(), tuple(done)


def extended_plan(plan: PrecisionPlan, view: GraphView) -> PrecisionPlan:
    """`plan` for a rewritten model: what was added follows its neighbours."""
    fresh = make_plan(view, default=plan.default, fallback=plan.fallback)
    nodes = {node.name: plan.nodes.get(node.name, fresh.nodes[node.name]) for node in view.nodes}
    return replace(plan, nodes=nodes, groups=fusion_groups(view), refusals=fresh.refusals)
