"""Calibrators for TensorRT 10: what they hand over, what they keep, and what they never swallow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tinyquant import Rows
from trtdouble import double

from trtune.calibrate.calibrators import (
    DeviceFeed,
    ScaleRatio,
    compare_tables,
    streaming_calibrator,
    table_calibrator,
    tensorrt_cache,
    tensorrt_table,
    version_of,
)
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, DataError, TrtuneError
from trtune.datasets.batches import InputSpec

SPECS = (InputSpec("x", ("N", 2), "float32"), InputSpec("ids", ("N",), "int64"))


@dataclass
class Gpu:
    """Device memory in a dict: address -> what was last copied there."""

    memory: dict[int, NDArray[Any] | None] = field(default_factory=dict)
    uploads: list[NDArray[Any]] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    full: bool = False
    stuck: bool = False

    def allocate(self, nbytes: int) -> Buffer:
        if self.full:
            raise TrtuneError(f"allocating {nbytes} bytes failed")
        address = 4096 * (len(self.memory) + 1)
        self.memory[address] = None
        return Buffer(self, address, nbytes)


@dataclass
class Buffer:
    gpu: Gpu
    pointer: int
    nbytes: int

    def upload(self, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= self.nbytes
        self.gpu.memory[self.pointer] = array.copy()
        self.gpu.uploads.append(array.copy())

    def free(self) -> None:
        self.gpu.freed.append(self.pointer)
        if self.gpu.stuck:
            raise TrtuneError("freeing failed")


def arrays(rows: int) -> dict[str, NDArray[Any]]:
    numbers = np.arange(rows)
    return {"x": np.float32([numbers, numbers * 10]).T, "ids": numbers.astype(np.int64)}


def feed_of(
    feeds: Mapping[str, NDArray[Any]], gpu: Gpu, *, size: int = 2, **options: Any
) -> DeviceFeed:
    shapes = {"x": (size, 2), "ids": (size,)}
    return DeviceFeed(Rows.of(feeds), SPECS, shapes, gpu.allocate, **options)


def test_batches_are_copied_in_the_order_that_tensorrt_asks_for() -> None:
    gpu = Gpu()
    feed = feed_of(arrays(4), gpu)
    first = feed.upload(["ids", "x"])
    assert first == [4096, 8192]
    assert gpu.memory[4096] is not None
    assert gpu.memory[4096].tolist() == [0, 1]
    assert gpu.memory[8192] is not None
    assert gpu.memory[8192].tolist() == [[0, 0], [1, 10]]
    assert feed.upload(["ids", "x"]) == first  # the same memory again
    assert gpu.memory[4096].tolist() == [2, 3]
    assert feed.upload(["ids", "x"]) is None
    assert feed.samples == 4
    feed.close()
    assert sorted(gpu.freed) == [4096, 8192]
    feed.close()
    assert len(gpu.freed) == 2


def test_a_short_last_batch_is_filled_with_its_last_sample() -> None:
    gpu = Gpu()
    feed = feed_of(arrays(3), gpu, size=2)
    while feed.upload(["ids"]) is not None:
        pass
    assert [array.tolist() for array in gpu.uploads] == [[0, 1], [2, 2]]
    assert feed.samples == 3


def test_progress_counts_samples() -> None:
    seen: list[tuple[str, int, int | None]] = []
    feed = feed_of(arrays(3), Gpu(), progress=lambda *step: seen.append(step))
    while feed.upload(["ids"]) is not None:
        pass
    assert seen == [("calibrate in TensorRT", 2, 3), ("calibrate in TensorRT", 3, 3)]


def test_every_buffer_is_freed_when_freeing_one_fails() -> None:
    gpu = Gpu(stuck=True)
    feed = feed_of(arrays(2), gpu)
    feed.upload(["x", "ids"])
    with pytest.raises(TrtuneError, match="freeing failed"):
        feed.close()
    assert sorted(gpu.freed) == [4096, 8192]


@pytest.mark.parametrize(
    ("feeds", "names", "message"),
    [
        pytest.param(
            arrays(2), ["y"], "TensorRT asks for input 'y', and the batch of p0 has 'x', 'ids'",
            id="an input that the data lacks",
        ),
        pytest.param(
            {**arrays(2), "x": np.zeros((2, 3), np.float32)}, ["x"],
            r"float32 of shape \[2, 2\]; the batch of p0 has float32 of shape \[2, 3\]",
            id="another shape than the profile's",
        ),
        pytest.param(
            {**arrays(2), "x": np.zeros((2, 2))}, ["x"], "the batch of p0 has float64",
            id="another type",
        ),
        pytest.param(
            {**arrays(2), "x": np.float32([[0, 1], [np.nan, 1]])}, ["x"],
            "p1: input 'x' holds NaN or infinity", id="NaN",
        ),
        pytest.param({"x": np.zeros((0, 2), np.float32)}, ["x"], "the data is empty", id="no data"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_names_the_sample(
    feeds: Mapping[str, NDArray[Any]], names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        feed_of(feeds, Gpu()).upload(names)


# The calibrators that stream


@pytest.mark.parametrize("kind", ["entropy2", "minmax"])
def test_the_cache_is_a_copy_of_what_tensorrt_wrote(kind: str) -> None:
    trt, gpu = double(10), Gpu()
    with streaming_calibrator(trt, kind, feed_of(arrays(2), gpu), batch_size=1) as calibrator:
        assert calibrator.get_batch_size() == 1
        assert calibrator.read_calibration_cache() is None
        assert calibrator.get_batch(["x", "ids"]) == [4096, 8192]
        assert calibrator.get_batch(["x", "ids"]) is None
        words = memoryview(bytearray(b"TRT-101601-EntropyCalibration2\nx: 3f800000\n"))
        calibrator.write_calibration_cache(words)
        words.release()
        calibrator.check()
        assert calibrator.cache == b"TRT-101601-EntropyCalibration2\nx: 3f800000\n"
        assert not gpu.freed
    assert sorted(gpu.freed) == [4096, 8192]


def test_each_kind_is_tensorrts_own_algorithm() -> None:
    trt = double(10)
    found = {
        kind: streaming_calibrator(trt, kind, feed_of(arrays(2), Gpu()), batch_size=1)
        for kind in ("entropy2", "minmax")
    }
    assert {kind: c.get_algorithm().name for kind, c in found.items()} == {  # type: ignore[attr-defined]
        "entropy2": "ENTROPY_CALIBRATION_2",
        "minmax": "MINMAX_CALIBRATION",
    }
    assert isinstance(found["entropy2"], trt.IInt8EntropyCalibrator2)
    assert isinstance(found["minmax"], trt.IInt8MinMaxCalibrator)


def test_an_exception_ends_the_data_and_is_raised_later_without_a_cache() -> None:
    feeds = arrays(4)
    feeds["x"][2, 0] = np.inf
    calibrator: Any = streaming_calibrator(
        double(10), "entropy2", feed_of(feeds, Gpu()), batch_size=1
    )
    assert calibrator.get_batch(["x"]) == [4096]
    assert calibrator.get_batch(["x"]) is None
    assert calibrator.get_batch(["x"]) is None  # it stays ended
    calibrator.write_calibration_cache(memoryview(b"partial"))
    assert calibrator.cache is None
    with pytest.raises(DataError, match="p2: input 'x' holds NaN or infinity"):
        calibrator.check()


def test_a_bug_in_the_data_says_what_it_was() -> None:
    def broken(nbytes: int) -> Any:
        raise RuntimeError("no such device")

    feed = DeviceFeed(Rows.of(arrays(2)), SPECS, {"x": (2, 2)}, broken)
    calibrator: Any = streaming_calibrator(double(10), "minmax", feed, batch_size=1)
    assert calibrator.get_batch(["x"]) is None
    with pytest.raises(TrtuneError, match="RuntimeError: no such device; nothing was kept"):
        calibrator.check()


# The calibrator that has a table


def test_a_table_is_given_twice_the_same_and_needs_no_data() -> None:
    cache = tensorrt_cache(CalibrationTable({"x": 0.5}), "10.16.1.11")
    with table_calibrator(double(10), cache) as calibrator:
        assert calibrator.get_batch_size() == 1
        assert calibrator.read_calibration_cache() == cache
        assert calibrator.read_calibration_cache() == cache
        calibrator.write_calibration_cache(memoryview(b"other"))
        calibrator.check()
    assert calibrator.cache == cache


def test_a_table_that_tensorrt_does_not_take_is_an_error() -> None:
    calibrator: Any = table_calibrator(double(10), b"TRT-8601-EntropyCalibration2\nx: 0\n")
    assert calibrator.get_batch(["x"]) is None
    with pytest.raises(TrtuneError, match=r"did not take .*'TRT-8601-EntropyCalibration2'"):
        calibrator.check()
    assert calibrator.cache is None


# Caches and tables


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10.16.1.11", (10, 16, 1)), ("11.4.0", (11, 4, 0)), ("10.3", (10, 3, 0))],
)
def test_version_of(text: str, expected: tuple[int, int, int]) -> None:
    assert version_of(text) == expected


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1),
        st.floats(0, 2.0**100, width=32),
    )
)
def test_a_table_survives_the_way_through_a_cache(scales: dict[str, float]) -> None:
    table = CalibrationTable(scales)
    assert tensorrt_table(tensorrt_cache(table, "10.16.1.11"), {}).scales == table.scales


def test_the_table_of_a_cache_says_who_calibrated() -> None:
    table = tensorrt_table(b"TRT-101601-MinMaxCalibration\nx: 3f800000\n", {"source": "tensorrt"})
    assert table.methods == {"x": "tensorrt/MinMaxCalibration"}
    assert table.provenance == {"source": "tensorrt"}
    with pytest.raises(CacheError, match="line 2"):
        tensorrt_table(b"TRT-101601-MinMaxCalibration\nx: zz\n", {})


def test_tables_are_compared_tensor_by_tensor_worst_first() -> None:
    ours = CalibrationTable({"same": 1.0, "wider": 1.0, "narrower": 1.0, "gone": 1.0, "zero": 0.0})
    theirs = CalibrationTable(
        {"same": 1.0, "wider": 2.0, "narrower": 0.125, "zero": 0.0, "other": 3.0}
    )
    assert compare_tables(ours, theirs) == (
        ScaleRatio("narrower", 1.0, 0.125, -3.0),
        ScaleRatio("wider", 1.0, 2.0, 1.0),
        ScaleRatio("same", 1.0, 1.0, 0.0),
        ScaleRatio("zero", 0.0, 0.0, 0.0),
        ScaleRatio("gone", 1.0, None, None),
    )


@given(st.floats(2**-100, 2**100, width=32), st.floats(2**-100, 2**100, width=32))
def test_the_ratio_changes_its_sign_when_the_tables_change_places(a: float, b: float) -> None:
    first, second = CalibrationTable({"x": a}), CalibrationTable({"x": b})
    (there,), (back,) = compare_tables(first, second), compare_tables(second, first)
    assert there.log2_ratio is not None
    assert back.log2_ratio is not None
    assert math.isclose(there.log2_ratio, -back.log2_ratio, abs_tol=1e-9)
