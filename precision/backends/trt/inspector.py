"""Which precision every ONNX node got, read from the JSON of TensorRT's engine inspector.

The JSON is that of an engine built with ProfilingVerbosity.DETAILED. TensorRT 10 writes
`Format/Datatype` and a list of names `Bindings`; 11 splits the former and writes `I/O Tensors`.
What is not understood becomes "unknown", never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trtune.precision.runtime.api import UNKNOWN
from trtune.precision.traces.engine_names import parts_of

METADATA = re.compile(r"\[ONNX Layer: (.*?)\](?=$|\s|[\x1e\x1f]|\[ONNX Layer: )")
"""How layers of a network, and of an engine, name the ONNX nodes that they were made from."""
DATA_TYPE_KEYS = ("Datatype", "DataType", "Format/Datatype")
TYPE_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"int8\b", "int8"),
    (r"bf16|bfloat16", "bf16"),
    (r"fp8|float8", "fp8"),
    (r"fp16|float16|\bhalf\b", "fp16"),
    (r"fp32|float32|\bfloat\b", "fp32"),
    (r"int4\b", "int4"),
    (r"int32", "int32"),
    (r"int64", "int64"),
    (r"\bbool\b", "bool"),
)
"""Words of TensorRT's type and format descriptions, in the order in which they are looked for."""
ARITHMETIC = frozenset({"int8", "bf16", "fp8", "fp16", "fp32", "int4"})
MOVES_DATA = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "Cast", "kgen", "Scale"})
"""Layer types that move or convert values: they count for a node only where nothing else does."""
TACTIC_TYPES: tuple[tuple[str, str], ...] = (
    (r"(?<![a-z0-9])i8(?:i8|f16|f32)_i8|imma|int8", "int8"),
    (r"(?<![a-z0-9])e4m3|fp8", "fp8"),
    (r"(?<![a-z0-9])bf16(?:bf16|f32)?_bf16", "bf16"),
    (r"(?<![a-z0-9])f16(?:f16|f32)?_f16|hmma|h884|h1688|h16816|fp16", "fp16"),
    (r"(?<![a-z0-9])(?:f32(?:f32)?_(?:f32|tf32)|tf32)|sgemm|scudnn|s1688|fp32", "fp32"),
)
"""Parts of kernels' names -> what they compute in: where formats are N/A for dynamic shapes."""


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine: name, type, the precision it computes in, the ONNX nodes in it.

    `precision` is the type of its first arithmetic input; where formats are not told because shapes
    are dynamic, that of its weights or of its kernel's name; "unknown" if nothing says it. `output`
    is the type of what it writes, `reads` and `writes` its tensors, `formats` their descriptions,
    `channels` those that a convolution reads and writes.
    """

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]
    output: str = UNKNOWN
    tactic: str = ""
    origin: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    channels: tuple[int, ...] = ()
    groups: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """What was fused into it, by its name."""
        return parts_of(self.name)


def data_type(description: str) -> str | None:
    """The precision that a type or format of the inspector names; None if it names none.

    >>> data_type("Thirty-two wide channel vectorized row major Int8 format.")
    'int8'
    >>> data_type("N/A due to dynamic shapes")
    """
    text = description.lower()
    return next((name for pattern, name in TYPE_PATTERNS if re.search(pattern, text)), None)


def parse_layers(text: str, nodes: Collection[str] | None = None) -> tuple[EngineLayer, ...]:
    """The layers of an engine from the inspector's JSON; `nodes` are the names to look for.

    Without `nodes` those that the metadata names count, or else the parts of the layer's name. An
    engine that was built with less detail gives layers of unknown precision; text that is not such
    JSON gives none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return ()
    layers = value.get("Layers") if isinstance(value, dict) else None
    if not isinstance(layers, list):
        return ()
    known = None if nodes is None else frozenset(nodes)
    return tuple(_layer(entry, known) for entry in layers)


def parse_bindings(text: str) -> tuple[str, ...]:
    """Inputs and outputs of the engine, from the same JSON; empty if it does not say."""
    try:
        value = json.loads(text)
    except ValueError:
        return ()
    if not isinstance(value, dict):
        return ()
    found = value.get("Bindings", value.get("I/O Tensors", ()))
    names = (tensor.get("Name") if isinstance(tensor, dict) else tensor for tensor in found or ())
    return tuple(str(name) for name in names if name)


def _layer(entry: Any, nodes: frozenset[str] | None) -> EngineLayer:
    if not isinstance(entry, dict):
        name = str(entry)
        return EngineLayer(name, UNKNOWN, UNKNOWN, _nodes_in(name, "", nodes))
    name, metadata = str(entry.get("Name", "")), str(entry.get("Metadata", ""))
    tensors = {side: _tensors(entry, side) for side in ("Inputs", "Outputs")}
    groups = entry.get("Groups", 1)
    return EngineLayer(
        name=name,
        kind=str(entry.get("LayerType", UNKNOWN)),
        precision=_precision(entry),
        nodes=_nodes_in(name, metadata, nodes),
        output=_first_type(tensors["Outputs"]),
        tactic=str(entry.get("TacticName", "")),
        origin=str(entry.get("Origin", "")),
        reads=tuple(str(tensor.get("Name", "")) for tensor in tensors["Inputs"]),
        writes=tuple(str(tensor.get("Name", "")) for tensor in tensors["Outputs"]),
        formats=tuple(_described(t) for side in tensors.values() for t in side[:1]),
        channels=tuple(c for side in tensors.values() for t in side[:1] for c in _channels(t)),
        groups=groups if isinstance(groups, int) else 1,
    )


def _tensors(entry: Mapping[str, Any], side: str) -> list[dict[str, Any]]:
    found = entry.get(side)
    return [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []


def _described(tensor: Mapping[str, Any]) -> str:
    found = (str(tensor[key]) for key in ("Format/Datatype", "Format", "Datatype") if key in tensor)
    return next(found, "")


def _channels(tensor: Mapping[str, Any]) -> list[int]:
    """The second dimension of a picture; nothing for what has another rank, or is free."""
    shape = tensor.get("Dimensions")
    if isinstance(shape, list) and len(shape) == 4 and isinstance(shape[1], int) and shape[1] > 0:
        return [shape[1]]
    return []


def _first_type(tensors: list[dict[str, Any]]) -> str:
    found = (_tensor_type(tensor) for tensor in tensors)
    return next((kind for kind in found if kind in ARITHMETIC), None) or UNKNOWN


def _precision(entry: Mapping[str, Any]) -> str:
    """Type of the first input that is arithmetic; of the first output for a layer without.

    Where a type is not told: of the weights, else what the kernel's name says.
    """
    for side in ("Inputs", "Outputs"):
        tensors = entry.get(side)
        for tensor in tensors if isinstance(tensors, list) else ():
            found = _tensor_type(tensor)
            if found is None:
                return _by_weights_or_tactic(entry)
            if found in ARITHMETIC:
                return found
    return UNKNOWN


def _by_weights_or_tactic(entry: Mapping[str, Any]) -> str:
    weights = entry.get("Weights")
    stated = data_type(str(weights.get("Type", ""))) if isinstance(weights, dict) else None
    if stated in ARITHMETIC:
        return str(stated)
    return tactic_type(str(entry.get("TacticName", ""))) or UNKNOWN


def tactic_type(tactic: str) -> str | None:
    """What a kernel computes in, by its name; None if that does not tell.

    >>> tactic_type("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs")
    'int8'
    >>> tactic_type("sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64")
    'fp16'
    """
    text = tactic.lower()
    return next((kind for pattern, kind in TACTIC_TYPES if re.search(pattern, text)), None)


def _tensor_type(tensor: Any) -> str | None:
    if not isinstance(tensor, dict):
        return None
    described = (str(tensor[key]) for key in DATA_TYPE_KEYS if key in tensor)
    return next((found for text in described if (found := data_type(text))), None)


def _nodes_in(name: str, metadata: str, nodes: frozenset[str] | None) -> tuple[str, ...]:
    """The known nodes that the metadata names; without metadata those that the layer's name does.

    A `{ForeignNode[first...last]}` names only its first and last node.
    """
    stated = METADATA.findall(metadata)
    if nodes is None:
        moves = name.startswith("Reformatting ")
        return tuple(dict.fromkeys(stated or (() if moves else parts_of(name))))
    found = [node for node in stated if node in nodes]
    if found or metadata:
        return tuple(dict.fromkeys(found))
    return tuple(dict.fromkeys(part for part in (name, *parts_of(name)) if part in nodes))


def node_precisions(layers: Collection[EngineLayer], nodes: Collection[str]) -> dict[str, str]:
    """What each of `nodes` runs in, in their order; "unknown" where the engine does not say.

    Layers that move data count only for a node that stands in no other layer. A node whose layers
    disagree is unknown.
    """
    found: dict[str, set[str]] = {}
    moved: dict[str, set[str]] = {}
    for layer in layers:
        for node in layer.nodes:
            target = moved if layer.kind in MOVES_DATA else found
            target.setdefault(node, set()).add(layer.precision)
    result = {}
    for node in nodes:
        precisions = found.get(node) or moved.get(node, set())
        result[node] = next(iter(precisions)) if len(precisions) == 1 else UNKNOWN
    return result
