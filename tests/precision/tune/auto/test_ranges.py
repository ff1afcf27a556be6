"""Method `auto`: the range that hurts the output least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray
from tinymodels import Net
from tinyquant import Case, case, fake, numpy_outputs, set_weight, uneven

from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import CANDIDATES
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import Alone, Change, fake_quantize
from trtune.precision.plan.placement import place
from trtune.precision.tune.auto.ranges import (
    APART,
    WITNESSES,
    Choice,
    choose_by_output,
    distinct_candidates,
)
from trtune.precision.tune.judge import Judge, worst

Rows = NDArray[np.float32]

# The candidates


def test_candidates_are_largest_first_and_5_percent_apart() -> None:
    values = np.random.default_rng(0).standard_t(3, (8, 5000)).astype(np.float32)
    histogram = Histogram.of(*values)
    found = distinct_candidates(histogram)
    amaxes = list(found)
    assert found[histogram.maximum] == "max"
    assert amaxes[0] == histogram.maximum
    assert len(amaxes) > 3
    assert all(b < APART * a for a, b in itertools.pairwise(amaxes))
    assert set(found.values()) <= set(CANDIDATES)
    for amax, name in found.items():
        assert CANDIDATES[name](histogram) == amax


def test_candidates_that_agree_are_tried_once() -> None:
    found = distinct_candidates(Histogram.of(np.full(100, 2.0, np.float32)))
    assert list(found) == [2.0]


def test_candidates_of_zero_are_no_candidates() -> None:
    mostly = np.zeros(100_000, np.float32)
    mostly[0] = 3.0
    assert 0.0 not in distinct_candidates(Histogram.of(mostly))


# The choice


def linear(columns: Sequence[float]) -> onnx.ModelProto:
    """y = x @ w with 16 features; column i of x counts `columns[i]` times as much as the others."""
    net = Net()
    net.op("MatMul", net.input("x", ("N", 16)), net.weight("w", 16, 8), out="y")
    model = net.model({"y": ("N", 8)})
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[: len(columns)] *= np.float32(columns)[:, None]
    set_weight(model, "w", weight)
    return model


def choose(
    proto: onnx.ModelProto, pictures: Sequence[Rows], *, batch: int = 4, kind: type[Alone] = Alone
) -> tuple[dict[str, Choice], Case, Alone]:
    """`choose_by_output` for every quantized tensor, on `pictures` of a model with one input."""
    prepared = case(proto)
    name = prepared.model.inputs[0].name
    batches = []
    for start in range(0, len(pictures), batch):
        part = np.concatenate(pictures[start : start + batch])
        batches.append(Batch({name: part}, tuple(map(str, range(len(part))))))
    placement = place(prepared.view, prepared.plan)
    alone = kind(prepared.model, prepared.view, placement, batches)
    histograms = {
        tensor: Histogram.of(
            *(row for b in range(alone.batches) for row in alone.stored(b, tensor))
        )
        for tensor in placement.activations
    }
    readers = {tensor: {tensor: edges} for tensor, edges in placement.activations.items()}
    return choose_by_output(alone, histograms, readers), prepared, alone


def rows(count: int, *, seed: int = 0) -> list[Rows]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 16)).astype(np.float32) for _ in range(count)]


def test_a_harmless_outlier_is_clipped() -> None:
    pictures = rows(16)
    pictures[3][0, 0] = 1000.0  # a feature that the weights ignore
    found = choose(linear([0.0]), pictures)[0]["x"]
    largest = max(float(np.abs(p[0, 1:]).max()) for p in pictures)
    assert 0.5 * largest < found.amax < 2 * largest
    assert found.error < 1e-3


def test_an_outlier_that_decides_the_output_is_kept() -> None:
    pictures = rows(16)
    for picture in pictures:
        picture[0, 0] = 50.0
    found = choose(linear([1.0]), pictures)[0]["x"]
    assert found.amax == 50.0  # the maximum, whichever methods give it


def test_the_error_is_that_of_the_plain_computation() -> None:
    pictures = rows(10)
    found, prepared, _ = choose(linear([1.0]), pictures)
    data = np.concatenate(pictures)
    exact = numpy_outputs(prepared.model.proto, {"x": data})["y"]
    scale = float(np.float32(found["x"].amax) / np.float32(127))
    test = numpy_outputs(prepared.model.proto, {"x": fake(data, scale)})["y"]
    energy = (exact**2).sum(axis=1)
    expected = (((exact - test) ** 2).sum(axis=1) / np.maximum(energy, energy.mean())).mean()
    assert found["x"].error == pytest.approx(expected, rel=1e-3)


def test_a_tensor_of_zeros_has_no_range() -> None:
    found = choose(linear([1.0]), [np.zeros((1, 16), np.float32)] * 4)[0]
    assert found == {"x": Choice(0.0, "max", 0.0)}


def test_a_tensor_too_small_for_a_scale_has_no_range() -> None:
    found = choose(linear([1.0]), [np.full((1, 16), 1e-44, np.float32)] * 4)[0]
    assert found == {"x": Choice(0.0, "max", 0.0)}


def test_a_tensor_that_reaches_no_output_keeps_its_maximum_or_any_other_range() -> None:
    net = Net()
    x = net.op("Relu", net.input("input"), out="x")
    net.conv(x, "dead", 3, 4)
    net.op("Tanh", x, out="y")
    rng = np.random.default_rng(0)
    pictures = [rng.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(4)]
    found = choose(net.model({"y": ("N", 3, 8, 8)}), pictures)[0]["x"]
    assert found.error == 0
    assert found.amax > 0


def test_one_picture_is_enough() -> None:
    found = choose(linear([1.0]), rows(1))[0]["x"]
    assert found.amax > 0
    assert found.error > 0


def test_what_a_tenth_of_the_pictures_exceed_has_to_be_shown() -> None:
    """A feature that some calibration pictures have and none of those held out."""
    calibrated = rows(40)
    for picture in calibrated[:8]:
        picture[0, 0] = 20.0
    held = rows(16, seed=1)
    prepared = case(linear([0.0]))
    batches = [Batch({"x": np.concatenate(held)}, tuple(map(str, range(16))))]
    placement = place(prepared.view, prepared.plan)
    readers = {"x": dict(placement.activations)}
    alone = Alone(prepared.model, prepared.view, placement, batches)
    unseen = choose_by_output(alone, {"x": Histogram.of(*calibrated)}, readers)["x"]
    assert unseen.amax == pytest.approx(20, rel=0.01)
    for picture in held[:WITNESSES]:
        picture[0, 0] = 20.0
    batches = [Batch({"x": np.concatenate(held)}, tuple(map(str, range(16))))]
    alone = Alone(prepared.model, prepared.view, placement, batches)
    shown = choose_by_output(alone, {"x": Histogram.of(*calibrated)}, readers)["x"]
    assert shown.amax < 10  # the weights ignore that feature, and pictures with it show so


def test_names_say_how_far_from_a_method_a_range_is() -> None:
    pictures = rows(24)
    found = [choose(tinymodels.mlp(), pictures)[0] for _ in range(2)]
    assert found[0] == found[1]
    for choice in found[0].values():
        assert choice.method in CANDIDATES
        assert 0.05 < choice.factor < 20


def test_the_ranges_of_a_group_are_tried_together() -> None:
    """Two tensors with one range: the amax that suits both, not the one that suits either."""
    net = Net()
    a = net.op("Relu", net.input("a", ("N", 16)), out="ar")
    b = net.op("Relu", net.input("b", ("N", 16)), out="br")
    y = net.op("MatMul", a, net.weight("v", 16, 8), out="av")
    z = net.op("MatMul", b, net.weight("w", 16, 8), out="bw")
    net.op("Add", y, z, out="y")
    prepared = case(net.model({"y": ("N", 8)}))
    rng = np.random.default_rng(0)
    feeds = {"a": rng.standard_normal((8, 16)), "b": 20 * rng.standard_normal((8, 16))}
    batch = Batch({n: v.astype(np.float32) for n, v in feeds.items()}, tuple("abcdefgh"))
    placement = place(prepared.view, prepared.plan)
    alone = Alone(prepared.model, prepared.view, placement, [batch])
    both = Histogram.of(alone.stored(0, "ar"), alone.stored(0, "br"))
    readers = {"range": dict(placement.activations)}
    found = choose_by_output(alone, {"range": both}, readers)["range"]
    assert found.amax > 0.8 * alone.stored(0, "br").max()
    scale = float(np.float32(found.amax) / np.float32(127))
    test = numpy_outputs(
        prepared.model.proto,
        batch.feeds,
        edges=placement.activations,
        scales={"ar": scale, "br": scale},
    )
    judge = Judge([alone.reference(0)])
    expected = worst([judge.errors(0, [test["y"]])])
    assert found.error == pytest.approx(expected, rel=1e-2)


# Against trying everything


def natural_pictures(count: int, *, seed: int = 0) -> list[Rows]:
    """Pictures of different brightness whose values have tails."""
    rng = np.random.default_rng(seed)
    return [
        (np.exp(rng.normal(0, 0.3)) * rng.standard_t(6, (1, 3, 8, 8))).astype(np.float32)
        for _ in range(count)
    ]


def error_of(alone: Alone, tensor: str, run: Callable[..., list[Rows]], amax: float) -> float:
    scale = float(np.float32(amax) / np.float32(127))
    judge = Judge([alone.reference(b) for b in range(alone.batches)])
    found = []
    for number in range(alone.batches):
        changed: Mapping[str, Rows] = {tensor: fake_quantize(alone.stored(number, tensor), scale)}
        found.append(judge.errors(number, run(number, changed)))
    return worst(found)


def usual_of(alone: Alone, tensor: str) -> float:
    """What a tenth of the pictures exceed: below that an amax has to be shown."""
    values = [np.abs(alone.stored(b, tensor)) for b in range(alone.batches)]
    return float(np.quantile(np.concatenate([v.reshape(len(v), -1).max(1) for v in values]), 0.9))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        *(tinymodels.conv_relu, tinymodels.depthwise, tinymodels.silu_se),
        *(tinymodels.concat, tinymodels.residual),
    ],
)
def test_auto_is_near_to_trying_everything(make: Callable[[], onnx.ModelProto], seed: int) -> None:
    found, prepared, alone = choose(uneven(make(), spread=0.7), natural_pictures(24, seed=seed))
    placement = place(prepared.view, prepared.plan)
    ratios = []
    for tensor, choice in found.items():
        run = alone.session(Change(placement.activations[tensor]))
        largest = max(np.abs(alone.stored(b, tensor)).max() for b in range(alone.batches))
        grid = [float(amax) for amax in np.geomspace(largest / 64, largest, 40)]
        grid = [amax for amax in grid if amax >= usual_of(alone, tensor)]
        best = min(error_of(alone, tensor, run, amax) for amax in grid)
        assert error_of(alone, tensor, run, choice.amax) == pytest.approx(choice.error, rel=1e-3)
        ratios.append(choice.error / best)
    # The error is a jagged function of amax, and the steps are of 20 %.
    assert max(ratios) < 2
    assert np.exp(np.mean(np.log(ratios))) < 1.2


@pytest.mark.parametrize("batch", [1, 4, 24])
def test_no_candidate_would_have_been_better(batch: int) -> None:
    pictures = natural_pictures(23)
    found, prepared, alone = choose(uneven(tinymodels.silu_se(), spread=0.7), pictures, batch=batch)
    placement = place(prepared.view, prepared.plan)
    for tensor, choice in found.items():
        run = alone.session(Change(placement.activations[tensor]))
        values = [alone.stored(b, tensor) for b in range(alone.batches)]
        histogram = Histogram.of(*(row for value in values for row in value))
        usual = usual_of(alone, tensor)
        for amax in [a for a in distinct_candidates(histogram) if a >= usual]:
            assert choice.error <= error_of(alone, tensor, run, amax) * 1.05


@pytest.mark.parametrize("place_of_the_bright_one", [0, 11, 23])
def test_where_a_picture_stands_does_not_matter(place_of_the_bright_one: int) -> None:
    """A picture that is far brighter counts as much in the last batch as in the first."""
    pictures = natural_pictures(24)
    pictures.insert(place_of_the_bright_one, pictures.pop(7) * np.float32(8))
    found = choose(uneven(tinymodels.conv_relu(), spread=0.7), pictures, batch=1)[0]
    usual = natural_pictures(24)
    usual[7] = usual[7] * np.float32(8)
    expected = choose(uneven(tinymodels.conv_relu(), spread=0.7), usual, batch=1)[0]
    for tensor, choice in found.items():
        assert choice.amax == pytest.approx(expected[tensor].amax, rel=0.25)
        assert choice.error == pytest.approx(expected[tensor].error, rel=0.4)


class Counting(Alone):
    """Notes the batch of every run."""

    def __init__(self, *given: Any) -> None:
        self.runs: list[int] = []
        super().__init__(*given)

    def session(
        self, change: Change, *, int8: bool = False
    ) -> Callable[[int, Mapping[str, Rows]], list[Rows]]:
        run = super().session(change, int8=int8)

        def counted(batch: int, changed: Mapping[str, Rows]) -> list[Rows]:
            self.runs.append(batch)
            return run(batch, changed)

        return counted


def test_an_amax_is_given_up_at_the_batch_that_shows_it_to_be_worse() -> None:
    prepared = case(linear([1.0]))
    pictures = [rows(1)[0]] * 24  # the first half says all there is to know
    batches = [Batch({"x": picture}, ("p",)) for picture in pictures]
    placement = place(prepared.view, prepared.plan)
    alone = Counting(prepared.model, prepared.view, placement, batches)
    histogram = Histogram.of(*pictures)
    found = choose_by_output(alone, {"x": histogram}, {"x": dict(placement.activations)})
    tried = alone.runs.count(0)
    assert tried >= len(distinct_candidates(histogram))
    assert alone.runs.count(23) < tried
    assert len(alone.runs) < 24 * tried
    plain = choose(linear([1.0]), pictures, batch=24)[0]["x"]
    assert found["x"].amax == plain.amax
    assert found["x"].error == pytest.approx(plain.error, rel=1e-5)


@pytest.mark.parametrize("bright", [None, 3, 21])
@pytest.mark.parametrize("make", [tinymodels.conv_relu, tinymodels.silu_se, tinymodels.residual])
def test_what_is_given_up_would_not_have_been_chosen(
    make: Callable[[], onnx.ModelProto], bright: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same choices as where nothing is, in fewer runs."""
    pictures = natural_pictures(24, seed=5)
    if bright is not None:
        pictures[bright] = pictures[bright] * np.float32(8)
    proto = uneven(make(), spread=0.7)
    found, _, alone = choose(proto, pictures, kind=Counting)
    monkeypatch.setattr("trtune.precision.tune.auto.ranges.CERTAINLY", float("inf"))
    expected, _, every = choose(proto, pictures, kind=Counting)
    assert found == expected
    assert isinstance(alone, Counting)
    assert isinstance(every, Counting)
    assert len(alone.runs) <= len(every.runs)
