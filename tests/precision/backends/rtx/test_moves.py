"""What rewrites that stay as nodes cost: made lists of kernels, and engines built for real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tinymodels
from rtxparts import needs_rtx

from trtune.calibrate.table import CalibrationTable
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.rtx.log import Kernel
from trtune.precision.backends.rtx.moves import Listed, around_moves, costly_moves, kernel_list
from trtune.precision.graph.view import GraphView, Model, model_from_proto
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.prepare.affine import Affine
from trtune.precision.runtime.api import Candidate
from trtune.precision.tune.preparing import Move, apply_moves, extended_plan

KNOWN = ["conv1", "silu1", "conv2", "silu2", "conv3"]
AROUND = {"x": ["mul_x", "silu1", "conv2"], "y": ["mul_y", "silu2", "conv3"]}


def kernel(*nodes: str) -> Kernel:
    return Kernel("+".join(nodes), "kgen", (), (), (), nodes)


def engine(*kernels: Sequence[str], floats: Sequence[str] = ()) -> Listed:
    convs = {n: "fp32" if n in floats else "int8" for n in KNOWN if n.startswith("conv")}
    return Listed(convs, tuple(kernel(*nodes) for nodes in kernels))


PLAIN = engine(["conv1"], ["silu1", "x/QuantizeLinear"], ["conv2"], ["silu2"], ["conv3"])


@pytest.mark.parametrize(
    ("after", "dropped"),
    [
        pytest.param(
            engine(["conv1"], ["silu1", "mul_x"], ["conv2"], ["silu2", "mul_y"], ["conv3"]), [],
            id="fused",
        ),
        pytest.param(
            engine(["conv1"], ["silu1"], ["mul_x"], ["conv2"], ["silu2", "mul_y"], ["conv3"]),
            ["x"], id="a Mul in a kernel of its own",
        ),
        pytest.param(
            engine(["conv1"], ["silu1", "mul_x"], ["conv2"], ["silu2", "mul_y"], ["conv3"],
                   floats=["conv3"]),
            ["y"], id="a convolution that went to float",
        ),
        pytest.param(
            engine(["conv1", "silu1"], ["silu1", "mul_x"], ["conv2"], ["silu2", "mul_y"],
                   ["conv3"], ["silu1", "conv2"]),
            ["x"], id="a kernel that does the work of other nodes",
        ),
        pytest.param(
            engine(["conv1"], ["silu1", "mul_x"], ["conv2"], ["silu2", "mul_y"], ["conv3"], []),
            ["x", "y"], id="a kernel more that says nothing of its nodes",
        ),
        pytest.param(
            engine(["conv1"], ["silu1", "mul_x", "conv2"], ["silu2", "mul_y"], ["conv3"]), [],
            id="a kernel less",
        ),
    ],
)  # fmt: skip
def test_who_is_to_blame(after: Listed, dropped: list[str]) -> None:
    planned = ["conv1", "conv2", "conv3"]
    found = costly_moves(PLAIN, after, planned, AROUND, KNOWN)
    assert list(found) == dropped
    assert all(found.values())


def test_what_was_in_float_before_is_nobodys_fault() -> None:
    before = Listed({**PLAIN.precisions, "conv3": "fp32"}, PLAIN.kernels)
    after = Listed(before.precisions, PLAIN.kernels)
    assert costly_moves(before, after, ["conv1", "conv3"], AROUND, KNOWN) == {}


def scaled() -> tuple[Model, PrecisionPlan, Model, dict[str, str]]:
    """A net with SiLU, and the same with every tensor behind one scaled by a Mul that stays."""
    model = model_from_proto(tinymodels.silu_se())
    view = GraphView.of(model)
    plan = make_plan(view)
    edges = place(view, plan).activations["stem_silu"]
    width = view.constant(view.by_name["n_stem"].input[1]).shape[0]
    factors = np.geomspace(0.5, 2, width).astype(np.float32)
    rewritten, moved = apply_moves(model, [Move(Affine("stem_silu", edges, factors, 0.25, 1), 1.0)])
    assert [entry.folded for entry in moved] == [False]
    return model, plan, rewritten, {entry.tensor: entry.name for entry in moved}


def test_the_nodes_around_a_move() -> None:
    model, _, rewritten, moved = scaled()
    known = [node.name for node in GraphView.of(model).nodes]
    view = GraphView.of(rewritten)
    added = [node.name for node in view.nodes if node.name not in known]
    around = around_moves(view, known, moved)
    assert len(added) == 2  # a Mul and an Add
    assert {*around["stem_silu"]} == {*added, view.producer["stem_silu"], "n_dw"}


@needs_rtx
def test_a_mul_behind_silu_costs_nothing_in_a_real_engine(tmp_path: Path) -> None:
    model, plan, rewritten, moved = scaled()
    view = GraphView.of(rewritten)
    longer = extended_plan(plan, view)
    backend = RtxBackend(compute_capabilities=["8.9"])
    engines = []
    for number, (net, planned) in enumerate(((model, plan), (rewritten, longer))):
        tensors = place(GraphView.of(net), planned).activations
        table = CalibrationTable(dict.fromkeys(tensors, 0.05))
        (tmp_path / str(number)).mkdir()
        candidate = Candidate(net, planned, table)
        engines.append(kernel_list(candidate, backend, tmp_path / str(number)))
    known = [node.name for node in GraphView.of(model).nodes]
    around = around_moves(view, known, moved)
    before, after = engines
    assert costly_moves(before, after, longer.int8_nodes, around, known) == {}
    assert len(before.kernels) == len(after.kernels) > 0
    # a real list with a made fault: the Mul in a kernel that is its own
    (mul,) = (n.name for n in view.nodes if n.op_type == "Mul" and n.name not in known)
    bad = Listed(after.precisions, (*after.kernels, kernel(mul)))
    assert list(costly_moves(before, bad, longer.int8_nodes, around, known)) == ["stem_silu"]
    # and without INT8 behind it
    lost = Listed({**after.precisions, "n_dw": "fp32"}, after.kernels)
    found = costly_moves(before, lost, longer.int8_nodes, around, known)
    assert found == {"stem_silu": "n_dw is in fp32 instead of int8"}
