"""What un-quantizing a node gains in the quantized network: the order to pin in.

Quantizing a node alone says what it does in an exact network. In the quantized one the noise of
the others masks some nodes and adds to that of others, so the node that hurts most alone may gain
nothing when it is pinned. Here the quantized network is run once, what it computes is kept, and for
each node only what lies behind it is run again, with its float values and weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.configs.system.cluster import Cluster, chunks, job_key, kept
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import (
    Alone,
    Change,
    fake_quantize_weights,
    in_parallel,
    read_in,
)
from trtune.precision.compare.batches import held_batches
from trtune.precision.compare.sample import LARGEST_SAMPLE
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.placement import Edge, Placement, edges_of, place
from trtune.precision.plan.plan import TUNER, USER, PrecisionPlan
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.output_groups import OutputGroup, add_parts, output_groups
from trtune.precision.runtime.session import kept_values, make_session
from trtune.precision.tune.judge import Gain, expectations, paired_gain, towards

_Outputs = Mapping[str, NDArray[Any]]
Yardstick = Callable[[Sequence[Batch], Sequence[_Outputs], Sequence[_Outputs]], float]
"""How far outputs are from FP32's: batches, FP32's outputs, the outputs -> 0 or more, less is
better."""

CHUNKS = 4
"""How many chunks of nodes are measured again after a pin, at most; a chunk has a node a core."""


@dataclass(frozen=True, slots=True)
class Quantizing:
    """How a plan becomes a network: the model that is lowered for it, and the scales.

    `view` is that of the model in float. What `model_for` gives has the same nodes, and perhaps
    other constants where the plan is int8. `device` is where the network runs; a `cluster` shares
    out the nodes that are asked about.
    """

    model_for: Callable[[PrecisionPlan], Model]
    view: GraphView
    table: CalibrationTable
    device: str = "cpu"
    cluster: Cluster | None = None

    @classmethod
    def of(cls, model: Model, table: CalibrationTable) -> Quantizing:
        """One whose model is the same for every plan."""
        return cls(lambda _: model, GraphView.of(model), table)

    def network(self, plan: PrecisionPlan) -> Model:
        """The integers of `plan`, everything else in float32."""
        plan = _integers_alone(plan)
        model = self.model_for(plan)
        return replace(model, proto=lower_emulate(model, plan, self.table))


@dataclass(frozen=True, slots=True)
class Reference:
    """The FP32 outputs for some batches of `pictures`, and the `groups` that are judged apart.

    `yardstick`, if there is one, says how far outputs are from these instead of their noise.
    """

    pictures: tuple[Batch, ...]
    outputs: tuple[_Outputs, ...]
    groups: tuple[OutputGroup, ...]
    yardstick: Yardstick | None = None

    @classmethod
    def of(cls, model: Model, pictures: Sequence[Batch], *, device: str = "cpu") -> Reference:
        """Run `model` on `pictures`, in batches of a size that it takes."""
        names = [output.name for output in model.outputs]
        session = make_session(model.proto, external_dir=model.external_dir, device=device)
        found: list[_Outputs] = [kept_values(session, names, batch.feeds) for batch in pictures]
        groups = output_groups({n: [one[n] for one in found] for n in model.judged})
        return cls(tuple(pictures), tuple(found), groups)

    def noise(self, run: Callable[[int], _Outputs]) -> float:
        """Noise by signal of the group that suffers most, over all batches, or what the yardstick
        says.

        `run` gives the outputs of a batch. What is not finite makes it infinite; 0 where the
        outputs are those of FP32, or nothing can be compared.
        """
        if self.yardstick is not None:
            found = [run(batch) for batch in range(len(self.outputs))]
            return self.yardstick(self.pictures, self.outputs, found)
        sums: dict[str, ErrorSums] = {}
        for batch, exact in enumerate(self.outputs):
            sums = add_parts(sums, self.groups, exact, run(batch))
        return max((10 ** (-found.sqnr_db / 10) for found in sums.values()), default=0.0)

    def energies(self, run: Callable[[int], _Outputs]) -> NDArray[np.float64]:
        """Noise energy of each group (rows) in each picture, by the group's signal over all.

        Where pictures cannot be told apart in an output, each has its share of the batch.
        """
        signal = np.zeros(len(self.groups))
        found: list[NDArray[np.float64]] = []
        for batch, exact in enumerate(self.outputs):
            outputs, count = run(batch), len(self.pictures[batch])
            rows = []
            for number, group in enumerate(self.groups):
                expected, got = (group.of(values[group.output]) for values in (exact, outputs))
                if expected.dtype.kind != "f" or expected.shape != got.shape:
                    rows.append(np.zeros(count))
                    continue
                signal[number] += _by_picture(expected, count).sum()
                with np.errstate(invalid="ignore"):  # an infinity that both have
                    rows.append(_by_picture(expected - got, count))
            found.append(np.stack(rows) if rows else np.zeros((0, count)))
        together = np.concatenate(found, axis=1)
        return np.asarray(together / np.where(signal > 0, signal, 1.0)[:, None])


def held_reference(
    quantizing: Quantizing,
    plan: PrecisionPlan,
    pictures: tuple[Batch, ...],
    *,
    memory: int,
) -> Reference:
    """The reference on as many of `pictures` as a `LeaveOneOut` can hold within `memory` bytes."""
    network = quantizing.network(plan)
    within = GraphView.of(network)
    read, exact = read_quantized(quantizing.view, within, plan)
    held = held_batches(
        network, within, Placement(read, {}), pictures,
        memory=memory, also=exact, device=quantizing.device,
    )  # fmt: skip
    floats = plan.pin(plan.quantized_nodes, "fp32", "", origin=TUNER)
    return Reference.of(quantizing.model_for(floats), held, device=quantizing.device)


def _by_picture(values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The energy of each picture, finite elements alone."""
    squares = np.square(np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0))
    if values.ndim and len(values) == count:
        return np.asarray(squares.reshape(count, -1).sum(axis=1))
    return np.full(count, squares.sum() / max(count, 1))


class LeaveOneOut:
    """The network quantized as `plan` says, on the pictures of `reference`, held in memory.

    `noise` is its noise by signal at the output that suffers most. What is half precision in
    `plan` is computed in float32: only integers are asked about. Thread-safe.
    """

    def __init__(self, quantizing: Quantizing, plan: PrecisionPlan, reference: Reference) -> None:
        self._view, self._plan, self._reference = quantizing.view, plan, reference
        self._table = quantizing.table
        self._weights = place(self._view, plan).weights
        self._quantizing, self._model = quantizing, quantizing.model_for(_integers_alone(plan))
        network = quantizing.network(plan)
        self._outputs = tuple(output.name for output in network.outputs)
        self._within = GraphView.of(network)
        read, exact = read_quantized(self._view, self._within, plan)
        pictures = reference.pictures
        self._alone = Alone(
            network, self._within, Placement(read, {}), pictures,
            also=exact, device=quantizing.device,
        )  # fmt: skip
        self.noise = reference.noise(self._as_it_is)
        self._energies = None if reference.yardstick else reference.energies(self._as_it_is)

    def _as_it_is(self, batch: int) -> _Outputs:
        return self._named(self._alone.reference(batch))

    def without(self, node: str) -> float:
        """Noise by signal of the output that suffers most when the quantized `node` is float."""
        return self._reference.noise(self._run_without(node))

    def gain(self, node: str) -> Gain:
        """What it takes off when `node` is float, as a part of the noise of the output that suffers
        most, with its standard error over pictures (none by a yardstick of one's own)."""
        outputs = list(map(self._run_without(node), range(len(self._reference.pictures))))
        part = 1 - _share(self._reference.noise(outputs.__getitem__), self.noise)
        if self._energies is None or not len(self._energies):
            return Gain(part)
        worst = int(np.argmax(self._energies.sum(axis=1)))
        after = self._reference.energies(outputs.__getitem__)
        return Gain(part, paired_gain(self._energies[worst], after[worst]).error)

    def _run_without(self, node: str) -> Callable[[int], _Outputs]:
        edges = edges_of(self._view, self._plan, self._view.by_name[node])
        run = self._alone.session(Change(edges, values=self._floats(node)))
        exact = {self._within.by_name[n].input[i]: self._view.by_name[n].input[i] for n, i in edges}

        def outputs(batch: int) -> _Outputs:
            changed = {read: self._alone.stored(batch, t) for read, t in exact.items()}
            return self._named(run(batch, changed))

        return outputs

    def in_float8(self, node: str) -> float:
        """Noise by signal of the output that suffers most when the int8 `node` is fp8."""
        edges = edges_of(self._view, self._plan, self._view.by_name[node])
        values = self._floats(node)
        weights = self._weights.get((node, 1))
        if weights is not None:
            name, axis = weights
            values[node, 1] = fake_quantize_weights(self._view.constant(name), axis, codes=FP8)
        run = self._alone.session(Change(edges, values=values))
        exact = {self._within.by_name[n].input[i]: self._view.by_name[n].input[i] for n, i in edges}

        def outputs(batch: int) -> _Outputs:
            changed = {
                read: read_in(FP8, self._alone.stored(batch, tensor), tensor, self._table)
                for read, tensor in exact.items()
            }
            return self._named(run(batch, changed))

        return self._reference.noise(outputs)

    def gains(self, nodes: Sequence[str], *, progress: Progress = silent) -> list[Gain]:
        """`gain` of each of `nodes`, on all cores or by the tasks of the cluster."""
        quantizing, what = self._quantizing, "rank pins"
        if quantizing.cluster is None or len(nodes) < 2 * quantizing.cluster.slots:
            return in_parallel(self.gain, nodes, what=what, progress=progress)
        fixed = replace(quantizing, model_for=Always(self._model), cluster=None)
        shared = (job_key(), fixed, self._plan, self._reference)
        found: dict[str, Gain] = {}
        tasks = chunks(nodes, quantizing.cluster)
        for _, part in quantizing.cluster.each(gains_part, tasks, shared=shared, what=what):
            found |= part
            progress(what, len(found), len(nodes))
        return [found[node] for node in nodes]

    def _floats(self, node: str) -> dict[Edge, NDArray[Any]]:
        """The constants of `node`, and of what is fused with it, that are others in float."""
        found = {}
        for name in (node, *self._plan.groups.get(node, ())):
            own = self._view.by_name[name].input
            for index, tensor in enumerate(self._within.by_name[name].input):
                if not tensor or not self._within.is_constant(tensor):
                    continue
                here = self._within.constant(tensor)
                there = self._view.constant(own[index]) if index < len(own) else here * 0
                if not np.array_equal(here, there):
                    found[name, index] = np.asarray(there)
        return found

    def _named(self, outputs: Sequence[NDArray[Any]]) -> _Outputs:
        return dict(zip(self._outputs, outputs, strict=True))


def read_quantized(
    view: GraphView, quantized: GraphView, plan: PrecisionPlan
) -> tuple[dict[str, tuple[Edge, ...]], list[str]]:
    """What is read quantized in the network of `plan`: the tensors with their readers there, and
    the same tensors before they were quantized."""
    read: dict[str, tuple[Edge, ...]] = {}
    exact: dict[str, None] = {}
    for name in plan.quantized_nodes:
        for node, index in dict.fromkeys([*edges_of(view, plan, view.by_name[name]), (name, 0)]):
            tensor = quantized.by_name[node].input[index]
            read[tensor] = (*read.get(tensor, ()), (node, index))
            exact[view.by_name[node].input[index]] = None
    return read, list(exact)


def _integers_alone(plan: PrecisionPlan) -> PrecisionPlan:
    """`plan` with float32 wherever it has half precision."""
    if not plan.halves:
        return plan
    nodes = {
        name: replace(a, precision="fp32" if a.precision in HALVES else a.precision, around="")
        for name, a in plan.nodes.items()
    }
    default = "int8" if plan.default in HALVES else plan.default
    return replace(plan, nodes=nodes, default=default, fallback="fp32")


@dataclass(frozen=True, slots=True)
class Always:
    """The same model whatever the plan: what travels to a worker in the place of a function."""

    model: Model

    def __call__(self, plan: PrecisionPlan) -> Model:
        """The model."""
        return self.model


def gains_part(
    key: str,
    quantizing: Quantizing,
    plan: PrecisionPlan,
    reference: Reference,
    nodes: Sequence[str],
) -> dict[str, Gain]:
    """In a worker: the gain of each of `nodes`; the network runs once for all tasks."""
    network: LeaveOneOut = kept(key, partial(LeaveOneOut, quantizing, plan, reference))
    return dict(zip(nodes, network.gains(nodes), strict=True))


@dataclass(frozen=True, slots=True)
class PathStep:
    """Another pin: noise by signal with it and all before it; `measured` or added up."""

    node: str
    noise: float
    measured: bool = True

    @property
    def sqnr_db(self) -> float:
        """The same in decibels."""
        return math.inf if self.noise <= 0 else -10 * math.log10(self.noise)


@dataclass(frozen=True, slots=True)
class PinPath:
    """Pins in the order that gains most, each given those before it, on held-out pictures.

    `start` is noise by signal at the output that suffers most with none of them.
    """

    start: float
    steps: tuple[PathStep, ...] = ()

    @property
    def noises(self) -> tuple[float, ...]:
        """Noise by signal with 0, 1, 2, ... pins."""
        return (self.start, *(step.noise for step in self.steps))


def pin_path(
    quantizing: Quantizing,
    plan: PrecisionPlan,
    reference: Reference,
    alone: Mapping[str, float],
    *,
    limit: int,
    enough: float = 0.0,
    progress: Progress = silent,
) -> PinPath:
    """The order in which to pin the quantized nodes of `plan`, on the pictures of `reference`.

    Greedy: the first pin is the one that is believed to leave the least noise in the quantized
    network, by what it leaves there and what it does alone (`towards`), the next that which is
    believed to leave the least behind it, and so on, `limit` of them or until no more than `enough`
    (a part of the noise without pins) is left. For the first every node is asked, in a network of
    many the `LARGEST_SAMPLE` that hurt most in `alone` (noise of nodes that are quantized alone),
    and the others are not in the path; then those that promised most, and the next of `alone`,
    until none that was not asked again promises more (Minoux, Accelerated greedy algorithms, 1978).
    The nodes behind them follow as their gains add up, in noise energy.
    """
    free = [name for name in plan.quantized_nodes if plan.nodes[name].origin != USER]
    order = sorted(free, key=lambda n: (-alone.get(n, 0.0), n))[:LARGEST_SAMPLE]
    if not order:
        return PinPath(0.0)
    network = LeaveOneOut(quantizing, plan, reference)
    start = now = network.noise
    found = network.gains(order, progress=progress)
    gains = dict(zip(order, found, strict=True))
    hurts = {node: _share(alone[node], now) for node in order if node in alone}
    expected, spread = expectations(gains, hurts)
    kept = {node: 1 - towards(gains[node], expected[node], spread) for node in order}
    steps: list[PathStep] = []
    for number in range(min(limit, len(order))):
        if number:
            plan = plan.pin([steps[-1].node], "fp32", "", origin=TUNER)
            network = LeaveOneOut(quantizing, plan, reference)
            now = network.noise
            steps[-1] = replace(steps[-1], noise=now)
            if now <= enough * start:
                break
            asked = _asked_again(network, kept, [n for n in order if n in kept])
            gains |= asked
            kept |= {n: 1 - towards(g, 1 - kept[n], spread) for n, g in asked.items()}
            progress("choose pins", number + 1, min(limit, len(order)))
        best = min(kept, key=lambda n: (kept[n], order.index(n)))
        steps.append(PathStep(best, now * (1 - gains[best].part)))
        del kept[best]
    last = steps[-1].noise if steps else start
    if steps and kept and last > enough * start:
        network = LeaveOneOut(quantizing, plan.pin([steps[-1].node], "fp32", "", origin=TUNER),
                              reference)  # fmt: skip
        rest = list(kept)
        found = network.gains(rest, progress=progress)
        kept |= {n: 1 - towards(g, 1 - kept[n], spread) for n, g in zip(rest, found, strict=True)}
    return PinPath(start, (*steps, *_added_up(last, kept, all_of_them=len(order) == len(free))))


def _share(noise: float, before: float) -> float:
    """What is left of the noise, as a part of that before."""
    if before <= 0 or not math.isfinite(before):
        return 1.0 if noise >= before else 0.0
    return noise / before


def _asked_again(
    network: LeaveOneOut, kept: Mapping[str, float], by_alone: Sequence[str]
) -> dict[str, Gain]:
    """What each of the nodes that may be the best now gains, measured again; `kept` is what is
    believed to be left without each."""
    size = max(usable_cores(), 2)
    waiting = sorted(kept, key=lambda n: kept[n])
    asked: dict[str, Gain] = {}
    for _ in range(CHUNKS):
        first = [n for n in by_alone[:1] if not asked]
        chunk = [*dict.fromkeys([*first, *(n for n in waiting if n not in asked)])][:size]
        if not chunk:
            break
        found = network.gains(chunk)
        asked |= dict(zip(chunk, found, strict=True))
        left = [kept[n] for n in waiting if n not in asked]
        if not left or 1 - max(gain.part for gain in asked.values()) <= left[0]:
            break
    return asked


def _added_up(noise: float, kept: Mapping[str, float], *, all_of_them: bool) -> list[PathStep]:
    """The pins behind those measured, as gains add up; with `all_of_them` nothing is int8."""
    steps = []
    order = sorted(kept, key=lambda n: (kept[n], n))
    for node in order:
        noise = 0.0 if all_of_them and node == order[-1] else noise * min(kept[node], 1.0)
        steps.append(PathStep(node, noise, measured=False))
    return steps


def noise_with(
    quantizing: Quantizing, plan: PrecisionPlan, reference: Reference, pins: Sequence[str]
) -> float:
    """Noise by signal of the group of outputs that suffers most with `pins` in float32."""
    network = quantizing.network(plan.pin(pins, "fp32", "", origin=TUNER))
    session = make_session(
        network.proto, external_dir=network.external_dir, device=quantizing.device
    )
    names = [output.name for output in network.outputs]

    def outputs(batch: int) -> _Outputs:
        found = session.run(names, dict(reference.pictures[batch].feeds))
        return dict(zip(names, found, strict=True))

    return reference.noise(outputs)


@dataclass(frozen=True, slots=True)
class Gains:
    """Noise by signal at the output that suffers most: `start` with every node as planned, `moved`
    with one node in fp8 and the others so."""

    start: float
    moved: Mapping[str, float]

    @property
    def order(self) -> tuple[str, ...]:
        """The nodes that gain, the one that gains most first."""
        gaining = [node for node, noise in self.moved.items() if noise < self.start]
        return tuple(sorted(gaining, key=lambda node: (self.moved[node], node)))

    def first(self, part: float) -> int:
        """The fewest of `order` that have `part` of the sum of their gains.

        >>> Gains(10.0, {"a": 4.0, "b": 7.0, "c": 9.0, "d": 11.0}).first(0.9)
        2
        """
        gained = [self.start - self.moved[node] for node in self.order]
        total, held = sum(gained), 0.0
        for number, gain in enumerate(gained, 1):
            held += gain
            if held >= part * total * (1 - 1e-9):
                return number
        return len(gained)


def float8_gains(
    quantizing: Quantizing,
    plan: PrecisionPlan,
    reference: Reference,
    *,
    progress: Progress = silent,
) -> Gains:
    """What moving each int8 node of `plan` to fp8 does in the quantized network, alone each."""
    nodes = [
        node
        for node in plan.int8_nodes
        if plan.nodes[node].origin != USER and not plan.may(node, FP8)
    ]
    if not nodes:
        return Gains(0.0, {})
    network = LeaveOneOut(quantizing, plan, reference)
    found = in_parallel(network.in_float8, nodes, what="rank fp8", progress=progress)
    return Gains(network.noise, dict(zip(nodes, found, strict=True)))
