"""Which GPUs multiply FP8."""

from __future__ import annotations

import pytest

from trtune.precision.plan.float8 import without_float8


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [(["8.9"], []), (["9.0", "12.0", "10.0"], []), (["7.5", "8.6", "8.9"], ["7.5", "8.6"])],
)
def test_which_gpus_have_none(capabilities: list[str], expected: list[str]) -> None:
    assert without_float8(capabilities) == expected
