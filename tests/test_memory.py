"""What a whole run holds at its peak does not grow with the evaluation set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux alone tells it")
def test_sixty_more_pictures_with_large_outputs_need_no_more_memory() -> None:
    peaks = {}
    for count in (8, 68):
        command = [sys.executable, str(SCRIPT), "--one", "--pictures", str(count)]
        command += ["--method", "max", "--short", "--memory", "128"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
        peaks[count] = json.loads(done.stdout.strip().splitlines()[-1])["anonymous"]
    outputs = 60 * 84 * 8400 * 4
    assert peaks[68] - peaks[8] < outputs / 2, "FP32's outputs alone would be 169 MB more"
