"""The gates: what FP32 has to be before anything is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from comparing import Array, Pictures, Shown, coarse, engine_of, pictures, rows
from onnx import TensorProto, numpy_helper
from tinyquant import Rows, case

from trtune.configs.errors import DataError, ModelError, TrtuneError
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.backends.trt.backend import Settings
from trtune.precision.compare.gate import (
    engine_gate,
    fp32_gate,
    gate_errors,
    gate_limits,
    model_gate,
)
from trtune.precision.graph.view import load_model
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import Candidate


def gate(reference: onnx.ModelProto, engine: Any, source: Any, **options: Any) -> Any:
    with engine_of(reference) as exact, engine as tested:
        return engine_gate(exact, tested, source, pictures=5, backend="tensorrt", **options)


@pytest.mark.parametrize("name", ["conv_relu", "residual", "attention", "two_outputs"])
def test_the_gate_lets_the_same_model_pass(name: str) -> None:
    proto = tinymodels.MODELS[name]()
    sums = gate(proto, engine_of(proto), rows(proto))
    assert list(sums) == [info.name for info in proto.graph.output]
    assert all(total.mean_relative <= 1e-6 for total in sums.values())


def test_the_gate_looks_at_the_pictures_asked_for_and_no_more() -> None:
    proto = tinymodels.mlp()
    (total,) = gate(proto, engine_of(proto), rows(proto, 7)).values()
    (size,) = (d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim[1:])
    assert total.count == 5 * size


def test_the_gate_stops_another_model_and_says_what_to_do() -> None:
    proto = tinymodels.conv_relu()
    with pytest.raises(TrtuneError) as caught:
        gate(proto, engine_of(coarse(proto)), rows(proto))
    text = str(caught.value)
    assert text.startswith("the FP32 engine of tensorrt is not the FP32 model: output 'logits'")
    for part in ("mean relative error of", "over 5 pictures", "`tf32`", "timing cache"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        pytest.param(lambda a: a * np.float32(1.0009), True, id="9e-4 passes"),
        pytest.param(lambda a: a * np.float32(1.0011), False, id="1.1e-3 does not"),
        pytest.param(np.zeros_like, False, id="nothing but zeros"),
        pytest.param(lambda a: np.full_like(a, np.nan), False, id="NaN"),
    ],
)  # fmt: skip
def test_where_the_gate_draws_the_line(change: Callable[[Array], Array], passes: bool) -> None:
    proto = tinymodels.mlp()

    def changed(name: str, array: Array) -> Array:
        return change(array).astype(np.float32)

    engine = Shown(engine_of(proto), changed)
    if passes:
        gate(proto, engine, rows(proto))
    else:
        with pytest.raises(TrtuneError, match="is not the FP32 model"):
            gate(proto, engine, rows(proto))


def test_elements_next_to_zero_may_differ_by_all_that_they_are() -> None:
    proto = tinymodels.mlp()
    tiny = np.float32(1e-12)

    def with_tiny(value: np.float32) -> Callable[[str, Array], Array]:
        def change(name: str, array: Array) -> Array:
            array[:, 0] = value
            return array

        return change

    reference = Shown(engine_of(proto), with_tiny(tiny))
    engine = Shown(engine_of(proto), with_tiny(np.float32(0)))
    with reference as exact, engine as tested:
        (total,) = engine_gate(exact, tested, rows(proto), pictures=5, backend="tensorrt").values()
    assert total.mean_relative > 0.01
    assert total.relative_l2 < 1e-9


@pytest.mark.parametrize(("tf32", "passes"), [(False, False), (True, True)])
def test_an_engine_that_may_use_tf32_is_held_to_less(tf32: bool, passes: bool) -> None:
    proto = tinymodels.mlp()
    engine = Shown(engine_of(proto), lambda name, array: array * np.float32(1.004))
    limit, noise = gate_limits(Settings(tf32=tf32).as_json())
    if passes:
        (total,) = gate(proto, engine, rows(proto), limit=limit, noise=noise).values()
        assert total.mean_relative == pytest.approx(0.004, rel=0.01)
    else:
        with pytest.raises(TrtuneError, match="leave `tf32` off"):
            gate(proto, engine, rows(proto), limit=limit, noise=noise)


def test_a_gate_without_pictures_is_none() -> None:
    proto = tinymodels.mlp()
    with pytest.raises(DataError, match="no samples to compare"):
        gate(proto, engine_of(proto), rows(proto, 0))


def test_nan_in_the_reference_names_the_picture() -> None:
    proto = tinymodels.mlp()
    feeds = {n: a.copy() for n, a in tinymodels.feeds(proto, batch=4).items()}
    next(iter(feeds.values()))[2] = np.nan
    with pytest.raises(ModelError, match="picture"):
        gate(proto, engine_of(proto), Rows.of(feeds, batch=2))


@pytest.mark.parametrize("default", ["fp32", "int8"])
def test_the_gate_of_a_backend_tells_fp32_from_int8(tmp_path: Path, default: str) -> None:
    prepared, backend = case(tinymodels.conv_relu()), OnnxruntimeBackend("emulate")
    plan = make_plan(prepared.view, default=default)
    backend.build(Candidate(prepared.model, plan, prepared.table), tmp_path)
    source = rows(prepared.model.proto)
    if default == "fp32":
        sums = gate_errors(prepared.model, backend, tmp_path, source, pictures=4)
        assert sums["logits"].mean_relative < 1e-5
        return
    with pytest.raises(TrtuneError, match="FP32 engine of onnxruntime/emulate is not the FP32"):
        gate_errors(prepared.model, backend, tmp_path, source, pictures=4)


@pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
def test_the_gate_passes_every_normalised_model(name: str, tmp_path: Path) -> None:
    proto = tinymodels.MODELS[name]()
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    model = load_model(path)
    feeds = tinymodels.feeds(proto, batch=4)
    sums = fp32_gate(path, model.proto, Pictures(feeds, 4), pictures=4)
    assert list(sums) == [spec.name for spec in model.outputs]
    assert all(total.mean_relative <= 1e-5 for total in sums.values())


def test_the_gate_stops_at_a_model_that_computes_something_else() -> None:
    model = tinymodels.conv_relu()
    with pytest.raises(ModelError, match=r"output 'logits' .* mean relative error \d.*1e-05"):
        fp32_gate(model, coarse(model), pictures(model))


def test_the_gate_accepts_what_its_limit_allows() -> None:
    model = tinymodels.conv_relu()
    sums = fp32_gate(model, coarse(model, step=1e-3), pictures(model), limit=1.0)
    assert 1e-5 < sums["logits"].mean_relative < 1.0


@pytest.mark.parametrize(("rest", "passes"), [(2e-9, True), (2e-3, False)])
def test_elements_of_an_output_next_to_zero_may_differ_in_the_model_too(
    rest: float, passes: bool
) -> None:
    def scaled(last: float) -> onnx.ModelProto:
        net = tinymodels.Net()
        factors = net.const("f", np.array([1, 1, last]).reshape(1, 3, 1, 1))
        return net.model({net.op("Mul", net.input("x"), factors, out="y"): tinymodels.PICTURE})

    model = scaled(rest / 2)
    if passes:
        (total,) = fp32_gate(model, scaled(rest), pictures(model)).values()
        assert total.mean_relative > 0.1
        return
    with pytest.raises(ModelError, match=r"relative L2 0\.000"):
        fp32_gate(model, scaled(rest), pictures(model))


def test_the_gate_names_the_picture_on_which_the_original_gives_nan() -> None:
    model = tinymodels.conv_relu()
    source = pictures(model)
    source.feeds["input"][5] = math.nan
    with pytest.raises(ModelError, match="picture 'p5' gives nan in tensor 'logits'"):
        fp32_gate(model, model, source)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_file_in_half_precision_is_held_to_what_that_explains(
    tmp_path: Path, wrong: bool, caplog: pytest.LogCaptureFixture
) -> None:
    proto = tinymodels.in_half(tinymodels.residual())
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx", widen=True)
    source = Pictures(tinymodels.feeds(proto, batch=4), 4)
    if not wrong:
        (total,) = model_gate(model, source).values()
        assert total.relative_l2 < 5e-3
        return
    onnx.save(tinymodels.in_half(tinymodels.residual(), TensorProto.BFLOAT16), tmp_path / "m.onnx")
    assert model_gate(model, source) == {}
    assert "cannot be compared" in caplog.text
    other = tinymodels.in_half(tinymodels.conv_relu())
    onnx.save(other, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"0\.1 is the most that float16 explains"):
        model_gate(model, source)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_file_that_onnxruntime_cannot_load_is_refused_with_its_words(
    where: str, tmp_path: Path
) -> None:
    model = tinymodels.conv_relu()
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    broken.graph.node[0].op_type = "Convolve"
    onnx.save(broken, tmp_path / "model.onnx")
    original = tmp_path / "model.onnx" if where == "file" else broken
    with pytest.raises(ModelError, match=r"cannot load .*Convolve"):
        fp32_gate(original, model, pictures(model))


def test_the_gate_fails_when_the_prepared_model_gives_nan() -> None:
    model = tinymodels.conv_relu()
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    for tensor in broken.graph.initializer:
        if tensor.name == "conv1_b":
            values = np.full(list(tensor.dims), math.inf, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ModelError, match="mean relative error inf"):
        fp32_gate(model, broken, pictures(model))
