"""The table of layers: one row a node, of what was planned and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.macs import macs, parameters
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.errors import ErrorSums
from trtune.reports.record import LayerRow


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of nodes, by their names. `how` says which engine, and how it was read."""

    accumulated: Mapping[str, ErrorSums] = field(default_factory=dict)
    alone: Mapping[str, ErrorSums] = field(default_factory=dict)
    runtime: Mapping[str, ErrorSums] = field(default_factory=dict)
    how: str = ""
    account: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)


def rows_of(
    view: GraphView,
    plan: PrecisionPlan,
    untuned: PrecisionPlan,
    table: CalibrationTable | None,
    measured: Measured,
) -> list[LayerRow]:
    """The rows for plain values: `untuned` places the pairs that the errors were measured with."""
    reads = {
        edge: tensor for tensor, edges in place(view, untuned).activations.items() for edge in edges
    }
    places = {node.name: place for place, node in enumerate(view.nodes, start=1)}
    rows = []
    for node in view.nodes:
        assignment = plan.nodes[node.name]
        shape = view.shapes.get(node.output[0], ())
        tensor = reads.get((node.name, 0), "")
        known = table is not None and tensor in table.scales
        runs_in = [f"{b}: {runs[node.name]}" for b, runs in measured.account.items()
                   if node.name in runs]  # fmt: skip
        rows.append(
            LayerRow(
                node=node.name,
                op=node.op_type,
                shape="x".join("?" if d is None else str(d) for d in shape),
                macs=macs(view, node.name),
                parameters=parameters(view, node.name),
                precision=assignment.precision,
                reason=assignment.reason,
                origin=assignment.origin,
                runs_in="; ".join(runs_in),
                tensor=tensor,
                amax=table.amax(tensor) if table is not None and known else None,
                method=table.method(tensor) if table is not None and known else "",
                time_ms=measured.times.get(node.name),
                producers=" ".join(str(places[name]) for name in view.producers_of(node.name)),
                **_accumulated(measured.accumulated.get(node.name)),
                **_alone(measured.alone.get(node.name)),
                **_runtime(measured.runtime.get(node.name), measured.how),
            )
        )
    return rows


def _accumulated(sums: ErrorSums | None) -> dict[str, Any]:
    if sums is None:
        return {}
    return {
        "accumulated_sqnr_db": sums.sqnr_db,
        "accumulated_cosine": sums.cosine,
        "accumulated_relative_l2": sums.relative_l2,
        "accumulated_mean_relative": sums.mean_relative,
        "accumulated_max_abs": sums.max_abs,
    }


def _alone(sums: ErrorSums | None) -> dict[str, Any]:
    if sums is None:
        return {}
    return {
        "alone_sqnr_db": sums.sqnr_db,
        "alone_cosine": sums.cosine,
        "alone_relative_l2": sums.relative_l2,
    }


def _runtime(sums: ErrorSums | None, how: str) -> dict[str, Any]:
    if sums is None:
        return {}
    return {
        "runtime": how,
        "runtime_sqnr_db": sums.sqnr_db,
        "runtime_relative_l2": sums.relative_l2,
        "runtime_max_abs": sums.max_abs,
    }
