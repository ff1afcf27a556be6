"""From a model and pictures to the table: which tensors, which ranges, by which method."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray
from tinymodels import Net
from tinyquant import Rows, case, inner_values, named, outputs, set_weight

from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import AMAX_METHODS
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import DataError
from trtune.datasets.holdout import WholeBatches, Without, hold_out
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.implicit import implicit_tensors, left_in_float
from trtune.precision.plan.placement import place, without_zero_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.tune.auto.search import PLENTY
from trtune.precision.tune.scales import (
    Calibrated,
    calibrate_model,
    carried_tensors,
    seen_pictures,
    with_deploy,
)

METHODS = [*AMAX_METHODS, "auto"]


def pictures(
    proto: onnx.ModelProto,
    count: int,
    *,
    order: Sequence[int] | None = None,
    bright: float = 1.0,
    **options: Any,
) -> Rows:
    """`count` different pictures for the inputs of `proto`; one is `bright` times as bright."""
    free = onnx.ModelProto()
    free.CopyFrom(proto)
    for info in free.graph.input:
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    feeds = tinymodels.feeds(free, batch=count, seed=5)
    for array in feeds.values():
        if array.dtype == np.float32:
            array[count // 2] *= bright
    return Rows(feeds, range(count) if order is None else order, **options)


def calibrated(proto: onnx.ModelProto, source: Rows, **options: Any) -> Calibrated:
    model = model_from_proto(proto)
    view = GraphView.of(model)
    return calibrate_model(model, view, make_plan(view), source, **options)


def values_of(proto: onnx.ModelProto, tensor: str, source: Rows) -> NDArray[np.float32]:
    model = model_from_proto(proto)
    rows = list(source.order)
    feeds = {name: array[rows] for name, array in source.feeds.items()}
    return inner_values(model, [tensor], feeds)[tensor]


# The table


def test_max_is_the_largest_magnitude_of_each_tensor() -> None:
    proto = tinymodels.residual()
    source = pictures(proto, 20)
    found = calibrated(proto, source, method="max")
    assert list(found.table.scales) == ["input", "stem_relu", "relu1", "flat"]
    for tensor, scale in found.table.scales.items():
        amax = np.abs(values_of(proto, tensor, source)).max()
        assert scale == pytest.approx(amax / 127, rel=1e-4)
    assert dict(found.table.methods) == dict.fromkeys(found.table.scales, "max")
    assert found.pictures == 20
    assert found.passes == 1
    assert found.search_seconds == 0
    assert found.seconds >= found.inference_seconds > 0


@pytest.mark.parametrize("method", AMAX_METHODS)
def test_every_method_takes_its_amax_from_the_histogram(method: str) -> None:
    proto = tinymodels.conv_relu()
    source = pictures(proto, 20, bright=10)
    found = calibrated(proto, source, method=method)
    for tensor, histogram in found.histograms.items():
        expected = np.float32(AMAX_METHODS[method](histogram)) / np.float32(127)
        assert found.table.scales[tensor] == expected
        assert found.table.methods[tensor] == method
        assert histogram.total == values_of(proto, tensor, source).size
    data = source.feeds["input"]
    assert np.array_equal(found.histograms["input"].counts, Histogram.of(*data).counts)


def test_the_percentile_is_the_one_asked_for() -> None:
    proto = tinymodels.conv_relu()
    low, high = (
        calibrated(proto, pictures(proto, 20), method="percentile", percentile=p).table.scales
        for p in (60.0, 99.99)
    )
    assert all(low[tensor] < high[tensor] for tensor in low)


def test_an_unknown_method_is_a_bug() -> None:
    proto = tinymodels.conv_relu()
    with pytest.raises(ValueError, match="unknown method 'minmax'"):
        calibrated(proto, pictures(proto, 4), method="minmax")


def test_provenance_goes_into_the_table_and_progress_is_told() -> None:
    proto = tinymodels.conv_relu()
    steps: list[str] = []
    found = calibrated(
        proto,
        pictures(proto, 20),
        method="auto",
        provenance={"model": "m"},
        progress=lambda what, done, total: steps.append(what),
    )
    assert dict(found.table.provenance) == {"model": "m"}
    assert list(dict.fromkeys(steps)) == [
        *("read pictures", "calibrate", "run held-out pictures", "choose ranges"),
        *("compare methods", "ranges in company"),
    ]
    assert found.search_seconds > 0


def test_little_memory_means_more_passes_and_the_same_table() -> None:
    proto = tinymodels.residual()
    rich = calibrated(proto, pictures(proto, 12), method="entropy")
    poor = calibrated(proto, pictures(proto, 12), method="entropy", memory=6_000)
    assert rich.passes == 1
    assert poor.passes > 1
    for tensor, scale in rich.table.scales.items():
        assert poor.table.scales[tensor] == pytest.approx(scale, rel=1e-3)


# Which tensors and ranges


@pytest.mark.parametrize(
    ("lowerings", "expected"),
    [
        pytest.param(["emulate"], ["input", "squeeze_relu", "max", "flat"], id="emulate"),
        pytest.param(
            ["deploy"],
            ["input", "squeeze_relu", "left_relu", "right_relu", "max", "mix", "flat"],
            id="deploy",
        ),
        pytest.param(
            ["deploy", "emulate"],
            ["input", "squeeze_relu", "left_relu", "right_relu", "max", "mix", "flat"],
            id="both",
        ),
        pytest.param([], ["input", "squeeze_relu", "max", "flat"], id="none named"),
    ],
)
def test_carried_tensors(lowerings: list[str], expected: list[str]) -> None:
    prepared = named("concat")
    assert carried_tensors(prepared.view, prepared.plan, lowerings) == expected
    assert carried_tensors(prepared.view, prepared.plan, iter(lowerings)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_tensors_with_one_range_have_one_scale(method: str) -> None:
    proto = tinymodels.concat()
    found = calibrated(proto, pictures(proto, 20), method=method, lowerings=["deploy"])
    scales = found.table.scales
    assert scales["left_relu"] == scales["right_relu"] == scales["max"]
    methods = found.table.methods
    assert methods["left_relu"] == methods["right_relu"] == methods["max"]
    assert list(found.histograms) == ["input", "squeeze_relu", "max", "mix", "flat"]
    assert set(scales) == {*found.histograms, "left_relu", "right_relu"}


def test_the_range_is_that_of_the_output() -> None:
    proto = tinymodels.concat()
    source = pictures(proto, 20)
    found = calibrated(proto, source, method="max", lowerings=["deploy"])
    pooled = np.abs(values_of(proto, "max", source)).max()
    parts = [np.abs(values_of(proto, t, source)).max() for t in ("left_relu", "right_relu")]
    assert min(parts) < 0.99 * pooled
    for tensor in ("left_relu", "right_relu", "max"):
        assert found.table.amax(tensor) == pytest.approx(pooled, rel=1e-4)


def test_with_deploy_adds_what_only_deploy_quantizes_for_all_readers() -> None:
    prepared = named("silu_se")
    tensors = carried_tensors(prepared.view, prepared.plan, ["deploy"])
    found = with_deploy(prepared.view, prepared.plan, tensors).activations
    assert list(found) == tensors
    assert found["stem"] == (("n_stem_sig", 0), ("n_stem_silu", 0))
    assert found["stem_silu"] == (("n_dw", 0),)
    assert found["se_up"] == (("n_se_gate", 0),)


def test_with_deploy_leaves_out_what_subgraphs_read() -> None:
    prepared = named("branches")
    found = with_deploy(prepared.view, prepared.plan, ["conv"]).activations
    assert found == {"conv": (("n_relu", 0), ("n_total", 0))}


# The same table whatever the order


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["silu_se", "concat"])
def test_shuffled_pictures_give_the_same_table_bit_for_bit(name: str, method: str) -> None:
    proto = tinymodels.MODELS[name]()
    lowerings = ["emulate", "deploy"]
    first = calibrated(proto, pictures(proto, 24, bright=10), method=method, lowerings=lowerings)
    for seed in range(2):
        order = [int(row) for row in np.random.default_rng(seed).permutation(24)]
        source = pictures(proto, 24, order=order, bright=10)
        again = calibrated(proto, source, method=method, lowerings=lowerings)
        assert dict(again.table.scales) == dict(first.table.scales)
        assert again.table.methods == first.table.methods


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_hardly_matters(method: str) -> None:
    proto = tinymodels.residual()
    first = calibrated(proto, pictures(proto, 24, batch=24), method=method).table.scales
    for batch in (1, 5):
        scales = calibrated(proto, pictures(proto, 24, batch=batch), method=method).table.scales
        for tensor, scale in first.items():
            assert scales[tensor] == pytest.approx(scale, rel=1e-3)


# auto: what is held out


def test_auto_sees_the_held_out_pictures_only_when_it_chooses() -> None:
    proto = tinymodels.conv_relu()
    source = pictures(proto, 20)
    found = calibrated(proto, source, method="auto", holdout=3)
    held = {int(batch.items[0][1:]) for batch in hold_out(source, PLENTY * 3)}
    assert len(held) == 5  # a quarter, since so small a network may have more than asked for
    seen = [source.feeds["input"][row] for row in range(20) if row not in held]
    assert found.pictures == 15
    assert np.array_equal(found.histograms["input"].counts, Histogram.of(*seen).counts)


@pytest.mark.parametrize(
    ("count", "seen"),
    [
        pytest.param(1, 1, id="one picture has to do for both"),
        pytest.param(2, 1, id="two"),
        pytest.param(3, 2, id="three"),
        pytest.param(9, 7, id="a quarter of them"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["count known", "count unknown"])
def test_auto_on_very_few_pictures(count: int, seen: int, known: bool) -> None:
    proto = tinymodels.residual()
    found = calibrated(proto, pictures(proto, count, known=known), method="auto", holdout=24)
    assert found.pictures == seen
    assert all(scale > 0 for scale in found.table.scales.values())


def test_auto_with_nothing_to_quantize_reads_the_data_like_any_other() -> None:
    proto = tinymodels.nothing_quantizable()
    for method in METHODS:
        found = calibrated(proto, pictures(proto, 5), method=method)
        assert dict(found.table.scales) == {}
        assert found.histograms == {}
        assert found.search_seconds == 0


@pytest.mark.parametrize("name", ["attention", "mlp", "two_inputs", "int64_input", "resize"])
def test_auto_on_other_inputs_and_shapes(name: str) -> None:
    proto = tinymodels.MODELS[name]()
    source = pictures(proto, 12)
    model = model_from_proto(proto)
    plan = make_plan(GraphView.of(model))
    table = calibrated(proto, source, method="auto", lowerings=["deploy"]).table
    for lower in (lower_emulate, lower_deploy):
        found = outputs(lower(model, plan, table), source.feeds)
        for tensor, values in outputs(proto, source.feeds).items():
            assert sqnr_db(values, found[tensor]) > 20


def test_auto_is_better_than_max_where_one_picture_is_far_brighter() -> None:
    """The bright picture is drowned by a sigmoid, so that its range does not matter."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "conv", 3, 16), out="relu")
    x = net.op("Sigmoid", net.conv(x, "c", 16, 16), out="gate")
    proto = net.head(x, 16)
    source = pictures(proto, 32)
    source.feeds["input"][3] *= 200
    model = model_from_proto(proto)
    plan = make_plan(GraphView.of(model))
    usual = {"input": np.delete(source.feeds["input"], 3, axis=0)}
    exact = outputs(proto, usual)["logits"]
    found = {}
    for method in ("max", "auto"):
        table = calibrated(proto, source, method=method).table
        quantized = lower_emulate(model, plan, table)
        found[method] = sqnr_db(exact, outputs(quantized, usual)["logits"])
    assert found["auto"] > found["max"] + 6


# Models of fixed batch size


def fixed(size: int) -> onnx.ModelProto:
    model = tinymodels.conv_relu()
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = size
    return model


@pytest.mark.parametrize(
    ("method", "count", "seen", "left_out"),
    [
        pytest.param("max", 10, 8, 2, id="10 pictures: two batches of 4"),
        pytest.param("auto", 10, 8, 0, id="10 pictures, 2 of them held out"),
        pytest.param("auto", 8, 4, 2, id="8 pictures, 2 of them held out"),
        pytest.param("auto", 4, 4, 0, id="4 pictures: too few to hold one out"),
        pytest.param("max", 4, 4, 0, id="4 pictures: one batch"),
    ],
)
def test_a_fixed_batch_takes_whole_batches(
    method: str, count: int, seen: int, left_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    proto = fixed(4)
    source = pictures(proto, count, batch=4)
    with caplog.at_level(logging.WARNING):
        found = calibrated(proto, source, method=method)
    assert found.pictures == seen
    expected = f"the last {left_out} pictures are left out: the model takes 4 at a time"
    assert set(caplog.messages) == ({expected} if left_out else set())
    assert all(scale > 0 for scale in found.table.scales.values())


@pytest.mark.parametrize("method", ["max", "auto"])
def test_fewer_pictures_than_a_fixed_batch(method: str) -> None:
    with pytest.raises(DataError, match=r"takes 4 pictures at a time.*has fewer.*free batch"):
        calibrated(fixed(4), pictures(fixed(4), 3), method=method)


@pytest.mark.parametrize("method", ["max", "auto"])
def test_a_fixed_batch_of_one(method: str) -> None:
    proto = tinymodels.fixed_batch()
    found = calibrated(proto, pictures(proto, 9, batch=1), method=method)
    assert found.pictures == (7 if method == "auto" else 9)


@pytest.mark.parametrize("method", ["max", "auto"])
def test_no_pictures(method: str) -> None:
    proto = tinymodels.conv_relu()
    with pytest.raises(DataError, match="check path, take and skip"):
        calibrated(proto, pictures(proto, 8, order=[]), method=method)


def test_seen_pictures() -> None:
    source = pictures(tinymodels.conv_relu(), 8)
    held = hold_out(source, 2)
    assert seen_pictures(source, (), 1) is source
    some = seen_pictures(source, held, 1)
    assert isinstance(some, Without)
    assert some.count == 6
    whole = seen_pictures(source, held, 3)
    assert isinstance(whole, WholeBatches)
    assert [batch.items for batch in whole] != []
    assert seen_pictures(source, held, 7).count == 7  # 6 would be too few


# Tensors that are always zero


def zero_table(prepared: Any, *zeros: str) -> CalibrationTable:
    scales = {**prepared.table.scales, **dict.fromkeys(zeros, 0.0)}
    return CalibrationTable(scales)


@pytest.mark.parametrize(
    ("name", "zero", "float_nodes"),
    [
        pytest.param("conv_relu", "relu1", ["n_conv2"], id="its data input"),
        pytest.param("residual", "stem_relu", ["n_conv1"], id="one's data, another's skip input"),
        pytest.param("concat", "squeeze_relu", ["n_left", "n_right"], id="several readers"),
        pytest.param("residual", "conv2", [], id="what nothing reads quantized"),
    ],
)
def test_a_node_that_reads_nothing_but_zeros_stays_float(
    name: str, zero: str, float_nodes: list[str]
) -> None:
    prepared = named(name)
    plan = without_zero_ranges(prepared.view, prepared.plan, zero_table(prepared, zero))
    before = prepared.plan.int8_nodes
    assert list(plan.int8_nodes) == [node for node in before if node not in float_nodes]
    for node in float_nodes:
        assert plan.precision(node) == "fp32"
        assert (
            plan.nodes[node].reason == f"its input {zero!r} was zero in every calibration picture"
        )
    assert plan.pinned == ()
    assert zero not in place(prepared.view, plan).activations


def test_a_live_convolution_stays_int8_beside_a_skip_input_of_zeros() -> None:
    prepared = named("residual")
    plan = without_zero_ranges(prepared.view, prepared.plan, zero_table(prepared, "stem_relu"))
    assert plan.is_int8("n_conv2")
    assert plan.float_reads == (("n_sum", 1),)
    edges = [e for found in place(prepared.view, plan).activations.values() for e in found]
    assert ("n_sum", 1) not in edges
    assert ("n_conv2", 0) in edges
    again = PrecisionPlan.from_json(plan.to_json())
    assert again == plan
    assert place(prepared.view, again) == place(prepared.view, plan)
    assert plan.decisions != prepared.plan.decisions


@pytest.mark.parametrize("lower", [lower_emulate, lower_deploy])
def test_a_dead_skip_input_costs_no_pair_in_any_lowering(lower: Any) -> None:
    """A branch that gave only zeros in calibration passes unclipped if it wakes."""
    net = Net()
    x = net.input("x")
    live, dead = net.conv(x, "live", 3, 8), net.op("Relu", net.conv(x, "asleep", 3, 8), out="dead")
    net.op("Relu", net.op("Add", live, dead, out="sum"), out="y")
    proto = net.model({"y": ("N", 8, 8, 8)})
    prepared = case(proto)
    table = zero_table(prepared, "dead")
    plan = without_zero_ranges(prepared.view, prepared.plan, table)
    assert plan.int8_nodes == prepared.plan.int8_nodes
    feeds = tinymodels.feeds(proto, batch=2)
    exact, found = (
        outputs(model, feeds)["y"]
        for model in (prepared.model.proto, lower(prepared.model, plan, table))
    )
    assert np.abs(exact - found).max() < 0.1 * np.abs(exact).max()


def test_a_tensor_that_the_table_does_not_know_is_no_zero() -> None:
    prepared = named("conv_relu")
    table = CalibrationTable({"input": 1.0})
    assert without_zero_ranges(prepared.view, prepared.plan, table) == prepared.plan


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_relu_goes_through_everything(method: str) -> None:
    proto = tinymodels.residual()
    set_weight(proto, "conv1_b", np.full(16, -1e4))  # relu1 is zero in every picture
    model = model_from_proto(proto)
    view = GraphView.of(model)
    source = pictures(proto, 12)
    lowerings = ("emulate", "deploy")
    found = calibrate_model(
        model, view, make_plan(view), source, method=method, lowerings=lowerings
    )
    assert found.table.scale("relu1") == 0
    plan = without_zero_ranges(view, make_plan(view), found.table)
    assert plan.int8_nodes == ("n_stem", "n_conv1", "n_logits")
    for lower in (lower_emulate, lower_deploy):
        quantized = lower(model, plan, found.table)
        for integer in (False, True):
            logits = outputs(quantized, source.feeds, integer_kernels=integer)["logits"]
            if method in ("max", "auto"):
                assert sqnr_db(outputs(proto, source.feeds)["logits"], logits) > 15
            assert np.isfinite(logits).all()


class TestImplicit:
    """What TensorRT 10 alone asks for stands in the table too, and nothing else changes."""

    @pytest.mark.parametrize("name", ["conv_relu", "residual", "concat", "mlp", "attention"])
    @pytest.mark.parametrize("method", ["entropy", "max", "auto"])
    def test_the_cache_is_complete_and_the_others_keep_their_scales(
        self, name: str, method: str
    ) -> None:
        prepared = named(name)
        view, plan = GraphView.of(prepared.model), make_plan(GraphView.of(prepared.model))
        proto = prepared.model.proto
        options = {"method": method, "holdout": 2}
        plain = calibrated(proto, pictures(proto, 8), **options).table
        both = ("emulate", "implicit")
        whole = calibrated(proto, pictures(proto, 8), lowerings=both, **options).table
        assert {t: whole.scales[t] for t in plain.scales} == dict(plain.scales)
        assert {t: whole.methods[t] for t in plain.methods} == dict(plain.methods)
        wanted = implicit_tensors(view, plan)
        assert set(wanted) <= set(whole.scales)
        assert left_in_float(view, plan, whole.scales) == {}
        carried = replace(whole, scales={t: whole.scales[t] for t in plain.scales})
        one = lower_emulate(prepared.model, plan, carried).SerializeToString()
        assert lower_emulate(prepared.model, plan, whole).SerializeToString() == one
