"""What differs between two runs: config, plan, pins, scales and values.

All from the files of their folders, so that a run of another day, or another machine, can be held
against this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtune.calibrate.cache import read_cache
from trtune.configs.errors import CacheError
from trtune.precision.plan.plan import PrecisionPlan
from trtune.reports.record import RunRecord, Variant
from trtune.reports.summary import DASH, decibels, metric_label, metric_text, number
from trtune.reports.tables import Table

ABSENT = "not there"
MOST_ROWS = 40
EQUAL_RATIO = 1e-6
"""Scales closer than this, relative, are the same: a cache holds float32."""
READABLE = (OSError, ValueError, KeyError, TypeError, CacheError, yaml.YAMLError)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What two runs are compared by; a part whose file is not there is empty.

    `config` maps key paths to values, `precisions` and `pins` nodes to precisions, `scales`
    tensors to scales.
    """

    record: RunRecord
    config: Mapping[str, Any]
    precisions: Mapping[str, str]
    pins: Mapping[str, str]
    scales: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """One kind of difference: its table, and how many rows there are beyond it."""

    title: str
    lead: str
    table: Table
    more: int = 0


def read_files(record: RunRecord, folder: Path) -> RunFiles:
    """Read the files of the run in `folder`; what cannot be read counts as not there."""
    plan = _tried(lambda: PrecisionPlan.from_json((folder / "plan.json").read_text("utf-8")), None)
    cache = folder / ("prepared.cache" if record.prepared else "calibration.cache")
    return RunFiles(
        record,
        _tried(lambda: flat_keys(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))), {}),
        {} if plan is None else {name: plan.precision(name) for name in plan.compute_nodes},
        {} if plan is None else {name: plan.precision(name) for name in plan.pinned},
        _tried(lambda: dict(read_cache(cache).scales), {}),
    )


def run_differences(first: RunFiles, second: RunFiles) -> list[Difference]:
    """What differs from `first` to `second`, one entry a kind; kinds without any are left out."""
    names = (first.record.name, second.record.name)
    if names[0] == names[1]:
        names = (f"{names[0]} {first.record.key}", f"{names[1]} {second.record.key}")
    found = [
        _texts("Config", "Keys of the config that differ.", "key", names, first.config,
               second.config),
        _texts("Pins", "Layers that only one of them pins, or to another precision.", "layer",
               names, first.pins, second.pins),
        _texts("Plan", "Layers that are planned in another precision.", "layer", names,
               first.precisions, second.precisions),
        _scales(names, first.scales, second.scales),
        _values(names, first.record, second.record),
    ]  # fmt: skip
    return [difference for difference in found if difference.table.rows]


def flat_keys(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as key path -> value.

    >>> flat_keys({"a": {"b": 1}, "c": [{"name": "x", "d": 2}], "e": [1, 2]})
    {'a.b': 1, 'c.x.name': 'x', 'c.x.d': 2, 'e': [1, 2]}
    """
    if isinstance(value, Mapping) and value:
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        parts = [(str(part.get("name", k)), part) for k, part in enumerate(value)]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for name, part in parts:
        found |= flat_keys(part, f"{path}.{name}" if path else name)
    return found


def scale_ratios(
    first: Mapping[str, float], second: Mapping[str, float]
) -> list[tuple[str, float | None, float | None, float]]:
    """Tensors with another scale: (tensor, first, second, second / first), those furthest apart
    first; a tensor that one of them lacks comes last, with an infinite ratio.

    >>> scale_ratios({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 4.0, "b": 2.0})
    [('a', 1.0, 4.0, 4.0), ('c', 3.0, None, inf)]
    """
    rows = []
    for tensor in {**first, **second}:
        one, other = first.get(tensor), second.get(tensor)
        if one is None or other is None:
            rows.append((tensor, one, other, math.inf))
        elif abs(one - other) > EQUAL_RATIO * max(abs(one), abs(other)):
            rows.append((tensor, one, other, other / one if one else math.inf))
    return sorted(rows, key=lambda row: (None in row, -_distance(row[3]), row[0]))


def _distance(ratio: float) -> float:
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _texts(
    title: str,
    lead: str,
    what: str,
    names: tuple[str, str],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> Difference:
    keys = [k for k in {**first, **second} if first.get(k, ABSENT) != second.get(k, ABSENT)]
    rows = tuple((k, str(first.get(k, ABSENT)), str(second.get(k, ABSENT))) for k in keys)
    table = Table((what, *names), rows[:MOST_ROWS], text_columns=3)
    return Difference(title, lead, table, len(rows) - len(table.rows))


def _scales(
    names: tuple[str, str], first: Mapping[str, float], second: Mapping[str, float]
) -> Difference:
    apart = scale_ratios(first, second) if first and second else []
    rows = tuple(
        (tensor, number(one), number(other), f"{ratio:.4g}" if math.isfinite(ratio) else DASH)
        for tensor, one, other, ratio in apart
    )
    same = len({**first, **second}) - len(rows)
    lead = (
        "Tensors whose scales differ, the largest ratios first, then those of one run alone; "
        f"{same} are equal."
    )
    table = Table(("tensor", *names, "ratio"), rows[:MOST_ROWS], text_columns=1)
    return Difference("Scales", lead, table, len(rows) - len(table.rows))


def _values(names: tuple[str, str], first: RunRecord, second: RunRecord) -> Difference:
    metric = first.baseline.metric
    if second.baseline.metric != metric:
        lead = "They have different metrics, so only what both measured is compared."
    else:
        lead = "What both measured, variant by variant."
    others = {(v.name, v.backend): v for v in second.variants}
    rows: list[tuple[str, ...]] = []
    for one in first.variants:
        other = others.get((one.name, one.backend))
        if other is None:
            continue
        for label, text in _measures(metric, same=second.baseline.metric == metric):
            before, after = text(one), text(other)
            if before != after:
                rows.append((f"{one.name}, {one.backend}", label, before, after))
    table = Table(("variant", "what", *names), tuple(rows[:MOST_ROWS]), text_columns=2)
    return Difference("Values", lead, table, len(rows) - len(table.rows))


def _measures(metric: str, *, same: bool) -> list[tuple[str, Callable[[Variant], str]]]:
    found: list[tuple[str, Callable[[Variant], str]]] = [
        ("SQNR", lambda v: decibels(v.sqnr_db)),
        ("agreement", lambda v: metric_text("agreement", v.agreement)),
        ("pins", lambda v: str(len(v.pinned))),
    ]
    own = (metric_label(metric), lambda v: metric_text(metric, v.value))
    return [own, *found] if same and metric != "sqnr_db" else found


def _tried(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except READABLE:
        return otherwise
