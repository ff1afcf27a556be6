"""TensorRT's timing cache as a file that several builds may share.

Each build starts from the file as it is, and at its end adds what it measured: under a lock of the
operating system it reads the file again, merges, and writes it in one step. So two builds at once
lose nothing of each other, and a reader never sees half a file.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from trtune.configs.errors import TrtuneError
from trtune.configs.files import write_bytes
from trtune.configs.system.locks import locked

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds to wait for another build that is writing, which takes it far less than one."""
ANOTHER_CACHE = "give this build another `timing_cache`"


def use_timing_cache(config: Any, path: Path) -> str:
    """Let a build start from the timings in `path`, or from none; a sentence for the log.

    Timings of another GPU or TensorRT version are not used. Raises TrtuneError if the file is
    there and cannot be read.
    """
    data = _read(path)
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return f"timing cache {path}: {f'{len(data)} bytes' if data else 'new'}"
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return f"timing cache {path} is of another GPU or TensorRT version: its timings were not used"


def save_timing_cache(config: Any, path: Path) -> None:
    """Add what the build measured to `path`, with what others wrote there meanwhile.

    A file of another GPU or version is replaced. Raises TrtuneError if it cannot be written.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return
    with locked(path, patience=PATIENCE, remedy=ANOTHER_CACHE):
        data = _read(path)
        others = config.create_timing_cache(data) if data else None
        if data and (others is None or not cache.combine(others, False)):
            log.info("timing cache %s was of another GPU or TensorRT version: replaced", path)
        write_bytes(path, bytes(cache.serialize()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise TrtuneError(f"cannot read the timing cache {path}: {error.strerror}") from error
