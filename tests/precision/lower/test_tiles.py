"""Weights for the matrix units of a CPU: which convolutions get them, and that no bit changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tinymodels import Net
from tinyquant import Array, Case, case, initializer, maker, op_counts, outputs

from trtune.configs.system.machine import has_matrix_units
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.proto import copy_model
from trtune.precision.graph.view import GraphView, Shape
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.lower.tiles import use_matrix_units
from trtune.precision.runtime.api import Candidate
from trtune.precision.runtime.session import optimized_graph

WHERE = "trtune.precision.backends.ort.backend.has_matrix_units"


def network(read: int, made: int, window: int = 1, size: int = 8, *, twice: bool = False) -> Case:
    """1 x 1 to `read` channels, the convolution `c` in question, and 1 x 1 behind it; `twice`: a
    second one reads the weights of `c`."""
    net = Net()
    x = net.input("input", ("N", 3, size, size))
    x = net.op("Relu", net.conv(x, "wide", 3, read, 1), out="x")
    y = net.op("Relu", net.conv(x, "c", read, made, window), out="y")
    if twice:
        again = net.op("Conv", x, "c_w", out="again", kernel_shape=[window] * 2)
        y = net.op("Add", net.op("Relu", again, out="z"), y, out="both")
    return case(net.head(net.op("Relu", net.conv(y, "last", made, 16, 1), out="l"), 16))


def lowered(prepared: Case) -> tuple[onnx.ModelProto, Mapping[str, Shape]]:
    found = lower_deploy(prepared.model, prepared.plan, prepared.table)
    return found, GraphView.of(prepared.model).shapes


def zero_point_of(model: onnx.ModelProto, tensor: str) -> Array:
    weight = maker(model, maker(model, tensor).input[1])
    return numpy_helper.to_array(initializer(model, weight.input[2]))


@pytest.mark.parametrize(
    ("prepared", "expected"),
    [
        pytest.param(network(512, 64), True, id="512 products of one place"),
        pytest.param(network(508, 64), False, id="fewer"),
        pytest.param(network(128, 64, 3), True, id="1152 products of a window"),
        pytest.param(network(64, 64, 3), False, id="576 products of a window"),
        pytest.param(network(512, 48), False, id="few outputs"),
        pytest.param(network(512, 88), False, id="outputs that are no multiple of 16"),
        pytest.param(network(512, 64, size=4), True, id="16 places"),
        pytest.param(network(512, 64, size=3), False, id="9 places"),
    ],
)
def test_which_convolutions_are_written_for_matrix_units(prepared: Case, expected: bool) -> None:
    model, shapes = lowered(prepared)
    before = copy_model(model)
    use_matrix_units(model, shapes)
    onnx.checker.check_model(model, full_check=True)
    assert set(zero_point_of(model, "y").tolist()) == {-1 if expected else 0}
    if not expected:
        assert model == before
    for kernels in (True, False):  # what is not written for vectors has the same sums
        said = outputs(before, prepared.feeds, integer_kernels=kernels)["logits"]
        found = outputs(model, prepared.feeds, integer_kernels=kernels)["logits"]
        np.testing.assert_allclose(found, said, rtol=0, atol=float(np.abs(said).max()) * 2e-2)


def test_codes_are_one_less_and_stand_for_the_same_weights() -> None:
    model, shapes = lowered(network(512, 64))
    before = copy_model(model)
    use_matrix_units(model, shapes)
    codes = [
        numpy_helper.to_array(initializer(m, maker(m, maker(m, "y").input[1]).input[0]))
        for m in (before, model)
    ]
    assert codes[0].dtype == codes[1].dtype == np.int8
    np.testing.assert_array_equal(codes[1].astype(np.int32), codes[0].astype(np.int32) - 1)
    names = {tensor.name for tensor in model.graph.initializer}
    assert len(names) == len(before.graph.initializer)  # the old ones are gone


def test_a_weight_that_has_the_least_code_stays() -> None:
    model, shapes = lowered(network(512, 64))
    weight = initializer(model, maker(model, maker(model, "y").input[1]).input[0])
    codes = numpy_helper.to_array(weight).copy()
    codes[0, 0, 0, 0] = -128
    weight.CopyFrom(numpy_helper.from_array(codes, weight.name))
    before = copy_model(model)
    use_matrix_units(model, shapes)
    assert model == before


def test_a_weight_of_two_convolutions_is_written_once() -> None:
    model, shapes = lowered(network(512, 64, twice=True))
    before = op_counts(model)
    use_matrix_units(model, shapes)
    onnx.checker.check_model(model, full_check=True)
    assert op_counts(model) == before
    for tensor in ("y", "z"):
        assert set(zero_point_of(model, tensor).tolist()) == {-1}


def test_shapes_that_are_not_known_keep_nothing_back() -> None:
    model, _ = lowered(network(512, 64))
    use_matrix_units(model, {})
    assert set(zero_point_of(model, "y").tolist()) == {-1}


@pytest.mark.parametrize("units", [True, False])
def test_the_backend_writes_for_the_cpu_it_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr(WHERE, lambda: units)
    prepared = network(512, 64)
    backend = OnnxruntimeBackend("deploy")
    assert backend.settings == ({"matrix_units": True} if units else {})
    assert OnnxruntimeBackend("emulate").settings == {}
    info = backend.build(Candidate(prepared.model, prepared.plan, prepared.table), tmp_path)
    assert info.path is not None
    assert set(zero_point_of(onnx.load(info.path), "y").tolist()) == {-1 if units else 0}
    assert set(info.precisions.values()) == {"int8"}
    assert op_counts(optimized_graph(info.path))["QLinearConv"] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile amx_int8 flush_l1d\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512_vnni\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm amx_int8\n", False),
        ("", False),
        (None, False),
    ],
)
def test_a_cpu_with_matrix_units(tmp_path: Path, text: str | None, expected: bool) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    assert has_matrix_units(file) is expected
