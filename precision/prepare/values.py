"""What preparing a model gives: the rewritten model, codes for its weights, and what was done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from trtune.precision.graph.view import Model

SCALE_CHANNELS, SHIFT_ALL, ROUND_CODES, CORRECT = "scale", "shift", "round", "bias"
ALL_MOVES = (SCALE_CHANNELS, SHIFT_ALL, ROUND_CODES, CORRECT)


@dataclass(frozen=True, slots=True)
class Moved:
    """What was done to one tensor: the smallest and largest factor of a channel, and the shift.

    `name` is the tensor that the readers read now; `folded` says that no node was added for it;
    `gain_db` is what it alone likely gains at the outputs.
    """

    tensor: str
    name: str
    scales: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    folded: bool = True
    gain_db: float = 0.0

    @property
    def moves(self) -> tuple[str, ...]:
        """scale, shift or both."""
        scaled = (SCALE_CHANNELS,) if self.scales != (1.0, 1.0) else ()
        return (*scaled, *((SHIFT_ALL,) if self.shift else ()))


@dataclass(frozen=True, slots=True)
class Codes:
    """int8 codes of an initializer, in its shape, and what is added to the bias of its reader
    because of them, one number an output channel, or None."""

    values: NDArray[np.int8]
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that computes what it did in FP32, and integer codes for its weights.

    `codes` maps an initializer of `model` to codes, which stand for it where its
    readers run in int8 (`codes.with_codes`). `moved` says what was done to tensors, in graph order.
    `gain_db` is what all of it together likely gains at the outputs of the quantized network, on
    pictures that nothing was chosen on.
    """

    model: Model
    codes: Mapping[str, Codes] = field(default_factory=dict)
    moved: tuple[Moved, ...] = ()
    gain_db: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", MappingProxyType(dict(self.codes)))

    def summary(self, readers: Mapping[str, str]) -> dict[str, list[str]]:
        """Tensor or node -> the moves made on it; `readers` maps an initializer to its node."""
        found = {moved.tensor: list(moved.moves) for moved in self.moved}
        for name, codes in self.codes.items():
            moves = [ROUND_CODES] if codes.bias is None else [ROUND_CODES, CORRECT]
            found.setdefault(readers.get(name, name), []).extend(moves)
        return found


def sentence(name: str, moved: Moved | None, *, rounded: bool) -> str:
    """What was done to a tensor or node, for people.

    >>> sentence("conv_12", Moved("x", "x", (0.2, 31.0), 3.1, True, 2.4), rounded=True)
    'conv_12: channels scaled 0.2 to 31, shifted by 3.1, codes rounded; +2.4 dB'
    """
    parts = []
    if moved is not None and SCALE_CHANNELS in moved.moves:
        parts.append(f"channels scaled {moved.scales[0]:.3g} to {moved.scales[1]:.3g}")
    if moved is not None and moved.shift:
        parts.append(f"shifted by {moved.shift:.3g}")
    if rounded:
        parts.append("codes rounded")
    gain = f"; {moved.gain_db:+.1f} dB" if moved is not None and moved.gain_db else ""
    return f"{name}: {', '.join(parts)}{gain}"


def sentences(moved: Mapping[str, Moved], rounded: Collection[str], *, most: int = 8) -> list[str]:
    """A sentence for each of the `most` tensors that gain most, and how many there are beside them.

    `moved` maps tensor -> what was done, `rounded` holds those whose readers' codes were rounded.

    >>> done = {"a": Moved("a", "a", shift=1.0, gain_db=2.0), "b": Moved("b", "b", shift=2.0)}
    >>> sentences(done, [], most=1)
    ['a: shifted by 1; +2.0 dB', '1 further tensor rewritten: run.json, prepared']
    """
    told = sorted(moved, key=lambda name: -moved[name].gain_db)[:most]
    lines = [sentence(name, moved[name], rounded=name in rounded) for name in moved if name in told]
    more = len(moved) - len(told)
    if more:
        lines.append(
            f"{more} further tensor{'s' if more > 1 else ''} rewritten: run.json, prepared"
        )
    return lines
