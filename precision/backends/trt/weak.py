"""Weak typing, TensorRT 10.x only: a precision plan as builder flags and pins on layers.

With the reduced precisions enabled TensorRT takes whatever is fastest, layer by layer. What the
plan wants elsewhere is a constraint: `layer.precision` and the type of every output, under OBEY
(a constraint that cannot be met fails the build) or PREFER. INT8 is never a constraint: a layer
that TensorRT leaves in float is found in the finished engine.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trtune.precision.backends.trt.inspector import METADATA
from trtune.precision.plan.plan import COMPUTE, DEFAULT, FOLLOWS, SHAPE, PrecisionPlan

log = logging.getLogger(__name__)

REDUCED: Mapping[str, str] = MappingProxyType({"int8": "INT8", "fp16": "FP16", "bf16": "BF16"})
"""Precision -> the builder flag that lets TensorRT use it."""
LEFT_ALONE = (
    *("CONSTANT", "CAST", "CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT"),
    *("ITERATOR", "LOOP_OUTPUT", "RECURRENCE", "TRIP_LIMIT"),
)
"""Types of layers that are never held to a precision."""
DATA_TYPES: Mapping[str, str] = MappingProxyType({"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"})
"""Precision -> the data type that pins a layer to it."""


@contextmanager
def deprecated_on_purpose() -> Iterator[None]:
    """All of weak typing is deprecated from 10.12 on; using it is what this module is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def enabled_precisions(plan: PrecisionPlan) -> tuple[str, ...]:
    """The reduced precisions that some node of `plan` is to run in, int8 first."""
    wanted = {plan.precision(name) for name in plan.compute_nodes}
    wanted |= {a.precision for a in plan.nodes.values() if a.role == FOLLOWS}
    return tuple(name for name in REDUCED if name in wanted)


def constrained_nodes(plan: PrecisionPlan) -> dict[str, str]:
    """Node -> the precision that TensorRT must be held to, in graph order.

    Free are the nodes in the lowest precision enabled, those in int8, those that follow their
    neighbours, and everything if nothing is enabled. The whole group of a constrained node is
    constrained: fusion could swallow a pin on one of its members.
    """
    enabled = enabled_precisions(plan)
    if not enabled:
        return {}
    found: dict[str, str] = {}
    for name, assignment in plan.nodes.items():
        if assignment.role == SHAPE or assignment.precision in ("int8", enabled[0]):
            continue
        if assignment.role == COMPUTE:
            for member in (name, *plan.groups.get(name, ())):
                found[member] = assignment.precision
        elif assignment.origin != DEFAULT:
            found.setdefault(name, assignment.precision)
    return {name: found[name] for name in plan.nodes if name in found}


def flag_names(plan: PrecisionPlan, *, constraints: str) -> list[str]:
    """The builder flags that `plan` needs. `constraints` is obey or prefer."""
    flags = [REDUCED[precision] for precision in enabled_precisions(plan)]
    if constrained_nodes(plan):
        flags.append(f"{constraints.upper()}_PRECISION_CONSTRAINTS")
    return flags


def set_flags(trt: Any, config: Any, plan: PrecisionPlan, *, constraints: str) -> list[str]:
    """Enable what `plan` needs; the names of the flags set. `constraints` is obey or prefer."""
    flags = flag_names(plan, constraints=constraints)
    with deprecated_on_purpose():
        for name in flags:
            config.set_flag(getattr(trt.BuilderFlag, name))
    return flags


def nodes_of_layers(network: Any, makers: Mapping[str, str]) -> list[str | None]:
    """For each layer of a parsed network the ONNX node that it was made from; None if unknown.

    `makers` maps each ONNX tensor to its node. Layers carry the node's name or metadata; those
    that the parser adds are called `(Unnamed Layer* N) [Type]`. One that makes an ONNX tensor is
    the last of that tensor's node; one that makes something else stands before a layer of its
    node, which reads that.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    known = frozenset(makers.values())
    nodes = [_stated_node(layer, makers, known) for layer in layers]
    read_by: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for tensor in layer_inputs(layer):
            read_by.setdefault(tensor.name, []).append(index)
    for index in reversed(range(len(layers))):  # readers stand behind their producers
        if nodes[index] is None:
            readers = [r for t in outputs_of(layers[index]) for r in read_by.get(t.name, ())]
            nodes[index] = next((nodes[r] for r in readers if nodes[r] is not None), None)
    return nodes


def _stated_node(layer: Any, makers: Mapping[str, str], known: frozenset[str]) -> str | None:
    stated = METADATA.search(layer.metadata or "")
    if stated and stated[1] in known:
        return stated[1]
    if layer.name in known:
        return str(layer.name)
    return next((makers[t.name] for t in outputs_of(layer) if t.name in makers), None)


def layer_inputs(layer: Any) -> list[Any]:
    """The tensors that a layer reads; optional ones that are absent are left out."""
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor for tensor in found if tensor is not None]


def outputs_of(layer: Any) -> list[Any]:
    """The tensors that a layer makes."""
    found = (layer.get_output(index) for index in range(layer.num_outputs))
    return [tensor for tensor in found if tensor is not None]


def constrainable_outputs(trt: Any, layer: Any) -> list[int]:
    """The outputs of `layer` whose type may be set; empty if the layer must be left alone.

    Left alone are constants, casts (which say their type themselves), the borders of loops and
    conditions, layers that compute shapes or read one first, and layers that make integers or
    booleans; of a TopK only the indices are. The network must be complete: before,
    `is_shape_tensor` is not yet right.
    """
    if layer.type in [getattr(trt.LayerType, name) for name in LEFT_ALONE]:
        return []
    first = layer.get_input(0) if layer.num_inputs else None
    if first is not None and first.is_shape_tensor:
        return []
    indices = list(range(layer.num_outputs))
    if layer.type == trt.LayerType.TOPK:
        indices = indices[:1]
    floats = (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)
    for index in indices:
        tensor = layer.get_output(index)
        if tensor is not None and (tensor.is_shape_tensor or tensor.dtype not in floats):
            return []
    return indices


@dataclass(frozen=True, slots=True)
class Pinned:
    """What became of the constraints: layer names by node, and the nodes that got none."""

    layers: Mapping[str, tuple[str, ...]]
    without: tuple[str, ...]


def pin_layers(
    trt: Any, network: Any, constraints: Mapping[str, str], makers: Mapping[str, str]
) -> Pinned:
    """Hold every layer of the nodes in `constraints` to its precision, in a complete network.

    `makers` maps each ONNX tensor to its node.
    """
    found: dict[str, list[str]] = {node: [] for node in constraints}
    with deprecated_on_purpose():
        for index, node in enumerate(nodes_of_layers(network, makers)):
            if node is None or node not in constraints:
                continue
            layer = network.get_layer(index)
            outputs = constrainable_outputs(trt, layer)
            if not outputs:
                continue
            dtype = getattr(trt.DataType, DATA_TYPES[constraints[node]])
            layer.precision = dtype
            for output in outputs:
                layer.set_output_type(output, dtype)
            found[node].append(layer.name)
    without = tuple(node for node, layers in found.items() if not layers)
    if without:
        log.info("no layer to constrain for %s", ", ".join(without))
    return Pinned({node: tuple(layers) for node, layers in found.items() if layers}, without)


def use_calibrator(config: Any, calibrator: Any, profile: Any | None) -> None:
    """Let the build calibrate with `calibrator`, at the opt shapes of `profile` if there is one."""
    with deprecated_on_purpose():
        config.int8_calibrator = calibrator
        if profile is not None:
            config.set_calibration_profile(profile)


def has_fast_int8(builder: Any) -> bool:
    """Whether the GPU has INT8 arithmetic."""
    with deprecated_on_purpose():
        return bool(builder.platform_has_fast_int8)


def trtexec_constraints(precisions: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Layer -> precision in the syntax of trtexec's --layerPrecisions, and the layers left out.

    Left out are names with characters that the syntax takes for its own.

    >>> trtexec_constraints({"a": "fp32", "b:0": "fp16"})
    ('a:fp32', ('b:0',))
    """
    left_out = tuple(name for name in precisions if set(name) & set(":,*"))
    kept = [f"{name}:{p}" for name, p in precisions.items() if name not in left_out]
    return ",".join(kept), left_out
