"""One pass over the data, against histograms of the same tensors computed the plain way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.calibrate.collect import Collection, collect
from trtune.calibrate.cpu.taps import tap
from trtune.calibrate.extents import measure
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.sessions import with_outputs
from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch

MODELS = [
    *("conv_relu", "depthwise", "residual", "concat", "silu_se", "mlp", "attention"),
    *("two_inputs", "int64_input", "two_outputs", "branches", "resize"),
]


@dataclass(frozen=True)
class Rows:
    """Samples held in memory, `size` at a time. A `BatchSource`."""

    feeds: dict[str, NDArray[Any]]
    items: tuple[str, ...]
    size: int = 4
    identity: str = "rows"
    skipped: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.items), self.size):
            part = slice(start, start + self.size)
            yield Batch({n: a[part] for n, a in self.feeds.items()}, self.items[part])


def rows(model: onnx.ModelProto, count: int = 11, *, size: int = 4) -> Rows:
    feeds = tinymodels.feeds(model, batch=count, seed=3)
    return Rows(feeds, tuple(f"picture {i:02}" for i in range(count)), size)


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """Inner tensors that are float, in graph order."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    kinds = {i.name: i.type.tensor_type.elem_type for i in inferred.graph.value_info}
    made = [name for node in inferred.graph.node for name in node.output]
    return [name for name in made if kinds.get(name) == onnx.TensorProto.FLOAT]


def values(model: onnx.ModelProto, tensors: list[str], feeds: dict[str, Any]) -> dict[str, Any]:
    """The tensors of one batch, from a session with all of them marked."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        with_outputs(model, tensors), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(tensors, session.run(tensors, feeds), strict=True))


def same(a: Collection, b: Collection) -> bool:
    return list(a.histograms) == list(b.histograms) and all(
        np.array_equal(h.counts, b.histograms[t].counts)
        and np.array_equal(h.pictures.counts, b.histograms[t].pictures.counts)
        and (h.maximum, h.pictures.item) == (b.histograms[t].maximum, b.histograms[t].pictures.item)
        for t, h in a.histograms.items()
    )


@pytest.mark.parametrize("name", MODELS)
def test_maxima_and_totals_are_those_of_the_tensors_computed_plainly(name: str) -> None:
    model = tinymodels.MODELS[name]()
    whole = name == "branches"  # sums over the batch, so that every batch size is another result
    source, tensors = rows(model, size=11 if whole else 4), float_tensors(model)
    found = collect(model, tensors, source)
    assert found.pictures == 11
    assert list(found.histograms) == tensors
    plain = values(model, tensors, source.feeds)
    for tensor, histogram in found.histograms.items():
        if plain[tensor].shape[:1] == (11,):  # else a constant, which every batch gives again
            assert histogram.total == plain[tensor].size, tensor
        np.testing.assert_allclose(histogram.maximum, np.abs(plain[tensor]).max(), rtol=1e-4)


@pytest.mark.parametrize("memory", [1 << 30, 40_000])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_beside_changes_not_a_bit_of_the_others(name: str, memory: int) -> None:
    model = tinymodels.MODELS[name]()
    source, tensors = rows(model), float_tensors(model)
    some, others = tensors[::2], tensors[1::2]
    alone = collect(model, some, source, memory=memory)
    both = collect(model, some, source, beside=others, memory=memory)
    assert list(both.histograms) == [*some, *others]
    kept = {tensor: both.histograms[tensor] for tensor in some}
    assert same(alone, replace(both, histograms=kept))
    plain = collect(model, others, source, memory=memory)
    for tensor in others:
        assert both.histograms[tensor].maximum == pytest.approx(
            plain.histograms[tensor].maximum, rel=1e-4
        )


def test_the_histogram_is_that_of_the_values_seen() -> None:
    model = tinymodels.conv_relu()
    source = rows(model, 6, size=6)
    (name,) = source.feeds
    found = collect(model, [name], source).histograms[name]
    expected = Histogram.of(*source.feeds[name])
    assert np.array_equal(found.counts, expected.counts)
    assert found.maximum == expected.maximum
    assert found.pictures.item == f"picture {int(expected.pictures.item):02}"


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(range(11)))
def test_the_order_of_the_pictures_changes_nothing(order: list[int]) -> None:
    model = tinymodels.depthwise()
    tensors, source = float_tensors(model), rows(model)
    shuffled = Rows(
        {n: a[order] for n, a in source.feeds.items()}, tuple(source.items[i] for i in order)
    )
    assert same(collect(model, tensors, source), collect(model, tensors, shuffled))


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_the_batch_size_moves_no_maximum_by_more_than_float_noise(size: int) -> None:
    model = tinymodels.silu_se()
    tensors = float_tensors(model)
    usual = collect(model, tensors, rows(model, size=4))
    other = collect(model, tensors, rows(model, size=size))
    for tensor in tensors:
        assert other.histograms[tensor].maximum == pytest.approx(
            usual.histograms[tensor].maximum, rel=1e-3
        )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    model = tinymodels.residual()
    tensors, source = float_tensors(model), rows(model)
    assert same(collect(model, tensors, source, workers=workers), collect(model, tensors, source))


def test_little_memory_means_more_passes_and_the_same_result() -> None:
    model = tinymodels.concat()
    tensors, source = float_tensors(model), rows(model)
    roomy, tight = collect(model, tensors, source), collect(model, tensors, source, memory=1)
    assert roomy.passes == 1
    assert tight.passes == len(tensors)
    for tensor in tensors:
        assert tight.histograms[tensor].total == roomy.histograms[tensor].total
        assert tight.histograms[tensor].maximum == pytest.approx(
            roomy.histograms[tensor].maximum, rel=1e-4
        )


@pytest.mark.parametrize(("batch", "kept"), [(1, 11), (4, 8)])
def test_a_fixed_batch_is_kept(batch: int, kept: int) -> None:
    model = tinymodels.conv_relu()
    source = rows(model, kept, size=batch)
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = batch
    found = collect(model, float_tensors(model), source)
    assert found.pictures == kept


def test_pictures_along_another_axis_are_found() -> None:
    model = tinymodels.conv_relu()
    (name,) = (i.name for i in model.graph.input)
    model.graph.node.append(
        onnx.helper.make_node("Transpose", [name], ["turned"], name="turn", perm=[1, 0, 2, 3])
    )
    source = rows(model, 5, size=5)
    assert measure(model, ["turned"], next(iter(source)))["turned"].axis == 1
    found = collect(model, ["turned"], source).histograms["turned"]
    straight = collect(model, [name], source).histograms[name]
    assert np.array_equal(found.counts, straight.counts)
    assert found.pictures.item == straight.pictures.item


class TestWhatIsWrong:
    def test_empty_data(self) -> None:
        model = tinymodels.conv_relu()
        with pytest.raises(DataError, match="no picture was read"):
            collect(model, float_tensors(model), rows(model, 0))

    def test_picture_and_tensor_are_named(self) -> None:
        model = tinymodels.conv_relu()
        source = rows(model)
        (name,) = source.feeds
        source.feeds[name][7, 0, 0, 0] = np.nan
        with pytest.raises(ModelError, match=rf"{name}.*NaN.*picture 07"):
            collect(model, [name, *float_tensors(model)], source)

    def test_a_mask_of_infinities_is_no_range(self) -> None:
        net = tinymodels.Net()
        x = net.input("x", ("N", 4))
        hidden = net.const("hidden", [0.0, -np.inf, 0.0, 0.0])
        model = net.model({net.op("Add", x, hidden, out="masked"): ("N", 4)})
        source = Rows({"x": np.float32([[1, 9, -2, 0], [3, 8, 1, 1]])}, ("a", "b"), 2)
        assert collect(model, ["masked"], source).histograms["masked"].maximum == 3

    @pytest.mark.parametrize("everywhere", [True, False])
    def test_an_overflow_of_some_pictures_is_named(self, everywhere: bool) -> None:
        model = tinymodels.conv_relu()
        source = rows(model)
        (name,) = source.feeds
        source.feeds[name][slice(None) if everywhere else 7, 0, 0, 0] = np.inf
        if everywhere:
            assert np.isfinite(collect(model, [name], source).histograms[name].maximum)
        else:
            with pytest.raises(ModelError, match=rf"{name}.*infinity for picture 'picture 07'"):
                collect(model, [name], source)

    def test_an_interrupt_from_the_data_leaves_no_thread(self) -> None:
        class Interrupted(Rows):
            def __iter__(self) -> Iterator[Batch]:
                yield from list(super().__iter__())[:2]
                raise KeyboardInterrupt

        model = tinymodels.conv_relu()
        source = rows(model)
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            collect(model, float_tensors(model), Interrupted(source.feeds, source.items, 4))
        assert threading.active_count() == before

    def test_a_model_that_cannot_be_loaded(self) -> None:
        model = tinymodels.conv_relu()
        model.graph.node[0].op_type = "NoSuchOperator"
        with pytest.raises(ModelError, match="NoSuchOperator"):
            tap(model, [model.graph.node[0].output[0]])


@pytest.mark.parametrize("size", [2, 3, 11])
def test_the_sources_batch_size_changes_nothing(size: int) -> None:
    model = tinymodels.attention()
    tensors = float_tensors(model)
    usual = collect(model, tensors, rows(model, size=4))
    assert same(usual, collect(model, tensors, rows(model, size=size)))


def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tinymodels.silu_se()
    tensors, source = float_tensors(model), rows(model)
    usual = collect(model, tensors, source)
    monkeypatch.setattr("trtune.calibrate.cpu.taps.SEGMENT_BYTES", 1)
    for tensor, histogram in collect(model, tensors, source).histograms.items():
        # onnxruntime chooses its kernels anew for graphs that are cut at every tensor
        assert histogram.total == usual.histograms[tensor].total
        assert histogram.maximum == pytest.approx(usual.histograms[tensor].maximum, rel=1e-4)


def fixed(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """`model`, changed to take `batch` pictures at a time and no other number."""
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = batch
    return model


@pytest.mark.parametrize("size", [1, 4, 5, 32])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_filled_up_and_what_fills_it_is_not_counted(batch: int, size: int) -> None:
    free = tinymodels.conv_relu()
    tensors, source = float_tensors(free), rows(free, 11, size=size)
    expected = collect(free, tensors, source)
    found = collect(fixed(tinymodels.conv_relu(), batch), tensors, source)
    assert found.pictures == 11
    for tensor, histogram in found.histograms.items():
        assert histogram.total == expected.histograms[tensor].total
        assert histogram.pictures.pictures == 11
        assert histogram.pictures.item == expected.histograms[tensor].pictures.item


def test_tensors_in_which_pictures_are_mixed_count_as_one_picture_a_batch() -> None:
    model = tinymodels.conv_relu()
    (name,) = (i.name for i in model.graph.input)
    model.graph.node.append(
        onnx.helper.make_node("ReduceMax", [name], ["peak"], name="peak", keepdims=0)
    )
    source = rows(model, 11, size=4)
    found = collect(model, ["peak"], source).histograms["peak"]
    assert (found.total, found.pictures.pictures) == (3, 3)
    assert " to picture " in found.pictures.item


def test_half_precision_is_counted_as_float32() -> None:
    model = tinymodels.half_weights()
    source = rows(model)
    found = collect(model, ["half"], source).histograms["half"]
    expected = Histogram.of(*(a.astype(np.float16) for a in source.feeds["input"]))
    assert np.array_equal(found.counts, expected.counts)


def test_progress_ends_at_the_number_of_pictures() -> None:
    seen: list[tuple[str, int, int | None]] = []
    model = tinymodels.conv_relu()
    collect(model, float_tensors(model), rows(model, 40), progress=lambda *step: seen.append(step))
    assert seen[-1] == ("calibrate", 40, 40)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_without_tensors_the_pictures_are_counted() -> None:
    found = collect(tinymodels.conv_relu(), [], rows(tinymodels.conv_relu()))
    assert (found.pictures, dict(found.histograms)) == (11, {})


def test_an_input_beside_is_counted_as_it_is_fed() -> None:
    model = tinymodels.conv_relu()
    source = rows(model)
    (name,) = source.feeds
    found = collect(model, float_tensors(model)[:1], source, beside=[name]).histograms[name]
    assert found.maximum == np.abs(source.feeds[name]).max()
    assert found.total == source.feeds[name].size
    with pytest.raises(ValueError, match="inputs are known"):
        tap(model, [name])
