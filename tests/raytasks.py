"""What the tests of Ray give its workers to do."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

from trtune.configs.errors import DataError
from trtune.configs.system.cluster import kept


def where_i_run(number: int) -> tuple[int, str, str]:
    logging.getLogger("trtune.tests").warning("number %d", number)
    return number, os.environ["TRTUNE_CORES"], str(os.getpid())


def refuse(number: int) -> None:
    raise DataError(f"sample {number} is no picture")


def die_once(folder: str, number: int) -> int:
    """Ends its process the first time that number 1 is asked for."""
    mark = Path(folder) / "died"
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def wait_for(folder: str, number: int) -> int:
    """The square of `number`, once `folder` has a file "go"; says in a file that it began."""
    (Path(folder) / f"began{number}-{os.getpid()}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    return number * number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(folder: str, number: int) -> None:
    (Path(folder) / f"began{number}").write_text(str(os.getpid()))
    time.sleep(600)


def counted_times(key: str, number: int) -> int:
    calls: list[int] = kept(key, list)
    calls.append(number)
    return len(calls)
