"""Counting on a GPU: what the host prepares everywhere, the kernel where there is a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.calibrate.collect import collect
from trtune.calibrate.cpu.counter import Counter
from trtune.calibrate.gpu.counter import count_on_gpu
from trtune.calibrate.gpu.layout import Counted, pieces
from trtune.calibrate.gpu.ranking import Ranking
from trtune.calibrate.histogram import Histogram
from trtune.calibrate.sessions import with_outputs
from trtune.configs.errors import ModelError
from trtune.datasets.batches import Batch


def why_no_gpu() -> str:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "onnxruntime-gpu is not installed"
    if importlib.util.find_spec("cuda.core") is None:
        return "cuda-python is not installed"
    driver = importlib.import_module("cuda.bindings.driver")
    status, *count = driver.cuDeviceGetCount() if not int(driver.cuInit(0)[0]) else (1, 0)
    return "" if not int(status) and count[0] else "no CUDA device"


@pytest.mark.parametrize(
    ("shape", "axis", "held", "expected"),
    [
        pytest.param((4, 3, 2), 0, 4, (24, 6, 4), id="pictures first"),
        pytest.param((8, 3), 0, 4, (24, 6, 4), id="two rows a picture"),
        pytest.param((7, 4, 5), 1, 4, (140, 5, 4), id="time first"),
        pytest.param((7, 5), None, 4, (35, 35, 1), id="mixed"),
        pytest.param((4,), 0, 4, (4, 1, 4), id="a number a picture"),
    ],
)
def test_which_values_are_whose(
    shape: tuple[int, ...], axis: int | None, held: int, expected: tuple[int, ...]
) -> None:
    found = Counted.of(shape, axis, held, 0)
    assert (found.size, found.inner, found.pictures) == expected


@given(st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 300_000)), max_size=4))
def test_pieces_cover_every_value_once(sizes: list[tuple[int, int]]) -> None:
    tensors = [Counted(size - size % inner, inner, 3, 0) for size, inner in sizes]
    for number, tensor in enumerate(tensors):
        mine = pieces(tensors)
        mine = mine[mine["tensor"] == number]
        ends = mine["start"] + mine["length"]
        assert [0, *ends.tolist()] == [*mine["start"].tolist(), tensor.size]


LARGEST = st.lists(st.sampled_from([0.0, 1.5, 2.0, 7.0]), min_size=2, max_size=2)
PICTURES = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=3), LARGEST),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[0],
)


@settings(deadline=None)
@given(PICTURES, st.integers(1, 5))
def test_maxima_rank_as_a_counter_ranks_them(
    rows: list[tuple[str, list[float]]], size: int
) -> None:
    ranking, counters = Ranking(2), [Counter(), Counter()]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        values = np.float32([row for _, row in part]).T.copy()
        ranking.add([name for name, _ in part], np.arange(2), values.view(np.uint32))
        for counter, row in zip(counters, values, strict=True):
            counter.add([name for name, _ in part], row.reshape(-1, 1))
    for number, counter in enumerate(counters):
        maximum, pictures = ranking.maxima(number)
        expected = counter.histogram()
        assert maximum == expected.maximum
        assert (pictures.item, pictures.runner_up) == (
            expected.pictures.item,
            expected.pictures.runner_up,
        )
        assert np.array_equal(pictures.counts, expected.pictures.counts)


def assert_same(found: Histogram, expected: Histogram) -> None:
    assert np.array_equal(found.counts, expected.counts)
    assert found.maximum == expected.maximum
    assert np.array_equal(found.pictures.counts, expected.pictures.counts)
    assert (found.pictures.item, found.pictures.runner_up) == (
        expected.pictures.item,
        expected.pictures.runner_up,
    )


def identity(dims: tinymodels.Dims, dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    net = tinymodels.Net()
    x = net.input("x", dims, dtype)
    doubled = net.op("Add", x, x, out="y")
    info = onnx.helper.make_tensor_value_info(doubled, dtype, dims)
    graph = onnx.helper.make_graph(net.nodes, "g", net.inputs, [info], net.initializers)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )


def plain(values: NDArray[Any], axis: int, names: tuple[str, ...]) -> Histogram:
    counter = Counter()
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    with np.errstate(over="ignore"):
        counter.add(names, np.ascontiguousarray(rows, np.float32)[: len(names)])
    return counter.histogram()


@dataclass(frozen=True)
class Rows:
    """Samples of one input held in memory, seven at a time. A `BatchSource`."""

    name: str
    values: NDArray[Any]
    identity: str = "rows"
    skipped: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, 7):
            part = self.values[start : start + 7]
            items = tuple(f"{start + i:03d}" for i in range(len(part)))
            yield Batch({self.name: part}, items)


@pytest.mark.gpu
@pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu())
class TestOnTheDevice:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
    @pytest.mark.parametrize(
        ("shape", "axis"),
        [
            *(((5, 3, 7, 9), 0), ((3, 5, 70_001), 1), ((5, 1), 0), ((5, 300_000), 0)),
            *(((11, 5, 3), 1), ((2, 5, 16_385), 1)),
        ],
    )
    def test_counts_are_those_of_the_host_bit_for_bit(
        self, shape: tuple[int, ...], axis: int, dtype: str
    ) -> None:
        rng = np.random.default_rng(len(shape) + axis)
        scale = np.float64(10) ** rng.uniform(-30, 4, shape)
        values = (rng.standard_normal(shape) * scale).astype(dtype)
        values[rng.random(shape) < 0.3] = 0
        values[rng.random(shape) < 0.01] = np.inf
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model = identity([None] * len(shape), kind)
        names = tuple("edcba"[: shape[axis] - 1])  # the last picture only fills up the batch
        batches = [({"x": values}, names, shape[axis])] * 3
        found, _ = count_on_gpu(model, [{"x": axis, "y": axis}], batches, 0, counted=lambda _: None)
        with np.errstate(over="ignore"):
            doubled = values + values
        for tensor, array in (("x", values), ("y", doubled)):
            counter = plain(array, axis, names)
            assert np.array_equal(found[tensor].counts, 3 * counter.counts)
            assert found[tensor].maximum == counter.maximum
            assert found[tensor].pictures.item == counter.pictures.item

    def test_nan_is_named(self) -> None:
        values = np.ones((4, 30), np.float32)
        values[2, 7] = np.nan
        batches = [({"x": values}, ("a", "b", "c", "d"), 4)]
        with pytest.raises(ModelError, match="'x' holds NaN for picture 'c'"):
            count_on_gpu(identity(["N", 30]), [{"x": 0}], batches, 0, counted=lambda _: None)

    @pytest.mark.parametrize("name", ["conv_relu", "residual", "attention", "two_inputs", "resize"])
    def test_a_network_is_counted_as_its_activations_are(self, name: str) -> None:
        model = tinymodels.MODELS[name]()
        tensors = [t for node in model.graph.node for t in node.output if t]
        infos = onnx.shape_inference.infer_shapes(model).graph.value_info
        floats = {i.name for i in infos if i.type.tensor_type.elem_type == 1}
        tensors = [t for t in tensors if t in floats]
        feeds = tinymodels.feeds(model, batch=6)
        session = ort.InferenceSession(
            with_outputs(model, tensors),
            providers=[("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
        )
        names = tuple(f"p{i}" for i in range(6))
        found, _ = count_on_gpu(
            model, [dict.fromkeys(tensors, 0)], [(feeds, names, 6)] * 2, 0, counted=lambda _: None
        )
        for tensor, array in zip(tensors, session.run(tensors, feeds), strict=True):
            assert found[tensor].maximum == pytest.approx(float(np.abs(array).max()), rel=1e-4)

    def test_what_is_beside_changes_nothing(self) -> None:
        model = tinymodels.residual()
        (feed,) = tinymodels.feeds(model, batch=50).items()
        tensors = [node.output[0] for node in model.graph.node]
        first, others = tensors[::2], tensors[1::2]
        alone = collect(model, first, Rows(*feed), device="cuda")
        both = collect(model, first, Rows(*feed), beside=others, device="cuda")
        assert (alone.passes, both.passes) == (1, 1)
        assert list(both.histograms) == [*first, *others]
        for tensor in first:
            assert np.array_equal(alone.histograms[tensor].counts, both.histograms[tensor].counts)

    def test_collect_gives_what_the_cpu_gives_within_the_runtimes_difference(self) -> None:
        model = tinymodels.residual()
        (feed,) = tinymodels.feeds(model, batch=50).items()
        source = Rows(*feed)
        tensors = [node.output[0] for node in model.graph.node]
        cpu = collect(model, tensors, source)
        gpu = collect(model, tensors, source, device="cuda")
        assert gpu.pictures == cpu.pictures == 50
        for tensor in tensors:
            mine, its = gpu.histograms[tensor], cpu.histograms[tensor]
            assert mine.total == its.total
            assert mine.maximum == pytest.approx(its.maximum, rel=1e-4)
