"""Caches under another header, with the key file beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtune.calibrate.cache import (
    Cache,
    dump_cache,
    load_table,
    read_cache,
    save_table,
    sidecar_of,
)
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, InputError
from trtune.tools import convert_cache, parse_version

OLD = "TRT-8601-EntropyCalibration2"


@pytest.fixture
def table() -> CalibrationTable:
    return CalibrationTable({"x": 0.1, "y": 0.0}, {"x": "mse"}, {"model": "abc"})


def test_a_key_file_goes_along(tmp_path: Path, table: CalibrationTable) -> None:
    save_table(tmp_path / "a.cache", table, OLD)
    convert_cache(tmp_path / "a.cache", "10.14.1", tmp_path / "b.cache")
    assert load_table(tmp_path / "b.cache") == table
    assert read_cache(tmp_path / "b.cache").version == (10, 14, 1)


def test_in_place_keeps_the_key_file_valid(tmp_path: Path, table: CalibrationTable) -> None:
    path = tmp_path / "a.cache"
    save_table(path, table, OLD)
    convert_cache(path, "9.3", path, overwrite=True)
    assert load_table(path) == table
    assert read_cache(path).header == "TRT-9300-EntropyCalibration2"


def test_a_stale_key_file_does_not_stay_beside_another_cache(
    tmp_path: Path, table: CalibrationTable
) -> None:
    (tmp_path / "a.cache").write_text(dump_cache(Cache(OLD, {"x": 1.0})))
    save_table(tmp_path / "b.cache", table)
    convert_cache(tmp_path / "a.cache", "10.1", tmp_path / "b.cache", overwrite=True)
    assert not sidecar_of(tmp_path / "b.cache").exists()
    assert not sidecar_of(tmp_path / "a.cache").exists()


def test_caches_made_after_fusion_cannot_be_carried_over(tmp_path: Path) -> None:
    (tmp_path / "a.cache").write_text(dump_cache(Cache("TRT-8601-LegacyCalibration", {"x": 1.0})))
    with pytest.raises(CacheError, match=r"a\.cache: a cache of LegacyCalibration was made after"):
        convert_cache(tmp_path / "a.cache", "10.1", tmp_path / "b.cache")
    assert not (tmp_path / "b.cache").exists()


@pytest.mark.parametrize("text", ["", "10", "10.x.1", "10.1.1.1.1", "8.12.1", "0.1", "1O.1", "²."])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(InputError, match="is not a TensorRT version"):
        parse_version(text)
