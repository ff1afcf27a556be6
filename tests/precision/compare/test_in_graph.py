"""Error sums that the runtime takes itself: those of the host, and what is left to the host."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import coarse, pictures
from tinyquant import named

from trtune.configs.errors import ModelError
from trtune.precision.compare.in_graph import SumsInGraph, can_merge
from trtune.precision.compare.layers import LayerErrors, compare_layers
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.runtime.errors import ErrorSums

NAMES = ["conv_relu", "depthwise", "residual", "concat", "silu_se", "attention", "two_outputs"]


def inner(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output]


def assert_same(found: LayerErrors, expected: LayerErrors) -> None:
    assert (found.pictures, found.missing) == (expected.pictures, expected.missing)
    assert list(found.errors) == list(expected.errors)
    for name, sums in expected.errors.items():
        own = found.errors[name]
        assert own.count == sums.count
        for word in ("signal", "energy", "dot", "noise", "relative", "max_abs"):
            close = pytest.approx(getattr(sums, word), rel=2e-4, abs=1e-6 * (1 + sums.signal))
            assert getattr(own, word) == close, (name, word)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_sums_are_those_of_the_host(name: str, size: int) -> None:
    model = tinymodels.MODELS[name]()
    assert can_merge(model, coarse(model))
    found, expected = (
        compare_layers(
            model, coarse(model), inner(model), pictures(model, size=size), pictures=6, in_graph=g
        )
        for g in (True, False)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_model_against_its_own_float_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = named(name)
    lowered = lower_emulate(prepared.model, prepared.plan, prepared.table)
    model, asked = prepared.model.proto, []
    of = SumsInGraph.of

    def counted(self: SumsInGraph, feeds: dict[str, np.ndarray]) -> dict[str, ErrorSums] | None:
        asked.append(of(self, feeds))
        return asked[-1]

    monkeypatch.setattr(SumsInGraph, "of", counted)
    found, expected = (
        compare_layers(model, lowered, inner(model), pictures(model), pictures=6, in_graph=g)
        for g in (True, False)
    )
    assert asked
    assert all(sums is not None for sums in asked)
    assert_same(found, expected)


def test_a_padded_batch_is_compared_on_the_host() -> None:
    free, fixed = tinymodels.conv_relu(), tinymodels.conv_relu()
    for info in (*fixed.graph.input, *fixed.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 4
    source = pictures(free, rows=6, size=4)
    found, expected = (
        compare_layers(fixed, coarse(fixed), inner(fixed), source, pictures=6, in_graph=g)
        for g in (True, False)
    )
    assert_same(found, expected)


def test_nan_and_other_shapes_have_the_words_of_the_host() -> None:
    model = tinymodels.conv_relu()
    source = pictures(model)
    source.feeds["input"][2] = np.nan
    with pytest.raises(ModelError, match="gives nan in tensor 'conv1'"):
        compare_layers(model, coarse(model), inner(model), source, pictures=7, in_graph=True)
    net = tinymodels.Net()
    net.op("Relu", net.conv(net.input("input"), "conv1", 3, 4), out="relu1")
    other = net.model({"relu1": ("N", 4, 8, 8)})
    with pytest.raises(ModelError, match=r"'relu1' has shape \[3, 16, 8, 8\].*\[3, 4, 8, 8\]"):
        compare_layers(model, other, ["relu1"], pictures(model), pictures=3, in_graph=True)


def test_an_infinity_in_the_candidate_is_counted() -> None:
    model = tinymodels.conv_relu()
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    (weight,) = (t for t in broken.graph.initializer if t.name == "conv1_w")
    huge = onnx.numpy_helper.to_array(weight) * np.float32(1e38)
    weight.CopyFrom(onnx.numpy_helper.from_array(huge, "conv1_w"))
    found, expected = (
        compare_layers(model, broken, ["conv1"], pictures(model), pictures=4, in_graph=g)
        for g in (True, False)
    )
    assert expected.errors["conv1"].not_finite
    assert found.errors["conv1"].not_finite == expected.errors["conv1"].not_finite


def test_other_versions_of_the_operators_do_not_merge() -> None:
    model, other = tinymodels.conv_relu(), tinymodels.conv_relu()
    assert can_merge(model, other)
    other.opset_import[0].version += 1
    assert not can_merge(model, other)
    assert not can_merge(tinymodels.MODELS["opset11"](), tinymodels.MODELS["opset11"]())
    branches = tinymodels.MODELS["branches"]()
    assert not can_merge(branches, branches)
