"""TensorRT 10 or 11 on a real GPU: each thing that this project says about its engines, shown.

Strong typing is tested on both versions, weak typing (flags, calibrators, OBEY) on 10.x.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels

import trtune
from trtune.configs.errors import DataError, TrtuneError
from trtune.datasets.batches import Batch
from trtune.precision.backends.gpu.engine import TrtEngine
from trtune.precision.backends.gpu.runtime import DeviceProperties, device_properties
from trtune.precision.backends.trt.backend import TensorRTBackend
from trtune.precision.backends.trt.build import Settings
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import BuildInfo, Candidate

pytestmark = pytest.mark.gpu

MODELS = [
    *("conv_relu", "depthwise", "residual", "concat", "silu_se", "mlp", "attention", "resize"),
    *("dynamic_reshape", "two_inputs", "int64_input", "two_outputs", "fixed_batch"),
]
FP32 = "precision.default=fp32"
STRONG, WEAK = "{name: tensorrt, typing: strong}", "{name: tensorrt, typing: weak}"
EMULATE = "{name: onnxruntime, lowering: emulate}"
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@pytest.fixture(params=[STRONG, WEAK], ids=["strong", "weak"])
def backend(request: pytest.FixtureRequest, trt: ModuleType) -> str:
    """A typing that the installed version has."""
    if request.param == WEAK and not hasattr(trt.BuilderFlag, "INT8"):
        pytest.skip(f"TensorRT {trt.__version__} has no weak typing")
    chosen: str = request.param
    return chosen


@pytest.fixture
def weak(trt: ModuleType) -> ModuleType:
    """TensorRT with calibrators."""
    if not hasattr(trt, "IInt8EntropyCalibrator2"):
        pytest.skip(f"TensorRT {trt.__version__} has no calibrators")
    return trt


def engine_of(trt: ModuleType, info: BuildInfo) -> TrtEngine:
    assert info.path is not None, info.reason
    return TrtEngine(trt, info.path)


def planned_int8(info: BuildInfo, proto: onnx.ModelProto) -> set[str]:
    """Nodes that the run's plan.json wants in int8."""
    assert info.path is not None
    plan = json.loads((info.path.parent.parent / "plan.json").read_text("utf-8"))
    names = {node.name for node in proto.graph.node if node.op_type in WEIGHTED}
    return {n for n, a in plan["nodes"].items() if n in names and a["precision"] == "int8"}


# engines run, and FP32 is FP32


@pytest.mark.parametrize("name", MODELS)
def test_an_fp32_engine_computes_what_onnxruntime_does(
    trt: ModuleType, project: Callable[[str], Any], name: str
) -> None:
    here = project(name)
    feeds = here.feeds(1 if name == "fixed_batch" else 4)
    reference = here.reference(feeds)
    with engine_of(trt, here.build(STRONG, FP32)) as engine:
        found = engine.infer(feeds)
    assert set(found) == set(reference)
    for tensor, expected in reference.items():
        assert found[tensor].dtype == expected.dtype
        error = np.abs(found[tensor] - expected).mean() / max(np.abs(expected).mean(), 1e-30)
        assert error < 1e-5, f"{tensor}: TF32 or something else is on: {error:.2e}"


@pytest.mark.parametrize(("precision", "least"), [("fp16", 45.0), ("bf16", 30.0)])
def test_half_precision_is_close_and_is_what_the_engine_has(
    trt: ModuleType, project: Callable[[str], Any], sqnr: Any, precision: str, least: float
) -> None:
    here = project("residual")
    info = here.build(STRONG, f"precision.default={precision}")
    assert precision in info.precisions.values()
    with engine_of(trt, info) as engine:
        found = engine.infer(here.feeds())
    assert sqnr(here.reference(here.feeds()), found) > least


def test_a_dynamic_batch_runs_at_every_size_of_its_profile_and_no_other(
    trt: ModuleType, project: Callable[[str], Any]
) -> None:
    here = project("conv_relu")
    shapes = "model.shapes={input: {min: [1, 3, 8, 8], opt: [4, 3, 8, 8], max: [6, 3, 8, 8]}}"
    with engine_of(trt, here.build(STRONG, FP32, shapes)) as engine:
        assert engine.inputs[0].shape == (None, 3, 8, 8)
        for count in (6, 1, 4):
            feeds = here.feeds(count)
            np.testing.assert_allclose(
                engine.infer(feeds)["logits"], here.reference(feeds)["logits"], atol=1e-4
            )
        with pytest.raises(DataError, match=r"from \[1, 3, 8, 8\] to \[6, 3, 8, 8\]"):
            engine.infer(here.feeds(7))


def test_engines_give_back_their_memory(trt: ModuleType, project: Callable[[str], Any]) -> None:
    here = project("conv_relu")
    info, feeds, free = here.build(STRONG, FP32), here.feeds(8), []
    for _ in range(10):
        with engine_of(trt, info) as engine:
            engine.infer(feeds)
            engine.latency(feeds, warmup=1, runs=2)
        free.append(device_properties().free_bytes)
    assert free[-1] >= free[2] - (8 << 20), "the first ones also load libraries"


def test_doctor_finds_it_usable(trt: ModuleType) -> None:
    found = trtune.diagnose()["tensorrt"]
    assert found.usable, found.reason
    assert found.version == trt.__version__


# precision: what is planned is what runs


@pytest.mark.parametrize("name", ["conv_relu", "residual", "concat", "mlp"])
def test_every_planned_int8_node_is_int8_or_is_named(
    trt: ModuleType, project: Callable[[str], Any], name: str
) -> None:
    here = project(name)
    info = here.build(STRONG)
    planned = planned_int8(info, here.proto)
    assert planned
    named = {line.partition(":")[0] for line in info.not_honoured}
    elsewhere = {n for n in planned if info.precisions[n] != "int8"}
    assert elsewhere <= named, f"neither int8 nor named: {elsewhere - named}"
    assert len(elsewhere) < len(planned)


@pytest.mark.parametrize(
    ("name", "pin"),
    [("residual", "n_conv1"), ("conv_relu", "n_conv2"), ("mlp", "n_fc2"), ("concat", "n_right")],
)
def test_a_pin_is_honoured_in_the_engine_inspector(
    backend: str, project: Callable[[str], Any], name: str, pin: str
) -> None:
    here = project(name)
    info = here.build(backend, f"precision.pin={{{pin}: fp32}}")
    assert info.precisions[pin] == "fp32"
    assert not any(line.startswith(f"{pin}:") for line in info.not_honoured)


def test_all_pinned_is_fp32_to_the_last_bit_of_float(
    trt: ModuleType, project: Callable[[str], Any], backend: str
) -> None:
    here = project("residual")
    info = here.build(backend, 'precision.pin={"op:Conv": fp32, "op:Gemm": fp32}')
    with engine_of(trt, info) as engine:
        found = engine.infer(here.feeds())["logits"]
    np.testing.assert_allclose(found, here.reference(here.feeds())["logits"], atol=1e-4)


# three ways: FP32, Q/DQ in onnxruntime, the engine


@pytest.mark.parametrize("name", ["conv_relu", "residual", "concat", "depthwise", "mlp"])
def test_the_engine_does_the_arithmetic_of_the_qdq_model(
    trt: ModuleType, project: Callable[[str], Any], sqnr: Any, name: str
) -> None:
    here = project(name)
    feeds = here.feeds(8)
    emulated = here.build(EMULATE)
    qdq = tinymodels.run(onnx.load(emulated.path), feeds)
    with engine_of(trt, here.build(STRONG)) as engine:
        found = engine.infer(feeds)
    quantization = sqnr(here.reference(feeds), qdq)
    runtime = sqnr(qdq, found)
    # Rounding that falls the other way moves a value by one step in a few places.
    assert runtime > quantization, f"runtime {runtime:.1f} dB, quantization {quantization:.1f} dB"
    assert runtime > 25.0


def test_a_run_measures_engines_beside_the_emulation(
    trt: ModuleType, project: Callable[[str], Any]
) -> None:
    latency = "report.latency={warmup: 5, runs: 20, batch: 4}"
    record = project("residual").run(f"backends=[{EMULATE}, {STRONG}]", latency)
    found = {(v.backend, v.name): v for v in record.variants}
    emulated, engine = found["onnxruntime/emulate", "int8"], found["tensorrt/strong", "int8"]
    assert engine.value is not None
    assert emulated.value is not None
    assert abs(engine.value - emulated.value) < 3.0, "decibels: the emulation predicts the engine"
    assert engine.latency_ms is not None
    assert 0 < engine.latency_ms.median <= engine.latency_ms.p95
    assert engine.size_bytes > 0


# calibration


def test_the_calibration_table_reaches_tensorrt_as_a_cache(
    weak: ModuleType, project: Callable[[str], Any]
) -> None:
    here = project("residual")
    info = here.build(WEAK)
    log = (info.path.parent / "build.log").read_text("utf-8")
    assert "Starting Calibration" not in log, "it was read, not made again"


@pytest.mark.parametrize(
    ("calibrator", "method", "widest"),
    [
        pytest.param("minmax", "max", 0.05, id="minmax: the same numbers"),
        pytest.param("entropy2", "entropy", 1.5, id="entropy: the same kind of number"),
    ],
)
def test_our_scales_against_tensorrts_own_calibration(
    weak: ModuleType, project: Callable[[str], Any], calibrator: str, method: str, widest: float
) -> None:
    here = project("residual")
    backend = f"{{name: tensorrt, typing: weak, calibrator: {calibrator}}}"
    info = here.build(backend, f"calibration.method={method}")
    ratios = info.details["calibration"]["log2_ratios"]
    assert None not in ratios.values(), "every tensor of ours is one of TensorRT's"
    assert max(map(abs, ratios.values())) < widest, ratios


class Failing:
    """Batches whose third cannot be read."""

    identity, count, skipped = "failing", 24, ()

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for _ in range(2):
            feeds = {"input": rng.standard_normal((8, 3, 8, 8)).astype(np.float32)}
            yield Batch(feeds, tuple("12345678"))
        raise OSError("the disk is gone")


def test_data_that_fails_while_tensorrt_calibrates_is_told_and_leaves_no_cache(
    weak: ModuleType, project: Callable[[str], Any], tmp_path: Path
) -> None:
    here = project("residual")
    table = trtune.calibrate(here.config(f"backends=[{WEAK}]"), out=tmp_path / "runs")
    model = load_model(here.folder / "net.onnx")
    candidate = Candidate(model, make_plan(GraphView.of(model)), table)
    backend = TensorRTBackend(Settings(typing="weak", calibrator="entropy2"), batches=Failing())
    with pytest.raises((TrtuneError, OSError), match="the disk is gone"):
        backend.build(candidate, tmp_path / "engine")
    assert not list((tmp_path / "engine").glob("calibration.cache*"))
    assert not (tmp_path / "engine" / "engine.plan").exists()


# times


def test_latency_of_the_gpu_is_apart_from_transfers_and_a_graph_is_no_slower(
    trt: ModuleType, project: Callable[[str], Any]
) -> None:
    here = project("silu_se")
    with engine_of(trt, here.build(STRONG)) as engine:
        feeds = here.feeds(8)
        before = engine.infer(feeds)
        plain = engine.latency(feeds, warmup=20, runs=100, graph=False)
        graph = engine.latency(feeds, warmup=20, runs=100, graph=True)
        after = engine.infer(feeds)
    assert graph.graph, graph.graph_reason
    for found in (plain, graph):
        assert 0 < found.compute.median <= found.compute.p95 <= found.compute.p99
        assert found.end_to_end is not None
        assert found.end_to_end.median > found.compute.median
        assert found.throughput > 0
    assert graph.compute.median < 2 * plain.compute.median
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg="timing changes no result")


def test_layer_times_are_those_of_the_engines_layers(
    trt: ModuleType, project: Callable[[str], Any]
) -> None:
    here = project("residual")
    info = here.build(STRONG)
    layers = json.loads((info.path.parent / "layers.json").read_text("utf-8"))["Layers"]
    names = {layer["Name"] if isinstance(layer, dict) else layer for layer in layers}
    with engine_of(trt, info) as engine:
        times = engine.layer_times(here.feeds(8), warmup=3, runs=10)
        whole = engine.latency(here.feeds(8), warmup=10, runs=50)
    assert set(times) <= names
    assert all(time >= 0 for time in times.values())
    assert sum(times.values()) > 0.2 * whole.compute.median


# inner tensors


def with_debug_tensors(trt: ModuleType, proto: onnx.ModelProto, path: Path) -> Path:
    """A strongly typed plan whose unfused tensors can be looked at; batch 4."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(proto.SerializeToString()), parser.get_error(0).desc()
    assert network.mark_unfused_tensors_as_debug_tensors()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))
    config.add_optimization_profile(profile)
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    return path


def test_inner_tensors_are_read_without_being_outputs(
    trt: ModuleType, project: Callable[[str], Any], tmp_path: Path
) -> None:
    if not hasattr(trt.INetworkDefinition, "mark_unfused_tensors_as_debug_tensors"):
        pytest.skip(f"TensorRT {trt.__version__} has no debug tensors for unfused ones")
    here = project("residual")
    feeds = here.feeds(4)
    every = onnx.ModelProto()
    every.CopyFrom(here.proto)
    known = {t for node in here.proto.graph.node for t in node.output}
    every.graph.output.extend(
        onnx.ValueInfoProto(name=t) for t in known - {o.name for o in every.graph.output}
    )
    reference = tinymodels.run(every, feeds)
    with TrtEngine(trt, with_debug_tensors(trt, here.proto, tmp_path / "debug.plan")) as engine:
        found = engine.debug_tensors(feeds)
        shared = sorted(known & set(found))
        assert shared, f"none of the model's tensors among {sorted(found)}"
        for tensor in shared:
            np.testing.assert_allclose(found[tensor], reference[tensor], atol=1e-4, err_msg=tensor)
        assert list(engine.debug_tensors(feeds, {shared[0]})) == [shared[0]]
        np.testing.assert_allclose(
            engine.infer(feeds)["logits"], reference["logits"], atol=1e-4, err_msg="runs on"
        )


# what stands beside a plan, and plans that do not fit


def test_engine_json_names_everything_that_the_plan_depends_on(
    trt: ModuleType, gpu: DeviceProperties, project: Callable[[str], Any]
) -> None:
    info = project("residual").build(STRONG)
    value = json.loads((info.path.parent / "engine.json").read_text("utf-8"))
    assert value["versions"]["tensorrt"] == trt.__version__
    assert set(value["hashes"]) == {"model", "plan", "scales"}
    text = json.dumps(value)
    for part in (gpu.name, gpu.compute_capability, "settings", "trtexec"):
        assert part in text


def test_a_truncated_plan_is_refused_in_words(
    trt: ModuleType, project: Callable[[str], Any], tmp_path: Path
) -> None:
    info = project("conv_relu").build(STRONG, FP32)
    (tmp_path / "half.plan").write_bytes(info.path.read_bytes()[: info.size_bytes // 2])
    with (
        pytest.raises(TrtuneError, match=r"cannot load .*half.plan.*trtune build"),
        TrtEngine(trt, tmp_path / "half.plan"),
    ):
        raise AssertionError("never entered")


def test_a_timing_cache_is_kept_and_shortens_nothing_in_the_result(
    trt: ModuleType, project: Callable[[str], Any], tmp_path: Path
) -> None:
    here = project("mlp")
    cache = tmp_path / "timing.cache"
    backend = f"{{name: tensorrt, typing: strong, timing_cache: '{cache}'}}"
    first = here.build(backend, FP32)
    assert cache.stat().st_size > 0
    with engine_of(trt, first) as engine:
        np.testing.assert_allclose(
            engine.infer(here.feeds())["logits"],
            here.reference(here.feeds())["logits"],
            atol=1e-4,
        )
