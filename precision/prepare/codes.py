"""Weights that carry integer codes: quantizing them again, by max|w| / 127, gives the codes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import weight_axis
from trtune.precision.prepare.affine import add_to_bias
from trtune.precision.prepare.draft import Draft
from trtune.precision.prepare.values import Codes


def with_codes(model: Model, plan: PrecisionPlan, codes: Mapping[str, Codes]) -> Model:
    """`model` whose int8 nodes in `plan` have weights that are codes times max|w| / 127.

    Whatever then quantizes these weights an output channel at a time, this package or TensorRT 10
    by itself, gets `codes`, because each channel's largest code is 127. Nodes that are not int8
    keep weights and bias as they are.
    """
    if not codes:
        return model
    draft = Draft(model)
    for name in plan.int8_nodes:
        node = draft.node(name)
        if len(node.input) > 1 and node.input[1] in codes:
            weights = draft.view.constant(node.input[1])
            held = codes[node.input[1]]
            value = code_values(weights, held.values, weight_axis(node))
            draft.set_constant((name, 1), value)
            if held.bias is not None:
                add_to_bias(draft, name, held.bias.astype(np.float64))
    return draft.finish()


def code_values(
    weights: NDArray[np.floating], codes: NDArray[np.int8], axis: int
) -> NDArray[np.float32]:
    """What `codes` stand for: times max|w| / 127 of each channel along `axis`, float32."""
    steps = channel_steps(weights, axis)
    shape = [1] * weights.ndim
    shape[axis] = -1
    values: NDArray[np.float32] = codes.astype(np.float32) * steps.reshape(shape)
    return values


def channel_steps(weights: NDArray[np.floating], axis: int) -> NDArray[np.float32]:
    """max|w| / 127 of each channel along `axis`; 1 for a channel of zeros. float32."""
    rest = tuple(k for k in range(weights.ndim) if k != axis)
    steps = np.abs(weights).max(axis=rest, initial=0).astype(np.float32) / np.float32(127)
    return np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps)


def readers_of(view: GraphView, plan: PrecisionPlan) -> dict[str, str]:
    """Initializer -> the int8 node that reads it as its weights."""
    nodes = (view.by_name[name] for name in plan.int8_nodes)
    return {node.input[1]: node.name for node in nodes if len(node.input) > 1}
