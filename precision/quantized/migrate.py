"""From a calibration cache of TensorRT 8 or 10 to explicit Q/DQ, and back.

Under implicit quantization TensorRT ran a layer in INT8 wherever its tensors had scales and that
was fast; with explicit quantization the pairs in the graph decide. What changes between the two is
part of the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from trtune.calibrate.cache import Cache, Version, check_table, header_for, read_cache
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ConfigError, InputError, ModelError, nearest
from trtune.precision.graph.view import GraphView, Model, load_model
from trtune.precision.lower.implicit import in_cache_order, lacking
from trtune.precision.plan.placement import is_move, place, without_zero_ranges
from trtune.precision.plan.plan import COMPUTE, FILE, SHAPE, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.migrate_pins import (
    LayerPin,
    PinFile,
    PinNote,
    read_pins,
    with_layer_pins,
)
from trtune.precision.traces.cache_fit import CacheFit, fit_of
from trtune.precision.traces.parser_names import explain_tensor
from trtune.precision.traces.scale_rules import complete_scales

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
class PrecisionChange:
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
    `missing` the tensors that the plan wanted a scale for, or that have an entry without a range;
    `changes` what runs in another precision than before; `fit` whether the cache belongs to the
    model.
    """

    plan: PrecisionPlan
    table: CalibrationTable
    matched: tuple[str, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    missing: tuple[Unmatched, ...] = ()
    pins: tuple[PinNote, ...] = ()
    changes: tuple[PrecisionChange, ...] = ()
    header: str = ""
    notes: tuple[str, ...] = field(default=())
    fit: CacheFit | None = None

    def lines(self) -> list[str]:
        """The report in sentences, one a line."""
        counts = self.plan.counts()
        found = [
            f"{self.header}: {len(self.matched)} of {len(self.matched) + len(self.unmatched)} "
            f"scales belong to tensors of this model; {counts['int8']} of "
            f"{len(self.plan.compute_nodes)} weighted nodes run in INT8"
        ]
        found += list(self.notes)
        found += [str(self.fit)] if self.fit is not None else []
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
    model: Path,
    cache: Path,
    pins: Path | None = None,
    *,
    fallback: str = "fp32",
    force: bool = False,
    allow_missing: bool = False,
    command: int | None = None,
) -> tuple[Model, Migrated]:
    """`migrate` of files: an ONNX model, a calibration cache, and perhaps a list of pins.

    Of several commands in `pins` `command` (from 1) is meant. Raises InputError, naming the file,
    for one that cannot be read or does not fit: a cache of another model unless `force`, a pin
    that holds for nothing unless `allow_missing`.
    """
    loaded = load_model(Path(model), fold="constants", widen=True)
    listed = PinFile(())
    if pins is not None:
        listed = _read_pins(Path(pins), command)
        _check_unique(Path(model), listed.pins)
    found = read_cache(Path(cache))
    try:
        moved = migrate(
            loaded, found, listed.pins, fallback=fallback, force=force, also_known=_names_in(model)
        )
    except CacheError as error:
        raise CacheError(f"{cache}: {error}") from error
    if moved.fit is not None and not moved.fit.belongs and not force:
        raise CacheError(f"{cache}: {moved.fit}. If it is right all the same: --force")
    lost = [pin for pin in moved.pins if not pin.known]
    if lost and not allow_missing:
        told = "; ".join(f"{pin.layer!r} ({pin.note})" for pin in lost[:5])
        raise ConfigError(
            f"{pins}: {len(lost)} of {len(moved.pins)} pins hold for nothing: {told}. Correct "
            "them, or go on without them: --allow-missing"
        )
    return loaded, replace(moved, notes=(*moved.notes, *listed.notes))


def _read_pins(pins: Path, command: int | None) -> PinFile:
    try:
        return read_pins(pins.read_text("utf-8"), command=command)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the pinned layers in {pins}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{pins}: {error}") from error


def _names_in(model: Path) -> frozenset[str]:
    """Every tensor of the file as it is, before anything is folded."""
    graph = onnx.load(model, load_external_data=False).graph
    made = (name for node in graph.node for name in node.output)
    return frozenset((*made, *(i.name for i in graph.input), *(t.name for t in graph.initializer)))


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
    model: Model,
    cache: Cache,
    pins: Sequence[LayerPin] = (),
    *,
    fallback: str = "fp32",
    force: bool = False,
    also_known: Collection[str] = (),
) -> Migrated:
    """What `cache` and `pins` mean for `model` with explicit quantization.

    The plan is the package's own, less the pins and the nodes without a scale; with a scale for
    every tensor it is what the main job makes of the same table. `also_known` are tensors of the
    file that were folded away. Raises CacheError for a cache without scales, or, unless `force`,
    one without a single tensor that is needed; ModelError for a model in half precision.
    """
    view = GraphView.of(model)
    _check_float32(view, model)
    if not cache.scales:
        raise CacheError("the cache holds a header and no scale; calibrate again")
    tensors = list(dict.fromkeys([*view.graph_inputs, *view.producer]))
    scales = {t: cache.scales[t] for t in tensors if t in cache.scales}
    scales |= _behind_casts(view, scales)
    base = make_plan(view, fallback=fallback)
    needed = list(place(view, base).activations)
    table = CalibrationTable(
        scales, {t: cache.algorithm for t in scales}, {"source": "migrated", "header": cache.header}
    )
    if needed and not any(tensor in scales for tensor in needed) and not force:
        check_table(table, needed)
    plan, told = with_layer_pins(view, base, pins)
    plan = _without_missing(view, plan, table)
    plan = without_zero_ranges(view, plan, table)
    known = set(tensors)
    absent = [t for t in needed if t not in scales]
    absent += [t for t in cache.no_range if t in known and t not in absent]
    return Migrated(
        plan=plan,
        table=table,
        matched=tuple(scales),
        unmatched=tuple(_unmatched(n, tensors, view) for n in cache.names if n not in known),
        missing=tuple(_missing(view, tensor, cache) for tensor in absent),
        pins=told,
        changes=_changes(view, base, plan, table),
        header=cache.header,
        notes=(*_header_notes(cache), *_concat_notes(view, cache)),
        fit=fit_of(view, needed, cache, also_known=also_known),
    )


def _behind_casts(view: GraphView, scales: Mapping[str, float]) -> dict[str, float]:
    """The scales of what stands beside a float16 input or output of the model as float32, which
    the cache has under the name of that."""
    found: dict[str, float] = {}
    for node in view.nodes:
        pair = (node.input[0], node.output[0]) if node.op_type == "Cast" else ()
        if {view.dtypes.get(tensor) for tensor in pair} == {"float16", "float32"}:
            known = [scales[tensor] for tensor in pair if tensor in scales]
            if len(known) == 1:
                found |= dict.fromkeys((t for t in pair if t not in scales), known[0])
    return found


def _missing(view: GraphView, tensor: str, cache: Cache) -> Unmatched:
    readers = list(dict.fromkeys(name for name, _ in view.consumers.get(tensor, ())))
    who = f"read by {', '.join(readers[:3])}" if readers else "an output of the network"
    if tensor in cache.no_range:
        maker = f"made by {view.producer[tensor]}, " if tensor in view.producer else ""
        return Unmatched(tensor, (), f"no range in the cache (infinity or NaN), {maker}{who}")
    return Unmatched(tensor, tuple(nearest(tensor, cache.scales, count=3)), who)


def _concat_notes(view: GraphView, cache: Cache) -> tuple[str, ...]:
    """What TensorRT made of the scales around each Concat when it built."""
    notes = []
    for node in view.nodes:
        own = cache.scales.get(node.output[0]) if node.op_type == "Concat" else None
        scales = {t: cache.scales[t] for t in node.input if t in cache.scales}
        changed = [name for name, scale in scales.items() if own and scale != own]
        if changed and own:
            ratios = [scales[name] / own for name in changed]
            notes.append(
                f"{node.name} (Concat): {len(changed)} of its {len(node.input)} inputs have scales "
                f"of their own in the cache ({min(ratios):.3g} to {max(ratios):.3g} times its "
                "output's). TensorRT 8 and 10 gave them the output's when they built; here what "
                "is read quantized keeps its own"
            )
    return tuple(notes)


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


def _unmatched(name: str, tensors: Iterable[str], view: GraphView) -> Unmatched:
    why = explain_tensor(name, view)
    return Unmatched(name, () if why else tuple(nearest(name, tensors, count=3)), why)


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
) -> tuple[PrecisionChange, ...]:
    """Nodes in another precision than TensorRT gave them by the scales alone, pins left out."""
    quantized = _neighbours_of_int8(view, plan)
    found: list[PrecisionChange] = []
    for node in view.nodes:
        assigned = plan.nodes[node.name]
        if assigned.role == SHAPE or assigned.is_pinned:
            continue
        before = _implicit_int8(view, node, table.scales, base)
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
            found.append(PrecisionChange(node.name, node.op_type, was, is_now, reason))
    return tuple(found)


def _implicit_int8(
    view: GraphView, node: onnx.NodeProto, scales: Mapping[str, float], plan: PrecisionPlan
) -> bool:
    """Whether implicit quantization could run `node` in INT8: what it reads and makes has scales.

    Of constants no scale is asked for; the output may be that of the activation fused behind.
    """
    data = [name for name in node.input if name and not view.is_constant(name)]
    if not data or any(view.dtypes.get(name, "float32") != "float32" for name in data):
        return False
    return not lacking(view, node, scales, plan)


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
    view: GraphView,
    table: CalibrationTable,
    version: Version = TRT10,
    plan: PrecisionPlan | None = None,
) -> tuple[Cache, tuple[str, ...]]:
    """The scales of Q/DQ as a cache for TensorRT 10, and the weighted nodes that it leaves in
    float there because a tensor of theirs has none.

    TensorRT 10 asks for far more scales than explicit quantization writes down: those that follow
    from the others are added (`complete_scales`), none is changed. `plan` is by default the
    package's own. Raises ValueError for a version that a header cannot hold.
    """
    plan = plan or make_plan(view)
    scales, _ = complete_scales(view, plan, table.scales)
    found = Cache(header_for(version), in_cache_order(view, scales))
    weighted = [n for n in view.nodes if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    left = (n.name for n in weighted if not _implicit_int8(view, n, found.scales, plan))
    return found, tuple(left)
