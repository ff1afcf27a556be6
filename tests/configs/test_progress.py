"""The progress that shows nothing."""

from __future__ import annotations

import pytest

from trtune.configs.progress import Progress, silent


def test_silent_is_a_progress_that_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress: Progress = silent
    progress("calibrate", 3, None)
    progress("calibrate", 3, 7)
    assert capfd.readouterr() == ("", "")
