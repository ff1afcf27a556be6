"""Lists of layers with a precision, as TensorRT's own tools write them, read as pins.

trtexec: `--layerPrecisions=conv_2:fp32,*se*:fp16`. An exact name counts before one with a wildcard,
wherever it stands; a name is split at its first `*`, a second one is a letter. Polygraphy:
`--layer-precisions conv_2:float32 conv_3:float16`. Here: `plan.json`, whose pinned nodes count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trtune.configs.errors import ConfigError, did_you_mean, nearest
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.pins import hold
from trtune.precision.plan.plan import COMPUTE, SHAPE, PrecisionPlan
from trtune.precision.traces.engine_names import FOREIGN, UNNAMED, nodes_of_layer, parts_of
from trtune.precision.traces.parser_names import explain_parser_name
from trtune.precision.traces.pin_text import PinCommand, bare_entries, commands_in

__all__ = [
    "LayerPin",
    "PinFile",
    "PinNote",
    "by_precedence",
    "explain_pins",
    "parse_pins",
    "parts_of",
    "read_pins",
    "with_layer_pins",
]

NAMES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
    "int8": "int8", "int32": "int32", "int64": "int64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerPin:
    """A layer name (of the engine, or with one `*`) and the precision that it is to run in."""

    layer: str
    precision: str

    @property
    def wildcard(self) -> bool:
        """Whether the name stands for all that begin and end alike."""
        return "*" in self.layer

    def matches(self, node: str) -> bool:
        """Whether the ONNX node called `node` is meant.

        >>> LayerPin("block*/se", "fp32").matches("block1/se")
        True
        >>> [LayerPin("*se*", "fp32").matches(name) for name in ("block1/se/conv", "se*")]
        [False, True]
        """
        if self.layer == node:
            return True
        start, star, end = self.layer.partition("*")
        fits = node.startswith(start) and node.endswith(end) and len(node) >= len(start) + len(end)
        return bool(star) and fits


@dataclass(frozen=True, slots=True)
class PinFile:
    """The pins of a file, and what else has to be said of it."""

    pins: tuple[LayerPin, ...]
    notes: tuple[str, ...] = ()


def by_precedence(pins: Iterable[LayerPin]) -> list[LayerPin]:
    """`pins` in the order in which the later one wins: those with a wildcard first.

    >>> [p.layer for p in by_precedence([LayerPin("a", "int8"), LayerPin("*", "fp32")])]
    ['*', 'a']
    """
    return sorted(pins, key=lambda pin: not pin.wildcard)


def parse_pins(text: str, *, command: int | None = None) -> tuple[LayerPin, ...]:
    """The pins in `text`: our plan.json, trtexec's or Polygraphy's syntax.

    >>> parse_pins("--layerPrecisions=a:fp32,b:fp16")
    (LayerPin(layer='a', precision='fp32'), LayerPin(layer='b', precision='fp16'))
    >>> parse_pins("--layer-precisions a:float32 'b c':float16")
    (LayerPin(layer='a', precision='fp32'), LayerPin(layer='b c', precision='fp16'))

    Raises what `read_pins` raises.
    """
    return read_pins(text, command=command).pins


def read_pins(text: str, *, command: int | None = None) -> PinFile:
    """The pins in `text`, which is read as a shell reads it, and notes on it.

    Of several commands `command` (from 1) is taken; without it they must say the same. Raises
    ConfigError, with what was found, for anything else.
    """
    stripped = text.removeprefix("\ufeff").strip()
    if not stripped:
        raise ConfigError("the list of pinned layers is empty")
    if stripped.startswith("{") and not FOREIGN.match(stripped):
        return PinFile(_from_plan(stripped))
    found = commands_in(stripped) if "--" in stripped else []
    if not found:
        if "--" in stripped.split(":")[0]:
            raise ConfigError(
                f"no layer is named in {stripped[:80]!r}: there is neither --layerPrecisions nor "
                "--layer-precisions"
            )
        return _file([_pin(entry) for entry in bare_entries(stripped)], stripped)
    chosen = _chosen(found, command)
    pins = [_pin(entry) for entry in chosen.entries]
    if not pins and chosen.output_types:
        raise ConfigError(
            f"the command sets types of outputs alone ({', '.join(chosen.output_types)}): "
            "--layerOutputTypes does not say what a layer computes in, so there is nothing to "
            "carry over. Name the layers in --layerPrecisions"
        )
    return _file(pins, stripped, _notes(chosen))


def _file(pins: Sequence[LayerPin], text: str, notes: Sequence[str] = ()) -> PinFile:
    if not pins:
        raise ConfigError(f"no layer is named in {text[:80]!r}")
    return PinFile(tuple(pins), tuple(notes))


def _notes(command: PinCommand) -> list[str]:
    notes = []
    if command.output_types:
        notes.append(
            f"--layerOutputTypes is not carried over ({', '.join(command.output_types)}): with "
            "strong typing a tensor has the type of what makes it"
        )
    if command.constrained is False:
        notes.append(
            "the command has no --precisionConstraints=obey or prefer: trtexec did not look at its "
            "--layerPrecisions; here they hold"
        )
    return notes


def _chosen(found: Sequence[PinCommand], command: int | None) -> PinCommand:
    """The command that counts; raises ConfigError if that is not clear."""
    if command is not None:
        if not 1 <= command <= len(found):
            raise ConfigError(f"there is no command {command}: {_counted(found)}")
        return found[command - 1]
    said = {frozenset(_said(c)) for c in found}
    if len(said) > 1:
        raise ConfigError(
            f"which command is meant? Their layers differ: {_counted(found)}. Say its number with "
            "--command"
        )
    return found[0]


def _said(command: PinCommand) -> dict[str, None]:
    return dict.fromkeys(command.entries or command.output_types)


def _counted(found: Sequence[PinCommand]) -> str:
    return "; ".join(f"{number}: {command}" for number, command in enumerate(found, start=1))


def _from_plan(text: str) -> tuple[LayerPin, ...]:
    try:
        plan = PrecisionPlan.from_json(text)
        nodes = {name: a for name, a in plan.nodes.items() if a.role == COMPUTE}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the list of pinned layers is JSON, but no plan.json of trtune: {error}"
        ) from error
    pinned = set(plan.pinned)
    return tuple(LayerPin(name, a.precision) for name, a in nodes.items() if name in pinned)


def _pin(entry: str) -> LayerPin:
    layer, colon, precision = entry.rpartition(":")
    if not colon or not layer:
        hint = " (a shell variable that the file does not set)" if "$" in entry else ""
        raise ConfigError(
            f"expected `layer:precision` in the list of pinned layers, found {entry[:80]!r}{hint}"
        )
    kinds = [NAMES.get(part.lower()) for part in precision.split("+")]
    if kinds[0] is None:
        raise ConfigError(
            f"layer {layer!r} has the precision {precision!r}, which is none"
            f"{did_you_mean(precision, NAMES)}"
        )
    return LayerPin(layer, kinds[0])


def explain_pins(layer: str) -> str:
    """Why a name of TensorRT's is no node of the ONNX file; empty if it looks like one.

    >>> explain_pins("(Unnamed Layer* 12) [Shuffle]")
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
    if layer.count("*") > 1:
        return "trtexec splits a name at its first `*`, the second one is a letter of the name"
    return explain_parser_name(layer)


@dataclass(frozen=True, slots=True)
class PinNote:
    """What became of a pin: the nodes that it holds for (whole fusion groups), or why for none.

    `known`: whether some node of the model is meant at all.
    """

    layer: str
    precision: str
    nodes: tuple[str, ...]
    note: str = ""
    known: bool = True


def with_layer_pins(
    view: GraphView, plan: PrecisionPlan, pins: Sequence[LayerPin]
) -> tuple[PrecisionPlan, tuple[PinNote, ...]]:
    """`plan` with `pins`, exact names before wildcards as in trtexec, and a note on each of them.

    Names of engine layers hold for all nodes that were fused into them.
    """
    told: dict[int, PinNote] = {}
    numbers = {id(pin): number for number, pin in enumerate(pins)}
    for pin in by_precedence(pins):
        plan, note = _with_pin(view, plan, pin)
        told[numbers[id(pin)]] = note
    return plan, tuple(told[number] for number in sorted(told))


def _with_pin(view: GraphView, plan: PrecisionPlan, pin: LayerPin) -> tuple[PrecisionPlan, PinNote]:
    names = [node.name for node in view.nodes]
    hit = [name for name in names if pin.matches(name)] or list(nodes_of_layer(pin.layer, view))
    leaders = list(dict.fromkeys(plan.leader(name) for name in hit))
    leaders = [name for name in leaders if plan.nodes[name].role != SHAPE]
    if not leaders:
        why = "shape computation" if hit else _no_node(pin.layer, names)
        return plan, PinNote(pin.layer, pin.precision, (), why, bool(hit))
    if pin.precision in ("int32", "int64"):
        return plan, PinNote(pin.layer, pin.precision, (), "integers stay what they are")
    held = hold(plan, leaders, pin.precision, f"pinned by {pin.layer}:{pin.precision}")
    plan, note = held.plan, _refused(pin, held.refused)
    members = [m for name in held.nodes for m in (name, *plan.groups.get(name, ()))]
    inside = [name for name in hit if plan.leader(name) != name]
    if inside and held.nodes and not pin.wildcard:
        note = (
            f"{', '.join(inside[:3])} is fused behind {plan.leader(inside[0])}, so the whole "
            "group is pinned" + (f"; {note}" if note else "")
        )
    return plan, PinNote(pin.layer, pin.precision, tuple(members), note)


def _no_node(layer: str, names: Iterable[str]) -> str:
    near = ", ".join(map(repr, nearest(layer, names, count=3)))
    return explain_pins(layer) or (f"no such node; nearest: {near}" if near else "no such node")


def _refused(pin: LayerPin, refused: Mapping[str, str]) -> str:
    """Which nodes may not run in the pin's precision, and why the first of them may not."""
    if not refused:
        return ""
    names = list(refused)
    return f"no {pin.precision} for {', '.join(names[:3])}: {refused[names[0]]}"
