"""Which precision every ONNX node got, read from the JSON of TensorRT's engine inspector.

The JSON is that of an engine built with ProfilingVerbosity.DETAILED. TensorRT 10 writes
`Format/Datatype` and a list of names `Bindings`; 11 splits the former and writes `I/O Tensors`.
What is not understood becomes "unknown", never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trtune.precision.runtime.api import UNKNOWN

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


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine: name, type, the precision it computes in, the ONNX nodes in it.

    `precision` is the type of its first arithmetic input, "unknown" if the inspector does not say.
    """

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]


def data_type(description: str) -> str | None:
    """The precision that a type or format of the inspector names; None if it names none.

    >>> data_type("Thirty-two wide channel vectorized row major Int8 format.")
    'int8'
    >>> data_type("N/A due to dynamic shapes")
    """
    text = description.lower()
    return next((name for pattern, name in TYPE_PATTERNS if re.search(pattern, text)), None)


def parse_layers(text: str, nodes: Collection[str]) -> tuple[EngineLayer, ...]:
    """The layers of an engine from the inspector's JSON; `nodes` are the names to look for.

    An engine that was built with less detail gives layers of unknown precision; text that is not
    such JSON gives none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return ()
    layers = value.get("Layers") if isinstance(value, dict) else None
    if not isinstance(layers, list):
        return ()
    return tuple(_layer(entry, frozenset(nodes)) for entry in layers)


def _layer(entry: Any, nodes: frozenset[str]) -> EngineLayer:
    if not isinstance(entry, dict):
        name = str(entry)
        return EngineLayer(name, UNKNOWN, UNKNOWN, _nodes_in(name, "", nodes))
    name, metadata = str(entry.get("Name", "")), str(entry.get("Metadata", ""))
    kind = str(entry.get("LayerType", UNKNOWN))
    return EngineLayer(name, kind, _precision(entry), _nodes_in(name, metadata, nodes))


def _precision(entry: Mapping[str, Any]) -> str:
    """Type of the first input that is arithmetic; of the first output for a layer without."""
    for side in ("Inputs", "Outputs"):
        tensors = entry.get(side)
        for tensor in tensors if isinstance(tensors, list) else ():
            found = _tensor_type(tensor)
            if found is None:
                return UNKNOWN
            if found in ARITHMETIC:
                return found
    return UNKNOWN


def _tensor_type(tensor: Any) -> str | None:
    if not isinstance(tensor, dict):
        return None
    described = (str(tensor[key]) for key in DATA_TYPE_KEYS if key in tensor)
    return next((found for text in described if (found := data_type(text))), None)


def _nodes_in(name: str, metadata: str, nodes: frozenset[str]) -> tuple[str, ...]:
    """The known nodes that the metadata names; without metadata those that the layer's name does.

    A `{ForeignNode[first...last]}` names only its first and last node.
    """
    stated = [node for node in METADATA.findall(metadata) if node in nodes]
    if stated or metadata:
        return tuple(dict.fromkeys(stated))
    return tuple(dict.fromkeys(part for part in _parts(name) if part in nodes))


def _parts(name: str) -> Iterator[str]:
    yield name
    foreign = re.fullmatch(r"\{ForeignNode\[(.*)\]\}", name)
    pieces = foreign[1].split("...") if foreign else [name]
    for piece in (part for whole in pieces for part in whole.split(" + ")):
        yield piece
        if piece.startswith("PWN("):
            yield from re.split(r"\)*, ", piece.replace("PWN(", "").rstrip(")"))


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
