"""Codes for all weights, rounded on what the quantized network feeds them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch, batch_size, rebatch
from trtune.precision.compare.alone import in_parallel
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import weight_axis
from trtune.precision.prepare.affine import bias_edge
from trtune.precision.prepare.codes import channel_steps
from trtune.precision.prepare.columns import WIDEST, columns, grouped, moments, ungrouped
from trtune.precision.prepare.rounding import rounded_codes
from trtune.precision.prepare.values import CORRECT, ROUND_CODES, Codes
from trtune.precision.runtime.session import make_session, named_values

log = logging.getLogger(__name__)

Array = NDArray[Any]

PICTURES = 64
SEED = 20231


@dataclass(frozen=True, slots=True)
class Seen:
    """X'X (groups, columns, columns) and the sums of X (groups, columns) over `count` positions."""

    products: NDArray[np.float64]
    sums: NDArray[np.float64]
    count: int

    def plus(self, other: Seen) -> Seen:
        """Both together."""
        return Seen(
            self.products + other.products, self.sums + other.sums, self.count + other.count
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean column vector of each group."""
        return self.sums / self.count

    @property
    def centred(self) -> NDArray[np.float64]:
        """The products less those of the mean."""
        return self.products - self.count * self.mean[:, :, None] * self.mean[:, None, :]


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
    proto = lower_emulate(model, plan, table)
    inputs = {node.name: node.input[0] for node in proto.graph.node if node.name in plan.nodes}
    names = [name for name in plan.int8_nodes if _columns_of(view, name)]
    codes: dict[str, Codes] = {}
    parts = _parts(view, names, memory)
    for number, part in enumerate(parts):
        sums = _moments(
            model, proto, view, {name: inputs[name] for name in part}, source,
            what="round weights" if len(parts) == 1 else f"round weights, part {number + 1}",
            device=device, progress=progress,
        )  # fmt: skip

        def one(name: str, sums: Mapping[str, Seen] = sums) -> Codes:
            return _codes(view, name, sums[name], kinds)

        found = in_parallel(one, [n for n in part if n in sums], what="round", progress=progress)
        for name, value in zip([n for n in part if n in sums], found, strict=True):
            codes[view.by_name[name].input[1]] = value
    return codes


def _columns_of(view: GraphView, name: str) -> int:
    """How many columns a group of the node's weights has; 0 for what is not rounded."""
    node = view.by_name[name]
    if len(view.consumers.get(node.input[1], ())) != 1:
        return 0
    weights = grouped(node, view.constant(node.input[1]))
    width = 0 if weights is None else weights.shape[2]
    return width if width <= WIDEST else 0


def _parts(view: GraphView, names: Sequence[str], memory: int) -> list[list[str]]:
    """`names` in order, so that the moments of each part take at most half of `memory`."""
    parts: list[list[str]] = []
    room = 0
    for name in names:
        node = view.by_name[name]
        weights = grouped(node, view.constant(node.input[1]))
        assert weights is not None
        size = 8 * len(weights) * weights.shape[2] ** 2
        if not parts or size > room:
            parts.append([])
            room = memory // 2
        parts[-1].append(name)
        room -= size
    return parts


def _moments(
    model: Model,
    proto: Any,
    view: GraphView,
    inputs: Mapping[str, str],
    source: Iterable[Batch],
    *,
    what: str,
    device: str,
    progress: Progress,
) -> dict[str, Seen]:
    tensors = list(dict.fromkeys(inputs.values()))
    inner = [t for t in tensors if t not in {i.name for i in model.inputs}]
    session = make_session(
        proto,
        outputs=inner,
        threads=usable_cores(),
        external_dir=model.external_dir,
        device=device,
    )
    sums: dict[str, Seen] = {}
    rng = np.random.default_rng(SEED)
    size = batch_size(model.inputs, 4)
    for number, batch in enumerate(islice(rebatch(source, size), -(-PICTURES // size))):
        if len(batch) < batch_size(model.inputs, 1):
            break
        values = named_values(session, inner, batch.feeds)
        for name, tensor in inputs.items():
            node = view.by_name[name]
            data = values[tensor] if tensor in values else batch.feeds[tensor]
            shape = tuple(view.constant(node.input[1]).shape)
            sampled = columns(node, data, shape, rng)
            total = sampled.sum(axis=1, dtype=np.float64)
            found = Seen(moments(sampled), total, sampled.shape[1])
            sums[name] = sums[name].plus(found) if name in sums else found
        progress(what, min((number + 1) * size, PICTURES), PICTURES)
    return sums


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
