"""Codes for all weights, rounded on what the quantized network feeds them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, takewhile
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.configs.system.machine import one_thread_each, usable_cores
from trtune.datasets.batches import Batch, batch_size, rebatch
from trtune.precision.compare.alone import in_parallel
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import weight_axis
from trtune.precision.prepare.affine import bias_edge
from trtune.precision.prepare.codes import channel_steps
from trtune.precision.prepare.columns import (
    WIDEST,
    grouped,
    moments,
    positions,
    ungrouped,
    weighted_columns,
)
from trtune.precision.prepare.rounding import rounded_codes
from trtune.precision.prepare.values import CORRECT, ROUND_CODES, Codes
from trtune.precision.runtime.session import ahead, make_session, named_values, threads_each

log = logging.getLogger(__name__)

Array = NDArray[Any]

PICTURES = 64
POSITIONS = 32
"""Positions sampled of each picture of a tensor."""

LOUDEST = 8.0
EMPTY: Mapping[str, int] = MappingProxyType({})
SEED = 20231


@dataclass(frozen=True, slots=True)
class Seen:
    """X'X (groups, columns, columns) and the sums of X (groups, columns) over `count` positions."""

    products: NDArray[np.float64]
    sums: NDArray[np.float64]
    count: float

    def plus(self, other: Seen) -> Seen:
        """Both together, in the memory of this one."""
        products, sums = self.products, self.sums
        products += other.products
        sums += other.sums
        return Seen(products, sums, self.count + other.count)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean column vector of each group."""
        return self.sums / self.count

    @property
    def centred(self) -> NDArray[np.float64]:
        """The products less those of the mean."""
        return self.products - self.count * self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True, slots=True)
class Observed:
    """What a few layers of the quantized network meet.

    `seen` are the moments of the columns that an int8 node multiplies its weights with; `samples`
    values of tensors before they are quantized, shape (pictures, positions, channels).
    """

    seen: Mapping[str, Seen]
    samples: Mapping[str, NDArray[np.float32]]


def rounded_weights(
    model: Model,
    plan: PrecisionPlan,
    table: CalibrationTable,
    source: Iterable[Batch],
    *,
    kinds: Sequence[str] = (ROUND_CODES, CORRECT),
    memory: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Codes]:
    """Initializer -> int8 codes for every weight that `plan` quantizes and that can be rounded.

    The inputs are those of the quantized network on at most `PICTURES` pictures of `source`; the
    moments of as many layers as fit `memory` are taken at a time. A weight that several nodes read
    is left out. With bias among `kinds` each code array comes with what its rounding does to the
    mean of the node's output, to be taken from the bias, and rounding looks at the rest only.
    Without round the codes are the nearest.
    """
    view = GraphView.of(model)
    codes: dict[str, Codes] = {}
    for part in observed(
        model, plan, table, source, memory=memory, device=device, progress=progress
    ):
        codes |= rounded_codes_of(view, part.seen, kinds, progress=progress)
    return codes


def rounded_codes_of(
    view: GraphView, seen: Mapping[str, Seen], kinds: Sequence[str], *, progress: Progress = silent
) -> dict[str, Codes]:
    """Initializer -> codes for the weights of the nodes in `seen`; see `rounded_weights`."""
    names = list(seen)

    def one(name: str) -> Codes:
        return _codes(view, name, seen[name], kinds)

    found = in_parallel(one, names, what="round", progress=progress)
    return {view.by_name[n].input[1]: codes for n, codes in zip(names, found, strict=True)}


def observed(
    model: Model,
    plan: PrecisionPlan,
    table: CalibrationTable,
    source: Iterable[Batch],
    *,
    axes: Mapping[str, int] = EMPTY,
    memory: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> Iterator[Observed]:
    """What the int8 nodes of `plan` meet in the quantized network, as many as fit `memory` at a
    time, those that read one tensor together.

    `axes` names the tensors to sample, with the axis of their channels. At most `PICTURES` of
    `source` are looked at. A picture whose values at a node have many times the usual energy counts
    less there, so that it has no more weight than `LOUDEST` usual ones.
    """
    view = GraphView.of(model)
    proto = lower_emulate(model, plan, table)
    inputs = {node.name: node.input[0] for node in proto.graph.node if node.name in plan.nodes}
    names = [name for name in plan.int8_nodes if _columns_of(view, name)]
    parts = _parts(view, names, memory)
    for number, part in enumerate(parts):
        yield _look(
            model, proto, view, {name: inputs[name] for name in part}, axes, source,
            what="look at layers" if len(parts) == 1 else f"look at layers, part {number + 1}",
            device=device, progress=progress,
        )  # fmt: skip


def _columns_of(view: GraphView, name: str) -> int:
    """How many columns a group of the node's weights has; 0 for what is not rounded."""
    node = view.by_name[name]
    if len(view.consumers.get(node.input[1], ())) != 1:
        return 0
    weights = grouped(node, view.constant(node.input[1]))
    width = 0 if weights is None else weights.shape[2]
    return width if width <= WIDEST else 0


def _parts(view: GraphView, names: Sequence[str], memory: int) -> list[list[str]]:
    """`names` in order, so that the moments of each part take at most half of `memory`; those that
    read one tensor in one part."""
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(view.by_name[name].input[0], []).append(name)
    parts: list[list[str]] = []
    room = 0
    for readers in together.values():
        size = 0
        for name in readers:
            node = view.by_name[name]
            weights = grouped(node, view.constant(node.input[1]))
            assert weights is not None
            size += 8 * len(weights) * weights.shape[2] ** 2
            size += 4 * PICTURES * POSITIONS * len(weights) * weights.shape[2]
        if not parts or size > room:
            parts.append([])
            room = memory // 2
        parts[-1] += readers
        room -= size
    return parts


def _look(
    model: Model,
    proto: Any,
    view: GraphView,
    inputs: Mapping[str, str],
    axes: Mapping[str, int],
    source: Iterable[Batch],
    *,
    what: str,
    device: str,
    progress: Progress,
) -> Observed:
    read = {view.by_name[name].input[0] for name in inputs}
    sampled = [tensor for tensor in axes if tensor in read]
    tensors = list(dict.fromkeys([*inputs.values(), *sampled]))
    inner = [t for t in tensors if t not in {i.name for i in model.inputs}]
    session = make_session(
        proto,
        outputs=inner,
        threads=threads_each(device),
        external_dir=model.external_dir,
        device=device,
    )
    sums: dict[str, Seen] = {}
    usual = {name: _Usual() for name in inputs}
    samples: dict[str, list[NDArray[np.float32]]] = {tensor: [] for tensor in sampled}
    rng = np.random.default_rng(SEED)
    size = batch_size(model.inputs, 4)
    progress(what, 0, PICTURES)

    def run(batch: Batch) -> dict[str, Array]:
        return {**batch.feeds, **named_values(session, inner, batch.feeds)}

    whole = takewhile(lambda b: len(b) >= batch_size(model.inputs, 1), rebatch(source, size))
    batches = islice(whole, -(-PICTURES // size))
    for number, (_, values) in enumerate(ahead(run, batches, device=device)):
        for tensor in sampled:
            samples[tensor].append(_sample(values[tensor], axes[tensor], rng))
        _add_moments(
            view, {name: values[tensor] for name, tensor in inputs.items()}, usual, sums, rng
        )
        progress(what, min((number + 1) * size, PICTURES), PICTURES)
    joined = {tensor: np.concatenate(rows) for tensor, rows in samples.items() if rows}
    return Observed(sums, joined)


def _add_moments(
    view: GraphView,
    inputs: Mapping[str, Array],
    usual: Mapping[str, _Usual],
    sums: dict[str, Seen],
    rng: np.random.Generator,
) -> None:
    """Add what each node meets in a batch of its `inputs` to its `sums`, on all cores; what is
    sampled is drawn in the order of the nodes."""
    dims = {name: tuple(view.initializers[view.by_name[name].input[1]].dims) for name in inputs}
    with one_thread_each(), ThreadPoolExecutor(usable_cores()) as pool:
        names = list(inputs)
        counts = list(pool.map(lambda n: usual[n].counts(inputs[n]), names))
        drawn = [positions(view.by_name[n], inputs[n].shape, dims[n], rng) for n in names]

        def one(number: int) -> None:
            name = names[number]
            sampled, total, count = weighted_columns(
                view.by_name[name], inputs[name], dims[name], drawn[number], counts[number]
            )
            found = Seen(moments(sampled), total, count)
            sums[name] = found if name not in sums else sums[name].plus(found)

        list(pool.map(one, range(len(names))))


def _sample(values: Array, axis: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """At most `POSITIONS` of each row of the batch, shape (rows, positions, channels)."""
    if axis == 1 and values.ndim > 2:  # drawn before channels go last: all would have to move
        found = values.reshape(*values.shape[:2], -1)
        found = _drawn(found, 2, rng).transpose(0, 2, 1)
    else:
        rows = np.moveaxis(values, axis, -1).reshape(len(values), -1, values.shape[axis])
        found = _drawn(rows, 1, rng)
    return np.ascontiguousarray(found, np.float32)


def _drawn(values: Array, axis: int, rng: np.random.Generator) -> Array:
    count = values.shape[axis]
    if count <= POSITIONS:
        return values
    return np.take(values, np.sort(rng.choice(count, POSITIONS, replace=False)), axis=axis)


class _Usual:
    """Which rows of a node's input are far louder than what it met so far."""

    def __init__(self) -> None:
        self._energies: list[float] = []

    def counts(self, data: Array) -> NDArray[np.float64]:
        """How many times each row counts: once, unless it is far louder than others."""
        energies = _energies(data.reshape(len(data), -1))
        self._energies += energies.tolist()
        limit = LOUDEST * float(np.median(self._energies))
        loud = (energies > limit) & (limit > 0)
        return np.where(loud, limit / np.where(loud, energies, 1.0), 1.0)


def _energies(rows: Array) -> NDArray[np.float64]:
    """The mean square of each row; in float32 where that holds it: it only says what is loud."""
    with np.errstate(over="ignore"):
        sums = np.array([np.dot(row, row) for row in rows], np.float64)
    if np.isfinite(sums).all():
        found: NDArray[np.float64] = sums / max(rows.shape[1], 1)
        return found
    exact: NDArray[np.float64] = (rows.astype(np.float64) ** 2).mean(axis=1)
    return exact


def _codes(view: GraphView, name: str, seen: Seen, kinds: Sequence[str]) -> Codes:
    node = view.by_name[name]
    weights = view.constant(node.input[1])
    parts = grouped(node, weights)
    assert parts is not None
    steps = channel_steps(weights, weight_axis(node)).reshape(parts.shape[:2])
    corrects = CORRECT in kinds and bias_edge(view, node) is not None
    products = seen.centred if corrects else seen.products
    if ROUND_CODES not in kinds:
        products = np.zeros_like(products)
    values = rounded_codes(parts, products, steps)
    found = np.ascontiguousarray(ungrouped(node, values, weights.shape), np.int8)
    if not corrects:
        return Codes(found)
    lost = parts - values * steps[:, :, None].astype(np.float64)
    return Codes(found, (lost * seen.mean[:, None, :]).sum(axis=2).reshape(-1).astype(np.float32))
