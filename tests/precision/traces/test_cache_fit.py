"""Which caches belong to a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import realdata
import tinymodels

from trtune.calibrate.cache import Cache
from trtune.precision.graph.file import load_model, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.implicit import constant_scales, implicit_tensors
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan
from trtune.precision.traces.cache_fit import CacheFit, fit_of

HEAD = "TRT-101401-EntropyCalibration2"
NAMES = ("input", "conv1", "relu1", "conv2", "relu2", "pooled", "flat", "logits")


def fit(*changed: str, drop: tuple[str, ...] = (), **scales: float) -> CacheFit:
    """How a cache of conv_relu fits with entries added, dropped or given another scale."""
    view = GraphView.of(model_from_proto(tinymodels.conv_relu()))
    names = [name for name in (*NAMES, *changed) if name not in drop]
    own = {name: 0.01 + 0.001 * k for k, name in enumerate(names)} | scales
    return fit_of(view, list(place(view, make_plan(view)).activations), Cache(HEAD, own))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param((), id="as it is"),
        pytest.param(("ONNXTRT_Broadcast_95_output", "ONNXTRT_ShapeShuffle_6_output"), id="parser"),
        pytest.param(("(Unnamed Layer* 4) [Constant]_output",), id="unnamed layers"),
        pytest.param(("tmp_refittable_weight_0_output", "conv1_w_output"), id="constants"),
        pytest.param(("a typo",), id="one other entry"),
    ],
)
def test_caches_that_belong(changed: tuple[str, ...]) -> None:
    assert fit(*changed).belongs


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (fit("a", "b", drop=("relu1", "flat")), "2 of 3 tensors that need a scale have no entry"),
        (fit(*(f"t{k}" for k in range(9))), "9 of 17 entries name nothing in it"),
        (fit("conv1_w", "conv2_w"), "entries are for weights"),
        (fit(conv1=0.01, conv2=0.012), "2 of 2 convolutions have the same scale"),
    ],
)
def test_caches_that_do_not(found: CacheFit, reason: str) -> None:
    assert not found.belongs
    assert reason in str(found)


def test_equal_scales_say_nothing_where_all_are_equal() -> None:
    assert fit(**dict.fromkeys(NAMES, 0.02)).belongs


@realdata.needs_data
@pytest.mark.slow
def test_caches_of_the_shared_models_fit_them_and_no_other() -> None:
    models = sorted((realdata.data_dir() / "models").glob("*.onnx"))
    made = {path.stem: whole(path) for path in models if "_qat" not in path.stem}
    for name, (view, needed, _) in made.items():
        for other, (_, _, cache) in made.items():
            found = fit_of(view, needed, cache)
            assert found.belongs == (name == other), f"{other} for {name}: {found}"


def whole(path: Path) -> tuple[GraphView, list[str], Cache]:
    """View, needed tensors, and a cache with an entry for everything that TensorRT asks for."""
    view = GraphView.of(load_model(path))
    plan = make_plan(view)
    tensors = implicit_tensors(view, plan)
    scales = np.random.default_rng(0).uniform(0.001, 0.007, len(tensors))
    own = dict(zip(tensors, scales.tolist(), strict=True))
    return view, list(place(view, plan).activations), Cache(HEAD, own | constant_scales(view, plan))
