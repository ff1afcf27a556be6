"""A model prepared as its calibration pictures show that it quantizes best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tinymodels
from realdata import data_dir, needs_data
from tinyquant import Rows, outputs, uneven

from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView, Model, model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.tune.prepared import Ready, prepare_model
from trtune.precision.tune.scales import calibrate_model


def ready(model: Model, source: Any, **options: Any) -> Ready:
    view = GraphView.of(model)
    plan = make_plan(view)
    base = calibrate_model(model, view, plan, source)
    return prepare_model(model, view, plan, source, base, **options)


def quantized_db(found: Ready, model: Model, feeds: dict[str, Any]) -> float:
    """The first output of what `found` lowers to, against the model it was made from."""
    proto = lower_emulate(found.model_for(found.plan), found.plan, found.calibrated.table)
    exact, test = outputs(model.proto, feeds), outputs(proto, feeds)
    name = model.outputs[0].name
    return sqnr_db(exact[name], test[name])


@pytest.mark.parametrize("make", [tinymodels.conv_relu, tinymodels.depthwise, tinymodels.silu_se])
@pytest.mark.parametrize("moves", [None, ["scale", "shift"], ["round"], ["round", "bias"], []])
def test_the_prepared_model_is_the_same_in_fp32(make: Any, moves: list[str] | None) -> None:
    model = model_from_proto(uneven(make()))
    feeds = tinymodels.feeds(model.proto, batch=48, seed=3)
    found = ready(model, Rows(feeds, range(48)), moves=moves, holdout=6)
    exact, test = outputs(model.proto, feeds), outputs(found.prepared.model.proto, feeds)
    for name, value in exact.items():
        assert np.abs(test[name] - value).max() <= 1e-5 * np.abs(value).max()
    assert set(found.plan.nodes) == {n.name for n in GraphView.of(found.prepared.model).nodes}
    placed = place(GraphView.of(found.prepared.model), found.plan).activations
    assert set(placed) <= set(found.calibrated.table.scales)
    if moves is not None and "round" in moves:
        assert found.prepared.codes
    if moves == []:
        assert found.prepared.model is model
        assert not found.tried


def test_what_does_not_help_is_not_kept() -> None:
    model = model_from_proto(uneven(tinymodels.depthwise()))
    feeds = tinymodels.feeds(model.proto, batch=64, seed=3)
    found = ready(model, Rows(feeds, range(64)), holdout=8)
    none = found.tried["none"]
    best = min(error for error, _, _ in found.tried.values())
    kept = [name for name, (error, part, noise) in found.tried.items() if part > 0]
    if found.prepared.codes or found.prepared.moved:
        assert kept
        assert found.prepared.gain_db > 0
    else:
        assert found.prepared.gain_db == 0
    assert none[1:] == (0.0, 0.0)
    assert best <= none[0]


def test_moves_stand_with_ranges_of_company_and_of_one_method() -> None:
    model = model_from_proto(uneven(tinymodels.depthwise()))
    feeds = tinymodels.feeds(model.proto, batch=96, seed=5)
    found = ready(model, Rows(feeds, range(96)), moves=["scale"], holdout=8)
    assert list(found.tried)[:2] == ["none", "scale"]
    assert set(found.tried) <= {"none", "scale", "scale (mse)"}
    kept = max(list(found.tried)[1:], key=lambda name: found.tried[name][1])
    if kept == "scale (mse)":
        assert set(found.calibrated.table.methods.values()) == {"mse"}


def test_one_method_for_all_is_not_tried_beside_itself() -> None:
    model = model_from_proto(uneven(tinymodels.depthwise()))
    feeds = tinymodels.feeds(model.proto, batch=48, seed=5)
    view, source = GraphView.of(model), Rows(feeds, range(48))
    plan = make_plan(view)
    base = calibrate_model(model, view, plan, source, method="max")
    found = prepare_model(model, view, plan, source, base, method="max", moves=["scale"], holdout=6)
    assert set(found.tried) == {"none", "scale"}
    assert set(found.calibrated.table.methods.values()) == {"max"}


def cifar10(name: str, count: int) -> Any:
    mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2470, 0.2435, 0.2616])
    raw = np.load(data_dir() / name)["images"][:count].astype(np.float32) / 255
    return ((raw - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def gained_db(network: str, pictures: int, tested: int, **options: Any) -> float:
    """Decibels that a real network has more prepared than as it is, both from one calibration."""
    model = load_model(data_dir() / "models" / f"{network}.onnx")
    view = GraphView.of(model)
    plan = make_plan(view)
    source = Rows({"input": cifar10("cifar10_calib512.npz", pictures)}, range(pictures), batch=32)
    base = calibrate_model(model, view, plan, source)
    found = prepare_model(model, view, plan, source, base, **options)
    feeds = {"input": cifar10("cifar10_test2000.npz", tested)}
    exact = outputs(model.proto, feeds)["logits"]
    plain = outputs(lower_emulate(model, plan, base.table), feeds)["logits"]
    prepared = lower_emulate(found.model_for(found.plan), found.plan, found.calibrated.table)
    return sqnr_db(exact, outputs(prepared, feeds)["logits"]) - sqnr_db(exact, plain)


@needs_data
@pytest.mark.slow
def test_resnet_gains_though_its_pictures_hardly_tell() -> None:
    assert gained_db("resnet20_cifar10", 256, 300) > 0.3


@needs_data
@pytest.mark.slow
def test_a_vision_transformer_gains_decibels() -> None:
    assert gained_db("vit_cifar10", 64, 96, holdout=16) > 2
