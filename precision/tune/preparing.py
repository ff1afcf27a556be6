"""Which moves a model is prepared with: each tensor's by what it does at the output, all together
by pictures that nothing was chosen on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

import numpy as np
import onnx
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
    bias_edge,
    input_channels,
    is_depthwise,
    may_shift,
    output_sums,
    reader_axis,
    rescaled,
    weights_by_channel,
)
from trtune.precision.prepare.columns import grouped
from trtune.precision.prepare.draft import Draft
from trtune.precision.prepare.local import Local, Weights, weights_of
from trtune.precision.prepare.scale import balanced_factors, depthwise_factors
from trtune.precision.prepare.statistics import Reach, merged, reach_of
from trtune.precision.prepare.values import (
    CORRECT,
    ROUND_CODES,
    SCALE_CHANNELS,
    SHIFT_ALL,
    Moved,
)
from trtune.precision.runtime.session import ahead, make_session, named_values, threads_each
from trtune.precision.tune.auto.company import Errors
from trtune.precision.tune.auto.ranges import screening_batches
from trtune.precision.tune.judge import Improvement, Judge, improvement, judge_of, level
from trtune.precision.tune.moments import Observed

log = logging.getLogger(__name__)

Array = NDArray[Any]

POWERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
RANGES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15)
"""How the range of a rewritten tensor is tried, by the channels' reach."""

PICTURES = 256
PROPOSED = 0.9
FINALISTS = 2
LEAST = 0.15
"""A move on a tensor has to take away this many decibels of what its quantization does."""

MISLED = 1.0
"""How far, in decibels, the output may gain less than the tensor itself: a standard deviation."""


@dataclass(frozen=True, slots=True)
class Move:
    """An affine rewrite of a tensor with the amax of what it becomes, and the gain in decibels that
    is expected of it."""

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
        model.proto,
        outputs=inner,
        threads=threads_each(device),
        external_dir=model.external_dir,
        device=device,
    )
    parts: dict[str, list[Reach]] = {t: [] for t in axes}
    size, seen = batch_size(model.inputs, 8), 0

    def run(batch: Batch) -> dict[str, Reach | None]:
        values = {**batch.feeds, **named_values(session, inner, batch.feeds)}
        return {t: reach_of(values[t], len(batch), axis) for t, axis in axes.items()}

    whole = takewhile(lambda b: len(b) >= batch_size(model.inputs, 1), rebatch(source, size))
    for batch, found in ahead(run, islice(whole, -(-PICTURES // size)), device=device):
        for tensor, reach in found.items():
            if reach is not None:
                parts[tensor].append(reach)
        seen += len(batch)
        progress("look at channels", min(seen, PICTURES), PICTURES)
    return {tensor: merged(found) for tensor, found in parts.items() if found}


def channel_tensors(view: GraphView, placement: Placement) -> dict[str, int]:
    """The quantized tensors whose channels can be rewritten, with their axis."""
    axes = {t: reader_axis(view, edges) for t, edges in placement.activations.items()}
    return {tensor: axis for tensor, axis in axes.items() if axis is not None}


class Chooser:
    """For each tensor the rewrite that leaves the least error at the output, if any is better.

    Local noise (`prepare.local`) proposes: the best scale, shift and both, each with its amax. The
    output disposes: what a proposal does there alone, its readers' weights quantized with it, as
    far as the pictures can tell; where they cannot, the tensor's own noise does (`MISLED`).
    `kinds` are all moves that will be made: with round among them errors of weights count as what
    rounding leaves of them, with bias without what they do to the mean. Tensors whose range is zero
    are left alone. `alone` holds the pictures.
    """

    def __init__(
        self,
        alone: Alone,
        view: GraphView,
        placement: Placement,
        table: CalibrationTable,
        reach: Mapping[str, Reach],
        axes: Mapping[str, int],
        kinds: Sequence[str],
    ) -> None:
        self._alone, self._view, self._placement = alone, view, placement
        self._table, self._reach, self._axes, self._kinds = table, reach, axes, kinds
        self._judge = judge_of(alone)

    def moves(self, part: Observed, *, progress: Progress = silent) -> list[Move]:
        """The best move of each tensor that `part` has samples of, where one helps."""
        names = [t for t in part.samples if t in self._reach and self._table.scales.get(t, 0) > 0]

        def best(tensor: str) -> Move | None:
            return self._best(tensor, part)

        found = in_parallel(best, names, what="choose moves", progress=progress)
        return [move for move in found if move is not None]

    def _best(self, tensor: str, part: Observed) -> Move | None:
        edges = self._placement.activations[tensor]
        readers: dict[str, Weights] = {}
        means: dict[str, NDArray[np.float64]] = {}
        for name, _ in edges:
            node = self._view.by_name[name]
            seen = part.seen.get(name)
            if seen is None:
                return None
            products = seen.products
            if CORRECT in self._kinds and bias_edge(self._view, node) is not None:
                products, means[name] = seen.centred, seen.mean
            weights = self._view.constant(node.input[1])
            held = weights_of(
                node, weights, products, max(seen.count, 1e-9), rounded=ROUND_CODES in self._kinds
            )
            if held is None:
                return None
            readers[name] = held
        local = Local(part.samples[tensor], tuple(readers.values()))
        moves = proposals(
            self._alone.model, self._view, edges, tensor, self._axes[tensor],
            self._reach[tensor], self._table.amax(tensor), local, self._kinds,
        )  # fmt: skip
        if not moves:
            return None
        trial = _Trial(self._alone, self._judge, self._view, edges, readers, means)
        return trial.best(moves, self._table.amax(tensor), self._axes[tensor])


def proposals(
    model: Model,
    view: GraphView,
    edges: tuple[Edge, ...],
    tensor: str,
    axis: int,
    reach: Reach,
    amax: float,
    local: Local,
    kinds: Sequence[str],
) -> list[Move]:
    """The best scale, shift and both that the model allows, by their local noise, best first.

    Those that leave more than `PROPOSED` of the noise there is without are left out.
    """
    nodes = [view.by_name[name] for name, _ in edges]
    channels = input_channels(view, nodes[0])
    maxima = reach.maxima
    if maxima.size != channels or not np.any(maxima > 0):
        return []
    ones = np.ones(channels, np.float32)
    ratio = amax / float(maxima.max())
    scales = _factors(view, nodes, maxima) if SCALE_CHANNELS in kinds else []
    shifts = SHIFT_ALL in kinds and may_shift(view, edges)
    none = min(local.noise(ones, 0.0, part * amax) for part in RANGES)
    found = []
    for factors, shifted in ((scales, False), ([ones], True), (scales, True)):
        if not factors or (shifted and not shifts):
            continue
        trials = (
            m for c in factors for m in _ranged(tensor, edges, c, axis, reach, ratio, shifted)
        )
        noises = [(local.noise(m.affine.scale, m.affine.shift, m.amax), m) for m in trials]
        if not noises:
            continue
        noise, move = min(noises, key=lambda entry: entry[0])
        if noise < PROPOSED * none and apply_affine(Draft(model), move.affine) is not None:
            found.append(replace(move, gain_db=10 * math.log10(none / max(noise, 1e-9 * none))))
    return sorted(found, key=lambda move: -move.gain_db)


def _factors(
    view: GraphView, nodes: Sequence[onnx.NodeProto], maxima: Array
) -> list[NDArray[np.float32]]:
    if all(is_depthwise(view, node) for node in nodes):
        found = [depthwise_factors(maxima)]
    else:
        parts = [
            np.abs(weights_by_channel(view, n, view.constant(n.input[1]))).max(axis=1)
            for n in nodes
        ]
        weights = np.max(parts, axis=0)
        found = [balanced_factors(maxima, weights, power) for power in POWERS]
    return [factors for factors in found if np.any(factors != 1)]


def _ranged(
    tensor: str,
    edges: tuple[Edge, ...],
    scale: NDArray[np.float32],
    axis: int,
    reach: Reach,
    ratio: float,
    shifted: bool,
) -> Iterator[Move]:
    """A rewrite with each range to try: by what the channels reach, and as much of it as now."""
    top = float((reach.maxima * scale).max())
    for part in RANGES:
        amax = part * max(ratio, 1.0) * top
        low = float((reach.low.min(axis=0) * scale).min())
        low = max(min(low, 0.0), -amax)
        if not shifted:
            yield Move(Affine(tensor, edges, scale, 0.0, axis), amax)
        elif amax + low > 0.5 * amax:
            yield Move(Affine(tensor, edges, scale, (amax + low) / 2, axis), (amax - low) / 2)


class _Trial:
    """What rewrites of one tensor do at the output, its readers' weights quantized too.

    Errors of weights are those of nearest codes, as much of them as rounding leaves (`readers`),
    less what they do to the mean where that goes into the bias (`means` of the columns).
    """

    def __init__(
        self,
        alone: Alone,
        judge: Judge,
        view: GraphView,
        edges: tuple[Edge, ...],
        readers: Mapping[str, Weights],
        means: Mapping[str, NDArray[np.float64]],
    ) -> None:
        self._alone, self._judge, self._view = alone, judge, view
        self._edges, self._readers, self._means = edges, readers, means
        (self._tensor,) = {view.by_name[name].input[index] for name, index in edges}
        self._screening = screening_batches([alone.pictures(b) for b in range(alone.batches)])

    def best(self, moves: Sequence[Move], amax: float, axis: int) -> Move | None:
        """The best of `moves`, with its likely gain over leaving the tensor as it is, at `amax`."""
        size = moves[0].affine.scale.size
        none = Move(Affine(self._tensor, self._edges, np.ones(size, np.float32), 0.0, axis), amax)
        first = [self._errors(move, range(self._screening)) for move in (none, *moves)]
        ranked = sorted(range(1, len(first)), key=lambda k: (level(first[k]), k))[:FINALISTS]
        rest = range(self._screening, self._alone.batches)
        before = [*first[0], *self._errors(none, rest)]
        found = [
            self._gained(moves[k - 1], before, [*first[k], *self._errors(moves[k - 1], rest)])
            for k in ranked
        ]
        helping = [m for g, m in found if m.gain_db > LEAST and not g.hurts]
        return max(helping, key=lambda move: move.gain_db, default=None)

    @staticmethod
    def _gained(move: Move, before: Errors, after: Errors) -> tuple[Improvement, Move]:
        """What is seen of a move's gain, and the move with what is likely."""
        gained = improvement(before, after)
        return gained, replace(move, gain_db=gained.towards(move.gain_db, MISLED))

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
        """Weights that do to the old tensor what codes do to the rewritten one, and biases: those
        that make up for the mean, or what a shift does that is taken back with exact weights."""
        found: dict[Edge, Array] = {}
        for name, _ in self._edges:
            node = self._view.by_name[name]
            exact = self._view.constant(node.input[1]).astype(np.float32)
            moved = rescaled(node, exact, affine.scale)
            lost = fake_quantize_weights(moved, weight_axis(node)) - moved
            lost *= np.float32(self._readers[name].share(affine.scale))
            back = rescaled(node, lost, (1 / affine.scale).astype(np.float32))
            found[(name, 1)] = exact + back
            added = None
            if name in self._means:
                parts = grouped(node, back)
                assert parts is not None
                added = (parts * self._means[name][:, None, :]).sum(axis=2).reshape(-1)
            elif affine.shift:
                added = affine.shift * output_sums(node, lost)
            if added is not None:
                place = bias_edge(self._view, node)
                assert place is not None
                held = self._view.by_name[place[0]].input[place[1] : place[1] + 1]
                bias = self._view.constant(held[0]) if held and held[0] else np.float32(0)
                found[place] = (bias - added).astype(np.float32)
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
