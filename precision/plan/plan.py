"""The precision plan: what every node should run in, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

from trtune.precision.plan.half_types import HALVES

COMPUTE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with integer kernels of their own; the others follow what surrounds them."""
ELEMENTWISE_OPS = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")
"""Operators on several tensors of data that a file may quantize all of. They have no integer
arithmetic of their own: in int8 they read codes, and nobody moves floats for them."""

QUANTIZED = ("int8", "fp8")
"""The precisions that Q/DQ pairs stand for."""

COMPUTE, FOLLOWS, SHAPE = "compute", "follows", "shape"

DEFAULT, RULE, USER, TUNER = "default", "rule", "user", "tuner"
RANGE, FILE, COMPILER, TIMED = "range", "file", "compiler", "speed"
ORIGINS = (DEFAULT, RULE, USER, TUNER, RANGE, FILE, COMPILER, TIMED)
"""Who decided a node's precision: nobody but the plan's default, a rule of this package, the user's
pin, the tuner's, a measured range, the file that the plan was read from, a runtime's compiler, or
times that were measured.
"""
PINS = (USER, TUNER)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One node's precision (int8, fp8, fp16, bf16, fp32), the reason, and its part in the network.

    `origin` is one of `ORIGINS`, and what code decides by; `reason` is for people.

    `role` is compute (a Conv, Gemm or MatMul, which runs in the precision named), follows (runs in
    whatever its neighbours give it) or shape (index computation, never quantized). `around` is the
    float type that a quantized node gives its result in, where that is not the plan's.
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
    nodes run in, and what those run in that cannot. `refusals` maps a precision to the nodes that
    cannot run in it, with the reason: by their types, and by ranges once those are measured. It
    follows from the model, so it is not written to JSON, and two plans are equal without it.
    `float_reads` are the (node, input index) pairs that read float though the rules would have them
    read int8.
    """

    default: str
    fallback: str
    nodes: Mapping[str, Assignment]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refusals: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict, compare=False, repr=False
    )
    float_reads: tuple[tuple[str, int], ...] = ()
    _leaders: Mapping[str, str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        leaders = {member: name for name, members in self.groups.items() for member in members}
        object.__setattr__(self, "nodes", MappingProxyType(dict(self.nodes)))
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))
        object.__setattr__(self, "refusals", MappingProxyType(dict(self.refusals)))
        edges = sorted({(node, index) for node, index in self.float_reads})
        object.__setattr__(self, "float_reads", tuple(edges))
        object.__setattr__(self, "_leaders", MappingProxyType(leaders))

    def leader(self, node: str) -> str:
        """The compute node that `node` is fused with; `node` itself if it is in no group, or is
        that compute node."""
        return self._leaders.get(node, node)

    def may(self, node: str, precision: str) -> str:
        """Why `node`, with the whole group that it is fused in, may not run in `precision`; empty
        if it may.

        What types, measured ranges and an imported model's scales forbid, whoever asks: the user's
        pins, the tuner, a migration. Raises KeyError for a node that is not there.
        """
        leader = self.leader(node)
        role = self.nodes[leader].role
        if role == SHAPE:
            return "it computes shapes"
        refused = self.refusals.get(precision, {})
        if precision in QUANTIZED:
            kind = "integer" if precision == "int8" else "float8"
            return refused.get(leader, "") if role == COMPUTE else f"it has no {kind} kernel"
        for member in (leader, *self.groups.get(leader, ())):
            if member in refused:
                return refused[member] if member == leader else f"{member!r}: {refused[member]}"
        return ""

    def precision(self, node: str) -> str:
        """What `node` should run in."""
        return self.nodes[node].precision

    def is_int8(self, node: str) -> bool:
        """Whether `node` is to be computed in int8."""
        assignment = self.nodes[node]
        return assignment.role == COMPUTE and assignment.precision == "int8"

    def is_quantized(self, node: str) -> bool:
        """Whether `node` is to be computed in int8 or fp8."""
        assignment = self.nodes[node]
        return assignment.role == COMPUTE and assignment.precision in QUANTIZED

    @property
    def around(self) -> str:
        """The float type that quantized nodes give their results in."""
        return self.default if self.default in HALVES else self.fallback

    def float_type(self, node: str) -> str:
        """fp32, fp16 or bf16: what the floats are that `node` reads and writes."""
        assignment = self.nodes[node]
        if assignment.precision not in QUANTIZED:
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
    def fp8_nodes(self) -> tuple[str, ...]:
        """The nodes to be computed in float8, in graph order."""
        return tuple(n for n in self.quantized_nodes if self.nodes[n].precision == "fp8")

    @property
    def quantized_nodes(self) -> tuple[str, ...]:
        """The nodes to be computed in int8 or fp8, in graph order."""
        return tuple(name for name in self.nodes if self.is_quantized(name))

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

    def pin(self, nodes: Iterable[str], precision: str, reason: str, *, origin: str = USER) -> Self:
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

    def without_int8(self, reasons: Mapping[str, str], *, origin: str) -> Self:
        """The plan with the nodes in `reasons` in its fallback, or in FP32 where that is forbidden.

        Neither int8 nor fp8 is left to them. What is fused with them keeps its float type. `origin`
        says who found that they cannot be quantized, and `reasons` why.
        """
        changed = dict(self.nodes)
        for node, reason in reasons.items():
            floats = "fp32" if self.may(node, self.fallback) else self.fallback
            changed[node] = replace(changed[node], precision=floats, reason=reason, origin=origin)
        refused = {p: {**self.refusals.get(p, {}), **reasons} for p in QUANTIZED}
        return replace(self, nodes=changed, refusals={**self.refusals, **refused})

    def reading_float(self, edges: Iterable[tuple[str, int]]) -> Self:
        """The plan in which the inputs `edges` are read in float."""
        return replace(self, float_reads=(*self.float_reads, *edges))

    def refusing(self, precision: str, reasons: Mapping[str, str]) -> Self:
        """The plan that also knows why the nodes in `reasons` may not run in `precision`."""
        known = {**self.refusals.get(precision, {}), **reasons}
        return replace(self, refusals={**self.refusals, precision: known})

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
            "float_reads": [list(edge) for edge in self.float_reads],
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
        value: dict[str, Any] = {
            "default": self.default,
            "fallback": self.fallback,
            "nodes": nodes,
            "groups": {name: list(members) for name, members in self.groups.items()},
        }
        if self.float_reads:
            value["float_reads"] = [list(edge) for edge in self.float_reads]
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
            float_reads=tuple((name, index) for name, index in value.get("float_reads", ())),
        )


def is_lowered(plan: PrecisionPlan) -> bool:
    """Whether anything in `plan` runs in less than FP32."""
    return bool(plan.quantized_nodes or plan.halves)
