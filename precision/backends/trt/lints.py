"""What an engine's own account says against it: layers that are slower or wider than they need be.

From the inspector's JSON alone; with an ONNX model whose nodes are planned in INT8, also what runs
in float all the same. Every finding names its layer, its ONNX nodes, what was found and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from trtune.precision.backends.trt.inspector import EngineLayer
from trtune.precision.plan.plan import QUANTIZED

FLOATS = ("fp32", "fp16", "bf16")
CONVOLUTIONS = ("Convolution", "ConvActPool", "GemmConvolution", "correlation", "gemm", "conv")
TENSOR_CORES = re.compile(
    r"imma|hmma|[hi]?mma|h884|h1688|h16816|i8816|i16832|s1688|s16816|tensor\d+x\d+|xmma|gmma",
    re.IGNORECASE,
)
PAIR_NAME = re.compile(r"QuantizeLinear", re.IGNORECASE)
BESIDE = re.compile(r"QuantizeLinear|[./](weight|bias)$|^\(Unnamed Layer", re.IGNORECASE)
"""Parts of a fused layer that do not say which operator it is."""
RESHAPES = ("NoOp", "Reformat")
MULTIPLE: Mapping[str, int] = {"int8": 16, "fp8": 16, "fp16": 8, "bf16": 8}
"""Channels that tensor cores take at a time."""


@dataclass(frozen=True, slots=True)
class EngineLint:
    """One finding: `kind` is a key of `REMEDIES`, `milliseconds` what the layer takes if known."""

    kind: str
    layer: str
    nodes: tuple[str, ...]
    found: str
    remedy: str
    milliseconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "nodes": list(self.nodes)}

    def __str__(self) -> str:
        who = ", ".join(self.nodes[:3]) or self.layer
        return f"{self.kind}: {who}: {self.found}. {self.remedy}"


REMEDIES: Mapping[str, str] = {
    "float though planned in FP8": (
        "FP8 needs Q/DQ on both factors and compute capability 8.9; look at the pairs around it"
    ),
    "float though planned in INT8": (
        "Look for a missing scale or pair at its inputs and outputs, and in the build log for what "
        "was said of it (`trtune explain`)"
    ),
    "not on tensor cores": (
        "Round channels up to a multiple of 16 (INT8) or 8 (FP16), or leave this layer in float"
    ),
    "INT8 in, float out": (
        "Quantize what it writes too (a pair in front of every reader), or the next layer reads "
        "four times the bytes"
    ),
    "alignment": "Round the channels up: kernels pad them, and compute the padding",
    "reformat": (
        "Neighbours want other types or layouts: give them the same precision, or pin the whole "
        "group to one"
    ),
    "Q/DQ left over": (
        "This pair was not fused: move it in front of the weighted node, or take it out"
    ),
}


class ShownLint(Protocol):
    """What a finding is shown by, here and in run.json."""

    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def nodes(self) -> Sequence[str]: ...
    @property
    def found(self) -> str: ...
    @property
    def remedy(self) -> str: ...
    @property
    def milliseconds(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class LintGroup:
    """Findings of one kind, which have one remedy: the slowest layers first."""

    kind: str
    remedy: str
    lints: tuple[ShownLint, ...]
    milliseconds: float | None
    """Of their layers together; None where no layer's time is known."""

    def places(self, most: int) -> str:
        """Where the first `most` are, and how many more there are."""
        shown = ", ".join(lint_place(lint) for lint in self.lints[:most])
        rest = len(self.lints) - most
        return f"{shown} and {rest} more" if rest > 0 else shown


def lint_place(lint: ShownLint) -> str:
    """The nodes of a finding in short: no weights, pairs or layers that the parser added.

    >>> lint_place(EngineLint("reformat", "w.weight + Conv_9", ("w.weight", "Conv_9"), "", ""))
    'Conv_9'
    """
    telling = [node for node in lint.nodes if not BESIDE.search(node)] or list(lint.nodes)
    return " + ".join(telling[:3]) or lint.layer


def lint_groups(lints: Iterable[ShownLint]) -> tuple[LintGroup, ...]:
    """The findings by kind: what costs most time first, then what was found most often."""
    kinds: dict[str, list[ShownLint]] = {}
    for lint in lints:
        kinds.setdefault(lint.kind, []).append(lint)
    groups = []
    for kind, members in kinds.items():
        members.sort(key=lambda lint: -(lint.milliseconds or 0.0))
        times = [lint.milliseconds for lint in members if lint.milliseconds is not None]
        total = sum(times) if times else None
        groups.append(LintGroup(kind, members[0].remedy, tuple(members), total))
    return tuple(sorted(groups, key=lambda g: (-(g.milliseconds or 0.0), -len(g.lints), g.kind)))


def engine_lints(
    layers: Iterable[EngineLayer],
    *,
    planned: Mapping[str, str] | None = None,
    ends: Collection[str] = (),
    times: Mapping[str, float] | None = None,
) -> tuple[EngineLint, ...]:
    """The findings in graph order.

    `planned` maps nodes to the precision that was asked for; `ends` are the inputs and outputs of
    the engine, whose own quantization is needed and not remarked on; `times` layer -> milliseconds.
    """
    known, found, layers = times or {}, [], tuple(layers)
    outer = _reached(layers, ends)
    for layer in layers:
        for kind, what in _findings(layer, planned or {}, outer):
            milliseconds = known.get(layer.name)
            found.append(
                EngineLint(kind, layer.name, layer.nodes, what, REMEDIES[kind], milliseconds)
            )
    return tuple(found)


def _reached(layers: Sequence[EngineLayer], ends: Collection[str]) -> frozenset[str]:
    """`ends`, and the tensors that only a reshape or a change of format parts from one."""
    found = set(ends)
    moves = [x for x in layers if x.kind in RESHAPES and not any(map(PAIR_NAME.search, x.parts))]
    for layer in reversed(moves):
        if found & set(layer.writes):
            found |= set(layer.reads)
    for layer in moves:
        if found & set(layer.reads):
            found |= set(layer.writes)
    return frozenset(found)


def is_convolution(layer: EngineLayer) -> bool:
    """Whether a layer multiplies by weights: a convolution or a matrix product."""
    return any(word in layer.kind for word in CONVOLUTIONS)


def _findings(
    layer: EngineLayer, planned: Mapping[str, str], ends: frozenset[str]
) -> Iterator[tuple[str, str]]:
    if layer.kind == "Reformat" and layer.origin != "QDQ":
        yield "reformat", f"{layer.precision} to {layer.output}: {_formats(layer)}"
        return
    pairs = [part for part in layer.parts if PAIR_NAME.search(part)]
    if pairs and len(pairs) == len(layer.parts) and not ends & {*layer.reads, *layer.writes}:
        yield "Q/DQ left over", f"a {layer.kind} of its own, {layer.precision} to {layer.output}"
        return
    moves = layer.kind in ("Reformat", "NoOp", "Constant")
    for precision in QUANTIZED if layer.precision in FLOATS and not moves else ():
        wanted = [n for n in layer.nodes if planned.get(n) == precision]
        if wanted:
            found = f"{', '.join(wanted[:3])} in {layer.precision}"
            yield f"float though planned in {precision.upper()}", found
    if is_convolution(layer):
        yield from _of_convolution(layer, ends)


def _of_convolution(layer: EngineLayer, ends: frozenset[str]) -> Iterator[tuple[str, str]]:
    step = MULTIPLE.get(layer.precision)
    depthwise = "Depthwise" in layer.kind or layer.groups > 1
    if step and layer.tactic and not TENSOR_CORES.search(layer.tactic) and not depthwise:
        yield "not on tensor cores", f"{layer.precision} by {layer.tactic}"
    if layer.precision == "int8" and layer.output in FLOATS and not ends & set(layer.writes):
        yield "INT8 in, float out", f"it writes {layer.output}"
    odd = [c for c in layer.channels if step and c % step]
    if odd and not depthwise:
        channels = " and ".join(map(str, layer.channels))
        yield "alignment", f"{channels} channels, {layer.precision} takes {step} at a time"


def _formats(layer: EngineLayer) -> str:
    return " to ".join(dict.fromkeys(layer.formats)) or "formats unknown"
