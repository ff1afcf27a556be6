"""Nodes that run in something else than the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PRECISION_OF_DTYPE = MappingProxyType(
    {
        "float32": "fp32",
        "float64": "fp64",
        "float16": "fp16",
        "bfloat16": "bf16",
        "int8": "int8",
        "uint8": "int8",
        "float8_e4m3fn": "fp8",
    }
)
"""The precision that a node on this type runs in."""


def not_honoured(
    planned: Mapping[str, str],
    precisions: Mapping[str, str],
    why: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """A sentence for each node that runs in something else than planned, in the plan's order.

    Nodes whose precision is unknown, and those on integers or booleans, are left out. `why` maps
    nodes to what is known of the reason.

    >>> not_honoured({"a": "int8", "b": "fp32"}, {"a": "fp32", "b": "fp32"})
    ('a: planned int8, runs in fp32',)
    """
    floats = set(PRECISION_OF_DTYPE.values())
    return tuple(
        f"{name}: planned {wanted}, runs in {precisions[name]}"
        + (f": {why[name]}" if name in why else "")
        for name, wanted in planned.items()
        if precisions.get(name) in floats and precisions[name] != wanted
    )
