"""Comparing layers: the same numbers however the work is cut up; errors name the culprit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import Pictures, coarse, pictures
from numpy.typing import NDArray
from onnx import numpy_helper

from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch
from trtune.precision.compare.gate import fp32_gate
from trtune.precision.compare.layers import compare_layers
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import OrtEngine, make_session


def inner(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output]


def whole(
    reference: onnx.ModelProto, candidate: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]
) -> dict[str, ErrorSums]:
    """The oracle: every tensor of both models at once, in one batch."""
    values = []
    for model in (reference, candidate):
        with OrtEngine(make_session(model, outputs=inner(model))) as engine:
            values.append(engine.infer(feeds))
    return {name: ErrorSums().add(values[0][name], values[1][name]) for name in inner(reference)}


def assert_close(got: Mapping[str, ErrorSums], expected: Mapping[str, ErrorSums]) -> None:
    assert list(got) == list(expected)
    for name, sums in expected.items():
        assert got[name].count == sums.count
        assert got[name].sqnr_db == pytest.approx(sums.sqnr_db, abs=1e-2), name
        assert got[name].cosine == pytest.approx(sums.cosine, abs=1e-6), name
        assert got[name].relative_l2 == pytest.approx(sums.relative_l2, rel=1e-3), name
        assert got[name].max_abs == pytest.approx(sums.max_abs, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", ["conv_relu", "residual", "silu_se", "attention", "two_outputs"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_any_batch_size_gives_the_numbers_of_one_batch(name: str, size: int) -> None:
    model = tinymodels.MODELS[name]()
    candidate, source = coarse(model), pictures(model, size=size)
    got = compare_layers(model, candidate, inner(model), source, pictures=7)
    assert_close(got.errors, whole(model, candidate, source.feeds))
    assert (got.pictures, got.missing, got.chunks) == (7, (), 1)


@pytest.mark.parametrize("name", ["depthwise", "concat", "attention"])
def test_chunked_and_unchunked_give_the_same_numbers(name: str) -> None:
    model = tinymodels.MODELS[name]()
    candidate, source = coarse(model), pictures(model)
    got = compare_layers(model, candidate, inner(model), source, pictures=7, memory=1)
    assert got.chunks == len(inner(model))
    assert source.passes == got.chunks + 1
    assert_close(got.errors, whole(model, candidate, source.feeds))


def test_memory_bounds_both_copies_of_the_marked_tensors_of_a_batch() -> None:
    model = tinymodels.conv_relu()
    names = ["conv1", "relu1", "conv2", "relu2"]
    conv1, conv2 = 16 * 8 * 8 * 4, 32 * 4 * 4 * 4
    memory = 2 * 3 * (conv1 + conv1)
    got = compare_layers(
        model, coarse(model), names, pictures(model, size=3), pictures=6, memory=memory
    )
    assert conv2 + conv2 < conv1 + conv1
    assert got.chunks == 2
    assert list(got.errors) == names


def test_only_the_asked_number_of_pictures_counts_and_the_last_batch_is_cut() -> None:
    model = tinymodels.mlp()
    candidate, source = coarse(model), pictures(model, rows=10, size=4)
    got = compare_layers(model, candidate, inner(model), source, pictures=6)
    head = {name: array[:6] for name, array in source.feeds.items()}
    assert got.pictures == 6
    assert_close(got.errors, whole(model, candidate, head))


def test_a_layer_before_the_change_is_exact_and_one_behind_it_is_not() -> None:
    model = tinymodels.conv_relu()
    candidate = onnx.ModelProto()
    candidate.CopyFrom(model)
    (weight,) = (t for t in candidate.graph.initializer if t.name == "conv2_w")
    halved = numpy_helper.to_array(weight) * np.float32(0.5)
    weight.CopyFrom(numpy_helper.from_array(halved, "conv2_w"))
    (bias,) = (t for t in model.graph.initializer if t.name == "conv2_b")
    for proto in (model, candidate):
        (entry,) = (t for t in proto.graph.initializer if t.name == "conv2_b")
        entry.CopyFrom(numpy_helper.from_array(np.zeros(list(bias.dims), np.float32), "conv2_b"))
    got = compare_layers(model, candidate, ["relu1", "conv2"], pictures(model), pictures=7)
    assert got.errors["relu1"].sqnr_db == math.inf
    assert got.errors["conv2"].relative_l2 == pytest.approx(0.5, rel=1e-6)
    assert got.errors["conv2"].cosine == pytest.approx(1.0)
    assert [name for name, _ in got.ranked()] == ["conv2", "relu1"]


def test_a_fixed_batch_is_padded_and_the_padding_does_not_count() -> None:
    free = tinymodels.conv_relu()
    fixed = tinymodels.conv_relu()
    for info in (*fixed.graph.input, *fixed.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 4
    source = pictures(free, rows=6, size=4)
    got = compare_layers(fixed, coarse(fixed), inner(fixed), source, pictures=6)
    assert got.pictures == 6
    assert_close(got.errors, whole(free, coarse(free), source.feeds))


def test_tensors_the_candidate_lacks_or_holds_as_codes_are_listed_as_missing() -> None:
    model = tinymodels.conv_relu()
    candidate = onnx.ModelProto()
    candidate.CopyFrom(model)
    for node in candidate.graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = "renamed" if name == "relu1" else name
    (cast,) = (n for n in candidate.graph.node if n.output[0] == "relu2")
    cast.op_type = "Cast"
    cast.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.INT8))
    candidate.graph.node.insert(
        4, onnx.helper.make_node("Cast", ["relu2"], ["back"], name="back", to=1)
    )
    candidate.graph.node[5].input[0] = "back"
    got = compare_layers(
        model, candidate, ["conv1", "relu1", "relu2", "logits"], pictures(model), pictures=3
    )
    assert got.missing == ("relu1", "relu2")
    assert list(got.errors) == ["conv1", "logits"]
    none = compare_layers(model, candidate, ["relu1"], pictures(model), pictures=3)
    assert (none.missing, none.errors, none.chunks) == (("relu1",), {}, 0)


def test_a_tensor_the_reference_lacks_is_the_callers_mistake() -> None:
    model = tinymodels.conv_relu()
    other = tinymodels.residual()
    with pytest.raises(ValueError, match="no node makes tensor 'stem_relu'"):
        compare_layers(model, other, ["stem_relu"], pictures(model), pictures=3)


def test_a_tensor_of_another_shape_is_reported_with_both_shapes() -> None:
    model, other = tinymodels.conv_relu(), tinymodels.residual()
    with pytest.raises(ModelError, match=r"'relu1' has shape \[3, 16, 8, 8\].*\[3, 4, 8, 8\]"):
        compare_layers(model, _renamed(other), ["relu1"], pictures(model), pictures=3)


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    net = tinymodels.Net()
    net.op("Relu", net.conv(net.input("input"), "conv1", 3, 4), out="relu1")
    return net.model({"relu1": ("N", 4, 8, 8)})


@pytest.mark.parametrize(
    ("row", "value", "expected"),
    [
        pytest.param(4, math.nan, "picture 'p4' gives nan in tensor 'conv1'", id="NaN"),
        pytest.param(0, math.inf, "picture 'p0' gives (nan|inf|-inf) in tensor 'conv1'", id="Inf"),
    ],
)
def test_a_picture_that_breaks_the_reference_is_named_with_the_tensor(
    row: int, value: float, expected: str
) -> None:
    model = tinymodels.conv_relu()
    source = pictures(model)
    source.feeds["input"][row, :, 3, 3] = value
    with pytest.raises(ModelError, match=expected):
        compare_layers(model, model, ["conv1", "logits"], source, pictures=7)


def test_no_pictures_at_all_is_an_error() -> None:
    model = tinymodels.conv_relu()
    empty = Pictures({"input": np.zeros((0, 3, 8, 8), np.float32)}, 2)
    with pytest.raises(DataError, match="no samples"):
        compare_layers(model, model, ["conv1"], empty, pictures=3)
    with pytest.raises(DataError, match="no samples"):
        fp32_gate(model, model, empty)


@pytest.mark.parametrize(("known", "total"), [(True, 7 * 2), (False, None)])
def test_progress_counts_every_picture_of_every_pass(known: bool, total: int | None) -> None:
    model = tinymodels.mlp()
    source = Pictures(tinymodels.feeds(model, batch=7), 3, known=known)
    seen: list[tuple[int, int | None]] = []
    compare_layers(
        model, model, ["fc1", "fc2"], source, pictures=9, memory=1,
        progress=lambda what, done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(done, total) for done in (0, 3, 6, 7, 10, 13, 14)]


def test_interrupting_the_data_leaves_no_session_open() -> None:
    model = tinymodels.mlp()

    class Interrupted(Pictures):
        def __iter__(self) -> Iterator[Batch]:
            yield next(super().__iter__())
            raise KeyboardInterrupt

    source = Interrupted(tinymodels.feeds(model, batch=4), 2)
    with pytest.raises(KeyboardInterrupt):
        compare_layers(model, model, ["fc1"], source, pictures=4)
    assert compare_layers(model, model, ["fc1"], pictures(model), pictures=4).pictures == 4
