"""Rewrites of channels change nothing in FP32, wherever the factor goes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymodels import Net
from tinyquant import Case, case, op_counts, outputs, set_weight

from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import place
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

PREPARABLE = [
    *("conv_relu", "depthwise", "residual", "concat", "silu_se", "mlp", "attention", "fixed_batch"),
    *("opset11", "shared_weight", "branches", "two_outputs", "dynamic_reshape", "resize"),
]


def affines(prepared: Case, *, shift: bool, seed: int = 0) -> list[Affine]:
    """One for each tensor whose channels can be rewritten, with random factors."""
    view, rng = prepared.view, np.random.default_rng(seed)
    found = []
    for tensor, edges in place(view, prepared.plan).activations.items():
        axis = reader_axis(view, edges)
        if axis is None:
            continue
        channels = input_channels(view, view.by_name[edges[0][0]])
        scale = np.exp(rng.normal(0, 1, channels)).astype(np.float32)
        by = 0.7 if shift and may_shift(view, edges) else 0.0
        found.append(Affine(tensor, edges, scale, by, axis))
    return found


def largest_difference(prepared: Case, draft: Draft) -> float:
    """By the largest output, on random pictures."""
    exact = outputs(prepared.model.proto, prepared.feeds)
    test = outputs(draft.finish().proto, prepared.feeds)
    return max(
        float(np.abs(exact[name] - test[name]).max() / max(np.abs(exact[name]).max(), 1e-6))
        for name in exact
    )


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", PREPARABLE)
def test_nothing_changes_in_fp32(name: str, shift: bool) -> None:
    prepared = case(tinymodels.MODELS[name]())
    draft = Draft(prepared.model)
    done = [apply_affine(draft, affine) for affine in affines(prepared, shift=shift)]
    assert largest_difference(prepared, draft) < 1e-5
    assert not any(done) or draft.changed
    onnx.checker.check_model(draft.finish().proto, full_check=True)


OPS = (
    "conv",
    "depthwise",
    "relu",
    "clip",
    "sigmoid",
    "maxpool",
    "avgpool",
    "split",
    "add_constant",
)


def network(ops: list[tuple[str, int]]) -> onnx.ModelProto:
    """A chain of operators, "split" being two convolutions joined by a concat or an addition."""
    net = Net()
    x, channels = net.input("input"), 3
    for number, (op, choice) in enumerate(ops):
        out = f"t{number}"
        if op == "conv":
            width = 3 + choice
            x = net.conv(x, out, channels, width, 1 + 2 * (choice % 2))
            channels = width
        elif op == "depthwise":
            x = net.conv(x, out, channels, channels, group=channels)
        elif op == "relu":
            x = net.op("Relu", x, out=out)
        elif op == "clip":
            bounds = (net.const(f"lo{number}", 0.0), net.const(f"hi{number}", 6.0))
            x = net.op("Clip", x, *bounds, out=out)
        elif op == "sigmoid":
            gate = net.op("Sigmoid", x, out=f"{out}_gate")
            x = net.op("Mul", x, gate, out=out)
        elif op in ("maxpool", "avgpool"):
            kind = "MaxPool" if op == "maxpool" else "AveragePool"
            x = net.op(kind, x, out=out, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        elif op == "add_constant":
            value = np.linspace(-1, 1, channels)[:, None, None]
            x = net.op("Add", x, net.const(f"c{number}", value), out=out)
        else:
            a = net.conv(x, f"{out}_a", channels, 4, 1)
            b = net.conv(x, f"{out}_b", channels, 4)
            x = (
                net.op("Concat", a, b, out=out, axis=1)
                if choice % 2
                else net.op("Add", a, b, out=out)
            )
            channels = 8 if choice % 2 else 4
    x = net.conv(x, "last", channels, 4, 1)
    return net.model({x: ("N", 4, 8, 8)})


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 3)), min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 99),
)
def test_nothing_changes_in_generated_networks(
    ops: list[tuple[str, int]], shift: bool, seed: int
) -> None:
    prepared = case(network(ops))
    draft = Draft(prepared.model)
    for affine in affines(prepared, shift=shift, seed=seed):
        apply_affine(draft, affine)
    assert largest_difference(prepared, draft) < 1e-5


def one(ops: list[tuple[str, int]], *, shift: float = 0.0) -> tuple[Case, Draft, str | None]:
    """The last tensor of a chain rewritten, which the last convolution reads."""
    prepared = case(network(ops))
    tensor = f"t{len(ops) - 1}"
    edges = place(prepared.view, prepared.plan).activations[tensor]
    channels = input_channels(prepared.view, prepared.view.by_name[edges[0][0]])
    scale = np.ones(channels) if shift else np.linspace(0.5, 2, channels)
    draft = Draft(prepared.model)
    affine = Affine(tensor, edges, scale.astype(np.float32), shift, 1)
    return prepared, draft, apply_affine(draft, affine)


@pytest.mark.parametrize(
    "ops",
    [
        pytest.param([("conv", 1)], id="a convolution"),
        pytest.param([("conv", 1), ("relu", 0)], id="ReLU"),
        pytest.param([("conv", 1), ("relu", 0), ("maxpool", 0)], id="max pool"),
        pytest.param([("conv", 1), ("avgpool", 0)], id="average pool"),
        pytest.param([("split", 1)], id="a concat"),
        pytest.param([("split", 0), ("relu", 0)], id="an addition"),
        pytest.param([("conv", 1), ("add_constant", 0)], id="an added constant"),
    ],
)
def test_factors_are_folded_through(ops: list[tuple[str, int]]) -> None:
    prepared, draft, name = one(ops)
    assert name == f"t{len(ops) - 1}"
    assert op_counts(draft.finish().proto) == op_counts(prepared.model.proto)
    assert largest_difference(prepared, draft) < 1e-5


@pytest.mark.parametrize("ops", [[("conv", 1), ("clip", 0)], [("conv", 1), ("sigmoid", 0)]])
def test_one_product_stays_behind_what_takes_no_factor(ops: list[tuple[str, int]]) -> None:
    prepared, draft, name = one(ops)
    assert name is not None
    assert name.endswith("/scaled")
    added = op_counts(draft.finish().proto) - op_counts(prepared.model.proto)
    assert dict(added) == {"Mul": 1}


def test_nothing_stays_behind_what_only_moves_values() -> None:
    prepared, draft, name = one([("conv", 1), ("sigmoid", 0), ("maxpool", 0)])
    assert name is None
    assert draft.finish() is prepared.model


@pytest.mark.parametrize("activation", ["relu", "clip"])
def test_a_shift_becomes_bounds_of_a_clip(activation: str) -> None:
    prepared, draft, name = one([("conv", 1), (activation, 0)], shift=1.5)
    assert name == "t1"
    proto = draft.finish().proto
    (clip,) = (node for node in proto.graph.node if node.op_type == "Clip")
    view = GraphView.of(draft.finish())
    bounds = [float(view.constant(key)) for key in clip.input[1:]]
    assert bounds == ([-1.5] if activation == "relu" else [-1.5, 4.5])
    assert largest_difference(prepared, draft) < 1e-5


def test_readers_that_pad_are_not_shifted() -> None:
    prepared = case(network([("conv", 0), ("conv", 1)]))  # 1 x 1, then 3 x 3 with padding
    readers = {t: e for t, e in place(prepared.view, prepared.plan).activations.items()}
    assert may_shift(prepared.view, readers["input"])
    assert not may_shift(prepared.view, readers["t0"])
    assert may_shift(prepared.view, readers["t1"])


def test_grouped_weights_by_channel() -> None:
    net = Net()
    net.conv(net.input("input", ("N", 4, 8, 8)), "y", 4, 6, 1, group=2)
    proto = net.model({"y": ("N", 6, 8, 8)})
    weight = next(t.name for t in proto.graph.initializer if len(t.dims) == 4)
    values = np.arange(12, dtype=np.float32).reshape(6, 2, 1, 1)
    set_weight(proto, weight, values)
    prepared = case(proto)
    node = prepared.view.by_name[prepared.view.producer["y"]]
    assert weights_by_channel(prepared.view, node, values).tolist() == [
        *([0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11])
    ]
    by = rescaled(node, values, np.array([1.0, 2.0, 4.0, 8.0]))
    assert by.reshape(6, 2).tolist() == [
        *([0, 0.5], [2, 1.5], [4, 2.5], [1.5, 0.875], [2, 1.125], [2.5, 1.375])
    ]
    assert not is_depthwise(prepared.view, node)
