"""What this process may use of the machine, and has used: cores and memory, on any system."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CORES_VARIABLE = "TRTUNE_CORES"
"""Names how many cores to use at most, for several processes on a machine."""


def usable_cores() -> int:
    """Cores that this process may use, which in a container may be fewer than the machine's.

    Those that it may run on, at most as many as the quotas of its control groups are worth
    (`docker run --cpus`), and as `CORES_VARIABLE` says.
    """
    known = hasattr(os, "sched_getaffinity")
    here = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    most = os.environ.get(CORES_VARIABLE, "")
    return min([here, *_own_quotas(), *([max(int(most), 1)] if most.isdigit() else [])])


PROCESSORS = Path("/proc/cpuinfo")


def has_matrix_units(processors: Path = PROCESSORS) -> bool:
    """Whether this CPU multiplies int8 matrices (Intel's AMX), and the system tells: Linux does."""
    try:
        text = processors.read_text("utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "amx_int8" in flags.split()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, every NumPy product is computed by the thread that asks for it.

    Threads of a pool that each have a library of threads below them wait for one another: on a busy
    machine a product took up to thirty times the processor time.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


CONTROL_GROUPS = Path("/sys/fs/cgroup")


@lru_cache(maxsize=1)
def _own_quotas() -> tuple[int, ...]:
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return ()
    return quotas(CONTROL_GROUPS, groups)


def quotas(root: Path, groups: str) -> tuple[int, ...]:
    """Cores that the CPU quotas of `groups` (a `/proc/PID/cgroup`) are worth, each rounded up.

    `cpu.max` of version 2 of the kernel's control groups ("QUOTA PERIOD", or max), and
    `cpu.cfs_quota_us` beside `cpu.cfs_period_us` of version 1 (Documentation/admin-guide). In a
    container the files lie at the root; elsewhere each group on the way to the process's counts.
    """
    found: list[int] = []
    lines = [line.split(":", 2) for line in groups.splitlines()]
    for controllers, path in (line[1:] for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            found += _quota(folder, split=bool(controllers))
            if folder == top:
                break
    return tuple(found)


def _quota(folder: Path, *, split: bool) -> list[int]:
    files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if split else ("cpu.max",)
    try:
        words = " ".join((folder / name).read_text(encoding="utf-8") for name in files).split()
    except OSError:
        return []
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        return []
    return [-(-int(words[0]) // int(words[1]))]


ALSO_CALLED = {"onnxruntime": ("onnxruntime-gpu",)}
"""Distributions that bring a module under another name than its own."""


@functools.cache
def package_version(name: str) -> str:
    """The installed version of a package, also of one that brings it under another name.

    Raises PackageNotFoundError if there is none.
    """
    for distribution in (name, *ALSO_CALLED.get(name, ())):
        with suppress(PackageNotFoundError):
            return version(distribution)
    raise PackageNotFoundError(name)


def is_installed(distribution: str) -> bool:
    """Whether a distribution of exactly this name is installed.

    >>> is_installed("numpy"), is_installed("no-such-distribution")
    (True, False)
    """
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes; 0 where no system call tells."""
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return _peak_working_set()
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        *[(f"other{k}", ctypes.c_size_t) for k in range(7)],
    ]


def _peak_working_set() -> int:
    kernel: Any = getattr(ctypes, "windll", None)
    if kernel is None:
        return 0
    kernel = kernel.kernel32
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    counters = _Counters(size=ctypes.sizeof(_Counters))
    done = kernel.K32GetProcessMemoryInfo(
        ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(counters), counters.size
    )
    return int(counters.peak_working_set) if done else 0
