"""A model that is quantized already, taken apart: FP32 model, plan, table, and what was found.

model = import_quantized(Path("qat.onnx"))
again = insert_quantization(model.model, model.table)      # the same outputs, bit for bit
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from trtune.calibrate.cache import load_table, save_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ModelError
from trtune.datasets.batches import Batch
from trtune.precision.graph.opsets import QDQ_OPSET
from trtune.precision.graph.proto import default_opset
from trtune.precision.graph.view import GraphView, Model, load_model, model_from_proto, save_model
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.placement import Edge
from trtune.precision.quantized.describe import nothing_in_int8
from trtune.precision.quantized.find import Found, find_quantization
from trtune.precision.quantized.findings import (
    BEYOND_INT8,
    EXACT,
    NONE,
    REQUANTIZE,
    Finding,
    finding,
    summary,
)
from trtune.precision.quantized.forms.clipped_codes import with_clips_in_front
from trtune.precision.quantized.forms.float_types import HALF_TYPES, Floats, in_full_precision
from trtune.precision.quantized.forms.foreign_ops import foreign_quantizers
from trtune.precision.quantized.forms.integer_ops import write_as_pairs
from trtune.precision.quantized.forms.moved_weights import with_weights_in_place
from trtune.precision.quantized.forms.old_axis import drop_axis, restore_axis
from trtune.precision.quantized.forms.own_float8 import with_standard_float8
from trtune.precision.quantized.forms.pairs_behind import with_pairs_behind
from trtune.precision.quantized.forms.resized_codes import with_floats_resized
from trtune.precision.quantized.forms.shifts import with_shifts
from trtune.precision.quantized.forms.taken_codes import with_tables_dequantized
from trtune.precision.quantized.insert import (
    insert_quantization,
    plan_from_table,
    with_reasons,
    without_spare_reads,
)
from trtune.precision.quantized.lint import lint
from trtune.precision.quantized.repair import Requantized, int8_range
from trtune.precision.quantized.strip import (
    REQUANTIZED_METHOD,
    Stripped,
    renormalised,
    strip_quantization,
)
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import make_session

__all__ = [
    "Imported",
    "import_quantized",
    "insert_file",
    "insert_quantization",
    "lint_model",
    "load_quantized",
    "quantization_errors",
    "strip",
    "strip_file",
    "with_calibrated",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Imported:
    """A quantized model taken apart.

    `original` is the model as it stands (normalised), `model` the FP32 one, `plan` and `table` its
    quantization, `findings` what the linter says, `changes` what was made symmetric, which costs
    accuracy (empty: `insert_quantization(model, table)` gives what `original` gives, bit for bit).
    `floats` is what the file computes in where it does not in int8.
    """

    original: Model
    model: Model
    plan: ImportedPlan
    table: CalibrationTable
    findings: tuple[Finding, ...]
    changes: tuple[Requantized, ...] = ()
    floats: Floats = field(default_factory=Floats)

    def in_file(self) -> ImportedPlan:
        """The plan that stands in the file, without pins."""
        return _plan(GraphView.of(self.model), self.table, self.floats, "fp32", {})


def load_quantized(path: Path, outputs: Sequence[str] = ()) -> tuple[Model, tuple[Finding, ...]]:
    """The model at `path` as it stands up to `outputs`, and what had to be done to read it.

    Scales with an axis in an opset before 13, which is not valid there, are read as opset 13 has
    them, and NVIDIA's own FP8 operators as those of ONNX. Raises ModelError as `load_model` does.
    """
    try:
        model, found = with_standard_float8(load_model(path, fold="none", outputs=outputs))
        return model, _repaired(found, allow_requantize=False)
    except ModelError as error:
        proto = _old_with_axis(Path(path))
        if proto is None:
            raise
        log.info("%s: %s", path, error)
    opset = default_opset(proto)
    bare, axes = drop_axis(proto)
    model = model_from_proto(bare, Path(path), fold="none", outputs=outputs)
    model = replace(model, proto=restore_axis(model.proto, axes))
    nodes = [node.name for node in model.proto.graph.node if node.output[0] in axes]
    found = tuple(
        finding(
            name,
            "axis-before-opset-13",
            f"an axis in opset {opset}",
            f"opset {QDQ_OPSET}, which has it",
            EXACT,
        )
        for name in nodes
    )
    return model, _repaired(found, allow_requantize=False)


def _old_with_axis(path: Path) -> onnx.ModelProto | None:
    """The file, if it has an axis on Q/DQ that its opset does not know."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return None
    opset = default_opset(proto)
    if opset is None or opset >= QDQ_OPSET:
        return None
    return proto if drop_axis(proto)[1] else None


def import_quantized(
    path: Path,
    *,
    outputs: Sequence[str] = (),
    allow_requantize: bool = False,
    fallback: str = "fp32",
    pins: Mapping[str, str] | None = None,
) -> Imported:
    """Take the quantized ONNX model at `path` apart, up to `outputs` if there are any.

    Repairs that keep every value are made; those that do not (asymmetric ranges) only with
    `allow_requantize`. `pins` are the plan's. `fallback` fp32 leaves what is not int8 in the type
    that the file has it in; fp16 or bf16 puts it there.

    Raises ModelError, with all that was found, if something is left that TensorRT cannot take, and
    for a model without quantization.
    """
    original, notes = load_quantized(path, outputs)
    return import_model(
        original, notes, allow_requantize=allow_requantize, fallback=fallback, pins=pins
    )


def import_model(
    original: Model,
    notes: Iterable[Finding] = (),
    *,
    allow_requantize: bool = False,
    fallback: str = "fp32",
    pins: Mapping[str, str] | None = None,
) -> Imported:
    """`import_quantized` of a model that is loaded already; `notes` are findings from before."""
    model, floats, found, findings = _examine(original)
    findings = (*notes, *_repaired(findings, allow_requantize=allow_requantize))
    if not found.pairs and all(row.kind == "half-rest" for row in findings):
        raise ModelError(
            f"{original.path} holds no QuantizeLinear or DequantizeLinear, so there is nothing to "
            "import; use `precision.default: int8` to quantize it"
        )
    blocking = [row for row in findings if row.blocks]
    if blocking:
        raise ModelError(refusal(original.path, findings))
    stripped = strip_quantization(model, found)
    view, table = GraphView.of(stripped.model), stripped.table
    plan = _plan(view, table, floats, fallback, {})
    fewer, spare = without_spare_reads(view, table, plan)
    rows = (*findings, *_spare(view, spare, dropped=bool(stripped.changes)))
    if stripped.changes:
        stripped = with_shifts(replace(stripped, table=fewer))
        view, table = GraphView.of(stripped.model), stripped.table
    kinds = ("weights-alone", "activation-alone", "unequal-scales")
    half = {row.node: row.found for row in rows if row.kind in kinds}
    plan = with_reasons(_plan(view, table, floats, fallback, pins or {}), half)
    for line in summary(rows):
        log.info("%s", line)
    return Imported(original, stripped.model, plan, table, rows, stripped.changes, floats)


def _plan(
    view: GraphView,
    table: CalibrationTable,
    floats: Floats,
    fallback: str,
    pins: Mapping[str, str],
) -> ImportedPlan:
    """The plan of `table`; with `fallback` fp32 every float node in the type that the file has."""
    if fallback != "fp32" or not floats.half:
        return plan_from_table(view, table, fallback=fallback, pins=pins)
    return plan_from_table(view, table, fallback=floats.half, pins=pins, types=floats.nodes)


def _spare(view: GraphView, edges: Iterable[Edge], *, dropped: bool) -> Iterator[Finding]:
    for name, index in edges:
        tensor = view.by_name[name].input[index]
        kept = "left as it is: without it the values would change"
        row = finding(
            name,
            "spare-pair",
            f"it reads {tensor!r} quantized, and nothing runs in int8 because of that",
            "left out, as other values are no longer the same either" if dropped else kept,
            REQUANTIZE if dropped else NONE,
        )
        yield replace(row, repaired=dropped)


def with_calibrated(imported: Imported, table: CalibrationTable) -> Imported:
    """`imported` with the scales of `table` for the tensors that had to be made symmetric, where
    they are smaller: nothing beyond the range of the file was there when the model was trained.
    """
    scales, methods = dict(imported.table.scales), dict(imported.table.methods)
    for tensor, method in imported.table.methods.items():
        found = table.scales.get(tensor, 0.0)
        if method == REQUANTIZED_METHOD and 0 < found < scales[tensor]:
            scales[tensor] = found
            methods[tensor] = f"{method}, {table.method(tensor) or 'calibrated'}"
    changes = tuple(
        replace(
            change,
            step_after=scales[change.tensor],
            range_after=int8_range(scales[change.tensor]),
        )
        if change.tensor in scales
        else change
        for change in imported.changes
    )
    found_table = replace(imported.table, scales=scales, methods=methods)
    return replace(imported, table=found_table, changes=changes)


def lint_model(path: Path, *, allow_requantize: bool = False) -> tuple[Finding, ...]:
    """What the linter finds in the quantized model at `path`, repaired or not as it would be."""
    original, notes = load_quantized(path)
    *_, findings = _examine(original)
    return (*notes, *_repaired(findings, allow_requantize=allow_requantize))


def strip(path: Path, *, allow_requantize: bool = False) -> Stripped:
    """The FP32 model in the quantized one at `path`, and the table of its scales.

    Raises ModelError as `import_quantized` and `require_scales` do.
    """
    found = import_quantized(path, allow_requantize=allow_requantize)
    require_scales(found)
    return Stripped(found.model, found.table, found.changes)


def require_scales(imported: Imported) -> None:
    """Raise ModelError, with the reason, for a model whose cache would be empty, or hold nothing
    that is still read quantized."""
    if not imported.table.scales or not imported.table.reads:
        why = nothing_in_int8(GraphView.of(imported.model), imported.plan)
        raise ModelError(
            f"{imported.original.path}: no data in it is quantized, so a cache of its scales would "
            f"be empty{f' ({why})' if why else ''}; calibrate the float model instead "
            "(`precision.default: int8`)"
        )


def strip_file(path: Path, model: Path, cache: Path, *, allow_requantize: bool = False) -> Stripped:
    """Write the FP32 model in the quantized one at `path` to `model`, and its table to `cache`.

    The cache is one of TensorRT 10; what that cannot hold stands in the key file beside it.
    Raises ModelError as `import_quantized` does, TrtuneError if a file cannot be written.
    """
    found = strip(Path(path), allow_requantize=allow_requantize)
    save_model(found.model.proto, Path(model), found.model.external_dir)
    save_table(Path(cache), found.table)
    return found


def insert_file(model: Path, cache: Path, target: Path) -> Model:
    """Write the FP32 `model` with the quantization of `cache` to `target`.

    With the key file of `strip_file` beside the cache the pairs stand where they stood; a cache
    alone gives scales, and the pairs stand where the rules of this package put them.
    Raises ModelError or CacheError if one cannot be read or does not fit the other.
    """
    loaded = load_model(Path(model), fold="none")
    table = load_table(Path(cache), allow_unkeyed=True)
    try:
        proto = insert_quantization(loaded, table)
    except CacheError as error:
        raise CacheError(f"{cache}: {error}") from error
    save_model(proto, Path(target), loaded.external_dir)
    return loaded


def _examine(original: Model) -> tuple[Model, Floats, Found, tuple[Finding, ...]]:
    wide, floats, halves = in_full_precision(original.proto)
    proto, converted = write_as_pairs(wide)
    model = original if proto is original.proto else renormalised(original, proto)
    rows = [*foreign_quantizers(original.proto), *halves, *converted]
    for form in (with_clips_in_front, with_tables_dequantized, with_floats_resized):
        proto, told = form(model.proto, GraphView.of(model))
        model = model if proto is model.proto else renormalised(model, proto)
        rows += told
    proto = with_weights_in_place(model.proto, GraphView.of(model))
    model = model if proto is model.proto else renormalised(model, proto)
    found = find_quantization(GraphView.of(model))
    proto, told = with_pairs_behind(model.proto, GraphView.of(model), found)
    if told:
        model = renormalised(model, proto)
        found = find_quantization(GraphView.of(model))
    rows += (*told, *lint(GraphView.of(model), found))
    return model, floats, found, tuple(rows)


def _repaired(findings: Iterable[Finding], *, allow_requantize: bool) -> tuple[Finding, ...]:
    allowed = {EXACT, REQUANTIZE} if allow_requantize else {EXACT}
    return tuple(replace(row, repaired=row.repair in allowed) for row in findings)


def refusal(path: Path, findings: Iterable[Finding]) -> str:
    """The text of the error for a model that cannot be imported."""
    blocking = [row for row in findings if row.blocks]
    lines = summary(blocking)
    remedy = "\n".join(_advice(blocking))
    return "\n".join(
        [f"{path}: {len(blocking)} findings stand in the way of its quantization.", *lines, remedy]
    )


def _advice(blocking: Iterable[Finding]) -> Iterator[str]:
    """What would help, a line for each way that does."""
    rows = list(blocking)
    if all(row.repair == REQUANTIZE for row in rows):
        yield (
            "All of it can be made symmetric int8, which changes the numbers: set "
            "`precision.allow_requantize: true` (or --allow-requantize), and the report shows what "
            "it costs"
        )
        return
    types = {row.kind for row in rows if row.kind in BEYOND_INT8}
    if types:
        yield (
            f"{' and '.join(sorted(types)).upper()} is not imported: what is taken over is int8 "
            "and FP8. TensorRT builds the file as it stands; for INT8 give the float model that it "
            "was made from with `precision.default: int8`"
        )
    if any(row.kind not in BEYOND_INT8 for row in rows if row.repair == NONE):
        yield "What is not repaired has to be changed where the model was exported"


def quantization_errors(
    imported: Imported, batches: Iterable[Batch], *, plan: ImportedPlan | None = None
) -> dict[str, ErrorSums]:
    """What the import changed: output -> errors of the imported model against the file as it is.

    Both run in onnxruntime with the pairs computed as written, and with every half rounded as a
    GPU does. All zero where no change was made.
    """
    again = insert_quantization(imported.model, imported.table, plan or imported.in_file())
    original = imported.original
    before = make_session(_as_on_a_gpu(original.proto), external_dir=original.external_dir)
    after = make_session(in_float32(again), external_dir=imported.model.external_dir)
    names = [output.name for output in original.outputs]
    kinds = {spec.name: spec.dtype for spec in original.inputs}
    sums = {name: ErrorSums() for name in names}
    for batch in batches:
        feeds: dict[str, Any] = dict(batch.feeds)
        given = {name: np.asarray(value).astype(kinds[name]) for name, value in feeds.items()}
        pairs = zip(names, before.run(names, given), after.run(names, feeds), strict=True)
        for name, reference, test in pairs:
            sums[name] = sums[name].add(np.asarray(reference), np.asarray(test))
    return sums


def _as_on_a_gpu(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with its halves rounded in float32; itself if its inputs or outputs are halves."""
    kinds = {i.type.tensor_type.elem_type for i in (*proto.graph.input, *proto.graph.output)}
    return proto if kinds & set(HALF_TYPES) else in_float32(proto)
