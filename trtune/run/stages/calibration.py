"""The calibration stage: a table and histograms, from pictures, from a cache, or from the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtune.calibrate.cache import check_table, load_table, save_table
from trtune.calibrate.histogram import load_histograms, save_histograms
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ConfigError, ModelError
from trtune.configs.files import hash_json
from trtune.configs.progress import Progress
from trtune.configs.schema import Calibration as Section
from trtune.configs.system.cluster import Cluster
from trtune.precision.graph.file import Model
from trtune.precision.lower.deploy import optional_tensors
from trtune.precision.lower.implicit import left_in_float
from trtune.precision.plan.half_ranges import tensors_for_ranges
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.plan import COMPUTE_OPS, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.insert import completed
from trtune.precision.traces.scale_rules import with_constants, with_implied
from trtune.precision.tune.scales import (
    IMPLICIT,
    Calibrated,
    calibrate_model,
    carried_tensors,
    implicit_only,
)
from trtune.run.data import RunData
from trtune.run.naming import CACHE_FILE, HISTOGRAM_FILE
from trtune.run.stage import Form, Kept, Need, Stage, device_needs, versions

if TYPE_CHECKING:
    from trtune.run.subject import Subject

log = logging.getLogger(__name__)

EMPTY = Calibrated(CalibrationTable({}), {}, 0, 0, 0.0, 0.0, 0.0)
COSTS = ("pictures", "passes", "seconds", "inference_seconds", "search_seconds")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a pass over the pictures is made for: `plan` with scales for `tensors`, `ranges`.

    `implicit` are the tensors that TensorRT 10 asks a scale for beside those, `lowerings` the ways
    of writing the plan that all of them are for; `float8` asks for scales for that too.
    """

    plan: PrecisionPlan
    tensors: tuple[str, ...]
    implicit: tuple[str, ...]
    ranges: tuple[str, ...]
    lowerings: tuple[str, ...] = ()
    float8: bool = False


def calibration(
    subject: Subject,
    planned: PrecisionPlan,
    data: RunData,
    section: Section,
    *,
    lowerings: Iterable[str],
    device: str = "cpu",
    float8: bool = False,
    cluster: Cluster | None = None,
    progress: Progress,
) -> Stage[Calibrated]:
    """What `planned` needs to know of the activations, on the calibration `data`.

    Scales for every quantizable node if any is int8, so that pins never make a kept table useless;
    ranges of what would be half if anything is, and with `float8` scales for that. A cache that
    `section` names gives the scales, and the pass the ranges alone; a quantized model brings its
    own scales, and the pass adds those that a lowering needs beside them.

    Raises ModelError if nothing in the model can be quantized, CacheError for a cache in the config
    that does not fit; making the stage, DataError for the data.
    """
    lowerings, imported = tuple(lowerings), subject.imported
    rules = planned.by_rules() if isinstance(planned, ImportedPlan) else planned
    own = None if imported is None else imported.table
    if own is not None and "deploy" not in lowerings and not rules.halves:
        return _brought(subject, rules, own, section, implicit=IMPLICIT in lowerings)
    wanted = replace(_wanted(subject, rules, lowerings), float8=float8)
    named = None
    if section.cache is not None and wanted.tensors:
        named = named_table(Path(section.cache), subject.model, trust=section.trust_cache)
        optional = optional_tensors(subject.view, wanted.plan) if "deploy" in lowerings else set()
        check_table(named, [tensor for tensor in wanted.tensors if tensor not in optional])
        wanted = _Wanted(make_plan(subject.view, default="fp32"), (), (), wanted.ranges)

    def make(folder: Path) -> Calibrated:
        found = _measured(subject, data, section, wanted, device, cluster, progress)
        table = found.table if named is None else named
        if own is not None:
            table = replace(completed(own, table), provenance=table.provenance)
        if IMPLICIT in wanted.lowerings:
            table = with_constants(subject.view, wanted.plan, table)
        return replace(found, table=table)

    needs = _needs(subject, data, section, wanted) | device_needs(device)
    needs |= {"cache": Need(named, {"calibration.cache": section.cache}), "file": own}
    return Stage("calibrate", needs, make, CALIBRATED, version=4)


def _brought(
    subject: Subject,
    plan: PrecisionPlan,
    own: CalibrationTable,
    section: Section,
    *,
    implicit: bool,
) -> Stage[Calibrated]:
    """The scales of a quantized model as they stand in it, with `implicit` and what follows from
    them for TensorRT 10; ConfigError if a cache is named too."""
    if section.cache is not None:
        raise ConfigError(
            "calibration.cache: with precision.default: qat all scales come from the Q/DQ in "
            "the model, so this cache would not be read; take it out, or give the FP32 model "
            "with precision.default: int8"
        )
    table = own
    if implicit and own.scales:
        table = with_implied(subject.view, plan, own)
        left = left_in_float(subject.view, plan, table.scales)
        if left:
            log.info("in float under implicit quantization: %s", ", ".join(left))
    found = replace(EMPTY, table=table)
    needs = {"model": subject.model, "scales": own, "implicit": implicit}
    return Stage("calibrate", needs, lambda folder: found, CALIBRATED, version=4)


def _measured(
    subject: Subject,
    data: RunData,
    section: Section,
    wanted: _Wanted,
    device: str,
    cluster: Cluster | None,
    progress: Progress,
) -> Calibrated:
    """What a pass over the pictures gives; nothing where nothing is wanted."""
    if not wanted.tensors and not wanted.ranges:
        return EMPTY
    found = calibrate_model(
        subject.model,
        subject.view,
        wanted.plan,
        data.source,
        lowerings=wanted.lowerings,
        method=section.method,
        percentile=section.percentile,
        holdout=section.holdout,
        memory=section.memory,
        device=device,
        cluster=cluster,
        also=wanted.ranges,
        float8=wanted.float8,
        provenance=_provenance(subject, data, section, wanted),
        progress=progress,
    )
    log.info(
        "calibrated %d tensors on %d pictures in %.1f s (runtime %.1f s, search %.1f s)",
        len(found.histograms),
        found.pictures,
        found.seconds,
        found.inference_seconds,
        found.search_seconds,
    )
    return found


def _wanted(subject: Subject, planned: PrecisionPlan, lowerings: tuple[str, ...]) -> _Wanted:
    plan = make_plan(subject.view, default="int8" if planned.quantized_nodes else "fp32")
    tensors = tuple(carried_tensors(subject.view, plan, lowerings))
    ranges = tuple(tensors_for_ranges(subject.view)) if planned.halves else ()
    if not tensors and not ranges:
        raise ModelError(_nothing_quantizable(subject.model, make_plan(subject.view)))
    implicit = tuple(implicit_only(subject.view, plan, lowerings))
    return _Wanted(plan, tensors, implicit, ranges, lowerings)


def _method(section: Section) -> dict[str, Any]:
    """What of the config decides the scales."""
    return {
        "method": section.method,
        "percentile": section.percentile if section.method == "percentile" else None,
        "holdout": section.holdout if section.method == "auto" else None,
    }


def _needs(subject: Subject, data: RunData, section: Section, wanted: _Wanted) -> dict[str, Any]:
    return {
        "model": subject.model,
        data.where: data.need,
        **{f"calibration.{name}": value for name, value in _method(section).items()},
        "tensors": [*wanted.tensors, *wanted.implicit],
        "ranges": wanted.ranges,
        **({"float8": True} if wanted.float8 else {}),
        **versions("trtune", "onnx", "onnxruntime", "numpy", "numba"),
    }


def _provenance(
    subject: Subject, data: RunData, section: Section, wanted: _Wanted
) -> dict[str, Any]:
    """What a table tells of itself: the file beside the cache goes on without its run."""
    return {
        "model": subject.model.sha256,
        "data": data.source.identity,
        **versions("trtune", "onnx", "onnxruntime", "numpy", "polygraphy"),
        **_method(section),
        "tensors": hash_json([*wanted.tensors, *wanted.implicit]),
        **({"ranges": hash_json(list(wanted.ranges))} if wanted.ranges else {}),
        **({"float8": True} if wanted.float8 else {}),
    }


def _write(found: Calibrated, folder: Path) -> Kept:
    files = [HISTOGRAM_FILE]
    save_histograms(folder / HISTOGRAM_FILE, found.histograms)
    if found.table.scales:
        files += [CACHE_FILE, f"{CACHE_FILE}.json"]
        save_table(folder / CACHE_FILE, found.table)
    return {name: getattr(found, name) for name in COSTS} | {"cache": len(files) > 1}, tuple(files)


def _read(value: Any, folder: Path) -> Calibrated:
    table = load_table(folder / CACHE_FILE, allow_unkeyed=True) if value["cache"] else EMPTY.table
    costs = {name: value[name] for name in COSTS}
    return Calibrated(table, load_histograms(folder / HISTOGRAM_FILE), **costs)


CALIBRATED: Form[Calibrated] = Form(_write, _read)


def named_table(path: Path, model: Model, *, trust: bool) -> CalibrationTable:
    """The cache that the config names. One whose key says another model needs `trust`."""
    table = load_table(path, allow_unkeyed=True)
    made_from = table.provenance.get("model")
    if made_from not in (None, model.sha256) and not trust:
        raise CacheError(
            f"{path} was made from another model (its key says {str(made_from)[:12]}, this one is "
            f"{model.sha256[:12]}); calibrate again, or set calibration.trust_cache to use it"
        )
    log.info("calibration cache %s used as the config says", path)
    return replace(table, provenance={**table.provenance, "file": path.name})


def _nothing_quantizable(model: Model, plan: PrecisionPlan) -> str:
    reasons = [f"{name!r}: {plan.nodes[name].reason}" for name in plan.compute_nodes]
    why = "; ".join([*reasons[:3], *(["..."] if len(reasons) > 3 else [])])
    return (
        f"{model.path}: nothing in it can be quantized, so there is nothing to calibrate "
        f"({why or 'it has no ' + ', '.join(COMPUTE_OPS)}); `trtune inspect` shows its nodes"
    )
