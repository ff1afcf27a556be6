"""What an engine's own account says against it: layers that are slower or wider than they need be.

From the inspector's JSON alone; with an ONNX model whose nodes are planned in INT8, also what runs
in float all the same. Every finding names its layer, its ONNX nodes, what was found and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trtune.precision.backends.trt.inspector import EngineLayer
from trtune.precision.plan.plan import QUANTIZED

FLOATS = ("fp32", "fp16", "bf16")
CONVOLUTIONS = ("Convolution", "ConvActPool", "GemmConvolution", "correlation", "gemm", "conv")
TENSOR_CORES = re.compile(
    r"imma|hmma|[hi]?mma|h884|h1688|h16816|i8816|i16832|s1688|s16816|tensor\d+x\d+|xmma|gmma",
    re.IGNORECASE,
)
PAIR_NAME = re.compile(r"QuantizeLinear", re.IGNORECASE)
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
    known, found = times or {}, []
    for layer in layers:
        for kind, what in _findings(layer, planned or {}, frozenset(ends)):
            milliseconds = known.get(layer.name)
            found.append(
                EngineLint(kind, layer.name, layer.nodes, what, REMEDIES[kind], milliseconds)
            )
    return tuple(found)


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
