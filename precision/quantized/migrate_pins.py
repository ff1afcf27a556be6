"""Lists of layers with a precision, as TensorRT's own tools write them, read as pins.

trtexec: `--layerPrecisions=conv_2:fp32,*se*:fp16`, read from left to right, later ones win, at most
one `*` a name. Polygraphy: `--layer-precisions conv_2:float32 conv_3:float16`, divided by blanks.
Here: `plan.json`, whose pinned nodes count.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trtune.configs.errors import ConfigError, did_you_mean
from trtune.precision.plan.plan import COMPUTE, PrecisionPlan

NAMES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
    "int8": "int8", "int32": "int32", "int64": "int64",
}  # fmt: skip
UNNAMED = re.compile(r"\(Unnamed Layer\* (\d+)\) \[([^\]]*)\]")
FOREIGN = re.compile(r"\{ForeignNode\[(.*)\.\.\.(.*)\]\}")


@dataclass(frozen=True, slots=True)
class LayerPin:
    """A layer name (of the engine, or with one `*`) and the precision that it is to run in."""

    layer: str
    precision: str

    def matches(self, node: str) -> bool:
        """Whether the ONNX node called `node` is meant.

        >>> LayerPin("block*/se", "fp32").matches("block1/se")
        True
        """
        parts = self.layer.split("*")
        return bool(re.fullmatch(".*".join(map(re.escape, parts)), node, re.DOTALL))


def parse_pins(text: str) -> tuple[LayerPin, ...]:
    """The pins in `text`: our plan.json, trtexec's or Polygraphy's syntax.

    >>> parse_pins("--layerPrecisions=a:fp32,b:fp16")
    (LayerPin(layer='a', precision='fp32'), LayerPin(layer='b', precision='fp16'))
    >>> parse_pins("--layer-precisions a:float32 'b c':float16")
    (LayerPin(layer='a', precision='fp32'), LayerPin(layer='b c', precision='fp16'))

    Raises ConfigError, with what was found, for anything else.
    """
    stripped = text.strip()
    if not stripped:
        raise ConfigError("the list of pinned layers is empty")
    if stripped.startswith("{"):
        return _from_plan(stripped)
    found = [_pin(entry) for entry in _entries(stripped)]
    if not found:
        raise ConfigError(f"no layer is named in {stripped[:80]!r}")
    return tuple(found)


def _from_plan(text: str) -> tuple[LayerPin, ...]:
    try:
        plan = PrecisionPlan.from_json(text)
        nodes = {name: a for name, a in plan.nodes.items() if a.role == COMPUTE}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the list of pinned layers is JSON, but no plan.json of trtune: {error}"
        ) from error
    return tuple(
        LayerPin(name, assigned.precision) for name, assigned in nodes.items() if assigned.is_pinned
    )


def _entries(text: str) -> Sequence[str]:
    """The `layer:precision` parts of a command line, of one option of it, or of a file of them."""
    options = re.split(r"(?:^|\s)--(?=[A-Za-z])", text)
    if len(options) == 1:
        return _words(text) if _by_blanks(text) else _listed(text)
    found: list[str] = []
    for option in options[1:]:
        name, _, body = re.sub(r"[=\s]+", "=", option, count=1).partition("=")
        if name == "layer-precisions":
            found += _words(body)
        elif name == "layerPrecisions":
            found += _listed(body)
    return found


def _listed(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    entries = [entry.strip().strip("'\"") for line in lines for entry in line.split(",")]
    return [entry for entry in entries if entry]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigError(f"cannot read the list of pinned layers: {error}") from error


def _by_blanks(text: str) -> bool:
    """Whether the entries of `text` are divided by blanks: every word names a precision."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return False
    return "," not in text and all(word.rpartition(":")[2] in NAMES for word in words)


def _pin(entry: str) -> LayerPin:
    layer, colon, precision = entry.rpartition(":")
    if not colon or not layer:
        raise ConfigError(
            f"expected `layer:precision` in the list of pinned layers, found {entry[:80]!r}"
        )
    kinds = [NAMES.get(part.lower()) for part in precision.split("+")]
    if kinds[0] is None:
        raise ConfigError(
            f"layer {layer!r} has the precision {precision!r}, which is none"
            f"{did_you_mean(precision, NAMES)}"
        )
    if layer.count("*") > 1:
        raise ConfigError(f"layer name {layer!r} has more than one '*', which trtexec refuses")
    return LayerPin(layer, kinds[0])


def explain(layer: str) -> str:
    """Why a name of TensorRT's is no node of the ONNX file; empty if it looks like one.

    >>> explain("(Unnamed Layer* 12) [Shuffle]")
    "layer 12 of TensorRT's own count, a Shuffle that its ONNX parser added or whose node has no \
name; the number changes with the parser, so it cannot be matched: name the tensor or node instead"
    """
    unnamed = UNNAMED.match(layer)
    if unnamed:
        return (
            f"layer {unnamed[1]} of TensorRT's own count, a {unnamed[2]} that its ONNX parser "
            "added or whose node has no name; the number changes with the parser, so it cannot be "
            "matched: name the tensor or node instead"
        )
    foreign = FOREIGN.fullmatch(layer)
    if foreign:
        return f"a part of the network that was compiled as a whole, {foreign[1]} to {foreign[2]}"
    return ""


def parts_of(layer: str) -> Iterable[str]:
    """The ONNX nodes in the name of an engine's layer.

    >>> list(parts_of("conv1 + PWN(PWN(sig), mul)"))
    ['conv1', 'sig', 'mul']
    """
    for part in layer.split(" + "):
        bare = part.replace("PWN(", "").rstrip(")") if part.startswith("PWN(") else part
        for name in bare.split(", ") if part.startswith("PWN(") else [bare]:
            yield name.strip().rstrip(")") if part.startswith("PWN(") else name.strip()
