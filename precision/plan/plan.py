"""The precision plan: what every node should run in, and why."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import onnx

from trtune.configs.errors import ConfigError, did_you_mean
from trtune.precision.graph.proto import attribute, default_opset
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_types import HALVES, QDQ, half_slots

log = logging.getLogger(__name__)

COMPUTE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with integer kernels of their own; the others follow what surrounds them."""

ACTIVATIONS = {
    *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
    *("Elu", "Selu", "Softplus", "Mish", "Gelu", "BatchNormalization"),
}

COMPUTE, FOLLOWS, SHAPE = "compute", "follows", "shape"

DEFAULT, RULE, USER, TUNER = "default", "rule", "user", "tuner"
RANGE, FILE, COMPILER = "range", "file", "compiler"
ORIGINS = (DEFAULT, RULE, USER, TUNER, RANGE, FILE, COMPILER)
"""Who decided a node's precision: nobody but the plan's default, a rule of this package, the user's
pin, the tuner's, a measured range, the file that the plan was read from, or a runtime's compiler.
"""
PINS = (USER, TUNER)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One node's precision (int8, fp16, bf16, fp32), the reason, and its part in the network.

    `origin` is one of `ORIGINS`, and what code decides by; `reason` is for people.

    `role` is compute (a Conv, Gemm or MatMul, which runs in the precision named), follows (runs in
    whatever its neighbours give it) or shape (index computation, never quantized). `around` is the
    float type that an int8 node gives its result in, where that is not the plan's.
    """

    precision: str
    reason: str
    role: str = COMPUTE
    around: str = ""
    origin: str = RULE

    @property
    def is_pinned(self) -> bool:
        """Whether the user or the tuner chose the precision of this very node."""
        return self.origin in PINS


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """Node name -> precision, with a reason each.

    `groups` maps a compute node to the nodes that are fused with it and share its fate: its
    activation, the Add behind it. `default` and `fallback` are what the user asked for: what
    nodes run in, and what those run in that cannot.
    """

    default: str
    fallback: str
    nodes: Mapping[str, Assignment]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", MappingProxyType(dict(self.nodes)))
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))

    def precision(self, node: str) -> str:
        """What `node` should run in."""
        return self.nodes[node].precision

    def is_int8(self, node: str) -> bool:
        """Whether `node` is to be computed in int8."""
        assignment = self.nodes[node]
        return assignment.role == COMPUTE and assignment.precision == "int8"

    @property
    def around(self) -> str:
        """The float type that int8 nodes give their results in."""
        return self.default if self.default in HALVES else self.fallback

    def float_type(self, node: str) -> str:
        """fp32, fp16 or bf16: what the floats are that `node` reads and writes."""
        assignment = self.nodes[node]
        if assignment.precision != "int8":
            return assignment.precision
        return assignment.around or self.around

    @property
    def halves(self) -> tuple[str, ...]:
        """Which of fp16 and bf16 there are in the plan."""
        used = {self.float_type(name) for name, a in self.nodes.items() if a.role != SHAPE}
        return tuple(name for name in HALVES if name in used)

    @property
    def compute_nodes(self) -> tuple[str, ...]:
        """The nodes that a precision can be chosen for, in graph order."""
        return tuple(name for name, a in self.nodes.items() if a.role == COMPUTE)

    @property
    def int8_nodes(self) -> tuple[str, ...]:
        """The nodes to be computed in int8, in graph order."""
        return tuple(name for name in self.nodes if self.is_int8(name))

    @property
    def pinned(self) -> tuple[str, ...]:
        """Compute nodes that the user or the tuner pinned, in graph order."""
        return tuple(name for name in self.compute_nodes if self.nodes[name].is_pinned)

    def counts(self) -> dict[str, int]:
        """How many compute nodes run in each precision."""
        found = {"int8": 0, "fp16": 0, "fp32": 0}
        for name in self.compute_nodes:
            precision = self.precision(name)
            found[precision] = found.get(precision, 0) + 1
        return found

    def pin(
        self, nodes: Iterable[str], precision: str, reason: str, *, origin: str = USER
    ) -> PrecisionPlan:
        """The plan with `nodes`, and the whole groups of the compute nodes among them, in
        `precision`.

        `origin` says whose pin it is. Raises KeyError for a node that is not there.
        """
        changed = dict(self.nodes)
        for node in nodes:
            for member in (node, *self.groups.get(node, ())):
                changed[member] = replace(
                    changed[member], precision=precision, reason=reason, origin=origin
                )
        return replace(self, nodes=changed)

    @property
    def decisions(self) -> dict[str, Any]:
        """Everything that decides what is written for the plan, as values for JSON: its key.

        The reasons are left out: another wording is no other plan.
        """
        return {
            "default": self.default,
            "fallback": self.fallback,
            "nodes": {n: [a.precision, a.role, a.around, a.origin] for n, a in self.nodes.items()},
            "groups": {name: list(members) for name, members in self.groups.items()},
        }

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back to an equal plan."""
        nodes = {
            name: {
                "precision": a.precision,
                "origin": a.origin,
                "reason": a.reason,
                "role": a.role,
            }
            | ({"around": a.around} if a.around else {})
            for name, a in self.nodes.items()
        }
        value = {
            "default": self.default,
            "fallback": self.fallback,
            "nodes": nodes,
            "groups": {name: list(members) for name, members in self.groups.items()},
        }
        return json.dumps(value, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        """Read what `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else,
        and for a plan that was written before plans said who decided."""
        value: dict[str, Any] = json.loads(text)
        if any("origin" not in a for a in value["nodes"].values()):
            raise ValueError("its nodes have no `origin`: an older trtune wrote it; run it again")
        return cls(
            value["default"],
            value["fallback"],
            {name: Assignment(**a) for name, a in value["nodes"].items()},
            {name: tuple(members) for name, members in value["groups"].items()},
        )


def make_plan(
    view: GraphView,
    *,
    default: str = "int8",
    fallback: str = "fp32",
    pins: Mapping[str, str] | None = None,
) -> PrecisionPlan:
    """The plan before tuning: every node that can be quantized is, but for the user's pins.

    `pins` maps a node name, `op:TYPE` or `re:EXPRESSION` (matched against the whole node name) to
    a precision; of several that match a node the last one counts. A pin holds for the whole group
    of the node. Pinned to int8, fp16 or bf16, a node that cannot run in it stays what it was, and
    the log says so. `fallback` is for what an int8 plan does not quantize; in a plan of another
    default the nodes without weights run in that default too. What ONNX does not define in a half
    type stays fp32. Raises ConfigError for a pin that matches nothing.
    """
    groups = fusion_groups(view)
    nodes = {node.name: _assignment(view, node, default, fallback) for node in view.nodes}
    plan = PrecisionPlan(default, fallback, nodes, groups)
    owner = {member: leader for leader, members in groups.items() for member in members}
    for pattern, precision in (pins or {}).items():
        leaders = dict.fromkeys(owner.get(name, name) for name in match_pin(view, pattern))
        refused = {name: _unpinnable(view, plan, name, precision) for name in leaders}
        plan = plan.pin(
            [name for name, why in refused.items() if not why],
            precision,
            f"pinned by the user: {pattern!r}",
        )
        reasons = {name: why for name, why in refused.items() if why}
        if reasons:
            log.warning("precision.pin: %r is not possible for %s", pattern, _listed(reasons))
    return plan


def _unpinnable(view: GraphView, plan: PrecisionPlan, node: str, precision: str) -> str:
    """Why `node` cannot be pinned to `precision`; empty if it can."""
    role = plan.nodes[node].role
    if role == SHAPE:
        return "it computes shapes"
    if precision in HALVES:
        return half_refusal(view, view.by_name[node], precision)
    if precision != "int8":
        return ""
    return refusal_of(view, view.by_name[node]) if role == COMPUTE else "it has no integer kernel"


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
    return ", ".join(shown) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def match_pin(view: GraphView, pattern: str) -> list[str]:
    """The nodes that a pin names, in graph order; ConfigError with the nearest words if none."""
    names = [node.name for node in view.nodes]
    kind, word = (pattern[:3], pattern[3:]) if pattern[:3] in ("op:", "re:") else ("", pattern)
    choices = names
    if kind == "op:":
        choices = [node.op_type for node in view.nodes]
        found = [name for name, op in zip(names, choices, strict=True) if op == word]
    elif kind == "re:":
        found = _matching(names, word)
    else:
        found = [name for name in names if name == word]
    if not found:
        raise ConfigError(
            f"precision.pin: {pattern!r} matches none of the {len(names)} nodes"
            f"{did_you_mean(word, choices, count=3)} (`trtune inspect MODEL` lists them)"
        )
    return found


def _matching(names: Iterable[str], expression: str) -> list[str]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"precision.pin: {'re:' + expression!r} is not a regular expression: {error}"
        ) from error
    return [name for name in names if compiled.fullmatch(name)]


def _assignment(view: GraphView, node: onnx.NodeProto, default: str, fallback: str) -> Assignment:
    if node.name in view.shape_nodes:
        return Assignment("fp32", "shape computation", SHAPE)
    floats = fallback if default == "int8" else default
    against = half_refusal(view, node, floats)
    if node.op_type not in COMPUTE_OPS:
        wanted = Assignment(floats, "follows its neighbours", FOLLOWS, origin=DEFAULT)
        return Assignment("fp32", against, FOLLOWS) if against else wanted
    if default != "int8":
        if against:
            return Assignment("fp32", against)
        return Assignment(default, "default", origin=DEFAULT)
    refusal = refusal_of(view, node)
    if not refusal:
        return Assignment("int8", "default", around="fp32" if against else "", origin=DEFAULT)
    return Assignment("fp32", f"{refusal}; {against}") if against else Assignment(floats, refusal)


def half_refusal(view: GraphView, node: onnx.NodeProto, precision: str) -> str:
    """Why `node` cannot run in fp16 or bf16 by its types; empty if it can, or for another type."""
    if precision not in HALVES or node.op_type in QDQ:  # Q/DQ take what they stand between
        return ""
    opset = default_opset(view.proto)
    assert opset is not None
    return half_slots(node, view.dtypes, opset, HALVES[precision]).refusal


def refusal_of(view: GraphView, node: onnx.NodeProto) -> str:
    """Why a Conv, ConvTranspose, Gemm or MatMul cannot be quantized; empty if it can."""
    data, weight = node.input[0], node.input[1]
    if view.is_constant(data):
        return "its data input is a constant"
    if view.dtypes.get(data, "float32") != "float32":
        return f"its data input is {view.dtypes[data]}"
    if not view.is_constant(weight):
        return "its weights are computed at run time (attention pattern)"
    if weight not in view.initializers:
        return "its weights are the result of other nodes"
    rank = len(view.initializers[weight].dims)
    if node.op_type == "MatMul" and rank != 2:
        return f"its weights have {rank} dimension{'s' if rank != 1 else ''}"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its data input is transposed (transA)"
    return ""


def weight_axis(node: onnx.NodeProto) -> int:
    """The output-channel axis of a compute node's weights."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if node.op_type == "MatMul" else 0


def fusion_groups(view: GraphView) -> dict[str, tuple[str, ...]]:
    """Compute node -> the nodes fused behind it: bias Add, activation (SiLU too), residual Add.

    The walk goes on as long as a tensor has one reader (two for x * sigmoid(x)); an Add of two
    convolutions belongs to the later one.
    """
    groups: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for node in reversed(view.nodes):
        if node.op_type not in COMPUTE_OPS or node.name in view.shape_nodes:
            continue
        members = _followers(view, node, taken)
        taken.update(members)
        groups[node.name] = members
    return {name: groups[name] for name in (n.name for n in view.nodes) if groups.get(name)}


def _followers(view: GraphView, node: onnx.NodeProto, taken: set[str]) -> tuple[str, ...]:
    members: list[str] = []
    tensor, added = node.output[0], False
    while tensor not in view.graph_outputs:
        readers = list(dict.fromkeys(name for name, _ in view.consumers.get(tensor, ())))
        following = _gated(view, tensor, readers) or (readers if len(readers) == 1 else [])
        last = view.by_name[following[-1]] if following else None
        if last is None or taken & set(following) or not _joins(view, last, len(following), added):
            break
        added = added or _is_residual(view, last)
        members.extend(following)
        tensor = last.output[0]
    return tuple(members)


def _gated(view: GraphView, tensor: str, readers: list[str]) -> list[str]:
    """[Sigmoid, Mul] if the readers of `tensor` are x * sigmoid(x)."""
    if len(readers) != 2:
        return []
    gates = [r for r in readers if view.by_name[r].op_type in ("Sigmoid", "HardSigmoid")]
    products = [r for r in readers if view.by_name[r].op_type == "Mul"]
    if len(gates) != 1 or len(products) != 1:
        return []
    gate, product = view.by_name[gates[0]], view.by_name[products[0]]
    only = [name for name, _ in view.consumers.get(gate.output[0], ())] == [product.name]
    return [gate.name, product.name] if only and gate.output[0] in product.input else []


def _joins(view: GraphView, node: onnx.NodeProto, length: int, added: bool) -> bool:
    if length == 2 or node.op_type in ACTIVATIONS:
        return True
    if node.op_type == "Add":
        return not (added and _is_residual(view, node))
    constant = any(view.is_constant(name) for name in node.input)
    return node.op_type in ("Mul", "Sub", "Div") and constant and len(node.input) == 2


def _is_residual(view: GraphView, node: onnx.NodeProto) -> bool:
    """An Add of two computed tensors."""
    return node.op_type == "Add" and not any(view.is_constant(name) for name in node.input)
