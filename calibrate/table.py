"""The calibration table: one scale a tensor, and where each came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from trtune.configs.errors import TrtuneError, did_you_mean

FLOAT8_MAX = 448.0
"""The largest number of float8 E4M3."""


class MissingScaleError(TrtuneError):
    """A tensor that should be quantized has no scale."""

    def __init__(self, tensor: str, tensors: Iterable[str]) -> None:
        super().__init__(
            f"tensor {tensor!r} has no scale in the calibration table"
            f"{did_you_mean(tensor, tensors)}; recalibrate, or pin its producer in `precision.pin`"
        )


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """Tensor name -> scale, with provenance.

    `scales` holds float32 values (as Python floats that float32 represents exactly), because
    that is what TensorRT's cache file holds: a table survives the round trip through it bit for
    bit. scale = amax / 127; amax is the largest magnitude that int8 can still tell from the next.
    `methods` says for each tensor how its amax was chosen, `factors` by what the method's own amax
    was multiplied where it was; `provenance` is what the table was made from (model, data and
    method hashes, versions): its key.

    A table that was read from a quantized model holds two things more, which are empty otherwise:
    `weights` maps an initializer to its scales, one an output channel or one for all, where they
    are not max|w| / 127; `reads` maps a tensor to the (node, input index) pairs that read it
    quantized, where the model and not the rules of this package says so. `axes` names the axis of a
    weight's scales where that is not the one of the output channels.

    `float8` holds a tensor's scale for float8, amax / 448, where its amax for that is another than
    for int8; `float8_weights` those of an initializer as `weights` does for int8.
    """

    scales: Mapping[str, float]
    methods: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    reads: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    float8: Mapping[str, float] = field(default_factory=dict)
    float8_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("scales", "float8"):
            object.__setattr__(self, kind, MappingProxyType(_scales(getattr(self, kind))))
        object.__setattr__(self, "methods", MappingProxyType(dict(self.methods)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        factors = {tensor: float(factor) for tensor, factor in self.factors.items()}
        axes = {weight: int(axis) for weight, axis in self.axes.items()}
        object.__setattr__(self, "axes", MappingProxyType(axes))
        object.__setattr__(self, "factors", MappingProxyType(factors))
        for kind in ("weights", "float8_weights"):
            object.__setattr__(self, kind, MappingProxyType(_weights(getattr(self, kind))))
        object.__setattr__(self, "reads", MappingProxyType(_reads(self.reads)))

    @classmethod
    def from_amax(
        cls,
        amax: Mapping[str, float],
        *,
        methods: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> CalibrationTable:
        """A table whose scales are `amax / 127`, divided in float32 as TensorRT does.

        >>> CalibrationTable.from_amax({"x": 127.0}).scale("x")
        1.0
        """
        with np.errstate(over="ignore"):  # infinity is refused by name
            scales = {t: float(np.float32(a) / np.float32(127)) for t, a in amax.items()}
        return cls(scales, methods or {}, provenance or {}, factors=factors or {})

    def scale(self, tensor: str) -> float:
        """The scale of `tensor`; raises MissingScaleError with the nearest name."""
        try:
            return self.scales[tensor]
        except KeyError:
            raise MissingScaleError(tensor, self.scales) from None

    def method(self, tensor: str) -> str:
        """How the amax of `tensor` was chosen, in words; empty if that is not known.

        >>> CalibrationTable({"x": 1.0}, {"x": "mse"}, factors={"x": 0.8}).method("x")
        'mse x 0.80'
        """
        name = self.methods.get(tensor, "")
        return f"{name} x {self.factors[tensor]:.2f}" if tensor in self.factors else name

    def amax(self, tensor: str) -> float:
        """127 times the scale of `tensor`."""
        return float(np.float32(self.scale(tensor)) * np.float32(127))

    def float8_scale(self, tensor: str) -> float:
        """The scale of `tensor` for float8: its own, or the amax of int8 / 448.

        Raises MissingScaleError with the nearest name.

        >>> CalibrationTable({"x": 448.0, "y": 1.0}, float8={"y": 3.0}).float8_scale("x")
        127.0
        """
        if tensor in self.float8:
            return self.float8[tensor]
        return float(np.float32(self.amax(tensor)) / np.float32(FLOAT8_MAX))

    def to_json(self) -> str:
        """The table as JSON text; `from_json` reads it back to an equal table."""
        return json.dumps(
            {
                "scales": dict(self.scales),
                "methods": dict(self.methods),
                "provenance": dict(self.provenance),
                **({"factors": dict(self.factors)} if self.factors else {}),
                **self.imported(),
            },
            indent=2,
            ensure_ascii=False,
        )

    def imported(self) -> dict[str, Any]:
        """What there is beside one scale a tensor, as values for JSON; what is empty is left out.

        Those are `weights`, `reads`, `axes`, `float8` and `float8_weights`.
        """
        parts: dict[str, Any] = {
            "weights": {name: list(scales) for name, scales in self.weights.items()},
            "reads": {t: [list(edge) for edge in edges] for t, edges in self.reads.items()},
            "axes": dict(self.axes),
            "float8": dict(self.float8),
            "float8_weights": {n: list(scales) for n, scales in self.float8_weights.items()},
        }
        return {name: value for name, value in parts.items() if value}

    @classmethod
    def from_json(cls, text: str) -> CalibrationTable:
        """Read what `to_json` wrote.

        >>> table = CalibrationTable.from_amax({"x": 0.1})
        >>> CalibrationTable.from_json(table.to_json()) == table
        True
        """
        value = json.loads(text)
        return cls(
            value["scales"],
            value["methods"],
            value["provenance"],
            value.get("weights", {}),
            value.get("reads", {}),
            value.get("factors", {}),
            value.get("axes", {}),
            value.get("float8", {}),
            value.get("float8_weights", {}),
        )


def _scales(given: Mapping[str, float]) -> dict[str, float]:
    """The scales as float32 values. Raises ValueError unless all are finite and not negative."""
    with np.errstate(over="ignore"):  # infinity is refused below, by name
        scales = {name: float(np.float32(scale)) for name, scale in given.items()}
    for name, scale in scales.items():
        if not np.isfinite(scale) or scale < 0:
            raise ValueError(f"scale of {name!r} is {scale}; it must be finite and not negative")
    return scales


def _weights(given: Mapping[str, Iterable[float]]) -> dict[str, tuple[float, ...]]:
    """The scales as float32 values. Raises ValueError unless all are above zero."""
    found: dict[str, tuple[float, ...]] = {}
    for name, scales in given.items():
        values = np.asarray(tuple(scales), np.float32)
        if not values.size or not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"weight scales of {name!r} must be finite and above zero: {values}")
        found[name] = tuple(values.tolist())
    return found


def _reads(given: Mapping[str, Iterable[Sequence[Any]]]) -> dict[str, tuple[tuple[str, int], ...]]:
    return {t: tuple((str(n), int(i)) for n, i in edges) for t, edges in given.items()}
