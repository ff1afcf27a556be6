from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.calibrate.cpu import fill as module
from trtune.calibrate.cpu.fill import CHUNK, SPREAD, STEP, TABLES, add_tables
from trtune.calibrate.histogram import BINS, SHIFT

SUBNORMAL = np.float32(1e-41)
REAL = {name: value for name, value in (("sifted", module.fill_sifted),) if module.CAN_SIFT}
FILLS: dict[str, Callable[..., None]] = {"anywhere": module.fill_anywhere, **REAL}


def random(rows: int, values: int, *, zeros: float = 0.0) -> NDArray[np.float32]:
    generator = np.random.default_rng(rows * values)
    drawn = generator.standard_normal((rows, values)).astype(np.float32)
    drawn[generator.random(drawn.shape) < zeros] = 0
    return drawn


def misaligned(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same values one float behind an address that vectors like."""
    room = np.empty(array.size + 1, np.float32)[1:]
    room[:] = array.ravel()
    return room.reshape(array.shape)


CASES = {
    "nothing": np.empty((2, 0), np.float32),
    "no row": np.empty((0, 8), np.float32),
    "one value": np.float32([[3]]),
    "signed zeros": np.float32([[0.0, -0.0] * STEP]),
    "subnormals": np.tile(np.float32([SUBNORMAL, -SUBNORMAL, 1e-38, 0]), (2, STEP)),
    "infinities": np.tile(np.float32([np.inf, -np.inf, 1, 2]), (1, STEP)),
    "NaN of both signs": np.tile(np.float32([np.nan, -np.nan, 5, 0]), (1, STEP)),
    "all the same": np.full((2, CHUNK), 6, np.float32),
    "only zeros": np.zeros((3, 3 * STEP + 1), np.float32),
    "largest in the rest": np.float32([[1] * STEP + [9, 2]]),
    "largest is negative": np.float32([[1] * STEP + [2, -9]]),
    "shorter than a step": random(5, STEP - 1),
    "a step": random(4, STEP),
    "a step and one": random(4, STEP + 1, zeros=0.5),
    "a chunk less one": random(2, CHUNK - 1, zeros=0.5),
    "a chunk": random(2, CHUNK),
    "a chunk and a step": random(2, CHUNK + STEP, zeros=0.9),
    "several chunks": random(3, 3 * CHUNK + 7, zeros=0.3),
    "not where vectors like it": misaligned(random(3, CHUNK + 100, zeros=0.5)),
}


def filled(fill: Callable[..., None], rows: NDArray[np.float32]) -> tuple[Any, Any]:
    """The sum of the tables, and each row's largest magnitude as bits."""
    tables = np.zeros((TABLES, BINS + SPREAD), np.uint32)
    largest = np.full(len(rows), 77, np.uint32)
    fill(rows.view(np.uint32), tables, largest)
    assert not tables[:, BINS:].any()
    return tables[:, :BINS].sum(axis=0, dtype=np.int64), largest


def expected(rows: NDArray[np.float32]) -> tuple[Any, Any]:
    bits = rows.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return np.bincount((bits >> SHIFT).ravel(), minlength=BINS), bits.max(axis=1, initial=0)


def assert_fills(fill: Callable[..., None], rows: NDArray[np.float32]) -> None:
    for found, wanted in zip(filled(fill, rows), expected(rows), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_every_bin_and_every_largest(fill: Callable[..., None], rows: NDArray[np.float32]) -> None:
    assert_fills(fill, rows)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@settings(max_examples=40)
@given(seed=st.integers(0, 99), values=st.integers(1, 200), zeros=st.floats(0, 1))
def test_any_bits_in_any_number(
    fill: Callable[..., None], seed: int, values: int, zeros: float
) -> None:
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 1 << 32, (2, values), np.uint32)
    bits[generator.random(bits.shape) < zeros] = 0
    assert_fills(fill, bits.view(np.float32))


@pytest.mark.skipif(not module.CAN_SIFT, reason="this processor has no AVX-512")
@pytest.mark.parametrize("name", ["a chunk", "several chunks", "signed zeros", "one value"])
def test_avx512_without_words_of_16_bits_counts_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CAN_SIFT_HALVES", False)
    assert_fills(numba.njit(module.fill_sifted.py_func), CASES[name])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "value"), [("CPU_NAME", "generic"), ("CPU_FEATURES", ""), ("ENABLE_AVX", 0)]
)
def test_numba_told_otherwise_has_nothing_of_this_processor(
    setting: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, setting, value)
    assert module.features() == frozenset()


def test_a_platform_whose_features_llvm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise RuntimeError("not known")

    monkeypatch.setattr(module.binding, "get_host_cpu_features", unknown)
    assert module.features() == frozenset()


def test_tables_are_added_up_to_a_bin() -> None:
    tables = np.ones((TABLES, BINS + SPREAD), np.uint32)
    tables[:, 2] = 0xFFFFFFFF
    counts = np.zeros(BINS, np.int64)
    add_tables(tables, 3, counts)
    assert counts[:4].tolist() == [TABLES, TABLES, TABLES * 0xFFFFFFFF, 0]
