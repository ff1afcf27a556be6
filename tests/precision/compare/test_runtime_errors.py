"""What the runtime adds to quantization; onnxruntime sessions play the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import Array, Shown, candidate_of, coarse, engine_of, inner, opens, rows
from tinyquant import Rows, named

from trtune.configs.errors import DataError, TrtuneError
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.compare.batches import batch_bytes
from trtune.precision.compare.by_node import compared_tensors, engine_errors
from trtune.precision.compare.layers import compare_layers
from trtune.precision.compare.runtime_errors import RuntimeErrors, runtime_errors
from trtune.precision.runtime.api import Engine
from trtune.precision.runtime.session import OrtEngine


def errors_between(
    reference: onnx.ModelProto, engine: onnx.ModelProto, source: Any, **options: Any
) -> RuntimeErrors:
    return runtime_errors(
        opens(reference), engine_of(engine), opens(engine), inner(reference), source,
        pictures=7, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["conv_relu", "residual", "silu_se", "attention", "two_outputs"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_numbers_are_those_of_comparing_the_two_models(name: str, size: int) -> None:
    proto = tinymodels.MODELS[name]()
    other, source = coarse(proto), rows(proto, size=size)
    got = errors_between(proto, other, source)
    expected = compare_layers(proto, other, inner(proto), source, pictures=7).errors
    assert set(got.errors) == set(expected) == set(inner(proto))
    assert (dict(got.missing), got.pictures) == ({}, 7)
    for tensor, sums in expected.items():
        assert got.errors[tensor].count == sums.count
        assert got.errors[tensor].relative_l2 == pytest.approx(sums.relative_l2, rel=1e-3, abs=1e-6)


def test_outputs_come_first_and_from_the_engine_that_is_used() -> None:
    proto = tinymodels.conv_relu()
    got = runtime_errors(
        opens(proto), engine_of(coarse(proto)), opens(proto), inner(proto), rows(proto), pictures=7
    )
    assert next(iter(got.errors)) == "logits"
    assert got.errors["logits"].noise > 0
    assert all(got.errors[name].relative_l2 < 1e-6 for name in inner(proto) if name != "logits")


@pytest.mark.parametrize("name", ["depthwise", "concat"])
def test_in_chunks_the_numbers_are_the_same(name: str) -> None:
    proto = tinymodels.MODELS[name]()
    whole = errors_between(proto, coarse(proto), rows(proto))
    alone = errors_between(proto, coarse(proto), rows(proto), memory=1)
    assert (whole.chunks, alone.chunks) == (1, len(inner(proto)) - 1)
    for tensor, sums in whole.errors.items():
        assert alone.errors[tensor].relative_l2 == pytest.approx(
            sums.relative_l2, rel=1e-3, abs=1e-6
        )


def test_memory_bounds_both_copies_of_a_batch() -> None:
    proto = tinymodels.conv_relu()
    names = ["conv1", "relu1", "conv2", "relu2"]
    conv1, conv2 = 16 * 8 * 8 * 4, 32 * 4 * 4 * 4
    sizes = batch_bytes(rows(proto, size=3), names, opens(proto))
    assert sizes == {"conv1": 3 * conv1, "relu1": 3 * conv1, "conv2": 3 * conv2, "relu2": 3 * conv2}
    asked: list[list[str]] = []

    def noted(tensors: Sequence[str]) -> OrtEngine:
        asked.append(list(tensors))
        return engine_of(proto, tensors)

    runtime_errors(
        opens(proto), engine_of(proto), noted, names, rows(proto, size=3), pictures=6,
        memory=2 * 3 * (conv1 + conv1),
    )  # fmt: skip
    assert asked == [["conv1", "relu1"], ["conv2", "relu2"]]


def test_one_engine_is_open_at_a_time() -> None:
    proto = tinymodels.conv_relu()
    open_now: list[str] = []

    @contextmanager
    def once(tensors: Sequence[str]) -> Iterator[Engine]:
        assert open_now == []
        open_now.append("inner")
        with engine_of(proto, tensors) as engine:
            yield engine
        open_now.pop()

    class Used(Shown):
        def __enter__(self) -> Used:
            assert open_now == []
            open_now.append("used")
            self.engine.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            open_now.pop()
            self.engine.__exit__(*error)

    used = Used(engine_of(proto), lambda name, array: array)
    got = runtime_errors(
        opens(proto), used, once, ["conv1", "conv2"], rows(proto), pictures=3, memory=1
    )
    assert (got.chunks, open_now) == (2, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda a: None, "inside a fused layer", id="not shown"),
        pytest.param(lambda a: a.astype(np.int8), "float32 in onnxruntime and int8", id="codes"),
        pytest.param(lambda a: a[..., :1], "[3, 16, 8, 1] in the engine", id="shape"),
    ],
)
def test_a_tensor_that_cannot_be_compared_is_missing_with_the_reason(
    change: Callable[[Array], Array | None], reason: str
) -> None:
    proto = tinymodels.conv_relu()

    def without(tensors: Sequence[str]) -> Shown:
        return Shown(engine_of(proto, tensors), lambda name, a: change(a) if name == "conv1" else a)

    got = runtime_errors(
        opens(proto), engine_of(proto), without, ["conv1", "conv2"], rows(proto), pictures=7
    )
    assert set(got.errors) == {"logits", "conv2"}
    assert list(got.missing) == ["conv1"]
    assert reason in got.missing["conv1"]


def test_a_half_is_compared_with_the_float_that_it_rounds() -> None:
    proto = tinymodels.conv_relu()

    def halves(tensors: Sequence[str]) -> Shown:
        return Shown(engine_of(proto, tensors), lambda name, a: a.astype(np.float16))

    got = runtime_errors(opens(proto), engine_of(proto), halves, ["conv1"], rows(proto), pictures=7)
    assert 60 < got.errors["conv1"].sqnr_db < 90


def test_nan_in_the_engine_is_a_result_and_in_onnxruntime_a_reason() -> None:
    proto = tinymodels.conv_relu()

    def broken(name: str, array: Array) -> Array:
        array[0] = np.nan
        return array

    def shows(tensors: Sequence[str]) -> Shown:
        return Shown(engine_of(proto, tensors), broken)

    tested = runtime_errors(
        opens(proto), engine_of(proto), shows, ["conv1"], rows(proto), pictures=7
    )
    assert tested.errors["conv1"].sqnr_db == -math.inf
    exact = runtime_errors(
        shows, engine_of(proto), opens(proto), ["conv1"], rows(proto), pictures=7
    )
    assert dict(exact.errors) == {}
    assert set(exact.missing) == {"logits", "conv1"}
    assert exact.missing["conv1"] == "it holds nan in the quantized model itself"


def test_a_chunk_whose_engine_cannot_be_built_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    proto = tinymodels.conv_relu()

    def fails(tensors: Sequence[str]) -> OrtEngine:
        if "conv1" in tensors:
            raise TrtuneError("no kernel for 'n_conv1'")
        return engine_of(proto, tensors)

    got = runtime_errors(
        opens(proto), engine_of(proto), fails, ["conv1", "conv2"], rows(proto), pictures=7, memory=1
    )
    assert set(got.errors) == {"logits", "conv2"}
    assert dict(got.missing) == {"conv1": "no kernel for 'n_conv1'"}
    assert "1 inner tensors are not compared: no kernel" in caplog.text


def test_pictures_that_an_engine_does_not_take_are_an_error() -> None:
    proto = tinymodels.conv_relu()

    class Narrow(Shown):
        def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            raise DataError("input 'input' has shape [3, 3, 8, 8], outside the engine's profile")

    def narrow(tensors: Sequence[str]) -> Narrow:
        return Narrow(engine_of(proto, tensors), lambda name, array: array)

    with pytest.raises(DataError, match="outside the engine's profile"):
        runtime_errors(opens(proto), engine_of(proto), narrow, ["conv1"], rows(proto), pictures=7)


def test_without_samples_nothing_is_compared() -> None:
    proto = tinymodels.conv_relu()
    with pytest.raises(DataError, match="no samples"):
        errors_between(proto, proto, rows(proto, 0))
    with pytest.raises(DataError, match="no samples"):
        runtime_errors(opens(proto), engine_of(proto), opens(proto), [], rows(proto, 0), pictures=7)


def test_a_fixed_batch_is_padded_and_the_padding_is_not_counted() -> None:
    proto = tinymodels.MODELS["fixed_batch"]()
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    feeds = {
        name: np.concatenate([array, array])[: fixed + 1]
        for name, array in tinymodels.feeds(proto, batch=fixed).items()
    }
    got = errors_between(proto, coarse(proto), Rows.of(feeds, batch=fixed))
    (size,) = (d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim[1:])
    assert got.errors[proto.graph.output[0].name].count == (fixed + 1) * size
    assert got.pictures == fixed + 1


def test_progress_counts_every_picture_of_every_pass() -> None:
    proto = tinymodels.mlp()
    seen: list[tuple[int, int | None]] = []
    errors_between(
        proto, proto, rows(proto, 7, size=4),
        progress=lambda what, done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(4, 14), (7, 14), (11, 14), (14, 14)]


@pytest.mark.parametrize("name", ["residual", "silu_se", "two_inputs"])
def test_errors_by_node_leave_nothing_behind(tmp_path: Path, name: str) -> None:
    prepared, backend = named(name), OnnxruntimeBackend("emulate")
    backend.build(candidate_of(prepared), tmp_path / "used")
    before = json.loads((tmp_path / "used" / "engine.json").read_text())
    found = engine_errors(
        candidate_of(prepared), prepared.view, backend, tmp_path / "used",
        rows(prepared.model.proto), scratch=tmp_path / "scratch", pictures=4, memory=1 << 20,
        progress=lambda what, done, of: None,
    )  # fmt: skip
    assert set(found) == set(compared_tensors(prepared.view).values())
    assert all(sums.relative_l2 < 1e-6 for sums in found.values())
    assert not (tmp_path / "scratch").exists()
    assert json.loads((tmp_path / "used" / "engine.json").read_text()) == before
