"""What un-quantizing a node gains, against the whole model lowered again as the oracle."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import tinymodels
from tinyquant import PLACED, Case, case, outputs

from trtune.calibrate.extents import measure
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import held_tensors
from trtune.precision.compare.batches import held_batches
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import place
from trtune.precision.runtime.output_groups import output_groups
from trtune.precision.tune.leave_one_out import (
    LeaveOneOut,
    PinPath,
    Quantizing,
    Reference,
    noise_with,
    pin_path,
)

MODELS = {name: tinymodels.MODELS[name] for name in PLACED}


def reference_of(prepared: Case, count: int = 2) -> Reference:
    size = len(next(iter(prepared.feeds.values())))
    names = tuple(f"p{i}" for i in range(size))
    model = prepared.model.proto
    pictures = [Batch(tinymodels.feeds(model, batch=size, seed=i), names) for i in range(count)]
    return Reference.of(prepared.model, pictures)


def whole(prepared: Case, reference: Reference, pins: tuple[str, ...]) -> float:
    """Noise by signal with `pins`, from the whole model lowered again."""
    plan = prepared.plan.pin(pins, "fp32", "pinned")
    proto = lower_emulate(prepared.model, plan, prepared.table)
    return reference.noise(lambda b: outputs(proto, dict(reference.pictures[b].feeds)))


def path_of(prepared: Case, reference: Reference, limit: int) -> PinPath:
    quantizing = Quantizing.of(prepared.model, prepared.table)
    return pin_path(quantizing, prepared.plan, reference, {}, limit=limit)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_whole_model_with_one_node_in_float(name: str) -> None:
    prepared = case(MODELS[name]())
    reference = reference_of(prepared)
    network = LeaveOneOut(Quantizing.of(prepared.model, prepared.table), prepared.plan, reference)
    assert network.noise == pytest.approx(whole(prepared, reference, ()), rel=1e-3)
    for node in prepared.plan.int8_nodes:
        expected = whole(prepared, reference, (node,))
        assert network.without(node) == pytest.approx(expected, rel=1e-2, abs=1e-9), node


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_a_path_tells_the_noise_of_its_pins(name: str) -> None:
    prepared = case(MODELS[name]())
    reference = reference_of(prepared)
    path = path_of(prepared, reference, 2)
    assert [step.measured for step in path.steps[:2]] == [True, True]
    assert {step.node for step in path.steps} == set(prepared.plan.int8_nodes)
    for count in range(3):
        pins = tuple(step.node for step in path.steps[:count])
        quantizing = Quantizing.of(prepared.model, prepared.table)
        again = noise_with(quantizing, prepared.plan, reference, pins)
        assert path.noises[count] == pytest.approx(again, rel=1e-2)
        assert path.noises[count] == pytest.approx(whole(prepared, reference, pins), rel=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_no_pair_is_much_better_than_the_first_two(name: str) -> None:
    prepared = case(MODELS[name]())
    nodes = prepared.plan.int8_nodes
    if len(nodes) < 3:
        pytest.skip("two pins are all of it")
    reference = reference_of(prepared)
    path = path_of(prepared, reference, 3)
    best = min(whole(prepared, reference, pins) for pins in combinations(nodes, 2))
    assert path.noises[3] <= best * 1.001


def test_nothing_quantized_has_no_path() -> None:
    prepared = case(MODELS["residual"]())
    plan = prepared.plan.pin(prepared.plan.int8_nodes, "fp32", "pinned")
    reference = reference_of(prepared)
    quantizing = Quantizing.of(prepared.model, prepared.table)
    assert pin_path(quantizing, plan, reference, {}, limit=3) == PinPath(0.0)


def test_noise_is_that_of_the_output_that_suffers_most() -> None:
    exact = {"a": np.float32([[3.0, 4.0]]), "b": np.float32([[0.3, 0.4]])}
    groups = output_groups({name: [array] for name, array in exact.items()})
    reference = Reference((), (exact,), groups)
    assert reference.noise(lambda _: exact) == 0.0
    tested = {"a": exact["a"] + np.float32([[0.0, 0.5]]), "b": exact["b"] * 0}
    assert reference.noise(lambda _: tested) == pytest.approx(1.0, rel=1e-6)
    broken = {"a": exact["a"] * np.float32(math.nan), "b": exact["b"]}
    assert reference.noise(lambda _: broken) == math.inf


@pytest.mark.parametrize(("share", "held"), [(0, [1]), (1, [1]), (3, [3]), (100, [4, 2])])
def test_held_pictures_stay_within_memory(share: int, held: list[int]) -> None:
    prepared = case(MODELS["residual"]())
    placement = place(prepared.view, prepared.plan)
    model = prepared.model.proto
    pictures = tuple(Batch(tinymodels.feeds(model, batch=1, seed=i), (f"p{i}",)) for i in range(6))
    tensors = held_tensors(prepared.view, placement)
    extents = measure(model, tensors, pictures[0])
    each = sum(extent.bytes for extent in extents.values())
    found = held_batches(
        prepared.model, prepared.view, placement, pictures, memory=max(share * each, 1)
    )
    assert [len(batch) for batch in found] == held
