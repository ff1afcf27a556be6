"""What a whole run holds at its peak does not grow with the evaluation set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.slow
def test_eighty_more_pictures_with_large_outputs_need_no_more_memory() -> None:
    peaks = {}
    for count in (8, 88):
        command = [sys.executable, str(SCRIPT), "--one", "--pictures", str(count)]
        command += ["--method", "max", "--short"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        peaks[count] = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    outputs = 80 * 84 * 8400 * 4
    assert peaks[88] - peaks[8] < outputs / 2, "FP32's outputs alone would be 226 MB more"
