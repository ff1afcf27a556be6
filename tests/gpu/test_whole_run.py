"""Every stage of a run on the GPU through onnxruntime, against the same run on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from gpuparts import require_onnxruntime_gpu
from tinyquant import named

from trtune.calibrate.sessions import gpu_name
from trtune.datasets.batches import Batch
from trtune.datasets.wrapped import HeldBatches
from trtune.doctor import DEVICE, diagnose
from trtune.precision.compare.alone import Alone, Change, alone_errors
from trtune.precision.compare.layers import compare_layers
from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.session import make_session

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda() -> str:
    """The device; skips, or fails where it is required, if onnxruntime cannot use it."""
    return require_onnxruntime_gpu()


EVERYTHING = (
    "calibration.method=auto",
    "calibration.prepare=auto",
    "calibration.holdout=8",
    "precision.target={metric: sqnr_db, min: 60}",
    "precision.max_pins=2",
)


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_a_whole_run_gives_what_the_cpu_gives(name: str, project: Callable[[str], Any]) -> None:
    tiny = project(name)
    found = {d: tiny.run(*EVERYTHING, f"runtime.device={d}") for d in ("cpu", "cuda")}
    cpu, gpu = found["cpu"], found["cuda"]
    assert gpu.calibration.tensors == cpu.calibration.tensors
    values = {d: {v.name: v.sqnr_db for v in r.variants} for d, r in found.items()}
    assert values["cuda"].keys() == values["cpu"].keys()
    for variant, value in values["cpu"].items():
        if value is not None and np.isfinite(value):
            assert values["cuda"][variant] == pytest.approx(value, abs=1.5), variant


def test_the_gpu_is_in_the_key_of_what_it_computed(
    project: Callable[[str], Any], tmp_path: Path
) -> None:
    tiny = project("residual")
    record = tiny.run(*EVERYTHING, "runtime.device=cuda")
    folders = tiny.folder.glob(f"runs/*{record.key[:8]}*/stages/calibrate.json")
    assert any(gpu_name("cuda") in path.read_text() for path in folders)


def test_half_and_layers_run_there_too(project: Callable[[str], Any]) -> None:
    tiny = project("conv_relu")
    record = tiny.run("precision.default=fp16", "runtime.device=cuda")
    assert record.status == "met"


def test_what_is_fed_behind_a_change_is_what_the_cpu_computes() -> None:
    model = model_from_proto(tinymodels.residual())
    view = GraphView.of(model)
    placement = place(view, make_plan(view))
    feeds = tinymodels.feeds(model.proto, batch=4)
    pictures = [Batch(feeds, ("a", "b", "c", "d"))]
    outputs = {}
    for device in ("cpu", "cuda"):
        alone = Alone(model, view, placement, pictures, device=device)
        tensor, edges = next(iter(placement.activations.items()))
        run = alone.session(Change(edges))
        outputs[device] = run(0, {tensor: np.zeros_like(alone.stored(0, tensor))})
    for on_cpu, on_gpu in zip(outputs["cpu"], outputs["cuda"], strict=True):
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)


def test_what_goes_through_int8_there_is_what_the_cpu_computes() -> None:
    prepared = named("residual")
    placement = place(prepared.view, prepared.plan)
    pictures = [Batch(dict(prepared.feeds), tuple("abcd"))]
    errors = {}
    for device in ("cpu", "cuda"):
        alone = Alone(
            prepared.model, prepared.view, placement, pictures,
            device=device, in_graph=device == "cuda",
        )  # fmt: skip
        errors[device] = alone_errors(alone, prepared.view, prepared.plan, prepared.table)
    assert list(errors["cuda"]) == list(errors["cpu"])
    for node, sums in errors["cpu"].items():
        assert errors["cuda"][node].sqnr_db == pytest.approx(sums.sqnr_db, abs=0.5), node


@pytest.mark.parametrize("name", ["residual", "silu_se", "attention", "two_inputs"])
def test_trials_share_batches_there_and_give_what_they_give_alone(name: str) -> None:
    prepared = named(name)
    placement = place(prepared.view, prepared.plan)
    pictures = [Batch(dict(prepared.feeds), tuple("abcd"))]
    alone = Alone(prepared.model, prepared.view, placement, pictures, device="cuda")
    trials = [(t, prepared.table.scale(t) * f) for t in placement.activations for f in (0.5, 2)]

    def one(trial: tuple[str, float]) -> list[Any]:
        tensor, step = trial
        run = alone.session(Change(placement.activations[tensor]), int8=True)
        return run(0, {tensor: step})

    apart = [one(trial) for trial in trials]
    alone.side_by_side(placement.activations)
    assert alone.shares_batches
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, trials))
    for trial, found, expected in zip(trials, together, apart, strict=True):
        for a, b in zip(found, expected, strict=True):
            most = 1e-4 * float(np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=most, err_msg=str(trial))


def test_layers_are_compared_there_as_on_the_cpu() -> None:
    prepared = named("silu_se")
    model = prepared.model.proto
    lowered = lower_emulate(prepared.model, prepared.plan, prepared.table)
    tensors = [name for node in model.graph.node for name in node.output]
    found = {
        device: compare_layers(model, lowered, tensors, held(prepared.feeds), pictures=4,
                               device=device, in_graph=device == "cuda")
        for device in ("cpu", "cuda")
    }  # fmt: skip
    assert list(found["cuda"].errors) == list(found["cpu"].errors)
    for name, sums in found["cpu"].errors.items():
        assert found["cuda"].errors[name].count == sums.count
        if np.isfinite(sums.sqnr_db) and sums.sqnr_db < 60:
            assert found["cuda"].errors[name].sqnr_db == pytest.approx(sums.sqnr_db, abs=0.5), name


def held(feeds: Mapping[str, Any]) -> HeldBatches:
    return HeldBatches((Batch(dict(feeds), tuple("abcd")),))


def test_pairs_are_rounded_as_on_the_cpu() -> None:
    """QuantizeLinear and DequantizeLinear of CUDA's provider: the same codes, halves included."""
    x = np.linspace(-3, 3, 20001, dtype=np.float32).reshape(1, -1)
    scale = np.float32(1 / 64)
    helper = onnx.helper
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "pair",
        [helper.make_tensor_value_info("x", kind, [1, x.size])],
        [helper.make_tensor_value_info("y", kind, [1, x.size])],
        [onnx.numpy_helper.from_array(scale, "s"), onnx.numpy_helper.from_array(np.int8(0), "z")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 13)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=8)
    found = [make_session(proto, device=d).run(None, {"x": x})[0] for d in ("cpu", "cuda")]
    np.testing.assert_array_equal(found[0], found[1])


def test_the_doctor_names_the_gpu() -> None:
    state = diagnose()[DEVICE]
    assert state.usable
    assert state.reason == gpu_name("cuda:0")
