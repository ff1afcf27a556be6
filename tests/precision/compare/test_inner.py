"""Engines to look into: doubles of TensorRT 10 and 11, which refuse what the real bindings do not
have, stand where its API does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import candidate_of, engine_of, inner, opens, rows
from cudadouble import CudaDouble
from enginedouble import EngineDouble, Plan
from onnx import TensorProto, helper, numpy_helper
from tinyquant import Case, named, op_counts
from trtdouble import World, double
from trtnetwork import OfNetwork

from trtune.configs.errors import TrtuneError
from trtune.datasets.batches import Batch
from trtune.precision.backends.gpu.engine import TrtEngine
from trtune.precision.backends.gpu.runtime import RUNTIME, DeviceProperties
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.trt.backend import Settings, TensorRTBackend
from trtune.precision.backends.trt.engine_file import Cuda
from trtune.precision.compare.by_node import compared_tensors
from trtune.precision.compare.inner import (
    DEBUG_TENSORS,
    MARKED_OUTPUTS,
    DebugView,
    build_marked,
    inner_kind,
    mark_outputs,
    opens_inner,
)
from trtune.precision.compare.runtime_errors import runtime_errors
from trtune.precision.graph.view import model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.runtime.api import BuildInfo
from trtune.precision.runtime.engine_json import read_engine_json, reusable

ADA = DeviceProperties(0, "NVIDIA L4", "8.9", "580.95.05", "13.0", "13.0", 24 << 30, 20 << 30)


BOTH = pytest.mark.parametrize("major", [10, 11])


UNFUSED = "mark_unfused_tensors_as_debug_tensors"


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
