from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from trtune.configs.system.machine import (
    CORES_VARIABLE,
    one_thread_each,
    peak_rss,
    quotas,
    usable_cores,
)


def test_peak_memory_is_in_bytes() -> None:
    assert 10 << 20 < peak_rss() < 1 << 40


def test_peak_memory_is_zero_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_rss() == 0


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == (os.cpu_count() or 1)


def test_no_more_cores_than_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES_VARIABLE, "1")
    assert usable_cores() == 1


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("quota", "cores"), [("400000 100000", (4,)), ("150000 100000", (2,)), ("max 100000", ())]
)
def test_a_quota_is_worth_cores(tmp_path: Path, quota: str, cores: tuple[int, ...]) -> None:
    write(tmp_path, cpu__max=quota)
    assert quotas(tmp_path, "0::/\n") == cores


def test_every_group_on_the_way_counts(tmp_path: Path) -> None:
    write(tmp_path / "user" / "job", cpu__max="max 100000")
    write(tmp_path / "user", cpu__max="300000 100000")
    write(tmp_path / "other", cpu__max="100000 100000")
    assert quotas(tmp_path, "0::/user/job\n") == (3,)


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    write(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    write(tmp_path / "memory", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    assert quotas(tmp_path, "4:memory:/\n2:cpu,cpuacct:/\n") == (3,)
    write(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us="-1")
    assert quotas(tmp_path, "2:cpu,cpuacct:/\nnonsense\n") == ()


def test_products_take_one_thread_inside_and_as_many_as_before_behind() -> None:
    def threads() -> set[int]:
        libraries = threadpool_info()
        return {held["num_threads"] for held in libraries if held["user_api"] == "blas"}

    np.ones((4, 4)) @ np.ones((4, 4))
    before = threads()
    with one_thread_each():
        assert threads() <= {1}
    assert threads() == before
