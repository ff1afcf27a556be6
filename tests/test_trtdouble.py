"""The double of TensorRT is as strict as the bindings that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
from trtdouble import World, double
from trtstrict import new, parse_signature

BOTH = pytest.mark.parametrize("major", [10, 11])
GONE = (
    *("IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator", "CalibrationAlgoType"),
    *("BuilderFlag.INT8", "BuilderFlag.FP16", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS"),
    *("IBuilderConfig.int8_calibrator", "IBuilderConfig.set_calibration_profile"),
    *("ILayer.precision", "ILayer.set_output_type", "Builder.platform_has_fast_int8"),
    *("TacticSource.CUBLAS", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
)
STAYS = (
    *("BuilderFlag.TF32", "BuilderFlag.VERSION_COMPATIBLE", "ILayer.metadata", "ITensor.dtype"),
    *("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "ITimingCache.combine", "ILogger.Severity"),
)


def has(trt: Any, dotted: str) -> bool:
    target = trt
    for part in dotted.split("."):
        if not hasattr(target, part):
            return False
        target = getattr(target, part)
    return True


@pytest.mark.parametrize("name", GONE)
def test_weak_typing_is_in_10_and_gone_in_11(name: str) -> None:
    assert has(double(10), name)
    assert not has(double(11), name)


@BOTH
@pytest.mark.parametrize("name", STAYS)
def test_both_have(major: int, name: str) -> None:
    assert has(double(major), name)


def test_the_numbers_of_enums_differ_between_versions() -> None:
    flags = [double(m).NetworkDefinitionCreationFlag.STRONGLY_TYPED for m in (10, 11)]
    assert [int(flag) for flag in flags] == [1, 0]
    assert flags[0] != 1
    assert flags[0] != flags[1]
    with pytest.raises(TypeError):
        1 << flags[0]  # type: ignore[operator]


def config_of(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, msg: str) -> None:
            return None

    return trt.Builder(Logger()).create_builder_config()


@BOTH
def test_what_is_not_there_cannot_be_read_set_or_called(major: int) -> None:
    trt = double(major)
    config = config_of(trt)
    assert not hasattr(config, "max_workspace_size")
    assert not hasattr(trt.BuilderFlag, "NO_SUCH")
    assert not hasattr(trt, "volumes")
    with pytest.raises(AttributeError, match="has no attribute 'max_workspace_size'"):
        config.max_workspace_size = 1


@BOTH
def test_read_only_properties_refuse(major: int) -> None:
    config = config_of(double(major))
    with pytest.raises(AttributeError, match=r"setter|can.t set"):
        config.num_optimization_profiles = 2


def test_a_tensors_type_is_read_only_from_11_on() -> None:
    old, trt = (double(major) for major in (10, 11))
    new(old.ITensor, kind="FLOAT").dtype = old.DataType.HALF
    with pytest.raises(AttributeError, match=r"setter|can.t set"):
        new(trt.ITensor, kind="FLOAT").dtype = trt.DataType.HALF


@BOTH
def test_values_of_another_type_refuse(major: int) -> None:
    trt = double(major)
    config = config_of(trt)
    for wrong in (6, "TF32", trt.DataType.FLOAT):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            config.set_flag(wrong)
    with pytest.raises(TypeError, match="must be ProfilingVerbosity"):
        config.profiling_verbosity = 2
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1, 2)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5)


def test_a_subclass_must_call_init() -> None:
    trt = double(10)

    class Forgetful(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            self.mine = 1

    with pytest.raises(TypeError, match=r"IInt8EntropyCalibrator2.__init__\(\) must be called"):
        Forgetful()


@BOTH
def test_what_the_bindings_do_not_construct_cannot_be_made(major: int) -> None:
    with pytest.raises(TypeError, match="No constructor defined"):
        double(major).IBuilderConfig()


def test_deprecated_members_warn() -> None:
    trt = double(10)
    config = config_of(trt)

    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        pass

    with pytest.warns(DeprecationWarning, match="int8_calibrator"):
        config.int8_calibrator = Calibrator()
    layer = new(trt.ILayer, types={})
    with pytest.warns(DeprecationWarning, match=r"ILayer\.precision"):
        layer.precision = trt.float32
    with pytest.warns(DeprecationWarning, match="set_output_type"):
        layer.set_output_type(0, trt.float32)


def test_what_the_double_does_not_do_is_an_error_and_not_a_success() -> None:
    trt = double(10)
    config, layer = config_of(trt), new(trt.ILayer)
    with pytest.raises(NotImplementedError, match="does not do can_run_on_DLA"):
        config.can_run_on_DLA(layer)


def test_without_a_gpu_there_is_no_builder() -> None:
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        config_of(double(10, World(gpu=False)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(self: A) -> None", [("self", "A", False)]),
        (
            "f(self: A, x: Sequence[int], y: E.F = <F.G: 1>) -> tuple[bool, list[int]]",
            [("self", "A", False), ("x", "Sequence[int]", False), ("y", "E.F", True)],
        ),
    ],
)
def test_signatures_are_read(text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert parse_signature(text) == expected
