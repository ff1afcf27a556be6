"""The prepare stage: a model that computes the same and quantizes better, with its own table.

Kept are the factors and codes, from which the model is made again; `prepared.onnx` and
`prepared.cache` beside them belong together and are for whoever builds without this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtune.calibrate.cache import load_table, save_table
from trtune.calibrate.histogram import load_histograms, save_histograms
from trtune.configs.progress import Progress
from trtune.configs.schema import Calibration as Section
from trtune.precision.graph.file import save_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.prepare.affine import Affine
from trtune.precision.prepare.values import Codes, Prepared
from trtune.precision.tune.prepared import Ready, prepare_model
from trtune.precision.tune.preparing import Move, apply_moves, extended_plan
from trtune.precision.tune.scales import Calibrated
from trtune.run.data import RunData
from trtune.run.naming import PREPARED_CACHE, PREPARED_MODEL
from trtune.run.stage import Form, Kept, Stage, device_needs, versions
from trtune.run.stages.calibration import COSTS

if TYPE_CHECKING:
    from trtune.run.subject import Subject

ARRAYS, HISTOGRAMS = "prepared.npz", "prepared_histograms.npz"


def is_prepared(section: Section, subject: Subject, planned: PrecisionPlan) -> bool:
    """Whether there is anything to prepare: not where scales come from a cache or a QAT model, and
    of itself (`auto`) not where nothing is INT8."""
    given = subject.imported is not None or section.cache is not None
    if given or section.prepare == "none":
        return False
    # Factors of channels leave float8's relative error as it is, and it has no codes to round.
    return bool(planned.int8_nodes if section.prepare == "auto" else planned.quantized_nodes)


def preparation(
    subject: Subject,
    planned: PrecisionPlan,
    base: Calibrated,
    data: RunData,
    section: Section,
    *,
    lowerings: Iterable[str],
    leave: Iterable[str] = (),
    device: str = "cpu",
    float8: bool = False,
    progress: Progress,
) -> Stage[Ready]:
    """The model of `subject` with its channels moved and its codes rounded, where that helps.

    `base` is its calibration without. Pins do not decide: the prepared model serves any. Channels
    of the tensors in `leave` stay as they are.
    """
    moves = None if section.prepare == "auto" else list(section.prepare)
    lowerings, halves, left = tuple(lowerings), bool(planned.halves), sorted(leave)
    plan = make_plan(subject.view, default="int8")
    needs = {
        "model": subject.model,
        data.where: data.need,
        "scales": base.table,
        "calibration.prepare": section.prepare,
        "calibration.method": section.method,
        "calibration.percentile": section.percentile if section.method == "percentile" else None,
        "calibration.holdout": section.holdout,
        "halves": halves,
        "lowerings": sorted(lowerings),
        **({"float8": True} if float8 else {}),
        **({"left as they are": left} if left else {}),
        **versions("trtune", "onnx", "onnxruntime", "numpy", "numba"),
        **device_needs(device),
    }

    def make(folder: Path) -> Ready:
        return prepare_model(
            subject.model,
            subject.view,
            plan,
            data.source,
            base,
            moves=moves,
            leave=left,
            lowerings=lowerings,
            method=section.method,
            percentile=section.percentile,
            holdout=section.holdout,
            memory=section.memory,
            halves=halves,
            device=device,
            float8=float8,
            provenance=dict(base.table.provenance),
            progress=progress,
        )

    def read(value: Any, folder: Path) -> Ready:
        return _read(value, folder, subject, plan, base)

    return Stage("prepare", needs, make, Form(_write, read), version=4)


def _write(found: Ready, folder: Path) -> Kept:
    value: dict[str, Any] = {"tried": {n: list(t) for n, t in found.tried.items()}}
    if not found.prepared.codes and not found.moves:
        return value | {"kept": False}, ()
    arrays: dict[str, Any] = {}
    for number, move in enumerate(found.moves):
        arrays[f"scale{number}"] = move.affine.scale
    for number, codes in enumerate(found.prepared.codes.values()):
        arrays[f"codes{number}"] = codes.values
        if codes.bias is not None:
            arrays[f"bias{number}"] = codes.bias
    np.savez(folder / ARRAYS, **arrays)
    save_histograms(folder / HISTOGRAMS, found.calibrated.histograms)
    save_table(folder / PREPARED_CACHE, found.calibrated.table)
    model = found.model_for(found.plan)
    save_model(model.proto, folder / PREPARED_MODEL, external_dir=model.external_dir)
    moves = [
        {"tensor": m.affine.tensor, "edges": [list(e) for e in m.affine.edges], "amax": m.amax,
         "shift": m.affine.shift, "axis": m.affine.axis, "gain_db": m.gain_db}
        for m in found.moves
    ]  # fmt: skip
    value |= {
        "kept": True,
        "moves": moves,
        "codes": list(found.prepared.codes),
        "gain_db": found.prepared.gain_db,
        "costs": {name: getattr(found.calibrated, name) for name in COSTS},
    }
    return value, (ARRAYS, HISTOGRAMS, PREPARED_CACHE, f"{PREPARED_CACHE}.json", PREPARED_MODEL)


def _read(
    value: Any, folder: Path, subject: Subject, plan: PrecisionPlan, base: Calibrated
) -> Ready:
    tried = {name: (t[0], t[1], t[2]) for name, t in value["tried"].items()}
    if not value["kept"]:
        return Ready(Prepared(subject.model), plan, base, tried)
    with np.load(folder / ARRAYS) as arrays:
        moves = tuple(
            Move(
                Affine(m["tensor"], tuple((n, int(i)) for n, i in m["edges"]), arrays[f"scale{k}"],
                       m["shift"], m["axis"]),
                m["amax"],
                m["gain_db"],
            )
            for k, m in enumerate(value["moves"])
        )  # fmt: skip
        codes = {
            name: Codes(arrays[f"codes{k}"], arrays.get(f"bias{k}"))
            for k, name in enumerate(value["codes"])
        }
    model, moved = apply_moves(subject.model, moves)
    if moved:
        plan = extended_plan(plan, GraphView.of(model))
    table = load_table(folder / PREPARED_CACHE, allow_unkeyed=True)
    calibrated = Calibrated(table, load_histograms(folder / HISTOGRAMS), **value["costs"])
    return Ready(Prepared(model, codes, moved, value["gain_db"]), plan, calibrated, tried, moves)


def prepared_subject(subject: Subject, ready: Ready) -> Subject:
    """`subject` with the prepared model."""
    model = ready.prepared.model
    return (
        subject
        if model is subject.model
        else replace(subject, model=model, view=GraphView.of(model))
    )
