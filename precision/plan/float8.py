"""What FP8 asks of a model and of the hardware."""

from __future__ import annotations

from collections.abc import Iterable

FP8 = "fp8"
OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take it."""
LEAST_CAPABILITY = (8, 9)
"""Ada; Hopper and Blackwell have it too."""


def without_float8(capabilities: Iterable[str]) -> list[str]:
    """Those compute capabilities, as "8.6", whose GPUs do not multiply float8.

    >>> without_float8(["8.6", "8.9", "12.0"])
    ['8.6']
    """
    numbers = {text: tuple(int(part) for part in text.split(".")) for text in capabilities}
    return [text for text, number in numbers.items() if number < LEAST_CAPABILITY]
