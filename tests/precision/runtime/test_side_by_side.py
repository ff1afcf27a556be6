"""Trials in common batches against the same trials one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray
from tinymodels import Net
from tinyquant import Case, case, named

from trtune.calibrate.sessions import SharedWeights
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import Alone, Change
from trtune.precision.plan.placement import place
from trtune.precision.runtime.side_by_side import ROWS, SideBySide

Array = NDArray[np.float32]


def batches_of(prepared: Case, count: int = 2, size: int = 4) -> list[Batch]:
    names = tuple(f"p{i}" for i in range(size))
    model = prepared.model.proto
    return [Batch(tinymodels.feeds(model, batch=size, seed=i), names) for i in range(count)]


def alone_of(prepared: Case, batches: list[Batch]) -> Alone:
    placement = place(prepared.view, prepared.plan)
    return Alone(prepared.model, prepared.view, placement, batches, in_graph=True)


def beside(prepared: Case, batches: list[Batch]) -> SideBySide:
    placement = place(prepared.view, prepared.plan)
    alone = alone_of(prepared, batches)
    outputs = [output.name for output in prepared.model.outputs]
    stored = []
    for number, batch in enumerate(batches):
        exact = dict(zip(outputs, alone.reference(number), strict=True))
        held = {t: alone.stored(number, t) for t in placement.activations}
        stored.append({**batch.feeds, **held, **exact})
    weights = SharedWeights(prepared.view.initializers.values())
    return SideBySide(prepared.model, weights, placement.activations, stored, "cpu")


SAME = ["conv_relu", "depthwise", "residual", "concat", "silu_se", "mlp", "attention",
        "two_inputs", "two_outputs", "constant_nodes", "opset11"]  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_each_trial_gives_what_it_gives_alone(name: str) -> None:
    prepared = named(name)
    batches = batches_of(prepared)
    alone = alone_of(prepared, batches)
    placement = place(prepared.view, prepared.plan)
    trials = [
        (batch, tensor, prepared.table.scale(tensor) * factor)
        for tensor in placement.activations
        for factor in (0.5, 1.0, 3.0)
        for batch in range(2)
    ]

    def one(trial: tuple[int, str, float]) -> list[Array]:
        batch, tensor, step = trial
        run = alone.session(Change(placement.activations[tensor]), int8=True)
        return run(batch, {tensor: step})

    expected = [one(trial) for trial in trials]
    alone.side_by_side(placement.activations)
    assert alone.shares_batches
    assert alone.trials_at_once >= ROWS // 4
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, trials))
    for (batch, tensor, _), ours, exact in zip(trials, found, expected, strict=True):
        for a, b, whole in zip(ours, exact, alone.reference(batch), strict=True):
            most = 1e-5 * float(np.abs(whole).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=most, err_msg=tensor)
    assert any(
        np.abs(a - b).max() > 1e-4
        for (batch, *_), ours in zip(trials, found, strict=True)
        for a, b in zip(ours, alone.reference(batch), strict=True)
    ), "no trial changed anything"


def test_several_tensors_of_a_range_go_together() -> None:
    prepared = named("residual")
    (batch,) = batches_of(prepared, 1)
    found = beside(prepared, [batch])
    one, other = "relu1", "stem_relu"
    steps = {one: 0.5, other: 0.25}
    both = found.run(0, steps)[0]
    for less in ({one: 0.5}, {other: 0.25}, {}):
        assert not np.array_equal(both, found.run(0, less)[0])


def test_what_waits_runs_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = named("mlp")
    found = beside(prepared, batches_of(prepared, 1))
    first, go = threading.Event(), threading.Event()
    sizes: list[int] = []
    run = found._run

    def slow(batch: int, trials: list[Mapping[str, float]]) -> list[Array]:
        sizes.append(len(trials))
        first.set()
        assert go.wait(30)
        return run(batch, trials)

    monkeypatch.setattr(found, "_run", slow)
    with ThreadPoolExecutor(12) as pool:
        head = pool.submit(found.run, 0, {"input": 0.1})
        assert first.wait(30)
        rest = [pool.submit(found.run, 0, {"input": 0.1 * k}) for k in range(2, 8)]
        until = time.monotonic() + 30
        while len(found._waiting) < 6 and time.monotonic() < until:
            time.sleep(0.001)
        go.set()
        exact = [f.result() for f in (head, *rest)]
    assert sizes == [1, 6]
    assert len({arrays[0].tobytes() for arrays in exact}) == 7


def mixing() -> onnx.ModelProto:
    """Every picture less the mean of its batch."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "a", 3, 8), out="x")
    x = net.op("Sub", x, net.op("ReduceMean", x, out="mean", axes=[0], keepdims=1), out="less")
    return net.head(net.conv(x, "b", 8, 8), 8)


def across() -> onnx.ModelProto:
    """A product whose rows are positions, with the pictures along the second axis."""
    net = Net()
    x = net.op("Transpose", net.input("input", ("N", 6, 16)), out="turned", perm=[1, 0, 2])
    x = net.op("MatMul", x, net.const("w", np.eye(16, dtype=np.float32)), out="m")
    net.op("Transpose", x, out="y", perm=[1, 0, 2])
    return net.model({"y": ("N", 6, 16)})


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (mixing, "follows the others"),
        (across, "along the first axis"),
        (tinymodels.fixed_batch, "cannot run it|along the first axis|a batch holds|has shape"),
    ],
)
def test_networks_whose_pictures_are_not_apart_are_refused(model: object, why: str) -> None:
    assert callable(model)
    prepared = case(model())
    size = 1 if model is tinymodels.fixed_batch else 4
    with pytest.raises(ValueError, match=why):
        beside(prepared, batches_of(prepared, 2, size))
    alone = alone_of(prepared, batches_of(prepared, 2, size))
    placement = place(prepared.view, prepared.plan)
    alone.side_by_side(placement.activations)
    assert not alone.shares_batches
    tensor, edges = next(iter(placement.activations.items()))
    run = alone.session(Change(edges), int8=True)
    assert run(0, {tensor: 0.5})[0].shape == alone.reference(0)[0].shape


def test_batches_of_other_sizes_are_refused() -> None:
    prepared = named("mlp")
    with pytest.raises(ValueError, match="along the first axis"):
        beside(prepared, [*batches_of(prepared, 1, 4), *batches_of(prepared, 1, 3)])


def test_too_large_for_the_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = named("mlp")
    monkeypatch.setattr("trtune.precision.runtime.side_by_side.ROOM", 1000)
    with pytest.raises(ValueError, match="a batch holds"):
        beside(prepared, batches_of(prepared, 1))


def halves() -> onnx.ModelProto:
    """A product in float16 between casts."""
    net = Net()
    x = net.op("Cast", net.input("input", ("N", 16)), out="half", to=onnx.TensorProto.FLOAT16)
    x = net.op("MatMul", x, net.const("w", np.eye(16), np.float16), out="m")
    net.op("Cast", x, out="y", to=onnx.TensorProto.FLOAT)
    return net.model({"y": ("N", 16)})


@pytest.mark.parametrize("value", [np.zeros((4, 2), object), [np.zeros((4, 2), np.float32)]])
def test_what_is_no_array_of_numbers_is_refused(value: object) -> None:
    prepared = named("mlp")
    (batch,) = batches_of(prepared, 1)
    alone = alone_of(prepared, [batch])
    stored = {
        **batch.feeds,
        "relu1": alone.stored(0, "relu1"),
        prepared.model.outputs[0].name: value,
    }
    edges = place(prepared.view, prepared.plan).activations
    weights = SharedWeights(prepared.view.initializers.values())
    with pytest.raises(ValueError, match="array of numbers"):
        SideBySide(prepared.model, weights, edges, [stored], "cpu")  # type: ignore[list-item]


def test_tensors_in_float16_are_refused() -> None:
    prepared = case(halves())
    (batch,) = batches_of(prepared, 1)
    half = batch.feeds["input"].astype(np.float16)
    stored = {**batch.feeds, "half": half, "y": batch.feeds["input"]}
    weights = SharedWeights(prepared.view.initializers.values())
    with pytest.raises(ValueError, match="not all tensors are float32"):
        SideBySide(prepared.model, weights, {"half": [("m", 0)]}, [stored], "cpu")


def test_a_session_that_cannot_be_made_is_refused() -> None:
    """An input of the name that a step would have."""
    net = Net()
    x = net.op("MatMul", net.input("x", ("N", 16)), net.const("w", np.eye(16, dtype=np.float32)),
               out="x/step")  # fmt: skip
    net.op("Neg", x, out="y")
    prepared = case(net.model({"y": ("N", 16)}))
    with pytest.raises(ValueError, match="x/step"):
        beside(prepared, batches_of(prepared, 1))
