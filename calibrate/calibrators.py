"""INT8 calibrators for TensorRT 10.x: ours subclass the binding's, and lose no data silently.

TensorRT prints an exception of a calibrator and builds on from the data it had until then. Here
the exception is kept, the data ends, no cache is handed out, and `check` raises it after the build.
The classes are made by functions that are given the `tensorrt` module, since TensorRT 11 has none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtune.calibrate.cache import Cache, dump_cache, header_for, parse_cache
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import DataError, TrtuneError, did_you_mean
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource, InputSpec, fit_batch, rebatch

log = logging.getLogger(__name__)

CACHE_ALGORITHMS: Mapping[str, str] = {
    "entropy2": "EntropyCalibration2",
    "minmax": "MinMaxCalibration",
}
"""Calibrator name in the config -> the algorithm that the header of its cache names."""


class GpuBuffer(Protocol):
    """Memory of a GPU that one input of a batch is copied to."""

    @property
    def pointer(self) -> int:
        """The device address."""

    def upload(self, array: NDArray[Any]) -> None:
        """Copy `array` (contiguous) to the device; returns when its memory may be reused."""

    def free(self) -> None:
        """Give the memory back."""


Allocate = Callable[[int], GpuBuffer]
"""Makes a buffer of so many bytes."""


class Calibrator(Protocol):
    """What the calibrators made here have beside TensorRT's own methods; use them in `with`."""

    error: Exception | None
    cache: bytes | None

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...

    def check(self) -> None:
        """Raise what went wrong in a callback; to be called after the build, failed or not."""


class DeviceFeed:
    """Batches of one size, each copied to the same device buffers; `close` frees them.

    `shapes` is what TensorRT expects of each input, its first dimension the samples of a batch.
    The last short batch is filled up with its last sample, because TensorRT reads whole batches.
    """

    def __init__(
        self,
        source: BatchSource,
        specs: Sequence[InputSpec],
        shapes: Mapping[str, Sequence[int]],
        allocate: Allocate,
        progress: Progress = silent,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._allocate = allocate
        self._progress = progress
        self._total = source.count
        self._size = next((shape[0] for shape in self._shapes.values() if shape), 1)
        self._batches: Iterator[Batch] = rebatch(source, self._size)
        self._buffers: dict[str, GpuBuffer] = {}
        self.samples = 0

    def upload(self, names: Sequence[str]) -> list[int] | None:
        """Device addresses of the next batch in the order of `names`; None when there is none."""
        batch = next(self._batches, None)
        if batch is None and not self.samples:
            raise DataError("data.calibration: the data is empty; check path, take and skip")
        if batch is None:
            return None
        self.samples += len(batch)
        if len(batch) < self._size:
            log.info("last calibration batch: %d of %d are its last sample again",
                     self._size - len(batch), self._size)  # fmt: skip
        self._progress("calibrate in TensorRT", self.samples, self._total)
        whole = fit_batch(batch, self._size)
        return [self._copied(name, whole) for name in names]

    def _copied(self, name: str, batch: Batch) -> int:
        array = batch.feeds.get(name)
        if array is None or name not in self._specs:
            raise DataError(
                f"TensorRT asks for input {name!r}, and the batch of {batch.items[0]} has "
                f"{', '.join(map(repr, batch.feeds))}{did_you_mean(name, batch.feeds)}"
            )
        spec, shape = self._specs[name], self._shapes[name]
        if array.dtype.name != spec.dtype or array.shape != shape:
            raise DataError(
                f"TensorRT calibrates input {name!r} with {spec.dtype} of shape {list(shape)}; the "
                f"batch of {batch.items[0]} has {array.dtype} of shape {list(array.shape)}. A free "
                "dimension is calibrated at `opt` of `model.shapes`"
            )
        _refuse_non_finite(name, array, batch.items)
        if name not in self._buffers:
            self._buffers[name] = self._allocate(array.nbytes)
        self._buffers[name].upload(np.ascontiguousarray(array))
        return int(self._buffers[name].pointer)

    def close(self) -> None:
        """Free every buffer, also when freeing one of them fails."""
        with ExitStack() as stack:
            while self._buffers:
                stack.callback(self._buffers.popitem()[1].free)


def _refuse_non_finite(name: str, array: NDArray[Any], items: Sequence[str]) -> None:
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return
    rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    raise DataError(f"{items[int(rows[0])]}: input {name!r} holds NaN or infinity")


def streaming_calibrator(trt: Any, kind: str, feed: DeviceFeed, *, batch_size: int) -> Calibrator:
    """A calibrator that lets TensorRT calibrate on `feed`; `kind` is entropy2 or minmax.

    `batch_size` must be 1 for a network with dynamic shapes. Afterwards `cache` is a copy of what
    TensorRT wrote, or None if it wrote nothing or the data broke off.
    """
    bases = {"entropy2": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
    base: Any = getattr(trt, bases[kind])

    class Streaming(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: Exception | None = None
            self.cache: bytes | None = None

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exception: object) -> None:
            feed.close()

        def get_batch_size(self) -> int:
            return batch_size

        def get_batch(self, names: list[str]) -> list[int] | None:
            if self.error is not None:
                return None
            try:
                return feed.upload(names)
            except Exception as error:  # TensorRT would print it and go on with partial data
                self.error = error
                return None

        def read_calibration_cache(self) -> bytes | None:
            return None  # asked twice a build; the answer must not change between

        def write_calibration_cache(self, cache: Any) -> None:
            if self.error is None:
                self.cache = bytes(cache)  # the memoryview dies with this call

        def check(self) -> None:
            if self.error is not None:
                raise _calibration_failed(self.error) from self.error

    calibrator: Calibrator = Streaming()
    return calibrator


def _calibration_failed(error: Exception) -> TrtuneError:
    if isinstance(error, TrtuneError):
        return error
    return TrtuneError(
        f"calibration in TensorRT stopped: {type(error).__name__}: {error}; nothing was kept. "
        "`calibrator: table` needs no GPU memory for data"
    )


def table_calibrator(trt: Any, cache: bytes) -> Calibrator:
    """A calibrator that has no data and gives TensorRT the scales of `cache`, a cache file's bytes.

    If TensorRT does not take them it asks for data; `check` then says so.
    """
    base: Any = trt.IInt8EntropyCalibrator2

    class FromTable(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: Exception | None = None
            self.cache: bytes | None = cache

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exception: object) -> None:
            return None

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> list[int] | None:
            header = cache.split(b"\n", 1)[0].decode("utf-8", "replace")
            self.error = TrtuneError(
                f"TensorRT {trt.__version__} did not take the calibration table with the header "
                f"{header!r} and asked for data; use `calibrator: entropy2` to calibrate there"
            )
            return None

        def read_calibration_cache(self) -> bytes | None:
            return cache

        def write_calibration_cache(self, written: Any) -> None:
            return None

        def check(self) -> None:
            if self.error is not None:
                self.cache = None
                raise self.error

    calibrator: Calibrator = FromTable()
    return calibrator


def version_of(text: str) -> tuple[int, int, int]:
    """Major, minor and patch of a TensorRT version.

    >>> version_of("10.16.1.11")
    (10, 16, 1)
    """
    major, minor, patch = (*map(int, text.split(".")[:3]), 0, 0)[:3]
    return major, minor, patch


def tensorrt_cache(table: CalibrationTable, tensorrt_version: str) -> bytes:
    """`table` as the cache file that this version of TensorRT reads.

    >>> tensorrt_cache(CalibrationTable({"x": 1.0}), "10.16.1.11")
    b'TRT-101601-EntropyCalibration2\\nx: 3f800000\\n'
    """
    header = header_for(version_of(tensorrt_version), "EntropyCalibration2")
    return dump_cache(Cache(header, table.scales)).encode("utf-8")


def tensorrt_table(cache: bytes, provenance: Mapping[str, Any]) -> CalibrationTable:
    """The table that a cache which TensorRT itself wrote stands for.

    Every tensor's method is `tensorrt/ALGORITHM`. Raises CacheError if it cannot be read.
    """
    parsed = parse_cache(cache.decode("utf-8"))
    method = f"tensorrt/{parsed.algorithm}"
    return CalibrationTable(parsed.scales, dict.fromkeys(parsed.scales, method), provenance)


@dataclass(frozen=True, slots=True)
class ScaleRatio:
    """One tensor in two tables; `theirs` is None where the tensor is missing.

    `log2_ratio` is log2(theirs / ours): 1 means that their range is twice as wide. None if one is
    missing or zero, unless both are zero.
    """

    tensor: str
    ours: float
    theirs: float | None
    log2_ratio: float | None


def compare_tables(ours: CalibrationTable, theirs: CalibrationTable) -> tuple[ScaleRatio, ...]:
    """Every tensor of `ours`, and what `theirs` says: widest ratio first, missing ones last.

    Tensors that only `theirs` has are left out: TensorRT calibrates all of them, and we those that
    carry a scale.

    >>> ours, theirs = CalibrationTable({"x": 1.0, "y": 1.0}), CalibrationTable({"x": 0.25})
    >>> [(row.tensor, row.log2_ratio) for row in compare_tables(ours, theirs)]
    [('x', -2.0), ('y', None)]
    """
    rows = []
    for tensor, scale in ours.scales.items():
        other = theirs.scales.get(tensor)
        ratio = 0.0 if scale == other else None
        if other and scale:
            ratio = math.log2(other / scale)
        rows.append(ScaleRatio(tensor, scale, other, ratio))

    def order(row: ScaleRatio) -> tuple[bool, float, str]:
        return row.log2_ratio is None, -abs(row.log2_ratio or 0.0), row.tensor

    return tuple(sorted(rows, key=order))
