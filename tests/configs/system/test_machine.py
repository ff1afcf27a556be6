from __future__ import annotations

import os
import sys

import pytest

from trtune.configs.system.machine import peak_rss, usable_cores


def test_peak_memory_is_in_bytes() -> None:
    assert 10 << 20 < peak_rss() < 1 << 40


def test_peak_memory_is_zero_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_rss() == 0


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == (os.cpu_count() or 1)
