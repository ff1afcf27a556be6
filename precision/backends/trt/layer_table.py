"""An engine's layers and times in files, told of the ONNX nodes: what trtexec exports.

`--exportLayerInfo` (TensorRT's inspector, TREx's graph.json) and `--exportProfile`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.configs.errors import InputError
from trtune.precision.backends.trt.inspector import (
    EngineLayer,
    node_precisions,
    parse_bindings,
    parse_layers,
)
from trtune.precision.backends.trt.layer_times import node_times
from trtune.precision.backends.trt.lints import EngineLint, engine_lints, is_convolution
from trtune.precision.graph.view import GraphView
from trtune.precision.traces.engine_names import nodes_of_layer


@dataclass(frozen=True, slots=True)
class EngineTable:
    """Layers, their milliseconds, what every node runs in, and what is to be said against it."""

    layers: tuple[EngineLayer, ...]
    times: Mapping[str, float]
    precisions: Mapping[str, str]
    node_times: Mapping[str, float]
    elsewhere: float
    lints: tuple[EngineLint, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "layers": [
                {
                    "name": layer.name,
                    "type": layer.kind,
                    "precision": layer.precision,
                    "output": layer.output,
                    "nodes": list(layer.nodes),
                    "milliseconds": self.times.get(layer.name),
                }
                for layer in self.layers
            ],
            "nodes": {
                name: {"precision": kind, "milliseconds": self.node_times.get(name)}
                for name, kind in self.precisions.items()
            },
            "milliseconds_elsewhere": self.elsewhere,
            "weighted_layers": self.weighted(),
            "lints": [lint.to_dict() for lint in self.lints],
        }

    def weighted(self) -> dict[str, int]:
        """How many convolutions and matrix products run in each precision."""
        return dict(Counter(layer.precision for layer in self.layers if is_convolution(layer)))

    def summary(self) -> list[str]:
        """Counts in sentences."""
        weighted = ", ".join(f"{kind} {n}" for kind, n in self.weighted().items()) or "none"
        kinds = ", ".join(
            f"{n} x {kind}" for kind, n in Counter(x.kind for x in self.lints).items()
        )
        total = sum(self.times.values())
        timed = f", {total:.4g} ms together" if self.times else ""
        return [
            f"{len(self.layers)} layers{timed}; with weights: {weighted}",
            f"findings: {kinds or 'none'}",
        ]


def read_table(
    layers: Path,
    profile: Path | None = None,
    *,
    view: GraphView | None = None,
    planned: Mapping[str, str] | None = None,
) -> EngineTable:
    """The table of what trtexec wrote; with `view` told of the nodes of that model.

    `planned` maps nodes to what they were to run in; of a model with Q/DQ it is read from the
    pairs. Raises InputError, naming the file, for one that is no such export.
    """
    text = _text(layers)
    found = parse_layers(text, None if view is None else frozenset(view.by_name))
    if not found:
        raise InputError(
            f"{layers} holds no layers: expected what `trtexec --exportLayerInfo=FILE` writes, "
            "a JSON object with `Layers`"
        )
    if view is not None:
        found = tuple(_with_regions(layer, view) for layer in found)
    times = {} if profile is None else read_profile(profile)
    names = tuple(view.by_name) if view is not None else _named(found)
    wanted = planned if planned is not None else (quantized_nodes(view) if view else {})
    by_node, rest = node_times(times, found, names)
    return EngineTable(
        layers=found,
        times=times,
        precisions=node_precisions(found, names),
        node_times=by_node,
        elsewhere=rest,
        lints=engine_lints(found, planned=wanted, ends=parse_bindings(text), times=times),
    )


def _with_regions(layer: EngineLayer, view: GraphView) -> EngineLayer:
    """`layer` with everything between the ends of a region that was compiled as a whole."""
    if "ForeignNode[" not in layer.name:
        return layer
    nodes = dict.fromkeys([*layer.nodes, *nodes_of_layer(layer.name, view)])
    return EngineLayer(
        layer.name, layer.kind, layer.precision, tuple(nodes), layer.output, layer.tactic,
        layer.origin, layer.reads, layer.writes, layer.formats, layer.channels, layer.groups,
    )  # fmt: skip


def _named(layers: tuple[EngineLayer, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node for layer in layers for node in layer.nodes))


def quantized_nodes(view: GraphView) -> dict[str, str]:
    """The weighted nodes of a Q/DQ model whose data is dequantized: planned in INT8 or FP8."""
    found = {}
    for node in view.nodes:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            maker = view.by_name.get(view.producer.get(node.input[0], ""))
            if maker is not None and maker.op_type == "DequantizeLinear":
                codes = view.dtypes.get(maker.input[0], "int8")
                found[node.name] = "fp8" if codes.startswith("float8") else "int8"
    return found


def read_profile(path: Path) -> dict[str, float]:
    """Layer -> milliseconds an inference, as `trtexec --exportProfile` writes them.

    Layers of the same name are added up. Raises InputError for another file.
    """
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    found: dict[str, float] = {}
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and "name" in entry:
            time = entry.get("averageMs", entry.get("medianMs", entry.get("timeMs")))
            if isinstance(time, (int, float)):
                name = str(entry["name"])
                found[name] = found.get(name, 0.0) + float(time)
    if not found:
        raise InputError(
            f"{path} holds no times: expected what `trtexec --exportProfile=FILE` writes, a JSON "
            "list of objects with `name` and `averageMs`"
        )
    return found


def is_layer_info(path: Path) -> bool:
    """Whether the file is JSON with the layers of an engine."""
    if path.suffix.lower() != ".json":
        return False
    try:
        return bool(parse_layers(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError):
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
