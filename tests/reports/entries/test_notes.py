"""Why a target was missed, and what stays in float, in words."""

from __future__ import annotations

import pytest
import tinymodels

from trtune.configs.schema import Target
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.tune.walk import Tuned
from trtune.reports.entries.notes import float_notes, missed_notes


def plan_of(**options: object) -> PrecisionPlan:
    return make_plan(GraphView(tinymodels.depthwise()), **options)  # type: ignore[arg-type]


TOP1 = Target(metric="top1", min=0.9)
DROP = Target(metric="top1", max_drop=0.01)


@pytest.mark.parametrize(
    ("target", "met", "nothing", "quantized", "needed", "fp32", "said"),
    [
        pytest.param(None, False, "", True, 3, 0.5, [], id="no target"),
        pytest.param(TOP1, True, "", True, 3, 0.5, [], id="met"),
        pytest.param(DROP, False, "", True, None, 0.5, [], id="missed, and nothing is known"),
        pytest.param(DROP, False, "all float", True, None, 0.5, ["all float"], id="nothing int8"),
        pytest.param(
            TOP1,
            True,
            "all float",
            True,
            None,
            0.5,
            ["with every node in float"],
            id="met by the FP32 model alone",
        ),
        pytest.param(TOP1, True, "all float", False, None, 0.5, ["all float"], id="by its pins"),
        pytest.param(DROP, False, "", False, None, 0.5, ["no node is quantized"], id="float plan"),
        pytest.param(DROP, False, "", True, 7, 0.5, ["about 7 pins"], id="more pins would do"),
        pytest.param(TOP1, False, "", True, None, 0.85, ["FP32 model itself"], id="FP32 misses"),
        pytest.param(TOP1, False, "", True, None, 0.95, [], id="FP32 meets it"),
        pytest.param(TOP1, False, "", True, 1, 0.85, ["about 1 pin ", "is 85.00"], id="both"),
    ],
)
def test_why_a_target_was_missed(
    target: Target | None,
    met: bool,
    nothing: str,
    quantized: bool,
    needed: int | None,
    fp32: float,
    said: list[str],
) -> None:
    tuned = Tuned(plan_of(), met, (), needed)
    notes = missed_notes(target, tuned, nothing, quantized=quantized, limit=4, fp32=fp32)
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))


def test_what_stays_in_float_is_named_unless_it_was_pinned() -> None:
    nodes = plan_of().compute_nodes
    assert float_notes(plan_of(default="fp32")) == []
    assert float_notes(plan_of(pins={nodes[0]: "fp32"})) == []
    ranges = plan_of().without_int8({nodes[0]: "its range is 0"}, origin="range")
    assert float_notes(ranges) == [f"{nodes[0]} stays fp32: its range is 0"]
