"""Engines against onnxruntime: the gate, and what the runtime adds to quantization.

onnxruntime sessions play the engine wherever only the protocol matters; doubles of TensorRT 10 and
11, which refuse what the real bindings do not have, stand where its API does.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from cudadouble import CudaDouble
from enginedouble import EngineDouble, Plan
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tinyquant import Case, Rows, case, named, op_counts
from trtdouble import World, double
from trtnetwork import OfNetwork

from trtune.configs.errors import DataError, ModelError, TrtuneError
from trtune.datasets.batches import Batch
from trtune.precision.backends.gpu.driver import DeviceProperties
from trtune.precision.backends.gpu.engine import TrtEngine
from trtune.precision.backends.gpu.runtime import RUNTIME
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.trt.backend import Settings, TensorRTBackend
from trtune.precision.backends.trt.engine_file import Cuda
from trtune.precision.compare import runtime_errors as engine_compare
from trtune.precision.compare.layers import compare_layers
from trtune.precision.compare.runtime_errors import (
    DEBUG_TENSORS,
    MARKED_OUTPUTS,
    DebugView,
    RuntimeErrors,
    build_marked,
    engine_gate,
    inner_kind,
    mark_outputs,
    opens_inner,
    runtime_errors,
    tensor_bytes,
)
from trtune.precision.graph.view import model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.plan import make_plan
from trtune.precision.runtime.api import (
    BuildInfo,
    Candidate,
    Engine,
    read_engine_json,
    reusable,
)
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.run.layers import compared_tensors, engine_errors, gate_errors

ADA = DeviceProperties(0, "NVIDIA L4", "8.9", "580.95.05", "13.0", "13.0", 24 << 30, 20 << 30)
BOTH = pytest.mark.parametrize("major", [10, 11])
UNFUSED = "mark_unfused_tensors_as_debug_tensors"
Array = NDArray[Any]


def engine_of(proto: onnx.ModelProto, outputs: Sequence[str] = ()) -> OrtEngine:
    return OrtEngine(lambda: make_session(proto, outputs=outputs))


def opens(proto: onnx.ModelProto) -> Callable[[Sequence[str]], OrtEngine]:
    return lambda tensors: engine_of(proto, tensors)


def coarse(proto: onnx.ModelProto, *, step: float = 0.05) -> onnx.ModelProto:
    """`proto` with its float weights rounded to multiples of `step`."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(proto)
    for tensor in rounded.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1:
            value = (np.round(value / step) * step).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return rounded


def rows(proto: onnx.ModelProto, count: int = 7, *, size: int = 3) -> Rows:
    return Rows(tinymodels.feeds(proto, batch=max(count, 1)), range(count), size)


def inner(proto: onnx.ModelProto) -> list[str]:
    return [name for node in proto.graph.node for name in node.output]


class Shown:
    """An engine whose values are made from those of another: what one that is not right shows."""

    def __init__(self, engine: Engine, change: Callable[[str, Array], Array | None]) -> None:
        self.engine, self.change = engine, change

    def __enter__(self) -> Shown:
        self.engine.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.engine.__exit__(*error)

    @property
    def inputs(self) -> Any:
        return self.engine.inputs

    @property
    def outputs(self) -> Any:
        return self.engine.outputs

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = {n: self.change(n, a) for n, a in self.engine.infer(feeds).items()}
        return {name: array for name, array in found.items() if array is not None}


# The FP32 gate


def gate(reference: onnx.ModelProto, engine: Any, source: Any, **options: Any) -> Any:
    with engine_of(reference) as exact, engine as tested:
        return engine_gate(exact, tested, source, pictures=5, backend="tensorrt", **options)


@pytest.mark.parametrize("name", ["conv_relu", "residual", "attention", "two_outputs"])
def test_the_gate_lets_the_same_model_pass(name: str) -> None:
    proto = tinymodels.MODELS[name]()
    sums = gate(proto, engine_of(proto), rows(proto))
    assert list(sums) == [info.name for info in proto.graph.output]
    assert all(total.mean_relative <= 1e-6 for total in sums.values())


def test_the_gate_looks_at_the_pictures_asked_for_and_no_more() -> None:
    proto = tinymodels.mlp()
    (total,) = gate(proto, engine_of(proto), rows(proto, 7)).values()
    (size,) = (d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim[1:])
    assert total.count == 5 * size


def test_the_gate_stops_another_model_and_says_what_to_do() -> None:
    proto = tinymodels.conv_relu()
    with pytest.raises(TrtuneError) as caught:
        gate(proto, engine_of(coarse(proto)), rows(proto))
    text = str(caught.value)
    assert text.startswith("the FP32 engine of tensorrt is not the FP32 model: output 'logits'")
    for part in ("mean relative error of", "over 5 pictures", "`tf32`", "timing cache"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        pytest.param(lambda a: a * np.float32(1.0009), True, id="9e-4 passes"),
        pytest.param(lambda a: a * np.float32(1.0011), False, id="1.1e-3 does not"),
        pytest.param(np.zeros_like, False, id="nothing but zeros"),
        pytest.param(lambda a: np.full_like(a, np.nan), False, id="NaN"),
    ],
)  # fmt: skip
def test_where_the_gate_draws_the_line(change: Callable[[Array], Array], passes: bool) -> None:
    proto = tinymodels.mlp()

    def changed(name: str, array: Array) -> Array:
        return change(array).astype(np.float32)

    engine = Shown(engine_of(proto), changed)
    if passes:
        gate(proto, engine, rows(proto))
    else:
        with pytest.raises(TrtuneError, match="is not the FP32 model"):
            gate(proto, engine, rows(proto))


def test_elements_next_to_zero_may_differ_by_all_that_they_are() -> None:
    proto = tinymodels.mlp()
    tiny = np.float32(1e-12)

    def with_tiny(value: np.float32) -> Callable[[str, Array], Array]:
        def change(name: str, array: Array) -> Array:
            array[:, 0] = value
            return array

        return change

    reference = Shown(engine_of(proto), with_tiny(tiny))
    engine = Shown(engine_of(proto), with_tiny(np.float32(0)))
    with reference as exact, engine as tested:
        (total,) = engine_gate(exact, tested, rows(proto), pictures=5, backend="tensorrt").values()
    assert total.mean_relative > 0.01
    assert total.relative_l2 < 1e-9


@pytest.mark.parametrize(("tf32", "passes"), [(False, False), (True, True)])
def test_an_engine_that_may_use_tf32_is_held_to_less(tf32: bool, passes: bool) -> None:
    proto = tinymodels.mlp()
    engine = Shown(engine_of(proto), lambda name, array: array * np.float32(1.004))
    limit, noise = engine_compare.gate_limits(Settings(tf32=tf32).as_json())
    if passes:
        (total,) = gate(proto, engine, rows(proto), limit=limit, noise=noise).values()
        assert total.mean_relative == pytest.approx(0.004, rel=0.01)
    else:
        with pytest.raises(TrtuneError, match="leave `tf32` off"):
            gate(proto, engine, rows(proto), limit=limit, noise=noise)


def test_a_gate_without_pictures_is_none() -> None:
    proto = tinymodels.mlp()
    with pytest.raises(DataError, match="no samples to compare an engine"):
        gate(proto, engine_of(proto), rows(proto, 0))


def test_nan_in_the_reference_names_the_picture() -> None:
    proto = tinymodels.mlp()
    feeds = {n: a.copy() for n, a in tinymodels.feeds(proto, batch=4).items()}
    next(iter(feeds.values()))[2] = np.nan
    with pytest.raises(ModelError, match="picture"):
        gate(proto, engine_of(proto), Rows.of(feeds, batch=2))


# What the runtime adds


def errors_between(
    reference: onnx.ModelProto, engine: onnx.ModelProto, source: Any, **options: Any
) -> RuntimeErrors:
    return runtime_errors(
        opens(reference), engine_of(engine), opens(engine), inner(reference), source,
        pictures=7, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["conv_relu", "residual", "silu_se", "attention", "two_outputs"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_numbers_are_those_of_comparing_the_two_models(name: str, size: int) -> None:
    proto = tinymodels.MODELS[name]()
    other, source = coarse(proto), rows(proto, size=size)
    got = errors_between(proto, other, source)
    expected = compare_layers(proto, other, inner(proto), source, pictures=7).errors
    assert set(got.errors) == set(expected) == set(inner(proto))
    assert (dict(got.missing), got.pictures) == ({}, 7)
    for tensor, sums in expected.items():
        assert got.errors[tensor].count == sums.count
        assert got.errors[tensor].relative_l2 == pytest.approx(sums.relative_l2, rel=1e-3, abs=1e-6)


def test_outputs_come_first_and_from_the_engine_that_is_used() -> None:
    proto = tinymodels.conv_relu()
    got = runtime_errors(
        opens(proto), engine_of(coarse(proto)), opens(proto), inner(proto), rows(proto), pictures=7
    )
    assert next(iter(got.errors)) == "logits"
    assert got.errors["logits"].noise > 0
    assert all(got.errors[name].relative_l2 < 1e-6 for name in inner(proto) if name != "logits")


@pytest.mark.parametrize("name", ["depthwise", "concat"])
def test_in_chunks_the_numbers_are_the_same(name: str) -> None:
    proto = tinymodels.MODELS[name]()
    whole = errors_between(proto, coarse(proto), rows(proto))
    alone = errors_between(proto, coarse(proto), rows(proto), memory=1)
    assert (whole.chunks, alone.chunks) == (1, len(inner(proto)) - 1)
    for tensor, sums in whole.errors.items():
        assert alone.errors[tensor].relative_l2 == pytest.approx(
            sums.relative_l2, rel=1e-3, abs=1e-6
        )


def test_memory_bounds_both_copies_of_a_batch() -> None:
    proto = tinymodels.conv_relu()
    names = ["conv1", "relu1", "conv2", "relu2"]
    conv1, conv2 = 16 * 8 * 8 * 4, 32 * 4 * 4 * 4
    sizes = tensor_bytes(opens(proto), names, rows(proto, size=3))
    assert sizes == {"conv1": 3 * conv1, "relu1": 3 * conv1, "conv2": 3 * conv2, "relu2": 3 * conv2}
    asked: list[list[str]] = []

    def noted(tensors: Sequence[str]) -> OrtEngine:
        asked.append(list(tensors))
        return engine_of(proto, tensors)

    runtime_errors(
        opens(proto), engine_of(proto), noted, names, rows(proto, size=3), pictures=6,
        memory=2 * 3 * (conv1 + conv1),
    )  # fmt: skip
    assert asked == [["conv1", "relu1"], ["conv2", "relu2"]]


def test_one_engine_is_open_at_a_time() -> None:
    proto = tinymodels.conv_relu()
    open_now: list[str] = []

    @contextmanager
    def once(tensors: Sequence[str]) -> Iterator[Engine]:
        assert open_now == []
        open_now.append("inner")
        with engine_of(proto, tensors) as engine:
            yield engine
        open_now.pop()

    class Used(Shown):
        def __enter__(self) -> Used:
            assert open_now == []
            open_now.append("used")
            self.engine.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            open_now.pop()
            self.engine.__exit__(*error)

    used = Used(engine_of(proto), lambda name, array: array)
    got = runtime_errors(
        opens(proto), used, once, ["conv1", "conv2"], rows(proto), pictures=3, memory=1
    )
    assert (got.chunks, open_now) == (2, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda a: None, "inside a fused layer", id="not shown"),
        pytest.param(lambda a: a.astype(np.int8), "float32 in onnxruntime and int8", id="codes"),
        pytest.param(lambda a: a[..., :1], "[3, 16, 8, 1] in the engine", id="shape"),
    ],
)
def test_a_tensor_that_cannot_be_compared_is_missing_with_the_reason(
    change: Callable[[Array], Array | None], reason: str
) -> None:
    proto = tinymodels.conv_relu()

    def without(tensors: Sequence[str]) -> Shown:
        return Shown(engine_of(proto, tensors), lambda name, a: change(a) if name == "conv1" else a)

    got = runtime_errors(
        opens(proto), engine_of(proto), without, ["conv1", "conv2"], rows(proto), pictures=7
    )
    assert set(got.errors) == {"logits", "conv2"}
    assert list(got.missing) == ["conv1"]
    assert reason in got.missing["conv1"]


def test_a_half_is_compared_with_the_float_that_it_rounds() -> None:
    proto = tinymodels.conv_relu()

    def halves(tensors: Sequence[str]) -> Shown:
        return Shown(engine_of(proto, tensors), lambda name, a: a.astype(np.float16))

    got = runtime_errors(opens(proto), engine_of(proto), halves, ["conv1"], rows(proto), pictures=7)
    assert 60 < got.errors["conv1"].sqnr_db < 90


def test_nan_in_the_engine_is_a_result_and_in_onnxruntime_a_reason() -> None:
    proto = tinymodels.conv_relu()

    def broken(name: str, array: Array) -> Array:
        array[0] = np.nan
        return array

    def shows(tensors: Sequence[str]) -> Shown:
        return Shown(engine_of(proto, tensors), broken)

    tested = runtime_errors(
        opens(proto), engine_of(proto), shows, ["conv1"], rows(proto), pictures=7
    )
    assert tested.errors["conv1"].sqnr_db == -math.inf
    exact = runtime_errors(
        shows, engine_of(proto), opens(proto), ["conv1"], rows(proto), pictures=7
    )
    assert dict(exact.errors) == {}
    assert set(exact.missing) == {"logits", "conv1"}
    assert exact.missing["conv1"] == "it holds nan in the quantized model itself"


def test_a_chunk_whose_engine_cannot_be_built_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    proto = tinymodels.conv_relu()

    def fails(tensors: Sequence[str]) -> OrtEngine:
        if "conv1" in tensors:
            raise TrtuneError("no kernel for 'n_conv1'")
        return engine_of(proto, tensors)

    got = runtime_errors(
        opens(proto), engine_of(proto), fails, ["conv1", "conv2"], rows(proto), pictures=7, memory=1
    )
    assert set(got.errors) == {"logits", "conv2"}
    assert dict(got.missing) == {"conv1": "no kernel for 'n_conv1'"}
    assert "1 inner tensors are not compared: no kernel" in caplog.text


def test_pictures_that_an_engine_does_not_take_are_an_error() -> None:
    proto = tinymodels.conv_relu()

    class Narrow(Shown):
        def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            raise DataError("input 'input' has shape [3, 3, 8, 8], outside the engine's profile")

    def narrow(tensors: Sequence[str]) -> Narrow:
        return Narrow(engine_of(proto, tensors), lambda name, array: array)

    with pytest.raises(DataError, match="outside the engine's profile"):
        runtime_errors(opens(proto), engine_of(proto), narrow, ["conv1"], rows(proto), pictures=7)


def test_without_samples_nothing_is_compared() -> None:
    proto = tinymodels.conv_relu()
    with pytest.raises(DataError, match="no samples"):
        errors_between(proto, proto, rows(proto, 0))
    with pytest.raises(DataError, match="no samples"):
        runtime_errors(opens(proto), engine_of(proto), opens(proto), [], rows(proto, 0), pictures=7)


def test_a_fixed_batch_is_padded_and_the_padding_is_not_counted() -> None:
    proto = tinymodels.MODELS["fixed_batch"]()
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    feeds = {
        name: np.concatenate([array, array])[: fixed + 1]
        for name, array in tinymodels.feeds(proto, batch=fixed).items()
    }
    got = errors_between(proto, coarse(proto), Rows.of(feeds, batch=fixed))
    (size,) = (d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim[1:])
    assert got.errors[proto.graph.output[0].name].count == (fixed + 1) * size
    assert got.pictures == fixed + 1


def test_progress_counts_every_picture_of_every_pass() -> None:
    proto = tinymodels.mlp()
    seen: list[tuple[int, int | None]] = []
    errors_between(
        proto, proto, rows(proto, 7, size=4),
        progress=lambda what, done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(4, 14), (7, 14), (11, 14), (14, 14)]


# Engines with inner tensors as outputs, for every runtime


def candidate_of(prepared: Case) -> Candidate:
    return Candidate(prepared.model, prepared.plan, prepared.table)


def emulated(prepared: Case) -> onnx.ModelProto:
    return in_float32(lower_emulate(prepared.model, prepared.plan, prepared.table))


def test_marking_adds_outputs_to_a_copy() -> None:
    model = model_from_proto(tinymodels.conv_relu())
    before = model.proto.SerializeToString()
    marked = mark_outputs(model, ["relu1", "logits", "conv1", "relu1", "nothing"])
    assert [info.name for info in marked.proto.graph.output] == ["logits", "relu1", "conv1"]
    assert [spec.name for spec in marked.outputs] == ["logits", "relu1", "conv1"]
    assert marked.sha256 != model.sha256
    assert mark_outputs(model, ["conv1"]).sha256 != marked.sha256
    assert model.proto.SerializeToString() == before
    onnx.checker.check_model(marked.proto, full_check=True)


def test_a_tensor_without_a_known_type_is_not_marked() -> None:
    proto = tinymodels.conv_relu()
    model = model_from_proto(proto)
    kept = [info for info in model.proto.graph.value_info if info.name != "conv1"]
    del model.proto.graph.value_info[:]
    model.proto.graph.value_info.extend(kept)
    marked = mark_outputs(model, ["conv1", "relu1"])
    assert [spec.name for spec in marked.outputs] == ["logits", "relu1"]


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        pytest.param("conv_relu", {}, id="int8"),
        pytest.param("residual", {}, id="int8 on a skip path"),
        pytest.param("conv_relu", {"n_conv2": "fp16"}, id="fp16 in the middle"),
    ],
)
def test_a_marked_engine_computes_what_the_unmarked_one_does(
    tmp_path: Path, name: str, pins: dict[str, str]
) -> None:
    prepared, backend = named(name, pins=pins), OnnxruntimeBackend("emulate")
    candidate = candidate_of(prepared)
    backend.build(candidate, tmp_path / "used")
    tensors = [t for t in compared_tensors(prepared.view) if t in inner(emulated(prepared))]
    got = runtime_errors(
        opens(emulated(prepared)), backend.load(tmp_path / "used"),
        opens_inner(backend, candidate, tmp_path / "marked"), tensors,
        rows(prepared.model.proto), pictures=7, memory=1 << 14,
    )  # fmt: skip
    assert got.chunks > 1
    assert dict(got.missing) == {}
    assert set(tensors) <= set(got.errors)
    assert all(sums.relative_l2 < 1e-6 for sums in got.errors.values())


def test_a_marked_engine_says_so_and_is_never_taken_for_the_other(tmp_path: Path) -> None:
    prepared, backend = named("conv_relu"), OnnxruntimeBackend("emulate")
    candidate = candidate_of(prepared)
    info = build_marked(backend, candidate, tmp_path, ["conv1", "relu1"])
    assert info.details["marked"] == ["conv1", "relu1"]
    assert read_engine_json(tmp_path).details["marked"] == ["conv1", "relu1"]
    versions = backend.versions
    assert reusable(tmp_path, candidate, backend=backend.name, versions=versions) is None
    backend.build(candidate, tmp_path)
    assert "marked" not in read_engine_json(tmp_path).details


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
def test_tensorrt_rtx_builds_a_marked_engine(tmp_path: Path) -> None:
    prepared, backend = named("conv_relu"), RtxBackend(compute_capabilities=["8.9"])
    assert inner_kind(backend) == MARKED_OUTPUTS
    info = build_marked(backend, candidate_of(prepared), tmp_path, ["conv1", "relu1"])
    assert (info.not_honoured, info.precisions["n_conv1"]) == ((), "int8")
    assert read_engine_json(tmp_path).details["marked"] == ["conv1", "relu1"]
    (made,) = (onnx.load(path) for path in tmp_path.glob("*.onnx"))
    assert [output.name for output in made.graph.output] == ["logits", "conv1", "relu1"]


# Engines with debug tensors, TensorRT 10.11 and later


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the double's networks answer when unfused tensors are to be shown; [] says yes."""
    answers: list[bool] = []

    def mark(network: Any) -> bool:
        network._world.events.append(UNFUSED)
        return answers.pop() if answers else True

    monkeypatch.setattr(OfNetwork, f"_do_{UNFUSED}", mark, raising=False)
    return answers


@contextmanager
def on_device(device: int) -> Iterator[None]:
    yield


def backend_of(trt: Any, **settings: Any) -> TensorRTBackend:
    return TensorRTBackend(
        Settings(**settings), batch=4, load_module=lambda: trt,
        cuda=Cuda(lambda device: ADA, on_device, lambda nbytes: None),  # type: ignore[arg-type]
    )  # fmt: skip


def before_10_11(world: World) -> Any:
    """The double of a TensorRT that cannot show unfused tensors."""
    trt = double(10, world)
    delattr(trt.INetworkDefinition, UNFUSED)
    return trt


@BOTH
@pytest.mark.usefixtures("marks")
def test_an_engine_for_comparison_shows_what_fusion_leaves(tmp_path: Path, major: int) -> None:
    world = World()
    backend, candidate = backend_of(double(major, world)), candidate_of(named("conv_relu"))
    assert backend.shows_unfused
    assert inner_kind(backend) == DEBUG_TENSORS
    info = backend.build_for_comparison(candidate, tmp_path)
    assert world.events.index(UNFUSED) < world.events.index("build")
    assert read_engine_json(tmp_path).details["marked"] == DEBUG_TENSORS
    assert info.precisions["n_conv1"] == "int8"
    assert [t.name for t in world.networks[-1]._outputs] == ["logits"]


@BOTH
@pytest.mark.usefixtures("marks")
def test_an_ordinary_engine_never_does(tmp_path: Path, major: int) -> None:
    world = World()
    backend, candidate = backend_of(double(major, world)), candidate_of(named("conv_relu"))
    backend.build(candidate, tmp_path)
    assert UNFUSED not in world.events
    assert "marked" not in read_engine_json(tmp_path).details

    def kept() -> BuildInfo | None:
        return reusable(
            tmp_path, candidate, backend=backend.name, versions=backend.versions,
            settings=backend.settings,
        )  # fmt: skip

    assert kept() is not None
    backend.build_for_comparison(candidate, tmp_path)
    assert kept() is None


@BOTH
def test_a_network_that_refuses_is_told(tmp_path: Path, marks: list[bool], major: int) -> None:
    marks.append(False)
    backend = backend_of(double(major))
    with pytest.raises(TrtuneError, match="refuses to show the inner tensors"):
        backend.build_for_comparison(candidate_of(named("conv_relu")), tmp_path)
    assert [path.name for path in tmp_path.glob("engine.*")] == []


@pytest.mark.parametrize("typing", ["weak", "strong"])
def test_before_10_11_inner_tensors_are_outputs(tmp_path: Path, typing: str) -> None:
    world = World()
    backend, candidate = backend_of(before_10_11(world), typing=typing), candidate_of(named("mlp"))
    assert inner_kind(backend) == MARKED_OUTPUTS
    with pytest.raises(TrtuneError, match=r"came with 10\.11"):
        backend.build_for_comparison(candidate, tmp_path)
    assert world.events == []
    info = build_marked(backend, candidate, tmp_path, ["fc1", "relu1"])
    own = [spec.name for spec in candidate.model.outputs]
    assert [t.name for t in world.networks[-1]._outputs] == [*own, "fc1", "relu1"]
    assert read_engine_json(tmp_path).details["marked"] == ["fc1", "relu1"]
    assert info.details["typing"] == typing
    quantized = op_counts(onnx.load(tmp_path / "model.onnx"))["QuantizeLinear"]
    assert quantized == (0 if typing == "weak" else 2)


def test_a_runtime_without_debug_tensors_marks_outputs() -> None:
    assert inner_kind(OnnxruntimeBackend("emulate")) == MARKED_OUTPUTS


class Debugging:
    """A backend whose engines show inner tensors: TensorRT's runtime, in its double."""

    shows_unfused = True

    def __init__(self, trt: EngineDouble, plan: Plan, *, fails: bool = False) -> None:
        self.trt, self.plan, self.fails = trt, plan, fails
        self.builds: list[Path] = []

    def build_for_comparison(self, candidate: Any, folder: Path) -> BuildInfo:
        self.builds.append(folder)
        if self.fails:
            raise TrtuneError("could not build the engine")
        folder.mkdir(parents=True, exist_ok=True)
        return BuildInfo("debugging", self.plan.write(folder / "engine.plan"))

    def load(self, folder: Path) -> TrtEngine:
        return TrtEngine(self.trt, folder / "engine.plan")


@pytest.fixture(params=["10", "11"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EngineDouble:
    cuda = CudaDouble()
    monkeypatch.setitem(sys.modules, RUNTIME, cuda)
    return EngineDouble(request.param, cuda)


def doubled() -> onnx.ModelProto:
    """What the double's engine computes, y = 2 x + 1, and the tensors that it shows."""
    shown = np.arange(6, dtype=np.float32).reshape(2, 3)
    off = shown + np.float32(1)
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["twice"]),
        helper.make_node("Add", ["twice", "one"], ["y"]),
        helper.make_node("Constant", [], ["inner"], value=numpy_helper.from_array(shown)),
        helper.make_node("Constant", [], ["other"], value=numpy_helper.from_array(off)),
    ]
    weights = [
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("two", 2), ("one", 1))
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "doubled", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Two:
    """Two batches of two samples."""

    identity, count = "two", 4
    skipped: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        for start in (0, 8):
            rows = np.arange(start, start + 8, dtype=np.float32).reshape(2, 4)
            yield Batch({"x": rows}, (f"p{start}", f"p{start + 1}"))


def test_debug_tensors_are_read_in_chunks_of_one_engine(
    runtime: EngineDouble, tmp_path: Path
) -> None:
    plan = Plan(debug=("inner", "other", "not asked for"))
    backend: Any = Debugging(runtime, plan)
    used = TrtEngine(runtime, plan.write(tmp_path / "used.plan"))
    got = runtime_errors(
        opens(doubled()), used, opens_inner(backend, None, tmp_path / "debug"),  # type: ignore[arg-type]
        ["inner", "twice", "other", "y"], Two(), pictures=4, memory=1,
    )  # fmt: skip
    assert backend.builds == [tmp_path / "debug"]
    assert (got.chunks, got.pictures) == (3, 4)
    assert list(got.errors) == ["y", "inner", "other"]
    assert got.errors["y"].noise == got.errors["inner"].noise == 0
    assert got.errors["other"].max_abs == 1
    assert dict(got.missing) == {"twice": "the engine does not show it: it is inside a fused layer"}
    assert runtime._cuda.held == {}


def test_a_debug_engine_that_cannot_be_built_is_tried_once(
    runtime: EngineDouble, tmp_path: Path
) -> None:
    backend: Any = Debugging(runtime, Plan(), fails=True)
    used = TrtEngine(runtime, Plan().write(tmp_path / "used.plan"))
    got = runtime_errors(
        opens(doubled()), used, opens_inner(backend, None, tmp_path / "debug"),  # type: ignore[arg-type]
        ["inner", "other"], Two(), pictures=4, memory=1,
    )  # fmt: skip
    assert len(backend.builds) == 1
    assert list(got.errors) == ["y"]
    assert set(got.missing.values()) == {"could not build the engine"}


def test_a_view_needs_an_engine_that_shows_tensors(runtime: EngineDouble, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OrtEngine has no debug tensors"):
        DebugView(engine_of(doubled()), ["inner"])
    with DebugView(TrtEngine(runtime, Plan().write(tmp_path / "a.plan")), ["inner"]) as view:
        assert [spec.name for spec in view.inputs] == ["x"]
        assert view.outputs == ()
        assert list(view.infer(next(iter(Two())).feeds)) == ["inner"]


# By node, as the pipeline asks


@pytest.mark.parametrize("name", ["residual", "silu_se", "two_inputs"])
def test_errors_by_node_leave_nothing_behind(tmp_path: Path, name: str) -> None:
    prepared, backend = named(name), OnnxruntimeBackend("emulate")
    backend.build(candidate_of(prepared), tmp_path / "used")
    before = json.loads((tmp_path / "used" / "engine.json").read_text())
    found = engine_errors(
        candidate_of(prepared), prepared.view, backend, tmp_path / "used",
        rows(prepared.model.proto), scratch=tmp_path / "scratch", pictures=4, memory=1 << 20,
        progress=lambda what, done, of: None,
    )  # fmt: skip
    assert set(found) == set(compared_tensors(prepared.view).values())
    assert all(sums.relative_l2 < 1e-6 for sums in found.values())
    assert not (tmp_path / "scratch").exists()
    assert json.loads((tmp_path / "used" / "engine.json").read_text()) == before


@pytest.mark.parametrize("default", ["fp32", "int8"])
def test_the_gate_of_a_backend_tells_fp32_from_int8(tmp_path: Path, default: str) -> None:
    prepared, backend = case(tinymodels.conv_relu()), OnnxruntimeBackend("emulate")
    plan = make_plan(prepared.view, default=default)
    backend.build(Candidate(prepared.model, plan, prepared.table), tmp_path)
    source = rows(prepared.model.proto)
    if default == "fp32":
        sums = gate_errors(prepared.model, backend, tmp_path, source, pictures=4)
        assert sums["logits"].mean_relative < 1e-5
        return
    with pytest.raises(TrtuneError, match="FP32 engine of onnxruntime/emulate is not the FP32"):
        gate_errors(prepared.model, backend, tmp_path, source, pictures=4)
