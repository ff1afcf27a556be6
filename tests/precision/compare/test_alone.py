"""One thing quantized alone: the rest of the network against the whole model as the oracle."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray
from tinymodels import Net
from tinyquant import (
    PLACED,
    Case,
    case,
    fake,
    fake_weight,
    named,
    numpy_outputs,
    outputs,
)

from trtune.calibrate.table import CalibrationTable
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import (
    Alone,
    Change,
    alone_errors,
    fake_quantize,
    fake_quantize_weights,
    held_tensors,
    in_parallel,
)
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import Placement, place, skip_edge
from trtune.precision.runtime.errors import ErrorSums


@pytest.mark.parametrize(
    ("value", "scale", "expected"),
    [
        (0.5, 1.0, 0.0),
        (1.5, 1.0, 2.0),
        (2.5, 1.0, 2.0),
        (-0.5, 1.0, 0.0),
        (127.4, 1.0, 127.0),
        (500.0, 1.0, 127.0),
        (-127.6, 1.0, -128.0),
        (-500.0, 0.5, -64.0),
        (0.3, 0.25, 0.25),
    ],
)
def test_fake_quantize(value: float, scale: float, expected: float) -> None:
    found = fake_quantize(np.float32([[value]]), scale)
    assert found.dtype == np.float32
    assert found.tolist() == [[expected]]


def test_fake_quantize_is_what_onnxruntime_computes() -> None:
    net = Net()
    x = net.input("x", ("N", 64))
    scale, zero = net.const("s", 0.037), net.const("z", 0, np.int8)
    x = net.op("QuantizeLinear", x, scale, zero, out="q")
    net.op("DequantizeLinear", x, scale, zero, out="y")
    values = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32) * 3
    before = values.copy()
    found = outputs(net.model({"y": ("N", 64)}), {"x": values})["y"]
    np.testing.assert_array_equal(fake_quantize(values, 0.037), found)
    np.testing.assert_array_equal(fake(values, 0.037), found)
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(fake_quantize(values.T, 0.037), found.T)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_fake_quantize_weights(axis: int) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    np.moveaxis(weights, axis, 0)[1] = 0
    np.testing.assert_array_equal(fake_quantize_weights(weights, axis), fake_weight(weights, axis))


# One node alone


def batches_of(prepared: Case, count: int = 2) -> list[Batch]:
    size = len(next(iter(prepared.feeds.values())))
    names = tuple(f"p{i}" for i in range(size))
    model = prepared.model.proto
    return [Batch(tinymodels.feeds(model, batch=size, seed=i), names) for i in range(count)]


def alone_of(prepared: Case, count: int = 2) -> Alone:
    placement = place(prepared.view, prepared.plan)
    return Alone(prepared.model, prepared.view, placement, batches_of(prepared, count))


def only(prepared: Case, node: str) -> onnx.ModelProto:
    """The whole model with nothing but `node` in int8."""
    others = [name for name in prepared.plan.compute_nodes if name != node]
    plan = prepared.plan.pin(others, "fp32", "pinned: not this one")
    return lower_emulate(prepared.model, plan, prepared.table)


def parallel_blocks() -> onnx.ModelProto:
    """Two residual blocks side by side, one without a skip conv, joined, with two outputs."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "stem", 3, 16), out="x")
    left = net.op("Relu", net.op("Add", net.conv(x, "a", 16, 16), x, out="as"), out="ar")
    shortcut = net.conv(x, "skip", 16, 16, 1)
    right = net.op("Add", shortcut, net.conv(x, "b", 16, 16), out="bs")
    right = net.op("Mul", right, net.op("Sigmoid", right, out="gate"), out="br")
    joined = net.op("Concat", left, right, out="joined", axis=1)
    model = net.head(net.conv(joined, "mix", 32, 16, 1), 16)
    info = onnx.helper.make_tensor_value_info("as", onnx.TensorProto.FLOAT, ("N", 16, 8, 8))
    model.graph.output.append(info)
    return model


def captured_only() -> onnx.ModelProto:
    """An If behind a conv, whose branches read a tensor and a weight from before that conv."""
    net = Net()
    before = net.op("Sigmoid", net.input("input", ("N", 4, 6, 6)), out="before")
    x = net.conv(net.op("Tanh", "input", out="t"), "conv", 4, 4)
    net.weight("inside", 4, 1, 1)
    total = net.op("ReduceSum", x, out="total", keepdims=0)
    positive = net.op("Greater", total, net.const("zero", 0.0), out="positive")
    bodies = []
    for name, op, inputs in (("yes", "Sum", [x, before, "inside"]), ("no", "Mul", [x, before])):
        made = onnx.helper.make_tensor_value_info(f"{name}_out", 1, ("N", 4, 6, 6))
        node = onnx.helper.make_node(op, inputs, [f"{name}_out"], name=f"{name}_node")
        bodies.append(onnx.helper.make_graph([node], name, [], [made]))
    net.op("If", positive, out="y", then_branch=bodies[0], else_branch=bodies[1])
    return net.model({"y": ("N", 4, 6, 6)})


MODELS = {
    **{name: tinymodels.MODELS[name] for name in PLACED},
    "parallel": parallel_blocks,
    "captured": captured_only,
}


@pytest.mark.parametrize("name", MODELS)
def test_alone_is_the_whole_model_with_one_node_in_int8(name: str) -> None:
    prepared = case(MODELS[name]())
    found = alone_errors(alone_of(prepared), prepared.view, prepared.plan, prepared.table)
    assert list(found) == list(prepared.plan.int8_nodes)
    for node, sums in found.items():
        whole, each = only(prepared, node), dict[str, ErrorSums]()
        for batch in batches_of(prepared):
            exact = outputs(prepared.model.proto, batch.feeds)
            test = outputs(whole, batch.feeds)
            for tensor, values in exact.items():
                each[tensor] = each.get(tensor, ErrorSums()).add(values, test[tensor])
        expected = min(each.values(), key=lambda sums: sums.sqnr_db)
        assert sums.count == expected.count
        assert sums.noise > 0
        assert sums.noise == pytest.approx(expected.noise, rel=0.02)
        assert sums.signal == pytest.approx(expected.signal, rel=1e-4)


@pytest.mark.parametrize("name", ["residual", "concat", "silu_se", "parallel", "captured"])
def test_the_outputs_are_those_of_the_whole_model(name: str) -> None:
    prepared = case(MODELS[name]())
    alone = alone_of(prepared)
    placement = place(prepared.view, prepared.plan)
    for node in prepared.plan.int8_nodes:
        skip = skip_edge(prepared.view, prepared.plan, prepared.view.by_name[node])
        edges = ((node, 0),) if skip is None else ((node, 0), skip)
        weight, axis = placement.weights[node, 1]
        run = alone.session(Change(edges, (((node, 1), weight, axis),)))
        whole = only(prepared, node)
        tensors = {prepared.view.by_name[n].input[i] for n, i in edges}
        for number, batch in enumerate(batches_of(prepared)):
            changed = {
                t: fake_quantize(alone.stored(number, t), prepared.table.scale(t)) for t in tensors
            }
            expected = outputs(whole, batch.feeds)
            for tensor, values in zip(expected, run(number, changed), strict=True):
                np.testing.assert_allclose(values, expected[tensor], atol=5e-3)


def test_only_a_tensor_is_changed_weights_stay() -> None:
    prepared = named("residual")
    alone = alone_of(prepared)
    placement = place(prepared.view, prepared.plan)
    scales = prepared.table.scales
    for tensor, edges in placement.activations.items():
        run = alone.session(Change(edges))
        for number, batch in enumerate(batches_of(prepared)):
            changed = {tensor: fake_quantize(alone.stored(number, tensor), scales[tensor])}
            expected = numpy_outputs(
                prepared.model.proto, batch.feeds, edges={tensor: edges}, scales=scales
            )
            (found,) = run(number, changed)
            np.testing.assert_allclose(found, expected["logits"], atol=1e-4)


def test_an_unchanged_tensor_gives_the_reference() -> None:
    prepared = case(parallel_blocks())
    alone = alone_of(prepared)
    run = alone.session(Change((("n_b", 0),)))
    for number in range(alone.batches):
        found = run(number, {"x": alone.stored(number, "x")})
        assert len(found) == 2
        for values, exact in zip(found, alone.reference(number), strict=True):
            np.testing.assert_allclose(values, exact, atol=1e-5)


def test_an_output_before_the_change_is_the_reference_itself() -> None:
    prepared = case(parallel_blocks())
    alone = alone_of(prepared)
    run = alone.session(Change((("n_logits", 0),)))
    logits, before = run(0, {"flat": alone.stored(0, "flat") * 0})
    assert np.abs(logits - alone.reference(0)[0]).max() > 0.1
    assert before is alone.reference(0)[1]


def dead_end() -> onnx.ModelProto:
    """A conv whose result goes nowhere, beside one that makes the output."""
    net = Net()
    x = net.op("Relu", net.input("input"), out="x")
    net.conv(x, "dead", 3, 4)
    net.conv(x, "y", 3, 4)
    return net.model({"y": ("N", 4, 8, 8)})


def test_a_change_that_reaches_no_output_changes_nothing() -> None:
    prepared = case(dead_end(), amax={"dead": 1.0})
    found = alone_errors(alone_of(prepared), prepared.view, prepared.plan, prepared.table)
    assert found["n_dead"].noise == 0
    assert found["n_y"].noise > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("conv_relu", {"input", "relu1", "flat"}, id="a chain: only what is changed"),
        pytest.param(
            "residual",
            {"input", "stem_relu", "relu1", "flat", "conv2"},
            id="what the skip input is added to",
        ),
        pytest.param(
            "concat",
            {"input", "squeeze_relu", "left_relu", "right_relu", "max", "flat"},
            id="what a concat reads from beside the changed conv",
        ),
        pytest.param(
            "silu_se",
            {"input", "stem_silu", "se_mean", "se_relu", "flat", "dw_silu"},
            id="what a gate is multiplied with",
        ),
        pytest.param("captured", {"t", "before"}, id="what only a subgraph reads"),
    ],
)
def test_held_tensors(name: str, expected: set[str]) -> None:
    prepared = case(MODELS[name]())
    found = held_tensors(prepared.view, place(prepared.view, prepared.plan))
    assert set(found) == expected
    assert len(found) == len(expected)


def test_sessions_can_be_used_from_several_threads() -> None:
    prepared = named("silu_se")
    alone = alone_of(prepared)
    placement = place(prepared.view, prepared.plan)
    edges = placement.activations["stem_silu"]
    run = alone.session(Change(edges))

    def once(scale: float) -> NDArray[np.float32]:
        changed = {"stem_silu": fake_quantize(alone.stored(0, "stem_silu"), scale)}
        return run(0, changed)[0]

    scales = [0.01 * (1 + i % 8) for i in range(64)]
    expected = [once(scale) for scale in scales]
    with ThreadPoolExecutor(8) as pool:
        for found, value in zip(pool.map(once, scales), expected, strict=True):
            np.testing.assert_array_equal(found, value)


def test_errors_do_not_depend_on_what_runs_beside() -> None:
    prepared = case(parallel_blocks())
    first = alone_errors(alone_of(prepared), prepared.view, prepared.plan, prepared.table)
    again = alone_errors(alone_of(prepared), prepared.view, prepared.plan, prepared.table)
    assert again == first


def test_nothing_in_int8_has_no_errors() -> None:
    prepared = named("nothing_quantizable")
    alone = Alone(prepared.model, prepared.view, Placement({}, {}), batches_of(prepared))
    assert alone_errors(alone, prepared.view, prepared.plan, CalibrationTable({})) == {}
    assert alone.batches == 2


# In parallel


def test_results_come_in_the_order_of_the_tasks_with_progress() -> None:
    seen: list[tuple[str, int, int | None]] = []
    found = in_parallel(
        lambda n: n * n, range(5), what="square", progress=lambda *step: seen.append(step)
    )
    assert found == [0, 1, 4, 9, 16]
    assert seen == [("square", n, 5) for n in range(6)]


def test_what_a_task_raises_comes_out() -> None:
    def task(number: int) -> int:
        if number == 3:
            raise RuntimeError("no")
        return number

    with pytest.raises(RuntimeError, match="no"):
        in_parallel(task, range(100), what="count")


# In the session, as on a GPU


@pytest.mark.parametrize("name", ["conv_relu", "residual", "concat", "silu_se", "attention", "mlp"])
def test_through_int8_in_the_session_gives_the_same_errors(name: str) -> None:
    prepared = named(name)
    placement = place(prepared.view, prepared.plan)
    on_host, inside = (
        Alone(prepared.model, prepared.view, placement, batches_of(prepared), in_graph=g)
        for g in (False, True)
    )
    tensor = next(iter(placement.activations))
    assert inside.through(0, tensor, 0.25) == 0.25
    np.testing.assert_array_equal(
        on_host.through(0, tensor, 0.25), fake_quantize(on_host.stored(0, tensor), 0.25)
    )
    found, expected = (
        alone_errors(alone, prepared.view, prepared.plan, prepared.table)
        for alone in (inside, on_host)
    )
    assert list(found) == list(expected)
    for node, sums in expected.items():
        assert found[node].sqnr_db == pytest.approx(sums.sqnr_db, abs=1e-2), node
