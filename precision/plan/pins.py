"""Pins: which nodes a pattern names, and what becomes of a plan when they are held to a precision.

The one place that turns a pin into assignments, whoever asks: `precision.pin`, a QAT model's
import, a migration's list of layers, the tuner.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from trtune.configs.errors import ConfigError, did_you_mean
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import USER, PrecisionPlan

log = logging.getLogger(__name__)

P = TypeVar("P", bound=PrecisionPlan)


@dataclass(frozen=True, slots=True)
class Held(Generic[P]):
    """A plan after a pin: `nodes` are the leaders that it holds for, `refused` maps those that may
    not run in its precision to the reason."""

    plan: P
    nodes: tuple[str, ...]
    refused: Mapping[str, str]


def hold(
    plan: P, nodes: Iterable[str], precision: str, reason: str, *, origin: str = USER
) -> Held[P]:
    """`plan` with the groups that `nodes` belong to in `precision`, as far as `plan.may` allows.

    Raises KeyError for a node that is not there.
    """
    leaders = dict.fromkeys(plan.leader(node) for node in nodes)
    answers = {leader: plan.may(leader, precision) for leader in leaders}
    held = tuple(leader for leader, why in answers.items() if not why)
    changed = plan.pin(held, precision, reason, origin=origin)
    return Held(changed, held, {leader: why for leader, why in answers.items() if why})


def with_pins(view: GraphView, plan: P, pins: Mapping[str, str]) -> P:
    """`plan` with the user's `pins`: pattern -> precision, of which the last that names a node
    holds.

    A node that may not run in the precision stays what it was, and the log says so. Raises
    ConfigError for a pattern that matches nothing.
    """
    for pattern, precision in pins.items():
        names = match_pin(view, pattern)
        found = hold(plan, names, precision, f"pinned by the user: {pattern!r}")
        plan = found.plan
        if found.refused:
            listed = _listed(found.refused)
            log.warning("precision.pin: %r is not possible for %s", pattern, listed)
    return plan


def first_that_may(plan: PrecisionPlan, node: str, precisions: Sequence[str]) -> str:
    """The first of `precisions` that `node` may run in; fp32 if it may run in none of them."""
    return next((p for p in precisions if not plan.may(node, p)), "fp32")


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
    return ", ".join(shown) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def match_pin(view: GraphView, pattern: str) -> list[str]:
    """The nodes that a pin names, in graph order; ConfigError with the nearest words if none.

    A node of the file that was folded into another one names that; one that became a constant is
    known, and names none.
    """
    works_in = {node.name: node.name for node in view.nodes}
    ops = {node.name: node.op_type for node in view.nodes}
    for name, folded in view.folded.items():
        works_in.setdefault(name, folded.into)
        ops.setdefault(name, folded.op)
    kind, word = (pattern[:3], pattern[3:]) if pattern[:3] in ("op:", "re:") else ("", pattern)
    choices = list(works_in)
    if kind == "op:":
        choices = list(ops.values())
        found = [name for name, op in ops.items() if op == word]
    elif kind == "re:":
        found = _matching(works_in, word)
    else:
        found = [name for name in works_in if name == word]
    if not found:
        raise ConfigError(
            f"precision.pin: {pattern!r} matches none of the {len(view.nodes)} nodes"
            f"{did_you_mean(word, choices, count=3)} (`trtune inspect MODEL` lists them)"
        )
    named = {works_in[name] for name in found}
    return [node.name for node in view.nodes if node.name in named]


def _matching(names: Iterable[str], expression: str) -> list[str]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"precision.pin: {'re:' + expression!r} is not a regular expression: {error}"
        ) from error
    return [name for name in names if compiled.fullmatch(name)]
