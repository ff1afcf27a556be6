"""Buffers on the GPU and pinned ones, on the double everywhere and on a real GPU where one is."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cudadouble import CudaDouble
from gpuparts import RUNTIME, needs_gpu
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtune.precision.backends.gpu.driver import Stream
from trtune.precision.backends.gpu.memory import DeviceBuffer, PinnedBuffer, read_device
from trtune.precision.backends.gpu.runtime import CudaError, device_properties


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("queued", [False, True], ids=["at once", "in a stream"])
def test_what_goes_up_comes_down(runtime: ModuleType, pinned: bool, queued: bool) -> None:
    values = np.arange(6000, dtype=np.float32).reshape(2, 3000) * 0.5
    with (
        Stream() as stream,
        DeviceBuffer(values.nbytes) as buffer,
        PinnedBuffer(values.nbytes) as host,
    ):
        source, target = values, np.empty_like(values)
        if pinned:
            source = target = host.view(values.shape, values.dtype)
            source[...] = values
        buffer.upload(source, stream if queued else None)
        if queued:
            stream.synchronize()
        target[...] = 0
        assert buffer.download(target, stream if queued else None) is target
        if queued:
            stream.synchronize()
        np.testing.assert_array_equal(target, values)


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int64, np.int8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_any_array_comes_back_as_it_was(values: np.ndarray[Any, Any]) -> None:
    before = sys.modules.get(RUNTIME)
    sys.modules[RUNTIME] = made = CudaDouble()
    try:
        with DeviceBuffer(values.nbytes) as buffer:
            buffer.upload(values.T)
            found = buffer.download(np.empty(values.T.shape, values.dtype))
    finally:
        if before is None:
            del sys.modules[RUNTIME]
        else:
            sys.modules[RUNTIME] = before
    assert found.tobytes() == np.ascontiguousarray(values.T).tobytes()
    assert made.held == {}


def test_an_array_that_does_not_fit_is_refused(runtime: ModuleType) -> None:
    with DeviceBuffer(8) as buffer, PinnedBuffer(8) as host:
        with pytest.raises(ValueError, match="12 bytes do not fit a buffer of 8"):
            buffer.upload(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="12 bytes do not fit a buffer of 8"):
            buffer.download(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="12 bytes do not fit a buffer of 8"):
            host.view((3,), np.float32)
        with pytest.raises(ValueError, match="C order"):
            buffer.download(np.zeros((2, 3), np.int8).T)
    with pytest.raises(ValueError, match="nbytes is -1"):
        DeviceBuffer(-1)


def test_a_buffer_is_freed_once_and_then_refuses(runtime: ModuleType) -> None:
    buffer = DeviceBuffer(16)
    assert buffer.pointer > 0
    buffer.free()
    buffer.free()
    with pytest.raises(ValueError, match="the device buffer is freed"):
        buffer.upload(np.zeros(1, np.int8))


def test_an_empty_tensor_still_has_an_address(runtime: ModuleType) -> None:
    with DeviceBuffer(0) as buffer, PinnedBuffer(0) as host:
        assert buffer.pointer > 0
        assert host.view((0, 4), np.float32).shape == (0, 4)


def test_read_device_copies_what_someone_else_holds(runtime: ModuleType) -> None:
    with Stream() as stream, DeviceBuffer(16) as buffer:
        buffer.upload(np.arange(4, dtype=np.int32), stream)
        found = np.zeros(4, np.int32)
        read_device(buffer.pointer, found, stream.address)
        assert found.tolist() == [0, 1, 2, 3]


def test_an_allocation_beyond_the_memory_is_told_and_harms_nothing(runtime: ModuleType) -> None:
    _, free, total = runtime.cudaMemGetInfo()
    with pytest.raises(
        CudaError, match=r"cudaErrorMemoryAllocation, out of memory \(.* are free\)"
    ):
        DeviceBuffer(2 * total)
    with DeviceBuffer(1024) as buffer:
        buffer.upload(np.ones(1024, np.int8))
        assert buffer.download(np.zeros(1024, np.int8)).all()
    assert runtime.cudaMemGetInfo()[2] == total
    assert free <= total


@needs_gpu
@pytest.mark.gpu
def test_memory_of_a_real_gpu_is_given_back() -> None:
    size = 1 << 30
    before = device_properties().free_bytes

    def fail_holding_it() -> None:
        with DeviceBuffer(size):
            assert device_properties().free_bytes <= before - size
            raise KeyError

    for _ in range(20):
        with pytest.raises(KeyError):
            fail_holding_it()
    assert device_properties().free_bytes == before
