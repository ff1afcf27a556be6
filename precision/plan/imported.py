"""The plan of a model that brings its own quantization: int8 or fp8 where the file says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from trtune.precision.plan.plan import FOLLOWS, RULE, Assignment, PrecisionPlan

QAT = "qat"
IN_FILE = "quantized in the QAT model"
FLOAT_IN_FILE = "float in the QAT model"


@dataclass(frozen=True, slots=True)
class Read:
    """One input that reads its tensor quantized, as long as one of the `owners` is.

    Without owners it does so always, unless its own node is pinned. `codes` is what it reads in the
    file, int8 or fp8; once none of its owners is computed in that, it reads what they are.
    """

    tensor: str
    node: str
    index: int
    owners: tuple[str, ...] = ()
    codes: str = "int8"


@dataclass(frozen=True, slots=True)
class ImportedPlan(PrecisionPlan):
    """A plan whose pairs stand where the imported model has them, and not where rules put them.

    `axes` maps a weight to the axis of its scales where the model has another than the rules.
    `products` are the matrix products of two tensors of data that the model quantizes,
    `elementwise` the sums and products of elements all of whose inputs are. Each of those leads
    what is fused behind it; `ruled_groups` are the groups without that, where they differ.
    """

    reads: tuple[Read, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    products: tuple[str, ...] = ()
    elementwise: tuple[str, ...] = ()
    ruled_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        PrecisionPlan.__post_init__(self)
        object.__setattr__(self, "reads", tuple(self.reads))
        object.__setattr__(self, "ruled_groups", MappingProxyType(dict(self.ruled_groups)))
        object.__setattr__(self, "axes", MappingProxyType(dict(self.axes)))

    @property
    def active_reads(self) -> tuple[Read, ...]:
        """The reads that stay quantized with the plan as it is."""
        return tuple(read for read in self.reads if self._is_active(read))

    def _is_active(self, read: Read) -> bool:
        if (read.node, read.index) in self.float_reads:
            return False
        if read.owners:
            return any(self.is_quantized(owner) for owner in read.owners)
        return not self.nodes[read.node].is_pinned

    def reads_quantized(self, node: str, index: int) -> bool:
        """Whether `node` reads its input `index` quantized, as the plan is."""
        return any((r.node, r.index) == (node, index) for r in self.active_reads)

    def by_rules(self) -> PrecisionPlan:
        """The same precisions with pairs where the rules of this package put them, which is what
        `lower_deploy` needs; they may stand on tensors that the imported table has no scale for.
        """
        why = {name: "products of data are float here" for name in self.products}
        ruled = self.without_int8(
            {n: w for n, w in why.items() if self.is_quantized(n)}, origin=RULE
        )
        follow = {name: self._following(name) for name in self.elementwise}
        pinned = {name for name in self.elementwise if self.nodes[name].is_pinned}
        floats = tuple((read.node, read.index) for read in self.reads if read.node in pinned)
        return PrecisionPlan(
            self.default,
            self.fallback,
            {**ruled.nodes, **follow},
            self.ruled_groups or self.groups,
            ruled.refusals,
            (*self.float_reads, *floats),
        )

    def _following(self, name: str) -> Assignment:
        """What an elementwise node is assigned where it has no precision of its own."""
        found = self.nodes[name]
        if found.is_pinned:
            return replace(found, role=FOLLOWS)
        return Assignment(self.float_type(name), "follows its neighbours", FOLLOWS, origin=RULE)

    @property
    def decisions(self) -> dict[str, Any]:
        """Everything that decides what is written for the plan: its key."""
        reads = [_as_list(read) for read in self.reads]
        found: dict[str, Any] = PrecisionPlan.decisions.fget(self)  # type: ignore[attr-defined]
        return {
            **found,
            "reads": reads,
            "axes": dict(self.axes),
            "products": list(self.products),
            **({"elementwise": list(self.elementwise)} if self.elementwise else {}),
        }

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back to an equal plan."""
        value = json.loads(PrecisionPlan.to_json(self))
        value["reads"] = [_as_list(read) for read in self.reads]
        if self.axes:
            value["axes"] = dict(self.axes)
        if self.products:
            value["products"] = list(self.products)
        if self.elementwise:
            value["elementwise"] = list(self.elementwise)
        if self.ruled_groups:
            value["ruled_groups"] = {name: list(held) for name, held in self.ruled_groups.items()}
        return json.dumps(value, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ImportedPlan:
        """Read what `to_json` wrote."""
        base, value = PrecisionPlan.from_json(text), json.loads(text)
        reads = tuple(
            Read(tensor, node, index, tuple(owners), *codes)
            for tensor, node, index, owners, *codes in value["reads"]
        )
        return cls(
            base.default,
            base.fallback,
            base.nodes,
            base.groups,
            float_reads=base.float_reads,
            reads=reads,
            axes=value.get("axes", {}),
            products=tuple(value.get("products", ())),
            elementwise=tuple(value.get("elementwise", ())),
            ruled_groups={n: tuple(m) for n, m in value.get("ruled_groups", {}).items()},
        )


def _as_list(read: Read) -> list[Any]:
    """`read` as values for JSON; the codes only where they are not int8."""
    codes = [read.codes] if read.codes != "int8" else []
    return [read.tensor, read.node, read.index, list(read.owners), *codes]
