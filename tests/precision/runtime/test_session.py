"""Values of chosen outputs of an onnxruntime session."""

from __future__ import annotations

import time
from threading import Lock

import numpy as np
import onnx
import pytest
import tinymodels

from trtune.calibrate.sessions import SharedWeights
from trtune.precision.runtime.session import (
    ROOM_AT_ONCE,
    RUNS_AT_ONCE,
    ahead,
    make_session,
    named_values,
    runs_at_once,
    threads_each,
)


@pytest.mark.parametrize("names", [[], ["y"], ["relu", "y"]])
def test_only_what_is_named_is_given(names: list[str]) -> None:
    net = tinymodels.Net()
    x = net.op("Relu", net.input("x"), out="relu")
    proto = net.model({net.op("Neg", x, out="y"): tinymodels.PICTURE})
    session = make_session(proto, outputs=["relu"])
    rows = np.full((2, 3, 8, 8), 1.5, np.float32)
    found = named_values(session, names, {"x": rows})
    assert {name: float(value.mean()) for name, value in found.items()} == {
        name: {"relu": 1.5, "y": -1.5}[name] for name in names
    }


def test_parts_of_a_graph_share_its_large_constants() -> None:
    weights = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 4096
    small = np.ones(64, np.float32)
    held = [onnx.numpy_helper.from_array(a, n) for n, a in (("w", weights), ("b", small))]
    shared = SharedWeights(held)
    assert list(shared.values) == ["w"]
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        "part",
        [helper.make_tensor_value_info("x", kind, [None, 64])],
        [helper.make_tensor_value_info("y", kind, [None, 64])],
        [shared.light(tensor) for tensor in held],
    )
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert part.ByteSize() < 1000
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    for _ in range(2):
        session = make_session(part, weights=shared)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weights + small, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_runs_ahead_come_in_order(count: int, device: str) -> None:
    """Later items are done first where they can be."""
    busy, most, lock = 0, 0, Lock()

    def run(item: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.002 * (item % 3))
        with lock:
            busy -= 1
        return item * item

    found = list(ahead(run, range(count), device=device))
    assert found == [(item, item * item) for item in range(count)]
    assert most <= (RUNS_AT_ONCE if device == "cpu" else 1)


@pytest.mark.parametrize(
    ("cores", "run_bytes", "runs", "threads"),
    [
        pytest.param(1, 1000, 1, 1, id="one core"),
        pytest.param(2, 1000, 2, 1, id="two cores"),
        pytest.param(6, 1000, 4, 1, id="six cores"),
        pytest.param(16, 1000, 4, 4, id="no more than four"),
        pytest.param(16, ROOM_AT_ONCE // 3, 3, 5, id="what three take fits"),
        pytest.param(16, ROOM_AT_ONCE + 1, 1, 16, id="not even one fits"),
        pytest.param(16, None, 1, 16, id="nobody knows"),
        pytest.param(2, 0, 2, 1, id="nothing"),
    ],
)
def test_runs_at_once_and_the_threads_of_each(
    monkeypatch: pytest.MonkeyPatch, cores: int, run_bytes: int | None, runs: int, threads: int
) -> None:
    monkeypatch.setattr("trtune.precision.runtime.session.usable_cores", lambda: cores)
    assert runs_at_once("cpu", run_bytes) == runs
    assert threads_each("cpu", runs) == threads
    assert runs_at_once("cuda:0", run_bytes) == 1


def test_what_is_not_asked_for_is_not_run_and_an_error_is_raised_where_it_happens() -> None:
    run: list[int] = []
    for item, _ in ahead(run.append, range(100), device="cpu"):
        if item == 2:
            break
    assert len(run) <= 3 + RUNS_AT_ONCE

    def fails(item: int) -> float:
        return 1 / (2 - item)

    runs = ahead(fails, range(5), device="cpu")
    assert [next(runs), next(runs)] == [(0, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(runs)
