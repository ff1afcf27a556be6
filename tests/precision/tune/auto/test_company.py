"""Ranges tried while everything else is quantized."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import tinymodels
from tinyquant import case

from trtune.calibrate.table import CalibrationTable
from trtune.datasets.batches import Batch
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import place
from trtune.precision.runtime.session import make_session
from trtune.precision.tune.auto.company import Company
from trtune.precision.tune.auto.ranges import Choice
from trtune.precision.tune.judge import Judge, worst

MODELS = [tinymodels.conv_relu, tinymodels.depthwise, tinymodels.silu_se, tinymodels.concat]


def network(
    make: Callable[[], onnx.ModelProto], amax: float
) -> tuple[Company, Callable[[dict[str, float]], float], dict[str, float]]:
    """A company with one range a tensor, its error by plain means, and the ranges."""
    prepared = case(make())
    rng = np.random.default_rng(0)
    name = prepared.model.inputs[0].name
    values = rng.standard_normal((12, 3, 8, 8)).astype(np.float32)
    batches = [Batch({name: part}, tuple("abcdef")) for part in np.split(values, 2)]
    exact = make_session(prepared.model.proto)
    references = [exact.run(None, dict(batch.feeds)) for batch in batches]
    tensors = list(place(prepared.view, prepared.plan).activations)
    amaxes = dict.fromkeys(tensors, amax)
    table = CalibrationTable.from_amax(amaxes)
    ranges = {tensor: (tensor,) for tensor in tensors}
    company = Company(prepared.model, prepared.plan, table, ranges, batches, references)

    def plain(amaxes: dict[str, float]) -> float:
        proto = lower_emulate(prepared.model, prepared.plan, CalibrationTable.from_amax(amaxes))
        session, judge = make_session(proto), Judge(references)
        runs = [session.run(None, dict(batch.feeds)) for batch in batches]
        return worst([judge.errors(i, run) for i, run in enumerate(runs)])

    return company, plain, amaxes


@pytest.mark.parametrize("make", MODELS)
def test_any_table_is_worth_what_its_lowered_model_is(
    make: Callable[[], onnx.ModelProto],
) -> None:
    company, plain, amaxes = network(make, 3.0)
    changed = {name: 1.0 + k / 4 for k, name in enumerate(amaxes)}
    for table in (amaxes, changed):
        assert worst(company.errors(table)) == pytest.approx(plain(table), rel=1e-3)


@pytest.mark.parametrize("make", MODELS)
def test_the_same_network_on_other_pictures(make: Callable[[], onnx.ModelProto]) -> None:
    company, _, amaxes = network(make, 3.0)
    first, second = company._pictures
    exact = [company._judge._references[1]]
    other = company.on([second], exact)
    assert other.pictures == [len(second)]
    shared = Judge(exact).errors(0, other._run_whole(0, other._scales(amaxes)))
    np.testing.assert_allclose(other.errors(amaxes)[0], shared)
    assert company.pictures == [len(first), len(second)]
    assert len(company.errors(amaxes)) == 2


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("start", [1.0, 40.0])
def test_a_round_finds_better_ranges_and_knows_their_error(
    make: Callable[[], onnx.ModelProto], start: float
) -> None:
    company, plain, amaxes = network(make, start)
    choices = {name: Choice(amax, "max", 0.0) for name, amax in amaxes.items()}
    limits = dict.fromkeys(amaxes, (0.0, 100.0))
    found = company.round(choices, limits)
    after = {name: choice.amax for name, choice in found.items()}
    assert plain(after) < plain(amaxes)
    assert all(0.39 * start <= amax <= 2.61 * start for amax in after.values())
    changed = [name for name in after if after[name] != start]
    assert found[changed[-1]].error == pytest.approx(plain(after), rel=1e-3)
    for name in changed:
        assert found[name].method == "max"
        assert found[name].factor == pytest.approx(after[name] / start)


def test_limits_are_kept() -> None:
    company, _, amaxes = network(tinymodels.conv_relu, 40.0)
    choices = {name: Choice(amax, "max", 0.0) for name, amax in amaxes.items()}
    found = company.round(choices, dict.fromkeys(amaxes, (39.0, 41.0)))
    assert found == choices
