"""The timing cache: shared by builds, merged, locked, never half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trtdouble import double

from trtune.configs.errors import TrtuneError
from trtune.configs.system.locks import locked
from trtune.precision.backends.trt import timing_cache
from trtune.precision.backends.trt.timing_cache import save_timing_cache, use_timing_cache

VERSION = {10: "10.16.1.11", 11: "11.4.0.106"}


def config_of(major: int) -> Any:
    trt = double(major)

    class Logger(trt.ILogger):  # type: ignore[misc]
        pass

    return trt.Builder(Logger()).create_builder_config()


def measured(config: Any, *entries: str) -> None:
    """As if the build had timed something."""
    config.get_timing_cache()._entries.extend(entries)


@pytest.mark.parametrize("major", [10, 11])
def test_a_build_starts_from_the_file_and_adds_to_it(tmp_path: Path, major: int) -> None:
    path = tmp_path / "timing.cache"
    path.write_text(f"{VERSION[major]}\nconv a\n")
    config = config_of(major)
    assert "bytes" in use_timing_cache(config, path)
    measured(config, "conv b")
    save_timing_cache(config, path)
    assert path.read_text() == f"{VERSION[major]}\nconv a\nconv b"


def test_without_a_file_it_starts_empty_and_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "below" / "timing.cache"
    config = config_of(10)
    assert use_timing_cache(config, path).endswith(": new")
    measured(config, "conv a")
    save_timing_cache(config, path)
    assert path.read_text() == f"{VERSION[10]}\nconv a"


def test_what_another_build_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    first, second = config_of(10), config_of(10)
    use_timing_cache(first, path)
    use_timing_cache(second, path)
    measured(first, "conv a")
    measured(second, "conv b")
    save_timing_cache(first, path)
    save_timing_cache(second, path)
    assert path.read_text().splitlines()[1:] == ["conv a", "conv b"]


def test_timings_of_another_version_are_not_used_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    path.write_text(f"{VERSION[10]}\nconv a\n")
    config = config_of(11)
    assert "another GPU or TensorRT version" in use_timing_cache(config, path)
    measured(config, "conv b")
    save_timing_cache(config, path)
    assert path.read_text() == f"{VERSION[11]}\nconv b"


def test_a_build_without_timings_writes_nothing(tmp_path: Path) -> None:
    save_timing_cache(config_of(10), tmp_path / "timing.cache")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrtuneError, match=f"cannot read the timing cache {tmp_path}"):
        use_timing_cache(config_of(10), tmp_path)


def test_a_build_waits_for_another_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "timing.cache"
    config = config_of(10)
    use_timing_cache(config, path)
    measured(config, "conv1")
    monkeypatch.setattr(timing_cache, "PATIENCE", 0.0)
    with locked(path, patience=0, remedy=""), pytest.raises(TrtuneError) as failure:
        save_timing_cache(config, path)
    assert "another process has held" in str(failure.value)
    assert str(failure.value).endswith("or give this build another `timing_cache`")
    save_timing_cache(config, path)
    assert path.is_file()
