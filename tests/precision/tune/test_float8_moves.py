"""The cheap rung: which nodes move to fp8, and how that goes on with pins that cost speed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tinymodels
from tinymodels import Net
from tinyquant import Case, case

from trtune.datasets.batches import Batch
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.tune.ladder import move_to_float8, onwards, outranks, tune
from trtune.precision.tune.leave_one_out import (
    Gains,
    Quantizing,
    Reference,
    float8_gains,
    noise_with,
)
from trtune.precision.tune.walk import Score, Step, Tuned


def spread() -> Case:
    """A network whose second convolution reads channels that differ by a factor of 3000."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "conv1", 3, 8), out="relu1")
    gains = np.geomspace(1, 3000, 8).reshape(1, 8, 1, 1)
    x = net.op("Mul", x, net.const("gains", gains), out="spread")
    net.initializers.append(
        tinymodels.numpy_helper.from_array(
            (np.random.default_rng(4).standard_normal((8, 8, 3, 3)) / gains / 8).astype(np.float32),
            "conv2_w",
        )
    )
    x = net.op("Conv", x, "conv2_w", out="conv2", kernel_shape=[3, 3], pads=[1] * 4)
    return case(net.head(x, 8), batch=8)


def reference_of(found: Case) -> Reference:
    batch = Batch(dict(found.feeds), tuple(f"p{k}" for k in range(8)))
    return Reference.of(found.model, [batch])


def test_what_fp8_gains_is_what_the_network_with_it_loses_less() -> None:
    found = spread()
    quantizing = Quantizing.of(found.model, found.table)
    reference = reference_of(found)
    gains = float8_gains(quantizing, found.plan, reference)
    assert set(gains.moved) == set(found.plan.int8_nodes)
    assert gains.start == pytest.approx(noise_with(quantizing, found.plan, reference, []), rel=1e-3)
    for node in ("n_conv2", "n_conv1"):
        moved = found.plan.pin([node], "fp8", "", origin=TUNER)
        exact = noise_with(quantizing, moved, reference, [])
        assert gains.moved[node] == pytest.approx(exact, rel=1e-3)
    assert gains.order[0] == "n_conv2"
    assert gains.moved["n_conv2"] < 0.5 * gains.start


def test_pins_of_the_user_are_not_moved() -> None:
    found = spread()
    plan = make_plan(found.view, pins={"n_conv2": "int8"})
    gains = float8_gains(Quantizing.of(found.model, found.table), plan, reference_of(found))
    assert "n_conv2" not in gains.moved
    floats = make_plan(found.view, pins={"re:.*": "fp32"})
    empty = float8_gains(Quantizing.of(found.model, found.table), floats, reference_of(found))
    assert empty.moved == {}


GAINS = Gains(10.0, {"n_conv1": 9.5, "n_conv2": 5.0, "n_logits": 11.0})


@pytest.mark.parametrize(("part", "count"), [(0.5, 1), (0.9, 1), (0.95, 2), (1.0, 2)])
def test_the_fewest_nodes_with_a_part_of_the_gain(part: float, count: int) -> None:
    assert GAINS.order == ("n_conv2", "n_conv1")
    assert GAINS.first(part) == count


def by_nodes(plan: PrecisionPlan, values: dict[tuple[str, ...], float], at: float = 1e9) -> (
    Callable[[PrecisionPlan], Score]
):  # fmt: skip
    def evaluate(asked: PrecisionPlan) -> Score:
        value = values[asked.fp8_nodes]
        return Score(value, value >= at, noise=-value)

    return evaluate


PLAN = make_plan(case(tinymodels.conv_relu()).view)
ONE, TWO = ("n_conv2",), ("n_conv1", "n_conv2")
ALL = ("n_conv1", "n_conv2", "n_logits")


@pytest.mark.parametrize(
    ("values", "at", "best", "steps"),
    [
        pytest.param({(): 1, ONE: 3, TWO: 4, ALL: 2}, 9, TWO, 4, id="the best of all"),
        pytest.param({(): 1, ONE: 3, TWO: 2, ALL: 5}, 9, ALL, 4, id="all, against the noise"),
        pytest.param({(): 4, ONE: 3, TWO: 2, ALL: 1}, 9, (), 4, id="none is better"),
        pytest.param({(): 1, ONE: 9, TWO: 0, ALL: 0}, 9, ONE, 2, id="the first that is enough"),
    ],
)
def test_sets_are_measured_until_one_is_enough(
    values: dict[tuple[str, ...], float], at: float, best: tuple[str, ...], steps: int
) -> None:
    evaluate = by_nodes(PLAN, values, at)
    found = move_to_float8(PLAN, GAINS, evaluate, start=evaluate(PLAN))
    assert found.plan.fp8_nodes == best
    assert found.met == (values[best] >= at)
    assert len(found.steps) == steps
    assert found.chosen.moved == best
    assert all(step.pinned == () for step in found.steps)


def test_a_plan_that_meets_the_target_is_left_alone() -> None:
    found = move_to_float8(PLAN, GAINS, lambda plan: pytest.fail("asked"), start=Score(5, True))
    assert found.plan == PLAN
    assert [step.action for step in found.steps] == ["start"]


def test_no_more_plans_are_measured_than_may_be() -> None:
    evaluate = by_nodes(PLAN, {(): 1, ONE: 3, TWO: 4, ALL: 2})
    found = move_to_float8(PLAN, GAINS, evaluate, start=evaluate(PLAN), evaluations=2)
    assert len(found.steps) == 2
    assert found.plan.fp8_nodes == ONE


@pytest.mark.parametrize(
    ("score", "than", "better"),
    [
        (Score(1, True), Score(9, False), True),
        (Score(1, False), Score(9, True), False),
        (Score(2, False), Score(1, False), True),
        (Score(2.0, False, error=1.5, noise=3.0), Score(1.0, False, error=1.5, noise=2.0), False),
        (Score(2.0, False, error=0.5, noise=3.0), Score(1.0, False, error=0.5, noise=2.0), True),
    ],
)
def test_within_a_standard_error_noise_decides(score: Score, than: Score, better: bool) -> None:
    assert outranks(score, than) == better


def test_pins_that_cost_speed_come_on_top() -> None:
    moved = PLAN.pin(ONE, "fp8", "", origin=TUNER)
    first = Tuned(moved, False, (Step("start", (), Score(1, False), 0, ""),
                                 Step("move", (), Score(3, False), 0, "", ONE)))  # fmt: skip

    def evaluate(plan: PrecisionPlan) -> Score:
        value = (
            3 + 2 * (plan.precision("n_conv2") == "fp32") + (plan.precision("n_logits") == "fp32")
        )
        return Score(value, value >= 5)

    then = tune(
        moved, [("n_conv2", "worst"), ("n_logits", "next")], evaluate, max_pins=4,
        precisions=("fp32",),
    )  # fmt: skip
    whole = onwards(first, then)
    assert whole.met
    assert [step.action for step in whole.steps] == ["start", "move", "pin"]
    assert whole.plan.precision("n_conv2") == "fp32"
    assert whole.chosen.pinned == ("n_conv2",)
    assert whole.chosen.moved == ()


def test_the_better_walk_is_kept_where_neither_is_enough() -> None:
    moved = PLAN.pin(ONE, "fp8", "", origin=TUNER)
    first = Tuned(moved, False, (Step("start", (), Score(1, False), 0, ""),
                                 Step("move", (), Score(3, False), 0, "", ONE)))  # fmt: skip
    worse = moved.pin(["n_logits"], "fp32", "", origin=TUNER)
    then = Tuned(worse, False, (Step("start", (), Score(3, False), 0, ""),
                                Step("pin", ("n_logits",), Score(2, False), 0, "")))  # fmt: skip
    whole = onwards(first, then)
    assert whole.plan == moved
    assert whole.chosen.moved == ONE
    assert len(whole.steps) == 3


def test_the_lowered_network_has_both() -> None:
    found = case(tinymodels.conv_relu())
    plan = found.plan.pin(ONE, "fp8", "", origin=TUNER)
    proto = lower_emulate(found.model, plan, found.table)
    kinds = {t.data_type for t in proto.graph.initializer if t.name.endswith("zero_point")}
    assert kinds == {3, 17}
