"""Building with TensorRT 10 and 11: what they are told, what is kept, and how failure reads.

The same suite runs against doubles of both versions, which refuse what the real bindings do not
have. What the real TensorRT makes of a model is not shown here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray
from onnx import helper
from tinyquant import Case, Rows, case, named, op_counts
from trtdouble import World, double

from trtune.calibrate.cache import read_cache
from trtune.calibrate.table import CalibrationTable, MissingScaleError
from trtune.configs.errors import ConfigError, DataError, ModelError, TrtuneError
from trtune.precision.backends.gpu.callbacks import messages_to, process_logger
from trtune.precision.backends.gpu.runtime import DeviceProperties
from trtune.precision.backends.trt.backend import Settings, TensorRTBackend, load_tensorrt
from trtune.precision.backends.trt.engine_file import Cuda
from trtune.precision.lower.implicit import implicit_tensors
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.runtime.api import BuildInfo, Candidate
from trtune.precision.runtime.engine_json import read_engine_json, reusable

ADA = DeviceProperties(0, "NVIDIA L4", "8.9", "580.95.05", "13.0", "13.0", 24 << 30, 20 << 30)
VERSIONS = {10: "10.16.1.11", 11: "11.4.0.106"}
WEAK_WORDS = ("set_flag INT8", "int8_calibrator", "precision", "set_output_type", "get_batch")
BOTH = pytest.mark.parametrize("major", [10, 11])


@dataclass
class Machine:
    """A GPU, the TensorRT on it, and what was done to it."""

    major: int = 10
    world: World = field(default_factory=World)
    gpu: DeviceProperties | None = ADA
    used: list[int] = field(default_factory=list)
    uploads: list[NDArray[Any]] = field(default_factory=list)
    held: int = 0

    def __post_init__(self) -> None:
        self.trt = double(self.major, self.world)

    def properties(self, device: int) -> DeviceProperties:
        if self.gpu is None:
            raise TrtuneError("no NVIDIA driver is loaded here")
        return self.gpu

    @contextmanager
    def use(self, device: int) -> Iterator[None]:
        self.used.append(device)
        yield
        self.used.append(-1)

    def allocate(self, nbytes: int) -> Any:
        machine = self
        machine.held += 1

        class Buffer:
            pointer = 4096

            def upload(self, array: NDArray[Any]) -> None:
                machine.uploads.append(array.copy())

            def free(self) -> None:
                machine.held -= 1

        return Buffer()

    def backend(
        self, *, batches: Any = None, shapes: Any = None, **settings: Any
    ) -> TensorRTBackend:
        return TensorRTBackend(
            Settings(**settings),
            shapes=shapes,
            batch=4,
            batches=None if batches is None else lambda: batches,
            load_module=lambda: self.trt,
            cuda=Cuda(self.properties, self.use, self.allocate),
        )

    @property
    def config(self) -> Any:
        return self.world.configs[-1]


def candidate_of(prepared: Case) -> Candidate:
    return Candidate(prepared.model, prepared.plan, complete(prepared))


def complete(prepared: Case) -> CalibrationTable:
    """The case's table, with a scale for everything else that TensorRT 10 asks for."""
    if isinstance(prepared.plan, ImportedPlan):
        return prepared.table
    rest = dict.fromkeys(implicit_tensors(prepared.view, prepared.plan), 0.5)
    return replace(prepared.table, scales={**rest, **prepared.table.scales})


def built(machine: Machine, prepared: Case, folder: Path, **options: Any) -> BuildInfo:
    return machine.backend(**options).build(candidate_of(prepared), folder)


# Both versions


@BOTH
@pytest.mark.parametrize("name", ["conv_relu", "residual", "mlp", "attention", "fixed_batch"])
def test_a_build_leaves_a_complete_folder(tmp_path: Path, major: int, name: str) -> None:
    machine, prepared = Machine(major), named(name)
    info = built(machine, prepared, tmp_path)
    assert info.backend == "tensorrt"
    assert info.path == tmp_path / "engine.plan"
    assert info.size_bytes == info.path.stat().st_size > 0
    assert info.versions["tensorrt"] == VERSIONS[major]
    assert info.versions["gpu"] == "NVIDIA L4 (8.9)"
    expected = {"model.onnx", "engine.plan", "engine.json", "layers.json", "build.log"}
    assert {path.name for path in tmp_path.iterdir()} - {"calibration.cache"} == expected
    read = read_engine_json(tmp_path)
    assert replace(read, seconds=info.seconds) == info
    assert {key: read.details[key] for key in ("gpu", "compute_capability", "driver", "cuda")} == {
        "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.95.05", "cuda": "13.0",
    }  # fmt: skip
    assert (tmp_path / "build.log").read_text() == "[INFO] Global timing cache in use.\n"
    assert machine.used == [0, -1]
    onnx.checker.check_model(tmp_path / "model.onnx")


@BOTH
def test_builds_share_the_logger_of_the_process_and_give_it_back(
    tmp_path: Path, major: int
) -> None:
    machine, prepared = Machine(major), named("conv_relu")
    logger = process_logger(machine.trt)
    for name in ("a", "b"):
        built(machine, prepared, tmp_path / name)
        assert logger.sink is None
    heard: list[tuple[str, str]] = []
    with messages_to(machine.trt, lambda severity, text: heard.append((severity, text))) as found:
        assert found is logger
        logger.log(machine.trt.ILogger.Severity.ERROR, "inside")
    logger.log(machine.trt.ILogger.Severity.ERROR, "outside")
    assert heard == [("ERROR", "inside")]
    assert list(logger.words) == ["outside"]


@BOTH
def test_every_compute_node_runs_as_planned(tmp_path: Path, major: int) -> None:
    prepared = named("residual", pins={"n_conv1": "fp32"})
    info = built(Machine(major), prepared, tmp_path)
    assert info.precisions == {
        "n_stem": "int8", "n_conv1": "fp32", "n_conv2": "int8", "n_logits": "int8",
        "n_relu1": "fp32",
    }  # fmt: skip
    assert info.not_honoured == ()


def test_weak_typing_is_used_on_10(tmp_path: Path) -> None:
    machine = Machine(10)
    prepared = named("conv_relu", pins={"n_conv2": "fp32"})
    info = built(machine, prepared, tmp_path)
    assert info.details["typing"] == "weak"
    assert machine.world.count("create_network 0") == 1
    for word in WEAK_WORDS[:4]:
        assert machine.world.count(word) >= 1
    assert op_counts(onnx.load(tmp_path / "model.onnx"))["QuantizeLinear"] == 0


@pytest.mark.parametrize(
    ("major", "typing", "flags"),
    [
        pytest.param(10, "strong", 2, id="10, strong by name"),
        pytest.param(11, "auto", 1, id="11"),
        pytest.param(11, "weak", 1, id="11, weak by name"),
        pytest.param(11, "strong", 1, id="11, strong by name"),
    ],
)
def test_weak_typing_is_never_touched_elsewhere(
    tmp_path: Path, major: int, typing: str, flags: int
) -> None:
    machine = Machine(major)
    prepared = named("conv_relu", pins={"n_conv2": "fp32"})
    info = built(machine, prepared, tmp_path, typing=typing)
    assert info.details["typing"] == "strong"
    assert info.backend == ("tensorrt" if typing == "auto" else f"tensorrt/{typing}")
    assert machine.world.events == [f"create_network {flags}", "build"]
    assert op_counts(onnx.load(tmp_path / "model.onnx"))["QuantizeLinear"] == 2
    assert not (tmp_path / "calibration.cache").exists()


def test_other_calibration_data_is_another_engine(tmp_path: Path) -> None:
    machine = Machine(10)
    first, second = (
        machine.backend(calibrator="minmax", batches=batches(count)).settings for count in (3, 6)
    )
    assert first != second
    assert machine.backend(batches=batches(3)).settings == machine.backend().settings


@BOTH
def test_what_the_engine_did_otherwise_is_named(tmp_path: Path, major: int) -> None:
    world = World(swallowed=frozenset({"n_conv1"}))
    info = built(Machine(major, world), named("conv_relu"), tmp_path)
    assert info.precisions["n_conv1"] == "fp32"
    assert info.not_honoured == ("n_conv1: planned int8, runs in fp32",)


def test_a_pin_that_was_ignored_is_named_with_its_group(tmp_path: Path) -> None:
    world = World(swallowed=frozenset({"n_conv2", "n_relu2"}))
    prepared = named("conv_relu", pins={"n_conv2": "fp32"})
    info = built(Machine(10, world), prepared, tmp_path)
    assert info.not_honoured == (
        "n_conv2: planned fp32, runs in int8",
        "n_relu2: planned fp32, runs in int8",
    )
    assert read_engine_json(tmp_path).not_honoured == info.not_honoured


@BOTH
@pytest.mark.parametrize(
    "world",
    [
        pytest.param(World(broken_words="{"), id="not JSON"),
        pytest.param(World(broken_words='{"Layers": {}}'), id="another form"),
        pytest.param(World(detail=False), id="names alone"),
        pytest.param(World(loads=False), id="the engine cannot be loaded here"),
    ],
)
def test_an_account_that_is_not_understood_gives_unknown(
    tmp_path: Path, major: int, world: World
) -> None:
    info = built(Machine(major, replace(world, events=[])), named("conv_relu"), tmp_path)
    assert set(info.precisions.values()) == {"unknown"}
    assert info.not_honoured == ()


def test_an_engine_that_cannot_be_inspected_says_so(tmp_path: Path) -> None:
    info = built(Machine(10, World(loads=False)), named("conv_relu"), tmp_path)
    assert info.details["notes"] == [
        "the engine cannot be inspected here: every precision is unknown"
    ]
    assert "Engine deserialization failed." in info.log


@BOTH
def test_an_engine_is_reused_until_something_changes(tmp_path: Path, major: int) -> None:
    machine, prepared = Machine(major), named("conv_relu")
    built(machine, prepared, tmp_path, workspace=1 << 30)

    def known(backend: TensorRTBackend) -> bool:
        found = reusable(
            tmp_path, candidate_of(prepared), backend=backend.name, versions=backend.versions,
            settings=backend.settings,
        )  # fmt: skip
        return found is not None

    assert known(machine.backend(workspace=1 << 30))
    assert not known(machine.backend(workspace=2 << 30))
    assert not known(machine.backend(workspace=1 << 30, shapes={"input": SHAPES}))
    machine.gpu = replace(ADA, name="NVIDIA H200", compute_capability="9.0")
    assert not known(machine.backend(workspace=1 << 30))


# Profiles


SHAPES = {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [5, 3, 8, 8]}


@BOTH
@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        pytest.param({"input": SHAPES}, [[1, 3, 8, 8], [2, 3, 8, 8], [5, 3, 8, 8]], id="given"),
        pytest.param(None, [[1, 3, 8, 8], [4, 3, 8, 8], [32, 3, 8, 8]], id="around the batch"),
    ],
)
def test_a_dynamic_input_gets_a_profile(
    tmp_path: Path, major: int, shapes: Any, expected: list[list[int]]
) -> None:
    machine = Machine(major)
    info = built(machine, named("conv_relu"), tmp_path, shapes=shapes)
    (profile,) = machine.config._profiles
    assert [list(shape) for shape in profile._shapes["input"]] == expected
    assert info.details["profiles"]["input"]["opt"] == expected[1]
    assert info.precisions["n_conv1"] == "int8"  # formats are asked for at the opt shapes


@BOTH
def test_a_fixed_model_gets_none(tmp_path: Path, major: int) -> None:
    machine = Machine(major)
    built(machine, named("fixed_batch"), tmp_path)
    assert machine.config._profiles == []


@BOTH
def test_a_profile_that_is_missing_is_asked_for_before_anything_is_built(
    tmp_path: Path, major: int
) -> None:
    proto = tinymodels.conv_relu()
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    machine = Machine(major)
    with pytest.raises(ConfigError, match=r"model\.shapes: input 'input' has free dimensions"):
        built(machine, case(proto), tmp_path)
    assert machine.world.events == []
    assert list(tmp_path.iterdir()) == []


# Settings


@BOTH
def test_settings_reach_the_builder(tmp_path: Path, major: int) -> None:
    machine = Machine(major)
    info = built(
        machine, named("conv_relu"), tmp_path, workspace=3 << 30, optimization_level=5, device=1,
        hardware_compatibility="ampere_plus", version_compatible=True,
    )  # fmt: skip
    config, trt = machine.config, machine.trt
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 << 30
    assert config.builder_optimization_level == 5
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert machine.used == [1, -1]
    assert info.details["settings"]["workspace"] == 3 << 30


@BOTH
def test_left_alone_a_setting_is_tensorrts_own(tmp_path: Path, major: int) -> None:
    machine = Machine(major)
    built(machine, named("conv_relu"), tmp_path, tf32=True)
    config, trt = machine.config, machine.trt
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 0
    assert config.builder_optimization_level == 3
    assert config.get_flag(trt.BuilderFlag.TF32)
    assert config._tactics is None


@pytest.mark.parametrize(
    ("major", "mask", "notes"),
    [
        pytest.param(10, (1 << 0) | (1 << 4), [], id="10 has both"),
        pytest.param(
            11, 1 << 1,
            ["tactic source cublas does not exist in TensorRT 11.4.0.106: left out"],
            id="11 has one of them, with another number",
        ),
    ],
)  # fmt: skip
def test_tactic_sources(tmp_path: Path, major: int, mask: int, notes: list[str]) -> None:
    machine = Machine(major)
    sources = ("cublas", "jit_convolutions")
    info = built(machine, named("conv_relu"), tmp_path, tactic_sources=sources)
    assert machine.config.get_tactic_sources() == mask
    assert info.details["notes"] == notes


@BOTH
def test_dla(tmp_path: Path, major: int) -> None:
    machine = Machine(major, World(dla_cores=2))
    built(machine, named("conv_relu"), tmp_path, dla_core=1)
    assert machine.config.DLA_core == 1
    assert machine.config.default_device_type == machine.trt.DeviceType.DLA
    assert machine.config.get_flag(machine.trt.BuilderFlag.GPU_FALLBACK)


@BOTH
@pytest.mark.parametrize(
    ("world", "settings", "kind", "message"),
    [
        pytest.param(
            {}, {"dla_core": 0}, TrtuneError, "this machine has no DLA cores; leave `dla_core` out",
            id="no DLA",
        ),
        pytest.param(
            {}, {"hardware_compatibility": "ampere"}, ConfigError,
            "hardware_compatibility: 'ampere' is none of none, ampere_plus",
            id="unknown compatibility",
        ),
        pytest.param(
            {"refuses_profiles": True}, {}, ConfigError,
            "model.shapes: TensorRT refuses the ranges of input", id="a profile that is refused",
        ),
        pytest.param(
            {"gpu": False}, {}, TrtuneError, "cannot start here: CUDA initialization failure",
            id="no GPU",
        ),
        pytest.param(
            {"unsupported": frozenset({"GlobalAveragePool"})}, {}, ModelError,
            r"cannot take model\.onnx: node 'n_pooled' \(GlobalAveragePool, opset 17\): "
            "No importer registered for op: GlobalAveragePool",
            id="unsupported operator",
        ),
        pytest.param(
            {"build_errors": ("Could not find any implementation for node n_conv1 due to "
                              "insufficient workspace. See verbose log",)},
            {"workspace": 1 << 20}, TrtuneError,
            r"It ran out of memory: raise `workspace` \(now 1MiB\)", id="workspace too small",
        ),
        pytest.param(
            {"build_errors": ("Requested amount of GPU memory could not be allocated: "
                              "[virtualMemoryBuffer] Cuda Runtime (out of memory)",)},
            {}, TrtuneError, "free the GPU", id="GPU memory full",
        ),
        pytest.param(
            {"build_errors": ("Error Code 10: Internal Error (Could not find any implementation "
                              "for node n_conv1 + n_relu1.)",)},
            {}, TrtuneError, r"There is no kernel for 'n_conv1 \+ n_relu1': pin its nodes to fp32",
            id="no kernel",
        ),
        pytest.param(
            {"build_errors": ("Assertion failed",)}, {}, TrtuneError,
            "Assertion failed. build.log beside the engine", id="anything else",
        ),
    ],
)  # fmt: skip
def test_failure_says_what_and_what_to_do(
    tmp_path: Path, major: int, world: Any, settings: Any, kind: type[Exception], message: str
) -> None:
    machine = Machine(major, World(**world))
    with pytest.raises(kind, match=message):
        built(machine, named("conv_relu"), tmp_path, **settings)
    assert not (tmp_path / "engine.plan").exists()
    assert not (tmp_path / "engine.json").exists()
    said = (tmp_path / "build.log").read_text()
    assert all(text in said for text in world.get("build_errors", ()))
    assert machine.used[:1] == [0]


@BOTH
def test_builds_share_a_timing_cache(tmp_path: Path, major: int) -> None:
    machine, cache = Machine(major), tmp_path / "timing.cache"
    info = built(machine, named("conv_relu"), tmp_path / "a", timing_cache=cache)
    assert info.details["notes"] == [f"timing cache {cache}: new"]
    built(machine, named("conv_relu"), tmp_path / "b", timing_cache=cache)
    assert cache.read_text() == f"{VERSIONS[major]}\ntimed tiny"


@pytest.mark.parametrize(
    ("major", "settings", "expected"),
    [
        pytest.param(
            10, {"workspace": 1 << 30, "optimization_level": 2},
            "trtexec --onnx=model.onnx --saveEngine=engine.plan --int8 --calib=calibration.cache "
            "--precisionConstraints=obey --layerPrecisions=n_conv2:fp32,n_relu2:fp32 "
            "--layerOutputTypes=n_conv2:fp32,n_relu2:fp32 --noTF32 --memPoolSize=workspace:1024M "
            "--builderOptimizationLevel=2 --profilingVerbosity=detailed",
            id="10, weak",
        ),
        pytest.param(
            10, {"typing": "strong", "device": 2, "timing_cache": Path("t.cache")},
            "trtexec --onnx=model.onnx --saveEngine=engine.plan --stronglyTyped --noTF32 "
            "--timingCacheFile=t.cache --device=2 --profilingVerbosity=detailed",
            id="10, strong",
        ),
        pytest.param(
            11, {"version_compatible": True, "hardware_compatibility": "ampere_plus",
                 "dla_core": 0, "tactic_sources": ("jit_convolutions",)},
            "trtexec --onnx=model.onnx --saveEngine=engine.plan --noTF32 --versionCompatible "
            "--hardwareCompatibilityLevel=ampere+ --tacticSources=+JIT_CONVOLUTIONS "
            "--useDLACore=0 --allowGPUFallback --profilingVerbosity=detailed",
            id="11",
        ),
    ],
)  # fmt: skip
def test_the_equivalent_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int, settings: Any, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = Machine(major, World(dla_cores=1))
    info = built(machine, named("fixed_batch", pins={"n_conv2": "fp32"}), tmp_path, **settings)
    assert info.details["command"] == expected


def test_the_command_has_the_profile(tmp_path: Path) -> None:
    info = built(Machine(11), named("conv_relu"), tmp_path)
    shapes = "--minShapes=input:1x3x8x8 --optShapes=input:4x3x8x8 --maxShapes=input:32x3x8x8"
    assert shapes in info.details["command"]


def test_layers_that_trtexec_cannot_name_are_told(tmp_path: Path) -> None:
    info = built(Machine(10), named("mlp", pins={"n_fc1": "fp32"}), tmp_path)
    assert "--layerPrecisions=n_fc1:fp32,n_relu1:fp32 " in info.details["command"]
    (left_out,) = info.details["command_leaves_out"]
    assert left_out.startswith("(Unnamed Layer* ")  # the bias of n_fc1, held to fp32 like it


def test_a_pin_without_a_layer_is_told(tmp_path: Path) -> None:
    net = tinymodels.Net()
    x = net.op("Cast", net.input("input", ("N", 16)), out="same", to=onnx.TensorProto.FLOAT)
    net.linear(x, "logits", 16, 10)
    prepared = case(net.model({"logits": ("N", 10)}), pins={"n_same": "fp32"})
    info = built(Machine(10), prepared, tmp_path)
    assert "no layer to hold to a precision for n_same" in info.details["notes"]


# 10.x: calibration


def test_our_table_is_calibration_enough(tmp_path: Path) -> None:
    machine, prepared = Machine(10), named("conv_relu")
    info = built(machine, prepared, tmp_path)
    cache = read_cache(tmp_path / "calibration.cache")
    assert cache.header == "TRT-101601-EntropyCalibration2"
    assert cache.scales == complete(prepared).scales
    assert machine.world.events[-4:] == [
        "get_batch_size", "get_algorithm", "read_calibration_cache", "read_calibration_cache",
    ]  # fmt: skip
    assert machine.uploads == []
    assert info.not_honoured == ()


def test_a_table_of_another_version_is_not_taken_silently(tmp_path: Path) -> None:
    machine = Machine(10)
    machine.trt.__version__ = "10.3.0"  # what is told, and not what the builder then is

    def build_with_another(*arguments: Any) -> Any:
        machine.trt.__version__ = "10.16.1.11"
        return original(*arguments)

    original = machine.trt.Builder._do_build_serialized_network
    machine.trt.Builder._do_build_serialized_network = build_with_another
    with pytest.raises(TrtuneError, match="did not take the calibration table"):
        built(machine, named("conv_relu"), tmp_path)
    assert not (tmp_path / "calibration.cache").exists()


def test_a_tensor_without_a_scale_is_refused_before_tensorrt_leaves_it_in_float(
    tmp_path: Path,
) -> None:
    prepared = named("conv_relu")
    scales = {t: s for t, s in prepared.table.scales.items() if t != "relu1"}
    candidate = Candidate(prepared.model, prepared.plan, CalibrationTable(scales))
    with pytest.raises(MissingScaleError, match="'relu1'"):
        Machine(10).backend().build(candidate, tmp_path)


def test_a_layer_whose_output_has_no_scale_is_left_in_float_and_says_why(tmp_path: Path) -> None:
    machine, prepared = Machine(10), named("conv_relu")
    whole = complete(prepared).scales
    scales = {t: s for t, s in whole.items() if t not in ("conv2", "relu2")}
    candidate = Candidate(prepared.model, prepared.plan, CalibrationTable(scales))
    info = machine.backend().build(candidate, tmp_path)
    assert (info.precisions["n_conv1"], info.precisions["n_conv2"]) == ("int8", "fp32")
    assert info.not_honoured == (
        "n_conv2: planned int8, runs in fp32: TensorRT 10 wants a scale for 'conv2', which the "
        "calibration table does not have",
    )
    said = (tmp_path / "build.log").read_text()
    assert "Missing scale and zero-point for tensor conv2, expect fall back to non-int8" in said
    assert any("n_conv2" in note for note in info.details["notes"])


def test_the_scale_of_what_is_fused_behind_is_enough(tmp_path: Path) -> None:
    prepared = named("conv_relu")
    scales = {t: s for t, s in complete(prepared).scales.items() if t not in ("conv1", "conv2")}
    candidate = Candidate(prepared.model, prepared.plan, CalibrationTable(scales))
    info = Machine(10).backend().build(candidate, tmp_path)
    assert info.not_honoured == ()
    assert "Missing scale" in (tmp_path / "build.log").read_text()


def batches(count: int = 6, **changes: Any) -> Rows:
    feeds = tinymodels.feeds(tinymodels.conv_relu(), batch=count, seed=3)
    return Rows.of({**feeds, **changes}, batch=3)


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        ("entropy2", "TRT-101601-EntropyCalibration2"),
        ("minmax", "TRT-101601-MinMaxCalibration"),
    ],
)
def test_tensorrt_calibrates_on_our_batches(tmp_path: Path, kind: str, header: str) -> None:
    machine, prepared, data = Machine(10), named("conv_relu"), batches(6)
    info = built(machine, prepared, tmp_path, calibrator=kind, batches=data)
    start = machine.world.events.index("get_batch_size")
    assert machine.world.events[start:] == [
        "get_batch_size", "get_algorithm", "read_calibration_cache", "read_calibration_cache",
        "get_batch", "get_batch", "get_batch", "write_calibration_cache",
    ]  # fmt: skip
    assert [array.shape[0] for array in machine.uploads] == [4, 4]  # the profile's opt
    rows = data.feeds["input"]
    assert np.array_equal(machine.uploads[0], rows[:4])
    assert np.array_equal(machine.uploads[1], rows[[4, 5, 5, 5]])
    assert machine.held == 0
    assert machine.config._calibration_profile is machine.config._profiles[0]
    cache = read_cache(tmp_path / "calibration.cache")
    assert cache.header == header
    assert info.details["calibration"]["calibrator"] == kind
    ratios = info.details["calibration"]["log2_ratios"]
    assert set(ratios) == set(complete(prepared).scales)
    assert ratios["input"] == pytest.approx(np.log2(0.5 / prepared.table.scales["input"]))
    assert machine.world.released  # the memoryview was gone after the call; our copy is not


def test_a_fixed_model_is_calibrated_at_its_own_batch(tmp_path: Path) -> None:
    machine = Machine(10)
    built(machine, named("fixed_batch"), tmp_path, calibrator="minmax", batches=batches(3))
    assert [array.shape[0] for array in machine.uploads] == [1, 1, 1]
    assert machine.config._calibration_profile is None


def spoiled() -> Rows:
    data = batches(6)
    data.feeds["input"][5, 0, 0, 0] = np.nan
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(spoiled, "p5: input 'input' holds NaN or infinity", id="NaN in batch 2"),
        pytest.param(lambda: batches(0), "the data is empty", id="no data"),
        pytest.param(
            lambda: batches(6, input=np.zeros((6, 3, 9, 9), np.float32)),
            r"float32 of shape \[4, 3, 8, 8\]; the batch of p0 has float32 of shape \[4, 3, 9, 9\]",
            id="outside the profile",
        ),
    ],
)
def test_broken_calibration_stops_the_build_and_leaves_no_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Callable[[], Rows], message: str
) -> None:
    machine = Machine(10)
    with pytest.raises(DataError, match=message):
        built(machine, named("conv_relu"), tmp_path, calibrator="entropy2", batches=data())
    assert machine.held == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "build.log"}
    assert "Exception caught" not in capsys.readouterr().err


def test_a_failed_build_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    machine, prepared = Machine(10), named("conv_relu")
    built(machine, prepared, tmp_path)
    with pytest.raises(DataError, match="holds NaN"):
        built(machine, prepared, tmp_path, calibrator="minmax", batches=spoiled())
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "build.log"}


def test_a_plan_with_int8_needs_a_table_or_data(tmp_path: Path) -> None:
    prepared = named("conv_relu")
    with pytest.raises(ValueError, match="needs a calibration table"):
        Machine(10).backend().build(Candidate(prepared.model, prepared.plan), tmp_path)
    with pytest.raises(ValueError, match="needs batches"):
        built(Machine(10), prepared, tmp_path, calibrator="minmax")


def test_int8_needs_a_gpu_that_has_it(tmp_path: Path) -> None:
    machine = Machine(10, World(fast_int8=False))
    with pytest.raises(TrtuneError, match=r"GPU 0 has no INT8 arithmetic: set `precision.default`"):
        built(machine, named("conv_relu"), tmp_path)
    info = built(machine, named("conv_relu", pins={"re:.*": "fp32"}), tmp_path)
    assert set(info.precisions.values()) == {"fp32"}
    assert machine.world.count("set_flag INT8") == 0


def test_constraints_may_yield_on_request(tmp_path: Path) -> None:
    machine, prepared = Machine(10), named("conv_relu", pins={"n_conv2": "fp32"})
    built(machine, prepared, tmp_path / "a")
    built(machine, prepared, tmp_path / "b", constraints="prefer")
    events = [event for event in machine.world.events if "CONSTRAINTS" in event]
    assert events == [
        "set_flag OBEY_PRECISION_CONSTRAINTS", "set_flag PREFER_PRECISION_CONSTRAINTS",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (("Could not find any implementation for node n_conv2.",), "`constraints: prefer`"),
        (("Assertion failed",), "A pin may be impossible: `constraints: prefer` lets pins yield"),
    ],
)
def test_a_pin_that_cannot_be_met_is_suspected(
    tmp_path: Path, errors: tuple[str, ...], message: str
) -> None:
    machine = Machine(10, World(build_errors=errors))
    with pytest.raises(TrtuneError, match=message):
        built(machine, named("conv_relu", pins={"n_conv2": "fp32"}), tmp_path)


def test_a_constraint_that_tensorrt_only_logs_about_is_not_lost(tmp_path: Path) -> None:
    machine = Machine(10, World(refuses_pins=True))
    prepared = named("conv_relu", pins={"n_conv2": "fp32"})
    with pytest.raises(
        TrtuneError, match=r"refused to hold a layer .* ILayer::setPrecision"
    ) as seen:
        built(machine, prepared, tmp_path / "a")
    assert "constraints: prefer" in str(seen.value)
    info = built(machine, prepared, tmp_path / "b", constraints="prefer")
    assert "refused to hold a layer to its precision" in info.details["notes"][0]


def test_a_model_with_qdq_is_built_strongly_typed(tmp_path: Path) -> None:
    machine, prepared = Machine(10), named("quantized")
    info = built(machine, prepared, tmp_path / "a")
    assert info.details["typing"] == "strong"
    assert info.details["notes"] == ["the model carries Q/DQ: it is built strongly typed"]
    assert "set_flag INT8" not in machine.world.events
    with pytest.raises(ConfigError, match="typing: weak: the model carries Q/DQ"):
        built(machine, prepared, tmp_path / "b", typing="weak")


def test_scales_of_a_quantized_model_need_strong_typing(tmp_path: Path) -> None:
    machine, prepared = Machine(10), named("conv_relu")
    table = replace(prepared.table, weights={"conv1_w": (0.5,)})
    candidate = Candidate(prepared.model, prepared.plan, table)
    info = machine.backend().build(candidate, tmp_path / "a")
    assert info.details["typing"] == "strong"
    assert "the plan comes from a quantized model" in info.details["notes"][0]
    with pytest.raises(ConfigError, match="typing: weak: the plan comes from a quantized model"):
        machine.backend(typing="weak").build(candidate, tmp_path / "b")


@pytest.mark.parametrize(("major", "typing"), [(10, "auto"), (10, "strong"), (11, "auto")])
def test_fp8_is_written_as_qdq(tmp_path: Path, major: int, typing: str) -> None:
    prepared = named("residual", pins={"n_conv1": "fp8"})
    machine = Machine(major)
    info = built(machine, prepared, tmp_path, typing=typing)
    assert info.details["typing"] == "strong"
    assert "set_flag INT8" not in machine.world.events
    assert info.precisions["n_conv1"] == "fp8"
    assert {info.precisions[n] for n in ("n_stem", "n_conv2", "n_logits")} == {"int8"}
    assert info.not_honoured == ()
    if (major, typing) == (10, "auto"):
        assert info.details["notes"][0] == (
            "1 node of the plan run in FP8, which TensorRT takes from Q/DQ alone: it is built "
            "strongly typed"
        )


def test_weak_typing_has_no_fp8(tmp_path: Path) -> None:
    prepared = named("residual", pins={"n_conv1": "fp8"})
    with pytest.raises(ConfigError, match=r"typing: weak: .* FP8, which TensorRT takes from Q/DQ"):
        built(Machine(10), prepared, tmp_path, typing="weak")


@pytest.mark.parametrize("major", [10, 11])
def test_a_gpu_without_fp8_is_named(tmp_path: Path, major: int) -> None:
    ampere = replace(ADA, name="NVIDIA A10", compute_capability="8.6")
    prepared = named("residual", pins={"n_conv1": "fp8"})
    with pytest.raises(TrtuneError, match=r"NVIDIA A10, compute capability 8.6\) has no FP8"):
        built(Machine(major, gpu=ampere), prepared, tmp_path)


# 11.x: what is carried over


def test_what_11_lacks_is_carried_over_and_told(tmp_path: Path) -> None:
    machine = Machine(11)
    prepared = named("conv_relu", pins={"n_conv2": "fp32"})
    info = built(machine, prepared, tmp_path, typing="weak", calibrator="minmax", batches=batches())
    assert info.details["notes"] == [
        "TensorRT 11.4.0.106 has no weak typing: the plan is written as Q/DQ and casts in the "
        "model",
        "strong typing has no calibrators: instead of minmax the scales of our calibration table "
        "are written as Q/DQ",
        "strong typing has no precision constraints: the pins of 1 node are missing Q/DQ, and "
        "casts to their precision",
    ]
    assert all(note in info.log for note in info.details["notes"])
    assert machine.uploads == []
    scales = {
        tensor.name: float(onnx.numpy_helper.to_array(tensor))
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if tensor.name in ("input/scale", "flat/scale")
    }
    assert scales == {
        "input/scale": prepared.table.scales["input"], "flat/scale": prepared.table.scales["flat"],
    }  # fmt: skip


# Loading and doctor


@BOTH
def test_the_engine_is_loaded_from_its_plan(tmp_path: Path, major: int) -> None:
    machine = Machine(major)
    built(machine, named("conv_relu"), tmp_path)
    engine: Any = machine.backend().load(tmp_path)
    assert type(engine).__name__ == "TrtEngine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"major": 11},
            "it was built with TensorRT 10.16.1.11, and 11.4.0.106 is installed",
            id="another version",
        ),
        pytest.param(
            {"gpu": replace(ADA, name="NVIDIA H200", compute_capability="9.0")},
            "it was built for NVIDIA L4 of compute capability 8.9, and GPU 0 is NVIDIA H200 of 9.0",
            id="another GPU",
        ),
        pytest.param({"gpu": None}, "no usable NVIDIA GPU was found", id="no GPU"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(tmp_path: Path, change: Any, message: str) -> None:
    built(Machine(10), named("conv_relu"), tmp_path)
    with pytest.raises(TrtuneError, match=message) as caught:
        Machine(**change).backend().load(tmp_path)
    assert "trtune build CONFIG --backend tensorrt" in str(caught.value)


@pytest.mark.parametrize(
    ("major", "expected"),
    [
        (10, "NVIDIA L4, compute capability 8.9, driver 580.95.05; weak typing (calibrators, "
             "constraints) and strong"),
        (11, "NVIDIA L4, compute capability 8.9, driver 580.95.05; strong typing only: what needs "
             "weak typing (calibrators, constraints) is written as Q/DQ and casts"),
    ],
)  # fmt: skip
def test_doctor_says_what_this_version_can(major: int, expected: str) -> None:
    found = Machine(major).backend().doctor()
    assert (found.usable, found.reason, found.version) == (True, expected, VERSIONS[major])


def test_doctor_without_a_gpu() -> None:
    found = Machine(10, gpu=None).backend().doctor()
    assert not found.usable
    assert found.reason == "GPU 0: no NVIDIA driver is loaded here"
    assert "NVIDIA GPU" in found.remedy


def test_without_tensorrt_the_pip_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    prepared = named("conv_relu")
    backend = TensorRTBackend(cuda=Machine().backend()._cuda)
    with pytest.raises(TrtuneError, match=r"pip install 'trtune\[trt10\]'"):
        backend.build(candidate_of(prepared), tmp_path)
    found = backend.doctor()
    assert not found.usable
    assert "trtune[trt11]" in found.remedy


@pytest.mark.parametrize("found", ["8.6.1", "12.0.0", "unreleased"])
def test_a_version_that_we_do_not_build_with_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    trt = double(10)
    trt.__version__ = found
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(TrtuneError, match=f"TensorRT {found} is installed, and trtune builds with"):
        load_tensorrt()


@BOTH
def test_both_versions_are_accepted(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    trt = double(major)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert load_tensorrt() is trt


def test_without_cuda_python_gpu_0_is_built_for(tmp_path: Path) -> None:
    machine = Machine(10, gpu=None)
    info = built(machine, named("conv_relu"), tmp_path)
    assert machine.used == []
    assert json.loads((tmp_path / "engine.json").read_text())["details"]["gpu"] == "unknown"
    assert info.versions["gpu"] == "unknown (unknown)"


# Plugins


def detector() -> Case:
    """A detector that ends in a plugin of TensorRT, cut before it."""
    net = tinymodels.Net()
    x = net.conv(net.input("x", ("N", 3, 8, 8)), "head", 3, 6)
    boxes = net.op("Reshape", x, net.const("s4", [0, -1, 4], np.int64), out="boxes")
    rows = net.op("Reshape", x, net.const("s2", [0, -1, 2], np.int64), out="rows")
    names = ["num", "found"]
    plugin = helper.make_node("EfficientNMS_TRT", [boxes, rows], names, "nms", domain="TRT")
    net.nodes.append(plugin)
    proto = net.model({"num": ("N", 1), "found": ("N", 10, 4)})
    proto.opset_import.append(helper.make_opsetid("TRT", 1))
    return case(proto)


@BOTH
def test_the_engine_with_plugins_is_built_whole(tmp_path: Path, major: int) -> None:
    machine = Machine(major)
    info = built(machine, detector(), tmp_path)
    assert (tmp_path / "engine.plan").stat().st_size > 0
    assert (tmp_path / "whole.plan").stat().st_size > 0
    assert info.details["whole"]["engine"] == "whole.plan"
    assert "plugins" in machine.world.events
    cut, whole = (
        [network.get_layer(k).name for k in range(network.num_layers)]
        for network in machine.world.networks
    )
    assert "nms" not in cut
    assert "nms" in whole
    assert len(whole) == len(cut) + 1


@BOTH
def test_without_the_plugin_the_engine_up_to_the_cut_is_there(tmp_path: Path, major: int) -> None:
    machine = Machine(major, World(unsupported=frozenset({"EfficientNMS_TRT"})))
    info = built(machine, detector(), tmp_path)
    assert info.path == tmp_path / "engine.plan"
    assert not (tmp_path / "whole.plan").exists()
    assert "EfficientNMS_TRT" in info.details["whole"]["reason"]
