"""The calibration stage: a table and histograms that a run made, kept, or was given."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtune.calibrate.cache import check_table, load_table, save_table
from trtune.calibrate.histogram import load_histograms, save_histograms
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ModelError
from trtune.configs.files import hash_json
from trtune.configs.progress import Progress
from trtune.configs.schema import Calibration
from trtune.datasets.batches import BatchSource
from trtune.precision.graph.file import Model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.half_ranges import tensors_for_ranges
from trtune.precision.plan.plan import COMPUTE_OPS, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.tune.scales import (
    Calibrated,
    calibrate_model,
    carried_tensors,
    implicit_only,
)
from trtune.run.store import read_stage, write_stage

log = logging.getLogger(__name__)

CACHE_FILE = "calibration.cache"
HISTOGRAM_FILE = "histograms.npz"


def calibrated_in(
    folder: Path,
    section: Calibration,
    model: Model,
    view: GraphView,
    source: BatchSource,
    planned: PrecisionPlan,
    *,
    lowerings: Iterable[str],
    made_from: Mapping[str, Any],
    progress: Progress,
) -> tuple[Calibrated, bool]:
    """What `planned` needs to know of the activations, and whether it was there from before.

    Scales for every quantizable node if any is int8, so that pins never make a kept table useless;
    ranges of what would be half if anything is. `made_from` is hashes and versions: with the rest
    of what the result depends on it is the key of what is kept in `folder`.

    Raises ModelError if nothing in the model can be quantized, CacheError for a cache in the config
    that does not fit, DataError for the data.
    """
    plan = make_plan(view, default="int8" if planned.int8_nodes else "fp32")
    tensors = carried_tensors(view, plan, lowerings)
    ranges = tensors_for_ranges(view) if planned.halves else ()
    if not tensors and not ranges:
        raise ModelError(_nothing_quantizable(model, make_plan(view)))
    named = section.cache is not None and bool(tensors)
    every = [*tensors, *implicit_only(view, plan, lowerings)]
    key = {**made_from, **_key(section, [] if named else every, ranges)}
    found, reused = Calibrated(CalibrationTable({}), {}, 0, 0, 0.0, 0.0, 0.0), False
    if ranges or not named:
        kept = _kept(folder, key)
        reused = kept is not None
        found = kept or _made(
            folder,
            key,
            calibrate_model(
                model,
                view,
                make_plan(view, default="fp32") if named else plan,
                source,
                lowerings=() if named else lowerings,
                method=section.method,
                percentile=section.percentile,
                holdout=section.holdout,
                memory=section.memory,
                also=ranges,
                provenance=key,
                progress=progress,
            ),
        )
    if named:
        table = named_table(Path(str(section.cache)), model, trust=section.trust_cache)
        check_table(table, tensors)
        save_table(folder / CACHE_FILE, table)
        found = replace(found, table=table)
    return found, reused


def _key(section: Calibration, tensors: Sequence[str], ranges: Sequence[str]) -> dict[str, Any]:
    """What of the config and of the plan decides the result."""
    return {
        "method": section.method,
        "percentile": section.percentile if section.method == "percentile" else None,
        "holdout": section.holdout if section.method == "auto" else None,
        "tensors": hash_json(list(tensors)),
        **({"ranges": hash_json(list(ranges))} if ranges else {}),
    }


def _made(folder: Path, key: Mapping[str, Any], found: Calibrated) -> Calibrated:
    log.info(
        "calibrated %d tensors on %d pictures in %.1f s (runtime %.1f s, search %.1f s)",
        len(found.histograms),
        found.pictures,
        found.seconds,
        found.inference_seconds,
        found.search_seconds,
    )
    _forget(folder)
    save_histograms(folder / HISTOGRAM_FILE, found.histograms)
    if found.table.scales:
        save_table(folder / CACHE_FILE, found.table)
    write_stage(folder, "calibrate", key, _cost(found))
    return found


def _forget(folder: Path) -> None:
    """Take away the cache of another calibration: one without its key is not trusted."""
    path = folder / CACHE_FILE
    for stale in (path, path.with_name(path.name + ".json")):
        stale.unlink(missing_ok=True)


def _kept(folder: Path, key: Mapping[str, Any]) -> Calibrated | None:
    cost = read_stage(folder, "calibrate", key)
    if cost is None:
        _forget(folder)
        return None
    try:
        histograms = load_histograms(folder / HISTOGRAM_FILE)
        if key["tensors"] == hash_json([]):
            return Calibrated(CalibrationTable({}, provenance=key), histograms, **cost)
        table = load_table(folder / CACHE_FILE)
    except (CacheError, OSError, ValueError, KeyError) as error:
        log.warning("the kept calibration cannot be used (%s): calibrating again", error)
        return None
    if dict(table.provenance) != dict(key):
        log.info("calibrate: not reused, %s is of another calibration", CACHE_FILE)
        return None
    return Calibrated(table, histograms, **cost)


def _cost(found: Calibrated) -> dict[str, Any]:
    return {
        "pictures": found.pictures,
        "passes": found.passes,
        "seconds": found.seconds,
        "inference_seconds": found.inference_seconds,
        "search_seconds": found.search_seconds,
    }


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
