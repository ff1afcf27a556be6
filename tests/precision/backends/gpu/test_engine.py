"""Running engines, against strict doubles of TensorRT's runtime and of CUDA: `2 x + 1`."""

from __future__ import annotations

import gc
import importlib
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cudadouble import CudaDouble, Status
from enginedouble import EngineDouble, Plan, capsule
from numpy.typing import NDArray

from trtune.configs.errors import DataError, TrtuneError
from trtune.datasets.batches import InputSpec
from trtune.precision.backends.gpu.callbacks import address_of
from trtune.precision.backends.gpu.engine import TrtEngine
from trtune.precision.backends.gpu.runtime import RUNTIME, load_runtime
from trtune.precision.backends.gpu.timing import Spread


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    made = CudaDouble()
    monkeypatch.setitem(sys.modules, RUNTIME, made)
    return made


@pytest.fixture(params=["10", "11"])
def trt(request: pytest.FixtureRequest, cuda: CudaDouble) -> EngineDouble:
    return EngineDouble(request.param, cuda)


def batch(count: int, dtype: str = "float32") -> dict[str, NDArray[Any]]:
    return {"x": (np.arange(count * 4).reshape(count, 4) - 3).astype(dtype)}


def engine_of(trt: EngineDouble, folder: Path, plan: Plan | None = None, **options: Any) -> Any:
    return TrtEngine(trt, (plan or Plan()).write(folder / "engine.plan"), **options)


# running


def test_an_engine_says_what_goes_in_and_out(trt: EngineDouble, tmp_path: Path) -> None:
    engine = engine_of(trt, tmp_path)
    assert (engine.inputs, engine.outputs) == ((), ())
    with engine:
        assert engine.inputs == (InputSpec("x", (None, 4), "float32"),)
        assert engine.outputs == (InputSpec("y", (None, 4), "float32"),)


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        pytest.param(Plan(), "float32", id="float, a free batch"),
        pytest.param(Plan(dtype="HALF"), "float16", id="half"),
        pytest.param(Plan(dtype="INT64"), "int64", id="int64"),
        pytest.param(
            Plan(shape=(2, 4), low=(2, 4), high=(2, 4)), "float32", id="a shape without freedom"
        ),
        pytest.param(Plan(dtype="INT64", on_host=True), "int64", id="an input in the CPU's memory"),
    ],
)
def test_infer_computes_what_the_engine_is(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path, plan: Plan, dtype: str
) -> None:
    feeds = batch(2, dtype)
    with engine_of(trt, tmp_path, plan) as engine:
        found = engine.infer({**feeds, "not an input": np.zeros(1)})
    assert list(found) == ["y"]
    assert found["y"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found["y"], feeds["x"] * 2 + 1)
    assert cuda.held == {}


def test_batches_may_differ_in_size_and_layout_from_one_to_the_next(
    trt: EngineDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path) as engine:
        for count in (8, 1, 5):
            x = batch(count)["x"]
            kept = engine.infer({"x": x})["y"]
            np.testing.assert_array_equal(kept, x * 2 + 1)
            engine.infer({"x": np.asfortranarray(x) - 7})
            np.testing.assert_array_equal(kept, x * 2 + 1, err_msg="arrays are the caller's")


def test_memory_is_taken_once_for_the_largest_shape(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path) as engine:
        taken = cuda.calls["cudaMalloc"]
        for count in (1, 8, 3):
            engine.infer(batch(count))
        assert cuda.calls["cudaMalloc"] == taken == 2
        assert cuda.held == {"stream": 1, "pinned": 2, "device": 2}


def test_memory_grows_where_the_largest_shape_is_not_known_beforehand(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path, Plan(on_host=True)) as engine:
        for count in (1, 8, 3):
            x = batch(count)["x"]
            np.testing.assert_array_equal(engine.infer({"x": x})["y"], x * 2 + 1)
        assert cuda.held == {"stream": 1, "pinned": 2, "device": 1}, "the input is on the CPU"
    assert cuda.held == {}


def test_an_output_whose_shape_depends_on_the_data_is_allocated_when_known(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path, Plan(ragged=True)) as engine:
        for count in (1, 8, 2):
            y = batch(count)["x"] * 2 + 1
            np.testing.assert_array_equal(engine.infer(batch(count))["y"], y[y > 0])
        assert engine.outputs == (InputSpec("y", (None,), "float32"),)
    assert cuda.held == {}


def test_the_engine_runs_on_its_gpu_and_leaves_the_current_one(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    cuda.devices = 2
    with engine_of(trt, tmp_path, device=1) as engine:
        assert cuda.device == 0
        engine.infer(batch(1))
        assert cuda.device == 0
    assert cuda.calls["cudaSetDevice"] == 6


def test_what_a_plan_may_do_is_said_to_the_runtime(trt: EngineDouble, tmp_path: Path) -> None:
    with engine_of(trt, tmp_path) as engine:
        assert not hasattr(engine._runtime, "engine_host_code_allowed"), "left as it is"
    with engine_of(trt, tmp_path, host_code=True, dla_core=1) as engine:
        assert engine._runtime.engine_host_code_allowed
        assert engine._runtime.DLA_core == 1


# the same on a real GPU, where copies do what kernels would


def no_gpu() -> str:
    """Why no real GPU can be used here, or ''."""
    try:
        status, count = importlib.import_module(RUNTIME).cudaGetDeviceCount()
    except ImportError as error:
        return f"cuda-python is not installed ({error})"
    return "" if count else f"no GPU: cudaGetDeviceCount gives {status.name}"


WHY_NO_GPU = no_gpu()
GPU = pytest.param(
    "gpu",
    marks=[pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NO_GPU), reason=WHY_NO_GPU or "-")],
)


@pytest.fixture(params=["double", GPU])
def copying(request: pytest.FixtureRequest) -> EngineDouble:
    """TensorRT's double over CUDA's double, then over a real GPU."""
    if request.param == "double":
        return EngineDouble("11", request.getfixturevalue("cuda"))
    return EngineDouble("11", load_runtime())


@pytest.mark.parametrize("dtype", ["FLOAT", "HALF", "INT64"])
@pytest.mark.parametrize("ragged", [False, True], ids=["known shape", "shape from the data"])
def test_a_copying_engine_gives_back_each_batch(
    copying: EngineDouble, tmp_path: Path, dtype: str, ragged: bool
) -> None:
    side = 1 << 16
    plan = Plan((-1, side), (1, side), (8, side), dtype=dtype, ragged=ragged, copies=True)
    rng = np.random.default_rng(0)
    with engine_of(copying, tmp_path, plan) as engine:
        kept = []
        for count in (3, 8, 1, 5) * 5:
            x = rng.integers(-99, 99, (count, side)).astype(engine.inputs[0].dtype)
            kept.append((x, engine.infer({"x": x})["y"]))
    for x, y in kept:
        np.testing.assert_array_equal(y, x.ravel() if ragged else x)


def test_a_copying_engine_is_timed_as_calls_and_as_a_graph(
    copying: EngineDouble, tmp_path: Path
) -> None:
    side = 1 << 22
    plan = Plan((-1, side), (1, side), (8, side), copies=True)
    x = np.arange(4 * side, dtype=np.float32).reshape(4, side)
    with engine_of(copying, tmp_path, plan) as engine:
        for graph in (False, True):
            found = engine.latency({"x": x}, warmup=3, runs=20, graph=graph)
            assert (found.graph, found.graph_reason) == (graph, "")
            # No GPU moves 20 TB/s: each byte is read and written.
            assert found.compute.median > 1e3 * 2 * x.nbytes / 20e12
            assert found.end_to_end is not None
            assert found.end_to_end.median > 0
        np.testing.assert_array_equal(engine.infer({"x": x + 1})["y"], x + 1)


def test_inner_tensors_of_a_copying_engine(copying: EngineDouble, tmp_path: Path) -> None:
    plan = Plan((-1, 4096), (1, 4096), (8, 4096), copies=True)
    x = np.arange(4 * 4096, dtype=np.float32).reshape(4, 4096)
    with engine_of(copying, tmp_path, plan) as engine:
        found = engine.debug_tensors({"x": x})
        np.testing.assert_array_equal(found["copy"], x)
        np.testing.assert_array_equal(engine.infer({"x": -x})["y"], -x)


# wrong input


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        pytest.param({"X": batch(1)["x"]}, "input 'x' is missing.*did you mean 'X'", id="missing"),
        pytest.param({}, "has nothing", id="an empty batch"),
        pytest.param(
            batch(1, "float64"), "'x' must be float32; the batch has float64", id="wrong type"
        ),
        pytest.param(
            batch(9),
            r"\[9, 4\] in the batch; the engine's profile goes from \[1, 4\] to \[8, 4\]: change "
            r"data.\*.batch, or model.shapes.x and build again",
            id="above the profile",
        ),
        pytest.param({"x": np.zeros((0, 4), np.float32)}, r"has shape \[0, 4\]", id="below it"),
        pytest.param({"x": np.zeros((1, 5), np.float32)}, r"has shape \[1, 5\]", id="fixed side"),
        pytest.param({"x": np.zeros(4, np.float32)}, r"has shape \[4\]", id="wrong rank"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_in_words(
    trt: EngineDouble, tmp_path: Path, feeds: dict[str, Any], says: str
) -> None:
    with engine_of(trt, tmp_path) as engine:
        with pytest.raises(DataError, match=says):
            engine.infer(feeds)
        assert engine.infer(batch(1))["y"].shape == (1, 4), "and works on"


def test_a_batch_for_an_engine_of_one_shape_names_that_shape(
    trt: EngineDouble, tmp_path: Path
) -> None:
    fixed = Plan(shape=(2, 4), low=(2, 4), high=(2, 4))
    with (
        engine_of(trt, tmp_path, fixed) as engine,
        pytest.raises(DataError, match=r"built for \[2, 4\] alone: change data"),
    ):
        engine.infer(batch(3))


def test_a_closed_engine_refuses(trt: EngineDouble, tmp_path: Path) -> None:
    engine = engine_of(trt, tmp_path)
    for use in (engine.infer, engine.latency, engine.layer_times, engine.debug_tensors):
        with pytest.raises(ValueError, match="use it in a `with` block"):
            use(batch(1))


# what TensorRT refuses


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        pytest.param(
            Plan(broken="context", memory=3 << 30),
            r"needs 3.0 GiB of GPU memory: Requested amount of GPU memory.*model.shapes",
            id="no memory for a context",
        ),
        pytest.param(Plan(broken="address"), "refuses memory for 'x'", id="an address"),
        pytest.param(
            Plan(broken="shape"), r"refuses shape \[8, 4\] of input 'x': setInputShape", id="shape"
        ),
        pytest.param(Plan(broken="shapes"), "undefined are y: it does not say why", id="shapes"),
        pytest.param(
            Plan(broken="allocator", ragged=True), "refuses to allocate output 'y'", id="allocator"
        ),
        pytest.param(Plan(dtype="FP4"), "tensor 'x' is FP4, which NumPy has no type", id="type"),
    ],
)
def test_what_tensorrt_refuses_at_the_start_has_its_words_and_a_remedy(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path, plan: Plan, says: str
) -> None:
    with pytest.raises(TrtuneError, match=says), engine_of(trt, tmp_path, plan):
        raise AssertionError("never entered")
    assert cuda.held == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", r"cannot load .*engine.plan \(0 B\)", id="empty"),
        pytest.param(
            b"other" * 300,
            r"tensorrt 1\d\..* cannot load .* \(1.5 KiB\): IRuntime.*stdVersionRead.*"
            "bound to the TensorRT version and the GPU.*trtune build CONFIG",
            id="of another version, or broken",
        ),
    ],
)
def test_a_plan_that_cannot_be_loaded_says_why_and_how_to_get_another(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "engine.plan").write_bytes(content)
    with (
        pytest.raises(TrtuneError, match=says),
        TrtEngine(trt, tmp_path / "engine.plan"),
    ):
        raise AssertionError("never entered")
    assert cuda.held == {}


def test_a_tensorrt_that_does_not_start_says_so(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    trt._starts = False
    with (
        pytest.raises(TrtuneError, match=r"cannot start on GPU 0 .*initialization failure.*driver"),
        engine_of(trt, tmp_path),
    ):
        raise AssertionError("never entered")
    assert cuda.held == {}


def test_a_plan_that_is_not_there(trt: EngineDouble, tmp_path: Path) -> None:
    with (
        pytest.raises(TrtuneError, match=r"none.plan cannot be read.*build it again"),
        TrtEngine(trt, tmp_path / "none.plan"),
    ):
        raise AssertionError("never entered")


def test_a_run_that_fails_frees_everything_on_the_way_out(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with (
        pytest.raises(TrtuneError, match=r"cannot run .*: enqueueV3: Error Code 1.*smaller batch"),
        engine_of(trt, tmp_path, Plan(broken="run")) as engine,
    ):
        engine.infer(batch(1))
    gc.collect()
    assert cuda.held == {}
    assert trt._contexts == 0


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param("cudaStreamCreateWithFlags", 1, id="the stream"),
        pytest.param("cudaHostAlloc", 1, id="pinned memory of the input"),
        pytest.param("cudaMalloc", 1, id="GPU memory of the input"),
        pytest.param("cudaHostAlloc", 2, id="pinned memory of the output"),
        pytest.param("cudaMalloc", 2, id="GPU memory of the output"),
        pytest.param("cudaMemcpyAsync", 1, id="upload"),
        pytest.param("cudaMemcpyAsync", 2, id="download"),
        pytest.param("cudaStreamSynchronize", 1, id="waiting"),
        pytest.param("cudaFree", 1, id="freeing itself: the rest is freed"),
    ],
)
def test_everything_is_freed_wherever_cuda_fails(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path, name: str, at: int
) -> None:
    def all_of_it() -> None:
        with engine_of(trt, tmp_path) as engine:
            engine.infer(batch(3))

    cuda.fail(name, Status.cudaErrorMemoryAllocation, at=at)
    with pytest.raises(TrtuneError, match="cudaErrorMemoryAllocation"):
        all_of_it()
    assert cuda.held == {}


def test_an_allocation_that_fails_in_a_callback_is_told(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path, Plan(ragged=True)) as engine:
        cuda.fail("cudaMalloc", Status.cudaErrorMemoryAllocation)
        with pytest.raises(TrtuneError, match=r"CUDA failed while allocating .* out of memory"):
            engine.infer(batch(8))
        assert engine.infer(batch(1))["y"].tolist() == [1.0], "and works on"
    assert cuda.held == {}


# times


@pytest.mark.parametrize(
    ("plan", "graph", "reason"),
    [
        pytest.param(Plan(), True, "", id="as a graph"),
        pytest.param(
            Plan(capturable=False), False, "not permitted when stream is capturing",
            id="what TensorRT cannot capture, without one",
        ),
    ],
)  # fmt: skip
def test_latency_is_the_gpus_apart_from_transfers(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path, plan: Plan, graph: bool, reason: str
) -> None:
    with engine_of(trt, tmp_path, plan) as engine:
        found = engine.latency(batch(2), warmup=0, runs=4)
        np.testing.assert_array_equal(engine.infer(batch(2))["y"], batch(2)["x"] * 2 + 1)
    assert found.compute == Spread(2.0, 2.0, 2.0)
    assert found.throughput == 500.0
    assert found.end_to_end is not None
    assert (found.graph, found.runs) == (graph, 4)
    assert reason in found.graph_reason
    assert cuda.held == {}


def test_latency_without_a_graph_when_none_is_asked_for(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path) as engine:
        found = engine.latency(batch(2), warmup=1, runs=2, graph=False)
    assert (found.graph, found.graph_reason) == (False, "")
    assert cuda.calls["cudaStreamBeginCapture"] == 0


def test_layer_times_are_per_run_and_loops_add_up(trt: EngineDouble, tmp_path: Path) -> None:
    with engine_of(trt, tmp_path) as engine:
        assert engine.layer_times(batch(2), warmup=1, runs=3) == {"conv + relu": 0.25, "head": 1.0}
        np.testing.assert_array_equal(engine.infer(batch(2))["y"], batch(2)["x"] * 2 + 1)
        with pytest.raises(ValueError, match="runs is 0"):
            engine.layer_times(batch(2), runs=0)


# inner tensors


def test_debug_tensors_are_copied_from_wherever_they_are(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    inner = np.arange(6, dtype=np.float32).reshape(2, 3)
    with engine_of(trt, tmp_path, Plan(debug=("inner", "on host", "other"))) as engine:
        found = engine.debug_tensors(batch(1))
        assert list(found) == ["inner", "on host", "other"]
        for array in found.values():
            np.testing.assert_array_equal(array, inner)
        assert list(engine.debug_tensors(batch(1), {"other"})) == ["other"]
        assert engine.infer(batch(1))["y"].shape == (1, 4)
    assert cuda.held == {}


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        pytest.param(Plan(debug=()), 0, id="an engine built without"),
        pytest.param(Plan(debug_type="FP4"), 0, id="a type that NumPy lacks is left out"),
    ],
)
def test_debug_tensors_that_are_not_there(
    trt: EngineDouble, tmp_path: Path, plan: Plan, count: int
) -> None:
    with engine_of(trt, tmp_path, plan) as engine:
        assert len(engine.debug_tensors(batch(1))) == count


def test_an_error_while_an_inner_tensor_is_copied_comes_out(
    trt: EngineDouble, cuda: CudaDouble, tmp_path: Path
) -> None:
    with engine_of(trt, tmp_path) as engine:
        cuda.fail("cudaMemcpyAsync", Status.cudaErrorIllegalAddress, at=2)
        with pytest.raises(TrtuneError, match="cudaErrorIllegalAddress"):
            engine.debug_tensors(batch(1))


def test_an_engine_that_refuses_a_listener_says_so(trt: EngineDouble, tmp_path: Path) -> None:
    with (
        engine_of(trt, tmp_path, Plan(broken="listener")) as engine,
        pytest.raises(TrtuneError, match="refuses to show inner tensors"),
    ):
        engine.debug_tensors(batch(1))


def test_addresses_come_as_numbers_or_capsules() -> None:
    assert address_of(4096) == 4096
    assert address_of(capsule(4096)) == 4096


def test_tensorrt_errors_go_to_the_log(
    trt: EngineDouble, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "engine.plan").write_bytes(b"no")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(TrtuneError, match=re.escape("(2 B): IRuntime")),
        TrtEngine(trt, tmp_path / "engine.plan"),
    ):
        raise AssertionError("never entered")
    assert any("stdVersionRead" in r.message and r.levelname == "ERROR" for r in caplog.records)


# the double itself


def test_the_double_refuses_what_the_bindings_lack(trt: EngineDouble, tmp_path: Path) -> None:
    with engine_of(trt, tmp_path) as engine:
        context = engine._context
        with pytest.raises(AttributeError, match="no property 'profilr'"):
            context.profilr = None
        with pytest.raises(AttributeError):
            context.execute_async_v2(0)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            context.profiler = object()
        with pytest.raises(TypeError, match="positional"):
            context.execute_async_v3(0, 1)
