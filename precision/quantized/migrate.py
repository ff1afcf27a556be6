"""From a calibration cache of TensorRT 8 or 10 to explicit Q/DQ, and back.

Under implicit quantization TensorRT ran a layer in INT8 wherever its tensors had scales and that
was fast; with explicit quantization the pairs in the graph decide. What changes between the two is
part of the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from trtune.calibrate.cache import Cache, Version, check_table, header_for, read_cache
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ConfigError, InputError, ModelError, nearest
from trtune.precision.graph.view import GraphView, Model, load_model
from trtune.precision.plan.pins import hold
from trtune.precision.plan.placement import is_move, place
from trtune.precision.plan.plan import COMPUTE, FILE, SHAPE, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.migrate_pins import LayerPin, explain, parse_pins, parts_of
from trtune.precision.tune.scales import without_zero_ranges

TRT10: Version = (10, 14, 1)
INTEGER_ALONE = frozenset(
    {
        *("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "LeakyRelu", "MaxPool"),
        *("Mul", "Relu", "Sigmoid", "Tanh"),
    }
)
"""Operators that implicit quantization runs in INT8 by themselves where their tensors have
scales."""


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A name that has no counterpart, the nearest ones that there are, and why if that is known."""

    name: str
    near: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class PinNote:
    """What became of a pin: the nodes that it holds for (whole fusion groups), or why for none."""

    layer: str
    precision: str
    nodes: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A node that runs in something else than under implicit quantization, and why."""

    node: str
    op: str
    before: str
    now: str
    reason: str


@dataclass(frozen=True, slots=True)
class Migrated:
    """A cache and pins, as a plan and a table of this package.

    `matched` are the tensors of the cache that the model has; `unmatched` the other entries;
    `missing` the tensors that the plan wanted a scale for; `changes` what runs in another precision
    than before.
    """

    plan: PrecisionPlan
    table: CalibrationTable
    matched: tuple[str, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    missing: tuple[Unmatched, ...] = ()
    pins: tuple[PinNote, ...] = ()
    changes: tuple[Change, ...] = ()
    header: str = ""
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The report in sentences, one a line."""
        counts = self.plan.counts()
        found = [
            f"{self.header}: {len(self.matched)} of {len(self.matched) + len(self.unmatched)} "
            f"scales belong to tensors of this model; {counts['int8']} of "
            f"{len(self.plan.compute_nodes)} weighted nodes run in INT8"
        ]
        found += list(self.notes)
        found += [f"no such tensor: {_told(entry)}" for entry in self.unmatched]
        found += [f"no scale for {_told(entry)}" for entry in self.missing]
        for pin in self.pins:
            held = f"holds for {', '.join(pin.nodes) or 'nothing'}"
            note = f"; {pin.note}" if pin.note else ""
            found.append(f"pin {pin.layer}:{pin.precision} {held}{note}")
        for change in self.changes:
            precisions = f"{change.before} before, {change.now} now"
            found.append(f"{change.node} ({change.op}): {precisions}: {change.reason}")
        return found


def _told(entry: Unmatched) -> str:
    why = f": {entry.why}" if entry.why else ""
    near = f" (nearest: {', '.join(map(repr, entry.near))})" if entry.near else ""
    return f"{entry.name!r}{near}{why}"


def migrate_files(
    model: Path, cache: Path, pins: Path | None = None, *, fallback: str = "fp32"
) -> tuple[Model, Migrated]:
    """`migrate` of files: an ONNX model, a calibration cache, and perhaps a list of pins.

    Raises InputError, naming the file, for one that cannot be read or does not fit.
    """
    loaded = load_model(Path(model), fold="constants")
    listed: tuple[LayerPin, ...] = ()
    if pins is not None:
        try:
            listed = parse_pins(Path(pins).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the pinned layers in {pins}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{pins}: {error}") from error
        _check_unique(Path(model), listed)
    found = read_cache(Path(cache))
    try:
        return loaded, migrate(loaded, found, listed, fallback=fallback)
    except CacheError as error:
        raise CacheError(f"{cache}: {error}") from error


def _check_unique(path: Path, pins: Sequence[LayerPin]) -> None:
    """Raise InputError if a pin names several nodes of the file at once."""
    names = Counter(n.name for n in onnx.load(path, load_external_data=False).graph.node)
    for pin in pins:
        if names.get(pin.layer, 0) > 1:
            raise InputError(
                f"the pin {pin.layer}:{pin.precision} names {names[pin.layer]} nodes of {path.name}"
                ": node names are not unique there. Give each a name of its own, or pin by "
                "`precision.pin` with the names that `trtune inspect` shows"
            )


def migrate(
    model: Model, cache: Cache, pins: Sequence[LayerPin] = (), *, fallback: str = "fp32"
) -> Migrated:
    """What `cache` and `pins` mean for `model` with explicit quantization.

    The plan is the package's own, less the pins and the nodes without a scale; with a scale for
    every tensor it is what the main job makes of the same table. Raises CacheError for a cache
    without scales or of another model, ModelError for a model in half precision.
    """
    view = GraphView.of(model)
    _check_float32(view, model)
    if not cache.scales:
        raise CacheError("the cache holds a header and no scale; calibrate again")
    tensors = list(dict.fromkeys([*view.graph_inputs, *view.producer]))
    scales = {t: cache.scales[t] for t in tensors if t in cache.scales}
    base = make_plan(view, fallback=fallback)
    needed = list(place(view, base).activations)
    table = CalibrationTable(
        scales, {t: cache.algorithm for t in scales}, {"source": "migrated", "header": cache.header}
    )
    if needed and not any(tensor in scales for tensor in needed):
        check_table(table, needed)
    plan, told = _with_pins(view, base, pins)
    plan = _without_missing(view, plan, table)
    plan = without_zero_ranges(view, plan, table)
    known = set(tensors)
    absent = [tensor for tensor in needed if tensor not in scales]
    return Migrated(
        plan=plan,
        table=table,
        matched=tuple(scales),
        unmatched=tuple(_unmatched(name, tensors) for name in cache.scales if name not in known),
        missing=tuple(Unmatched(t, tuple(nearest(t, cache.scales, count=3))) for t in absent),
        pins=told,
        changes=_changes(view, base, plan, table),
        header=cache.header,
        notes=_header_notes(cache),
    )


def _header_notes(cache: Cache) -> tuple[str, ...]:
    if cache.algorithm in ("EntropyCalibration2", "MinMaxCalibration"):
        return ()
    return (
        f"{cache.algorithm} calibrates after TensorRT has fused layers: tensors inside a fused "
        "layer have no scale of their own in such a cache",
    )


def _check_float32(view: GraphView, model: Model) -> None:
    half = [
        node.name
        for node in view.nodes
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and view.dtypes.get(node.input[0]) in ("float16", "bfloat16")
    ]
    if half:
        raise ModelError(
            f"{model.path} is in half precision already ({len(half)} nodes, such as {half[0]!r}): "
            "quantization starts from float32. Export it in float32; `precision.fallback: fp16` "
            "makes the rest fp16"
        )


def _unmatched(name: str, tensors: Iterable[str]) -> Unmatched:
    why = explain(name)
    return Unmatched(name, () if why else tuple(nearest(name, tensors, count=3)), why)


def _with_pins(
    view: GraphView, plan: PrecisionPlan, pins: Sequence[LayerPin]
) -> tuple[PrecisionPlan, tuple[PinNote, ...]]:
    told: list[PinNote] = []
    names = [node.name for node in view.nodes]
    for pin in pins:
        hit = [name for name in names if pin.matches(name)]
        hit = hit or [part for part in parts_of(pin.layer) if part in view.by_name]
        leaders = list(dict.fromkeys(plan.leader(name) for name in hit))
        leaders = [name for name in leaders if plan.nodes[name].role != SHAPE]
        if not leaders:
            why = "shape computation" if hit else _no_node(pin.layer, names)
            told.append(PinNote(pin.layer, pin.precision, (), why))
            continue
        if pin.precision in ("int32", "int64"):
            told.append(PinNote(pin.layer, pin.precision, (), "integers stay what they are"))
            continue
        held = hold(plan, leaders, pin.precision, f"pinned by {pin.layer}:{pin.precision}")
        plan, note = held.plan, _refused(pin, held.refused)
        members = [m for name in held.nodes for m in (name, *plan.groups.get(name, ()))]
        inside = [name for name in hit if plan.leader(name) != name]
        if inside and held.nodes:
            note = (
                f"{', '.join(inside[:3])} is fused behind {plan.leader(inside[0])}, so the whole "
                "group is pinned" + (f"; {note}" if note else "")
            )
        told.append(PinNote(pin.layer, pin.precision, tuple(members), note))
    return plan, tuple(told)


def _no_node(layer: str, names: Iterable[str]) -> str:
    near = ", ".join(map(repr, nearest(layer, names, count=3)))
    return explain(layer) or (f"no such node; nearest: {near}" if near else "no such node")


def _refused(pin: LayerPin, refused: Mapping[str, str]) -> str:
    """Which nodes may not run in the pin's precision, and why the first of them may not."""
    if not refused:
        return ""
    names = list(refused)
    return f"no {pin.precision} for {', '.join(names[:3])}: {refused[names[0]]}"


def _without_missing(
    view: GraphView, plan: PrecisionPlan, table: CalibrationTable
) -> PrecisionPlan:
    """`plan` less the nodes that read a tensor without a scale."""
    reasons = {
        plan.leader(name): f"the cache has no scale for its input {tensor!r}"
        for tensor, edges in place(view, plan).activations.items()
        if tensor not in table.scales
        for name, _ in edges
    }
    return plan.without_int8(reasons, origin=FILE)


def _changes(
    view: GraphView, base: PrecisionPlan, plan: PrecisionPlan, table: CalibrationTable
) -> tuple[Change, ...]:
    """Nodes in another precision than TensorRT gave them by the scales alone, pins left out."""
    quantized = _neighbours_of_int8(view, plan)
    found: list[Change] = []
    for node in view.nodes:
        assigned = plan.nodes[node.name]
        if assigned.role == SHAPE or assigned.is_pinned:
            continue
        before = _implicit_int8(view, node, table)
        if assigned.role == COMPUTE:
            now, reason = assigned.precision == "int8", assigned.reason
            if now and not before:
                reason = "its output had no scale, so TensorRT left it in float"
        elif node.op_type in INTEGER_ALONE:
            now, reason = node.name in quantized, "no pairs around it: it follows its neighbours"
            if now and not before:
                continue
        else:
            continue
        if before != now:
            was, is_now = ("int8", plan.fallback) if before else (plan.fallback, "int8")
            found.append(Change(node.name, node.op_type, was, is_now, reason))
    return tuple(found)


def _implicit_int8(view: GraphView, node: onnx.NodeProto, table: CalibrationTable) -> bool:
    """Whether implicit quantization could run `node` in INT8: what it reads and makes has scales.

    Of constants no scale is asked for; the output may be that of the activation fused behind.
    """
    data = [name for name in node.input if name and not view.is_constant(name)]
    if not data or any(view.dtypes.get(name, "float32") != "float32" for name in data):
        return False
    made = [*node.output, *_behind(view, node)]
    return all(table.scales.get(name, 0) > 0 for name in data) and any(
        table.scales.get(name, 0) > 0 for name in made
    )


def _behind(view: GraphView, node: onnx.NodeProto) -> list[str]:
    readers = view.consumers.get(node.output[0], ())
    if len(readers) != 1:
        return []
    return list(view.by_name[readers[0][0]].output)


def _neighbours_of_int8(view: GraphView, plan: PrecisionPlan) -> set[str]:
    """Nodes that run in int8 because they are fused with an int8 node or move what one reads."""
    found = {m for name in plan.int8_nodes for m in plan.groups.get(name, ())}
    quantized = set(place(view, plan).activations)
    for node in reversed(view.nodes):
        moved = [name for k, name in enumerate(node.input) if is_move(node, k)]
        if moved and quantized.intersection(node.output):
            found.add(node.name)
            quantized.update(moved)
    return found


def to_cache(
    view: GraphView, table: CalibrationTable, version: Version = TRT10
) -> tuple[Cache, tuple[str, ...]]:
    """The scales of Q/DQ as a cache for TensorRT 10, and the weighted nodes that it leaves in
    float there because a tensor of theirs has none.

    Operators that only move values get the scale of what they move, which explicit quantization
    does not write down. Raises ValueError for a version that a header cannot hold.
    """
    scales = dict(table.scales)
    for nodes, forward in ((view.nodes, True), (tuple(reversed(view.nodes)), False)):
        for node in nodes:
            ends = [name for k, name in enumerate(node.input) if is_move(node, k)]
            if not ends:
                continue
            source, target = (ends, node.output) if forward else (node.output, ends)
            known = [scales[name] for name in source if name in scales]
            if known and len(known) == len(list(source)):
                for name in target:
                    if name and not view.is_constant(name):
                        scales.setdefault(name, max(known))
    order = [*view.graph_inputs, *view.producer]
    ranked: Mapping[str, float] = {t: scales[t] for t in order if t in scales}
    found = Cache(header_for(version), ranked)
    whole = CalibrationTable(ranked)
    weighted = [n for n in view.nodes if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    return found, tuple(n.name for n in weighted if not _implicit_int8(view, n, whole))
